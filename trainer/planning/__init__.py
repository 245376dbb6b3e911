"""Predictions: bytes, seconds and candidates for a placement, by formula."""
