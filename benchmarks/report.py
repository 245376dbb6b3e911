"""What a benchmark found and under which conditions: a table to read, JSON to keep."""

import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pipelines.formats import format_table

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
