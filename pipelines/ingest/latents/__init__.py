"""Encode the images of a dataset once, so that training reads latents."""
