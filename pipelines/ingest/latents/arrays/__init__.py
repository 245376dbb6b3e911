"""Take in latents that another program computed, one .npy file for each image."""
