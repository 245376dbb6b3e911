"""Decoding with NVIDIA DALI: images and latents to bands, on a GPU or the processor."""
