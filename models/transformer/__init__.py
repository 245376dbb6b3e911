"""The network: a transformer whose weights, but not attention, are separate for each scale."""
