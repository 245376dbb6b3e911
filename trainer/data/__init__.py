"""The images of a run: found, checked, and loaded as its configuration says."""
