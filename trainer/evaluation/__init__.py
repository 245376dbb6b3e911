"""Figures of samples, at the end of a run and for any checkpoint later."""
