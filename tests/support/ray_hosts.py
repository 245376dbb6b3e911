"""A Ray cluster whose nodes are hosts of a lab, and which starts again what ends."""

from __future__ import annotations

import os
import re
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from shlex import join

from tests.support.hosts import Host, Lab

NODE = " --block "
"""A part of the title of the command that runs a node, but for the head's, which does not stay."""
RAYLET = "/raylet/raylet "
DASHBOARD = "/dashboard/dashboard.py"
WORKER = "RayTrainWorker"
"""Likewise of a node's own process, of the head's dashboard, and of a rank."""

_PORT = 6379
_OBJECT_STORE_BYTES = 100 * 2**20
_PATIENCE_S = 540
_RAY = str(Path(sys.executable).with_name("ray"))


def ray_environment() -> dict[str, str]:
    """What a lab's environment needs so that Ray runs on its hosts, with a token."""
    return {
        # `python` means this one.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
    }


class RayHosts:
    """The cluster.

    A node, but for the head's, is started by its host as a service is: each time that it ends it
    begins anew. At first the head is up, and the others come: a driver may start meanwhile.

    Args:
        lab: What the hosts belong to; has `ray_environment`.
        cpus: How many CPUs each host's node has, by the host's name; the head first.
        logs: A folder of this machine for what the nodes print.

    Attributes:
        head: The host with the head node and the dashboard.
        others: The other hosts.
        address: For `cluster.address`.
    """

    def __init__(self, lab: Lab, *, cpus: Mapping[str, int], logs: Path) -> None:
        self._cpus = dict(cpus)
        self._logs = logs
        self._begun_at: dict[str, int] = {}
        self.head, *self.others = (lab.add(name) for name in cpus)
        self.address = f"{self.head.address}:{_PORT}"
        token = secrets.token_hex(32)
        for host in self.hosts:
            (place := host.disk / "tmp/home/.ray").mkdir(mode=0o700)
            (place / "auth_token").write_text(token)
            self.begin(host)
            if host is self.head:
                self.wait_until_up(host)

    @property
    def hosts(self) -> list[Host]:
        """All hosts, the head first."""
        return [self.head, *self.others]

    def begin(self, host: Host) -> None:
        """Have a host that has just been switched on run its node, from now on."""
        words = (
            *(_RAY, "start", "--disable-usage-stats", "--node-ip-address", host.address),
            *("--num-cpus", str(self._cpus[host.name])),
            *("--object-store-memory", str(_OBJECT_STORE_BYTES)),
            # Processes for nothing: it shows workers' output to drivers, and ours take theirs
            # another way; the head's monitor would add nodes where none can be had.
            *("--include-log-monitor", "false"),
        )
        if host is self.head:
            # Without --block, with which the head would end as soon as its dashboard does.
            role = ("--head", "--no-monitor", "--port", str(_PORT), "--dashboard-host", "127.0.0.1")
            service = f"{join((*words, *role))}; sleep infinity\n"
        else:
            role = (NODE.strip(), "--address", self.address)
            service = f"while :; do {join((*words, *role))}; sleep 1; done\n"
        (host.disk / "tmp/node.sh").write_text(service)
        self._note_start(host)
        host.start("sh", "/tmp/node.sh", log=self.log(host))

    def expect_restart(self, host: Host) -> None:
        """Have `wait_until_up` wait for the next start of a host's node."""
        self._note_start(host)

    def wait_until_up(self, host: Host) -> None:
        """Wait until a host's node, begun anew or expected to be, is a part of the cluster."""
        deadline = time.monotonic() + _PATIENCE_S
        while "Ray runtime started" not in (said := self._said(host)):
            if time.monotonic() > deadline:
                raise RuntimeError(f"The node of {host.name} did not start:\n{said[-3000:]}")
            time.sleep(0.1)

    def drain(self, host: Host, *, deadline_s: int) -> None:
        """Tell the cluster that a host will be taken away; it goes on, and the caller takes it."""
        found = re.search(r"--node_id=(\w+)", " ".join(host.processes(RAYLET)[0].cmdline()))
        assert found
        done = self.head.run(
            *(_RAY, "drain-node", "--address", self.address, "--node-id", found[1]),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the lab wants it"),
            *("--deadline-remaining-seconds", str(deadline_s)),
        )
        if done.returncode:
            raise RuntimeError(f"`ray drain-node` failed:\n{done.stdout}{done.stderr}")

    def log(self, host: Host) -> Path:
        """What a host's node has printed."""
        return self._logs / f"{host.name}.log"

    def _note_start(self, host: Host) -> None:
        log = self.log(host)
        log.touch()
        self._begun_at[host.name] = log.stat().st_size

    def _said(self, host: Host) -> str:
        return self.log(host).read_bytes()[self._begun_at[host.name] :].decode(errors="replace")
