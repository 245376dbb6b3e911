"""Flow matching over the scales of a pyramid: what to train and how to sample."""
