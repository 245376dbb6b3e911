"""Checkpoints: whole or not there at all, checked when read, restored on any number of ranks."""
