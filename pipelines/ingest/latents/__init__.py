"""The command `python -m pipelines.ingest.latents`; what it does lies in the folder above."""
