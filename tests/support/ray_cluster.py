"""A real Ray cluster of one node, started by the `ray` command as an operator would."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from socket import create_server

START_TIMEOUT_S = 120
HOST = "127.0.0.2"
"""A loopback address that Ray, unlike 127.0.0.1, does not replace by the host's own."""


@dataclass(frozen=True, kw_only=True)
class RayCluster:
    """A running cluster.

    Attributes:
        address: For `ray.init` and `ClusterConfig.address`.
        dashboard: For `ray job submit --address`.
        environment: What a process needs to speak to it.
    """

    address: str
    dashboard: str
    environment: dict[str, str]

    def job(self, *arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Runs `ray job <arguments>` against the cluster and returns what it printed."""
        return subprocess.run(
            [_ray(), "job", arguments[0], "--address", self.dashboard, *arguments[1:]],
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


@contextmanager
def ray_cluster(*, cpus: int = 2) -> Iterator[RayCluster]:
    """Starts a head node with `cpus` CPUs and a dashboard, and ends it after the block."""
    scratch = Path(tempfile.mkdtemp(prefix="ray-"))
    port, dashboard_port = _free_port(), _free_port()
    environment = {
        # `ray job submit -- python …` means this Python.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Time for a last checkpoint between the SIGTERM and the SIGKILL of `ray job stop`.
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
    }
    with (scratch / "head.log").open("w") as log:
        head = subprocess.Popen(
            [
                *(_ray(), "start", "--head", "--block", "--disable-usage-stats"),
                *("--node-ip-address", HOST, "--port", str(port), "--num-cpus", str(cpus)),
                *("--include-dashboard", "true", "--dashboard-host", HOST),
                *("--dashboard-port", str(dashboard_port), "--temp-dir", str(scratch / "ray")),
                *("--object-store-memory", str(200 * 2**20)),
            ],
            env=os.environ | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_up(head, scratch / "head.log")
        yield RayCluster(
            address=f"{HOST}:{port}",
            dashboard=f"http://{HOST}:{dashboard_port}",
            environment=environment,
        )
    finally:
        _end(head)
        shutil.rmtree(scratch, ignore_errors=True)


def _ray() -> str:
    return str(Path(sys.executable).with_name("ray"))


def _free_port() -> int:
    with create_server((HOST, 0)) as server:
        port: int = server.getsockname()[1]
    return port


def _wait_until_up(head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while "Ray runtime started" not in log.read_text():
        if head.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"`ray start` failed:\n{log.read_text()}")
        time.sleep(0.2)


def _end(head: subprocess.Popen[bytes]) -> None:
    """Ends the node, whose processes all belong to the session that the command leads."""
    head.send_signal(signal.SIGTERM)
    try:
        head.wait(timeout=3)
    except subprocess.TimeoutExpired:
        head.kill()
        head.wait()
    for process in _session(head.pid):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _session(leader: int) -> list[int]:
    listing = subprocess.run(
        ["ps", "-s", str(leader), "-o", "pid="], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in listing.stdout.split()]
