"""All that waits for a GPU, one after the other, into one JSON file: `make bench-gpu`."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import command
from pipelines.command import CommandParser
from pipelines.formats import format_table

_DESCRIPTION = """\
Runs the tests of tests/gpu, and then each benchmark that a GPU is needed for, as processes of their
own. What fails or runs out of time is told and kept, and the next one begins. The file is written
anew after each part, so that it holds what was measured however this ends. Without a CUDA device it
says so and exits with 1.

  python -m benchmarks.gpu --output gpu.json
  python -m benchmarks.gpu --only training,update --minutes 10 --output gpu.json"""

_KEPT_CHARACTERS = 4000
_XL = ("--size", "XL/2", "--depth", "28")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One process.

    Attributes:
        name: What it is called in the file.
        words: What Python runs, without the interpreter.
        limit_s: How long it may take.
        has_rows: Whether it takes `--output`, as benchmarks do.
    """

    name: str
    words: tuple[str, ...]
    limit_s: float
    has_rows: bool = True


def _benchmark(name: str, *words: str, limit_s: float) -> Part:
    module, *sub = words
    words = ("-m", f"benchmarks.{module}", *sub, "--device", "cuda")
    return Part(name=name, words=words, limit_s=limit_s)


_LOOP = ("training_loop", *_XL, "--batch", "96", "--precision", "bf16", "--updates", "5")
PARTS: tuple[Part, ...] = (
    Part(name="tests", words=("-m", "pytest", "-q", "tests/gpu"), limit_s=270, has_rows=False),
    # The share of the peak, with the product's own loop; of three scales nothing fits beside it.
    _benchmark("training", *_LOOP, "--against", "none", "--rounds", "3", limit_s=120),
    _benchmark(
        *("training compiled", *_LOOP, "--against", "none", "--rounds", "3"),
        *("--compile", "blocks"),
        limit_s=210,
    ),
    _benchmark(
        *("loop", *_LOOP, "--against", "bare", "--rounds", "3", "--scales", "1,2"), limit_s=120
    ),
    # Few images, where kernels set the pace.
    _benchmark(
        *("few images", "training_loop", *_XL, "--batch", "12", "--precision", "bf16"),
        *("--against", "none", "--rounds", "3", "--compile", "blocks"),
        limit_s=150,
    ),
    _benchmark(
        *("kernels", "gpu_training", "--scales", "2", "--compile", "off", "--rounds", "5"),
        limit_s=90,
    ),
    # One update of XL/2 by ZeRO stage, which the log has of before.
    _benchmark(
        *("update", "experts", "step", "--model", "xl_2", "--ranks", "1", "--images", "6"),
        *("--stages", "0,1,2", "--rounds", "3"),
        limit_s=150,
    ),
    # 20 guided steps of Heun are 80 evaluations; with 16 images kernels set the pace.
    _benchmark(
        *("sampling", "sampling", *_XL, "--scales", "2", "--steps", "20", "--guidance", "1.5"),
        *("--batches", "16,128", "--finest-batch", "128", "--share-coarse", "8"),
        *("--ways", "bf16,bf16 graphs,tf32", "--rounds", "1"),
        limit_s=150,
    ),
    _benchmark(
        *("whole job", "whole_job", *_XL, "--batch", "96", "--precision", "bf16", "--rounds", "3"),
        limit_s=150,
    ),
    _benchmark(
        *("waiting", "data", "waiting", "--data", "digits", "--depth", "4", "--batch", "128"),
        *("--precision", "bf16"),
        limit_s=90,
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts."""
    parser = CommandParser(
        prog="python -m benchmarks.gpu",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--minutes", type=float, default=25.0, help="for all parts; default 25")
    parser.add_argument("--only", help=f"some of: {', '.join(part.name for part in PARTS)}")
    options = parser.parse_args(arguments)
    chosen = _chosen(parser, options.only)
    if not torch.cuda.is_available():
        sys.exit(
            f"error: nothing was measured: torch {torch.__version__} finds no CUDA device here; "
            "run make bench-gpu where there is one"
        )
    found = run_parts(chosen, output=options.output, budget_s=60 * options.minutes)
    rows = [[each["part"], each["end"], f"{each['seconds']:.0f} s"] for each in found]
    print(format_table([["part", "end", "time"], *rows]))
    return 0 if all(each["end"] == "done" for each in found) else 1


def _chosen(parser: argparse.ArgumentParser, only: str | None) -> list[Part]:
    names = [part.name for part in PARTS] if only is None else only.split(",")
    by_name = {part.name: part for part in PARTS}
    if unknown := [name for name in names if name not in by_name]:
        parser.error(f"--only {unknown[0]} is no part; there are {', '.join(by_name)}")
    return [by_name[name] for name in names]


def run_parts(parts: Sequence[Part], *, output: Path, budget_s: float) -> list[dict[str, Any]]:
    """Run processes one after the other, and keep what they found.

    Args:
        parts: The processes.
        output: JSON file, written anew after each.
        budget_s: For all of them; those that are left when it is spent are not begun.

    Returns:
        For each part how it ended, its time, the end of its output, and the report it wrote.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    began, found = time.monotonic(), list[dict[str, Any]]()
    on_gpu = torch.cuda.is_available()
    conditions = {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
    }
    for part in parts:
        left_s = began + budget_s - time.monotonic()
        print(f"{part.name}: {' '.join(part.words)}", flush=True)
        found.append(_run(part, limit_s=min(part.limit_s, left_s)))
        output.write_text(json.dumps({"conditions": conditions, "parts": found}, indent=1) + "\n")
    return found


def _run(part: Part, *, limit_s: float) -> dict[str, Any]:
    told: dict[str, Any] = {"part": part.name, **asdict(part), "seconds": 0.0, "report": None}
    if limit_s <= 0:
        return told | {"end": "not begun: the time was spent", "output": ""}
    with tempfile.TemporaryDirectory(prefix="lapflow-") as folder:
        report, log = Path(folder) / "report.json", Path(folder) / "output.txt"
        words = [sys.executable, *part.words]
        words += ["--output", str(report)] if part.has_rows else []
        began = time.monotonic()
        with log.open("wb") as writing:
            process = subprocess.Popen(
                words, stdout=writing, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(timeout=limit_s)
                end = "done" if code == 0 else f"exit code {code}"
            except subprocess.TimeoutExpired:
                end = f"ended after {limit_s:.0f} s"
            finally:
                _end_group(process)
        told["seconds"] = time.monotonic() - began
        if report.exists():
            told["report"] = json.loads(report.read_text())
        text = log.read_text(errors="replace")
    print(text[-_KEPT_CHARACTERS:], flush=True)
    return told | {"end": end, "output": text[-_KEPT_CHARACTERS:]}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and whatever it started, which may outlive it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(command.run_guarded(main))
