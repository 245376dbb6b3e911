"""Training: from a composed configuration to a trained, evaluated and resumable run."""
