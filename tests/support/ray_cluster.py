"""A real Ray cluster of one or more nodes, started by the `ray` command as an operator would.

All nodes are on this machine, each at a loopback address of its own.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support.ports import free_port

START_TIMEOUT_S = 540
HOST = "127.0.0.2"
"""A loopback address that Ray, unlike 127.0.0.1, does not replace by the host's own."""


@dataclass(frozen=True, kw_only=True)
class RayCluster:
    """A running cluster.

    Attributes:
        address: For `ray.init` and `ClusterConfig.address`.
        dashboard: For `ray job submit --address`.
        environment: What a process needs to speak to it.
        logs: Where its nodes, each of which is on this machine, keep their logs.
        nodes: The command that runs each node, by the node's address; the head node first.
        add: Starts a node, given its address and its CPUs.
    """

    address: str
    dashboard: str
    environment: dict[str, str]
    logs: Path
    nodes: dict[str, subprocess.Popen[bytes]]
    add: Callable[[str, int], None]

    def job(self, *arguments: str, timeout_s: float = 540) -> subprocess.CompletedProcess[str]:
        """Runs `ray job <arguments>` against the cluster and returns what it printed."""
        return subprocess.run(
            [_ray(), "job", arguments[0], "--address", self.dashboard, *arguments[1:]],
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def drain(self, node: str, within_s: int) -> None:
        """Announces that the node at that address will be taken away."""
        subprocess.run(
            [
                *(_ray(), "drain-node", "--address", self.address, "--node-id", self.node_id(node)),
                *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"),
                *("--deadline-remaining-seconds", str(within_s)),
            ],
            env=os.environ | self.environment,
            check=True,
        )

    def node_id(self, node: str) -> str:
        """Ray's name of the live node at that address, asked by a process of this run's."""
        import ray

        return next(
            one["NodeID"]
            for one in ray.nodes()
            if one["Alive"] and one["NodeManagerAddress"] == node
        )

    def lose(self, node: str) -> None:
        """Kills all processes of the node at that address at once, as a power cut would."""
        _kill(self.nodes[node].pid)


@contextmanager
def ray_cluster(
    *,
    cpus: int = 2,
    more_cpus: Sequence[int] = (),
    dashboard: bool = True,
    token: bool = False,
    stop_wait_s: int = 30,
) -> Iterator[RayCluster]:
    """Starts a cluster and ends it after the block.

    Args:
        cpus: CPUs of the head node.
        more_cpus: CPUs of each further node.
        dashboard: Whether the head node has one, which is what takes jobs.
        token: Whether it asks for one.
        stop_wait_s: What a job gets to end once it is asked to, unless it says otherwise.
    """
    scratch = Path(tempfile.mkdtemp(prefix="ray-"))
    port, dashboard_port = free_port(HOST), free_port(HOST)
    environment = {
        # `ray job submit -- python …` means this Python.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        # Time for a last checkpoint between the SIGTERM and the SIGKILL of `ray job stop`.
        "RAY_JOB_STOP_WAIT_TIME_S": str(stop_wait_s),
    }
    if token:
        (scratch / "token").write_text(secrets.token_hex(32))
        environment |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(scratch / "token"),
        }
    head = (
        *("--head", "--port", str(port), "--include-dashboard", str(dashboard).lower()),
        *("--dashboard-host", HOST, "--dashboard-port", str(dashboard_port)),
        # What would add nodes, where none can be had, is a process for nothing.
        *("--temp-dir", str(scratch / "ray"), "--no-monitor"),
    )
    hosts = [HOST] + [f"127.0.0.{3 + index}" for index in range(len(more_cpus))]
    nodes: dict[str, subprocess.Popen[bytes]] = {}
    with ExitStack() as at_last:
        at_last.callback(shutil.rmtree, scratch, ignore_errors=True)

        def add(host: str, cpus: int) -> None:
            role = ("--address", f"{HOST}:{port}") if nodes else head
            log = scratch / f"{host}.log"
            nodes[host] = _start(
                (
                    *(*role, "--node-ip-address", host, "--num-cpus", str(cpus)),
                    # Without it every cluster of this machine wants the same one.
                    *("--dashboard-agent-listen-port", str(free_port(HOST))),
                ),
                environment=environment,
                log=log,
            )
            at_last.callback(_end, nodes[host])
            # One by one: nodes that start on one machine at once take each other's names.
            _wait_until_up(nodes[host], log)

        for host, count in zip(hosts, (cpus, *more_cpus), strict=True):
            add(host, count)
        yield RayCluster(
            address=f"{HOST}:{port}",
            dashboard=f"http://{HOST}:{dashboard_port}",
            environment=environment,
            logs=(scratch / "ray/session_latest").resolve() / "logs",
            nodes=nodes,
            add=add,
        )


def _start(
    arguments: tuple[str, ...], *, environment: dict[str, str], log: Path
) -> subprocess.Popen[bytes]:
    with log.open("w") as output:
        return subprocess.Popen(
            [
                *(_ray(), "start", "--block", "--disable-usage-stats", *arguments),
                *("--object-store-memory", str(200 * 2**20)),
                # It shows workers' output to drivers, and ours take theirs another way.
                *("--include-log-monitor", "false"),
            ],
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _ray() -> str:
    return str(Path(sys.executable).with_name("ray"))


def _wait_until_up(node: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while "Ray runtime started" not in log.read_text():
        if node.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"`ray start` failed:\n{log.read_text()}")
        time.sleep(0.2)


def _end(node: subprocess.Popen[bytes]) -> None:
    node.send_signal(signal.SIGTERM)
    try:
        node.wait(timeout=3)
    except subprocess.TimeoutExpired:
        node.kill()
        node.wait()
    _kill(node.pid)


def _kill(leader: int) -> None:
    """Kills a node, whose processes all belong to the session that the command leads."""
    for process in _session(leader):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _session(leader: int) -> list[int]:
    listing = subprocess.run(
        ["ps", "-s", str(leader), "-o", "pid="], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in listing.stdout.split()]
