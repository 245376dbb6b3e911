"""Benchmarks of many ranks: what they tell each other, and how evenly they are busy."""
