"""The job's configuration: composed, read, checked, and told to people."""
