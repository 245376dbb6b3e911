"""A real MLflow server over HTTP on a loopback port, which can be stopped and started again."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.support.job import ROOT
from tests.support.ports import free_port


class MlflowServer:
    """One server process over a SQLite file.

    Args:
        folder: Where the database and artifacts are.
        database: What its database begins as.
    """

    def __init__(self, folder: Path, database: Path) -> None:
        self._folder = folder
        shutil.copy(database, folder / "server.db")
        self._port = free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: psutil.Process | None = None

    def start(self, timeout_s: float = 540.0) -> None:
        """Start it and wait until it answers."""
        words = [
            *("--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{self._folder / 'server.db'}"),
            *("--artifacts-destination", str(self._folder / "artifacts")),
        ]
        log = self._folder / "server.log"
        self._process = psutil.Process(_ask({"words": words, "log": str(log)}))
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self._process.status() != psutil.STATUS_ZOMBIE:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError(log.read_text()[-2000:])

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """Have the system refuse whatever it writes to files, for the length of a `with` block."""
        assert self._process is not None
        usual = self._process.rlimit(psutil.RLIMIT_FSIZE)
        self._process.rlimit(psutil.RLIMIT_FSIZE, (0, usual[1]))
        try:
            yield
        finally:
            self._process.rlimit(psutil.RLIMIT_FSIZE, usual)

    def kill(self) -> None:
        """End it without notice."""
        if self._process is not None:
            _ask({"kill": self._process.pid})
            self._process = None


@functools.cache
def _parent() -> subprocess.Popen[str]:
    """What servers are forks of; it ends with this process."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.mlflow_forks"],
        cwd=ROOT,
        # Its jobs, which judge language models, are five more processes.
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _ask(request: Mapping[str, object]) -> int:
    parent = _parent()
    assert parent.stdin is not None
    assert parent.stdout is not None
    print(json.dumps(request), file=parent.stdin, flush=True)
    answer = parent.stdout.readline()
    if not answer:
        raise RuntimeError(f"what MLflow servers are forks of ended with {parent.wait()}")
    return int(answer)


@contextmanager
def mlflow_server(folder: Path, database: Path) -> Iterator[MlflowServer]:
    """Run a server, on a copy of the database, for the length of a `with` block."""
    server = MlflowServer(folder, database)
    server.start()
    try:
        yield server
    finally:
        server.kill()
