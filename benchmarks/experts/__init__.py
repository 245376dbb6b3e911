"""Benchmarks of expert shards: what ranks hold and send, and what a step takes."""
