"""Decoders: batches of stored samples in, Laplacian bands on the device out."""
