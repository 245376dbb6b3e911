"""A run: from its configuration to a trained and evaluated model."""
