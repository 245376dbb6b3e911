"""`python -m cluster.manifests`: files that have Kubernetes, Slurm or AWS run a job."""
