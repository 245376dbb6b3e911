"""Commands that measure speed and memory: `python -m benchmarks.NAME --help`.

Each prints a table and, with `--output FILE`, writes what it measured and under which conditions as
JSON. Candidates take turns and are compared by their minima, so that other work on the machine
disturbs them alike; compare numbers of one run only.
"""

from pipelines.interruption import end_quietly_when_interrupted

end_quietly_when_interrupted()
