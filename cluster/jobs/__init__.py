"""`python -m cluster.jobs`: jobs of a Ray cluster, sent, followed and stopped."""
