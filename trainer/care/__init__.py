"""Looking after the checkpoints of a run: what is kept, and whether it is whole."""
