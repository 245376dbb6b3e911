"""Attacks and faults by chance, counted: `make fuzz SECONDS=…`, `python -m tests.fuzz --help`."""
