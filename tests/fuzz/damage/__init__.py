"""Damage to what a finished run leaves."""
