"""How the source is built, counted: `make house`, `python -m tests.house --help`."""
