"""From samples of a dataset to batches, with a cursor to go on from."""
