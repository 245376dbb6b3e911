"""Evaluation: features, Fréchet distance, label agreement, and the report that joins them."""
