"""The object store of runs: a local folder or S3."""
