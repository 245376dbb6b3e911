"""Encode the images of a dataset once, or take in latents, so that training reads latents."""
