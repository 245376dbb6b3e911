"""The command `python -m tests.house`."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from pipelines.console import say, say_error
from tests.house.import_graph import Cycle
from tests.house.measures import (
    MAX_FILE_LINES,
    MAX_FUNCTION_LINES,
    MIN_LINES_FOR_ONE_IMPORTER,
    Measures,
    measure,
)

_DESCRIPTION = """\
Count how the packages trainer, models, pipelines and cluster are built, by reading their files.

  python -m tests.house
  python -m tests.house --against main~100      a column of what it was
  python -m tests.house --json

An import is a pair of files, whatever stands between them. Imports within functions are imports;
those under TYPE_CHECKING make no cycle and no floor. A package is a folder without those below it,
and without commands: users run those with -m, and nothing imports them.

exit codes: 0 counted, 2 the arguments cannot be used"""

_ROOT = Path(__file__).resolve().parents[2]
_LABELS = {
    "files": "files",
    "files_with_code": "  without empty __init__",
    "lines": "lines",
    "import_lines_percent": "  of import statements, %",
    "imports": "imports between files",
    "imports_called": "  within functions only",
    "imports_typing": "  under TYPE_CHECKING only",
    "without_importer": "files without importer",
    "single_importer": "files with one importer",
    "slivers": f"slivers: those under {MIN_LINES_FOR_ONE_IMPORTER} lines",
    "loose_files": "loose files in trainer/",
    "room_floors": "floors of rooms in trainer/",
    "file_floors": "floors of files in trainer/",
    "file_cycles": "import cycles between files",
    "package_cycles": "import cycles between packages",
    "long_files": f"files over {MAX_FILE_LINES} lines",
    "long_functions": f"functions over {MAX_FUNCTION_LINES} lines",
}
_NAMED = (
    "file_cycles",
    "package_cycles",
    "slivers",
    "without_importer",
    "long_files",
    "long_functions",
)


def main(arguments: Sequence[str] | None = None, *, root: Path = _ROOT) -> int:
    """Run the command for the repository in `root` and return its exit code."""
    options = _parser().parse_args(arguments)
    states = {"now": measure(root)}
    if options.against is not None:
        try:
            states = {"before": _measure_revision(root, options.against), **states}
        except subprocess.CalledProcessError as error:
            say_error(f"--against {options.against}: {error.stderr.decode().strip()}")
            return 2
    if options.json:
        say(json.dumps({name: asdict(each) for name, each in states.items()}, indent=2))
    else:
        say("\n".join((*_table(states), *_names(states["now"]))))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.house",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--against", metavar="REV", help="count this revision of git too")
    parser.add_argument("--json", action="store_true", help="write figures and names as JSON")
    return parser


def _measure_revision(root: Path, revision: str) -> Measures:
    archive = subprocess.run(
        ["git", "archive", "--format=tar", revision], cwd=root, capture_output=True, check=True
    ).stdout
    with tempfile.TemporaryDirectory(prefix="lapflow-house-") as name:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(name, filter="data")
        return measure(Path(name))


def _table(states: dict[str, Measures]) -> Iterator[str]:
    if len(states) > 1:
        yield _row("", list(states))
    for name, label in _LABELS.items():
        yield _row(label, [_figure(getattr(each, name)) for each in states.values()])


def _row(label: str, cells: list[str]) -> str:
    return f"{label:34}" + "".join(f"{each:>10}" for each in cells)


def _figure(value: float | tuple[object, ...]) -> str:
    return f"{len(value) if isinstance(value, tuple) else value:,}"


def _names(measures: Measures) -> Iterator[str]:
    for name in _NAMED:
        found: tuple[str | Cycle, ...] = getattr(measures, name)
        if found:
            yield f"\n{_LABELS[name].strip()}:"
        for each in found:
            yield from _way_round(each) if isinstance(each, Cycle) else [f"  {each}"]


def _way_round(cycle: Cycle) -> Iterator[str]:
    yield f"  {' '.join(cycle.members)}"
    for step in cycle.steps:
        line = f"    {step.importer} → {step.imported}"
        first, *more = step.imports
        if first != (step.importer, step.imported):  # between files the step is the import
            line += f": {f'{len(more) + 1}, such as ' if more else ''}{' → '.join(first)}"
        yield line


if __name__ == "__main__":
    sys.exit(main())
