"""Attacks and faults by chance, counted: `make fuzz SECONDS=…`, `python -m tests.fuzz --help`."""

from pipelines.interruption import end_quietly_when_interrupted

end_quietly_when_interrupted()
