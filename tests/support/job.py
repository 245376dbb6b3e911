"""Whole jobs as a user starts them: a process, its output, its signals, what it leaves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
from torch import Tensor

from trainer.checkpoint.content import load_weights
from trainer.checkpoint.reader import CheckpointReader
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig

ROOT = Path(__file__).resolve().parents[2]

# The whole chain at the smallest size at which every part still has something to do.
SMALL = (
    "+exp=digits",
    "model.depth=2",
    "model.width=32",
    "train.global_batch=64",
    "train.total_images=6400",
    "checkpoint.interval_images=1280",
    "checkpoint.keep_last=100",
    "runtime.log_interval_images=640",
    "eval.samples=100",
    # More blocks than ranks, and the last one is not full.
    "eval.batch=40",
    "eval.sampler.steps=2",
    "eval.grid_interval_images=3200",
    "cluster.address=local",
)


class Job:
    """One `python -m trainer.launch` in a process group of its own.

    Args:
        overrides: Its arguments.
        home: LAPFLOW_HOME, which also marks every process the job starts.
        environment: More variables.
        module: The module to run.

    Attributes:
        output: What it has written so far.
        lines: The same by line, each with the time of a monotonic clock when it came.
    """

    def __init__(
        self,
        *overrides: str,
        home: Path,
        environment: Mapping[str, str] | None = None,
        module: str = "trainer.launch",
    ) -> None:
        self._home = home
        self.output = ""
        self.lines: list[tuple[float, str]] = []
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", module, *overrides],
            cwd=ROOT,
            env={**os.environ, **(environment or {}), "LAPFLOW_HOME": str(home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Number of the launch's own process."""
        return self._process.pid

    def wait(self, timeout_s: float = 540.0) -> int:
        """Wait for the end and return the exit code."""
        code = self._process.wait(timeout_s)
        self._reader.join(540)
        return code

    def wait_for(self, pattern: str, timeout_s: float = 540.0) -> re.Match[str]:
        """Wait until the output matches a pattern."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if found := re.search(pattern, self.output):
                return found
            if self._process.poll() is not None and not self._reader.is_alive():
                break
            time.sleep(0.02)
        raise AssertionError(f"{pattern!r} did not appear in:\n{self.output}")

    def signal_group(self, number: int) -> None:
        """Send a signal to the whole foreground process group, as a terminal does."""
        os.killpg(self._process.pid, number)

    def signal(self, number: int) -> None:
        """Send a signal to the launch's own process alone."""
        os.kill(self._process.pid, number)

    def workers(self) -> list[psutil.Process]:
        """Find the job's training workers."""
        return [process for process in self.processes() if "RayTrainWorker" in _title(process)]

    def processes(self) -> list[psutil.Process]:
        """Find every process of the job, cluster included: all carry its LAPFLOW_HOME."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("LAPFLOW_HOME") == str(self._home):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def kill_everything(self) -> None:
        """End every process of the job with SIGKILL, at once."""
        for process in self.processes():
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        self._process.wait(30)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append((time.monotonic(), line))
            self.output += line


@contextmanager
def job(*overrides: str, home: Path, **options: object) -> Iterator[Job]:
    """Run a job and leave nothing of it behind."""
    started = Job(*overrides, home=home, **options)  # type: ignore[arg-type]
    try:
        yield started
    finally:
        started.kill_everything()


def final_state(store_uri: str, run: str, config: StoreConfig | None = None) -> dict[str, Tensor]:
    """Read weights, moments and EMA of a run's newest checkpoint, whole."""
    store = open_store(f"{store_uri}/runs", config or StoreConfig())
    manifest = CheckpointReader(store, run=run).newest_valid()
    assert manifest is not None
    state = {
        f"{kind}/{name}": tensor
        for kind in manifest.kinds
        for name, tensor in load_weights(store, manifest, kind).items()  # type: ignore[arg-type]
    }
    counters = {
        name: _number(value)
        for name, value in manifest.train_state.items()
        if name not in ("metrics", "unsent_points")
    }
    return state | counters


def _number(value: int) -> Tensor:
    import torch

    return torch.tensor(value)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""
