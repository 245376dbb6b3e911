"""What `python -m trainer.checkpoints` does: list, verify, export and prune."""
