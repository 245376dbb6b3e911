"""Weights that leave the project: files and folders that other programs load."""
