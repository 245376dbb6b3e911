"""Metrics: recorded on the device, reduced rarely, tracked without ever stopping training."""
