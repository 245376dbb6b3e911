"""A real MLflow server over HTTP on a loopback port, which can be stopped and started again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

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
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout_s: float = 540.0) -> None:
        """Start it and wait until it answers."""
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"),
                    *("--port", str(self._port), "--workers", "1"),
                    *("--backend-store-uri", f"sqlite:///{self._folder / 'server.db'}"),
                    *("--artifacts-destination", str(self._folder / "artifacts")),
                ],
                # Its jobs, which judge language models, are five more processes.
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError((self._folder / "server.log").read_text()[-2000:])

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """Have the system refuse whatever it writes to files, for the length of a `with` block."""
        assert self._process is not None
        first = psutil.Process(self._process.pid)
        everyone = [first, *first.children(recursive=True)]
        usual = [each.rlimit(psutil.RLIMIT_FSIZE) for each in everyone]
        for each in everyone:
            each.rlimit(psutil.RLIMIT_FSIZE, (0, usual[0][1]))
        try:
            yield
        finally:
            for each, limits in zip(everyone, usual, strict=True):
                each.rlimit(psutil.RLIMIT_FSIZE, limits)

    def kill(self) -> None:
        """End it without notice, workers included."""
        if self._process is not None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None


@contextmanager
def mlflow_server(folder: Path, database: Path) -> Iterator[MlflowServer]:
    """Run a server, on a copy of the database, for the length of a `with` block."""
    server = MlflowServer(folder, database)
    server.start()
    try:
        yield server
    finally:
        server.kill()
