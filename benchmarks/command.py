"""The command line that all benchmarks share."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.report import Cell, Report
from models.transformer.config import PRESETS, TransformerConfig, preset
from trainer.errors import is_user_error

_TINY = TransformerConfig(depth=2, width=64, heads=2)


def parser(name: str, *, description: str, rounds: int) -> argparse.ArgumentParser:
    """Make a parser with the options of every benchmark.

    Args:
        name: Module name of the benchmark.
        description: What it measures, for --help.
        rounds: Default number of measured rounds.
    """
    made = argparse.ArgumentParser(
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


def sizes(options: argparse.Namespace) -> TransformerConfig:
    """Return the sizes that the options of `add_size` choose."""
    chosen = _TINY if options.size == "tiny" else preset(options.size)
    return replace(chosen, depth=options.depth) if options.depth else chosen


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
    benchmarks: Mapping[str, Callable[[Sequence[str]], int]],
    usage: str,
    arguments: Sequence[str] | None,
) -> int:
    """Run the benchmark of a package that the first argument names.

    Args:
        benchmarks: Their main functions, by name.
        usage: What to print where none is named.
        arguments: Command line without the program's name; None takes the process's own.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in benchmarks:
        print(usage, end="")
        return 0 if given[:1] in (["-h"], ["--help"]) else 2
    return benchmarks[given[0]](given[1:])


def run_guarded(main: Callable[[], int]) -> int:
    """Run a benchmark from the terminal: sizes that do not fit are a message, not a traceback."""
    try:
        return main()
    except ValueError as error:
        if not is_user_error(error):
            raise
        print(f"error: {error}", file=sys.stderr)
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
