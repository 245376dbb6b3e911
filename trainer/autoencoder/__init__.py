"""The autoencoder of latent space: its settings, its files, and its loading with checks."""
