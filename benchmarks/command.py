"""What all benchmarks share: their command line, and what they found under which conditions."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from models.transformer.config import PRESETS, TransformerConfig, preset
from pipelines.command import CommandParser
from pipelines.console import say_error
from pipelines.formats import format_table
from trainer.errors import is_user_error

_TINY = TransformerConfig(depth=2, width=64, heads=2)


def parser(name: str, *, description: str, rounds: int) -> argparse.ArgumentParser:
    """Make a parser with the options of every benchmark.

    Args:
        name: Module name of the benchmark.
        description: What it measures, for --help.
        rounds: Default number of measured rounds.
    """
    made = CommandParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--rounds", type=positive, default=rounds, help=f"default {rounds}")
    made.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    made.add_argument("--threads", type=positive, help="torch threads; default torch's own choice")
    made.add_argument("--output", type=Path, help="JSON file to write")
    return made


def add_size(
    made: argparse.ArgumentParser, *, size: str, depth: int | None, batch: int | None
) -> None:
    """Add the options that choose a model and a batch.

    Args:
        made: The benchmark's parser.
        size: Default preset.
        depth: Default number of blocks; None is the preset's.
        batch: Default images in a batch; None leaves the option out.
    """
    made.add_argument(
        "--size",
        choices=["tiny", *PRESETS],
        default=size,
        metavar="SIZE",
        help=f"tiny, {', '.join(PRESETS)}; default {size}",
    )
    made.add_argument(
        "--depth", type=positive, default=depth, help="blocks, instead of the size's own number"
    )
    made.add_argument("--image-size", type=positive, default=32, help="of latents; default 32")
    made.add_argument("--channels", type=positive, default=4, help="of latents; default 4")
    if batch is not None:
        made.add_argument("--batch", type=positive, default=batch, help=f"default {batch}")


def add_processor_time(made: argparse.ArgumentParser) -> None:
    """Add the option for a busy machine."""
    made.add_argument(
        "--processor-time",
        action="store_true",
        help="count this process's computing instead of the clock's time; GPUs have their own",
    )


def sizes(options: argparse.Namespace) -> TransformerConfig:
    """Return the sizes that the options of `add_size` choose."""
    chosen = _TINY if options.size == "tiny" else preset(options.size)
    return replace(chosen, depth=options.depth) if options.depth else chosen


Cell = str | int | float | None
"""A value of the table; None stands for what does not apply."""


class Report:
    """Collects the rows of one benchmark; the conditions are taken when it is made and when read.

    Args:
        benchmark: Name of the benchmark.
        device: Where it runs.
        settings: What it was asked to do.
    """

    def __init__(
        self, benchmark: str, *, device: torch.device, settings: Mapping[str, Cell]
    ) -> None:
        self._benchmark = benchmark
        self._settings = dict(settings)
        self._rows: list[dict[str, Cell]] = []
        self._conditions: dict[str, Cell] = {
            "began": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": _device_name(device),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "load_before": os.getloadavg()[0],
        }

    def add(self, **row: Cell) -> None:
        """Add a row; columns appear in the order in which rows first name them."""
        self._rows.append(row)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values, with the load average of this moment."""
        conditions = {**self._conditions, "load_after": os.getloadavg()[0]}
        return {
            "benchmark": self._benchmark,
            "settings": self._settings,
            "conditions": conditions,
            "rows": self._rows,
        }

    def deliver(self, output: Path | None) -> str:
        """Render the table for a terminal, and write the JSON file if one is asked for.

        Args:
            output: File to write, or None.

        Raises:
            OSError: The file cannot be written.
        """
        found = self.as_dict()
        if output is not None:
            output.write_text(json.dumps(found, indent=1) + "\n")
        told = ", ".join(f"{name} {_text(value)}" for name, value in found["conditions"].items())
        asked = ", ".join(f"{name} {_text(value)}" for name, value in self._settings.items())
        return f"{self._benchmark}: {asked}\n{told}\n\n{self._table()}"

    def _table(self) -> str:
        columns = list(dict.fromkeys(name for row in self._rows for name in row))
        lines = [columns, *([_text(row.get(name)) for name in columns] for row in self._rows)]
        return format_table(lines)


def _text(value: Cell) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [
        line.partition(":")[2].strip()
        for line in _lines(Path("/proc/cpuinfo"))
        if line.startswith("model name")
    ]
    return (
        f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
    )


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a benchmark runs and where its report goes.

    Attributes:
        device: The device.
        report: Collects the rows.
        output: JSON file to write, or None.
    """

    device: torch.device
    report: Report
    output: Path | None

    def deliver(self) -> None:
        """Print the table and write the file."""
        print(self.report.deliver(self.output))


def setting(benchmark: str, options: argparse.Namespace) -> Setting:
    """Choose the device, set the threads, and begin the report.

    Exits with code 1 and a message when CUDA is asked for and there is none.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            f"error: nothing was measured: torch {torch.__version__} finds no CUDA device here, "
            "which --device cuda needs"
        )
    name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name if options.device == "auto" else options.device)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    asked: dict[str, Cell] = {
        name: value if isinstance(value, int | float) else str(value)
        for name, value in vars(options).items()
        if name not in ("device", "threads", "output") and value is not None
    }
    report = Report(benchmark, device=device, settings=asked)
    return Setting(device=device, report=report, output=options.output)


def dispatch(
    package: str, benchmarks: Sequence[ModuleType], arguments: Sequence[str] | None
) -> int:
    """Run the benchmark of a package that the first argument names.

    Args:
        package: Module that `python -m` runs.
        benchmarks: Modules with a function `main`; the first line of each says what it measures.
        arguments: Command line without the program's name; None takes the process's own.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    named = {module.__name__.rpartition(".")[2]: module for module in benchmarks}
    if given and given[0] in named:
        status: int = named[given[0]].main(given[1:])
        return status
    rows = [(f"  {name}", (module.__doc__ or "").split("\n")[0]) for name, module in named.items()]
    print(
        f"usage: python -m {package} NAME [options]\n\n{format_table(rows)}\n\nEach takes --help."
    )
    return 0 if given[:1] in (["-h"], ["--help"]) else 2


def run_guarded(main: Callable[[], int]) -> int:
    """Run a benchmark from the terminal: sizes that do not fit are a message, not a traceback."""
    try:
        return main()
    except ValueError as error:
        if not is_user_error(error):
            raise
        say_error(error)
        return 2


def positive(text: str) -> int:
    """Parse a whole number from 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def whole_numbers(text: str) -> Sequence[int]:
    """Parse a comma-separated list of whole numbers from 1, for argparse."""
    return tuple(positive(part) for part in text.split(","))
