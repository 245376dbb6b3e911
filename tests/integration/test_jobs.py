"""Commands that speak to a real cluster that asks for a token: `cluster.jobs` and others."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from tests.support.job import ROOT
from tests.support.metadata_service import metadata_service
from tests.support.ray_cluster import HOST, RayCluster, ray_cluster

pytestmark = pytest.mark.slow

# Ends late and tells by its code that it has saved, as a training job does; longer than Ray's own
# three seconds.
STOPS_LATE = """
import signal, sys, time
def stop(*_):
    time.sleep(5)
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("up", flush=True)
time.sleep(3600)
"""
IGNORES = STOPS_LATE.replace("time.sleep(5)", "time.sleep(3600)")
# A driver: it is told by its first signal, and ends by itself.
DRIVES = """
import os, signal, sys, time
from pathlib import Path
from cluster.contract import ClusterConfig
from cluster.ray_session import session

told = []
signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
with session(ClusterConfig(), print):
    Path(sys.argv[1]).write_text(f"{os.getpid()} {os.getppid()}")
    while not told:
        time.sleep(0.05)
Path(sys.argv[1]).write_text("ended")
"""


@dataclass(frozen=True)
class Ended:
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(cpus=1, token=True, stop_wait_s=3) as up:
        yield up


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a job gets a copy of."""
    for name, text in (("late", STOPS_LATE), ("ignores", IGNORES), ("drives", DRIVES)):
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def begin(
    cluster: RayCluster,
    *words: str,
    cwd: Path,
    program: Sequence[str] = ("-m", "cluster.jobs"),
    **variables: str,
) -> subprocess.Popen[str]:
    environment = os.environ | cluster.environment | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.Popen(
        [sys.executable, *program, *words],
        cwd=cwd,
        env={"RAY_API_SERVER_ADDRESS": cluster.dashboard} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate(timeout=540)
    return Ended(process.returncode, out, err)


def jobs(cluster: RayCluster, *words: str, cwd: Path, **variables: str) -> Ended:
    return end(begin(cluster, *words, cwd=cwd, **variables))


def wait_for(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.1)


def test_the_exit_code_is_that_of_the_command(cluster, folder):
    seven = begin(cluster, "submit", "--id", "seven", "--", "sh", "-c", "exit 7", cwd=folder)
    zero = jobs(cluster, "submit", "--id", "zero", "--", "echo", "a  b", cwd=folder)
    assert zero.code == 0, zero.err
    assert "a  b" in zero.out.splitlines()
    assert "job zero: succeeded" in zero.out
    assert end(seven).code == 7
    # From elsewhere, and when all is over.
    assert jobs(cluster, "logs", "seven", "--follow", cwd=folder).code == 7
    told = json.loads(jobs(cluster, "status", "seven", "--json", cwd=folder).out)
    assert (told["status"], told["driver_exit_code"]) == ("FAILED", 7)
    listed = jobs(cluster, "status", cwd=folder)
    assert {line.split()[0] for line in listed.out.splitlines()} >= {"seven", "zero"}

    again = jobs(cluster, "submit", "--id", "zero", "--", "true", cwd=folder)
    assert again.code == 2
    assert "zero already exists" in again.err
    assert jobs(cluster, "logs", "nobody", cwd=folder).code == 2


def test_who_has_no_token_is_told_so(cluster, folder):
    other = folder / "token"
    other.write_text("0" * 64)
    refused = jobs(cluster, "status", cwd=folder, RAY_AUTH_TOKEN_PATH=str(other))
    assert refused.code == 2
    assert "wants the token of its cluster" in refused.err
    assert "Traceback" not in refused.err


def test_settings_that_cannot_be_are_not_sent(cluster, folder):
    train = ("python", "-m", "trainer.launch", "+exp=digits", "train.total_images=-1")
    refused = jobs(cluster, "submit", "--id", "never", "--", *train, cwd=ROOT)
    assert refused.code == 2
    assert "error: train.total_images=-1" in refused.err
    assert jobs(cluster, "status", "never", cwd=folder).code == 2


def test_what_a_training_job_is_stands_beside_it(cluster, folder):
    train = ("python", "-m", "trainer.launch", "+exp=digits", "run=dry", f"home={folder}")
    sent = jobs(cluster, "submit", "--id", "dry", "--", *train, "dry_run=true", cwd=ROOT)
    assert sent.code == 0, sent.err
    told = json.loads(jobs(cluster, "status", "dry", "--json", cwd=folder).out)
    assert told["metadata"] == {"run": "dry", "uri": f"{folder}/store/runs/dry", "workers": "2"}


def test_the_runs_of_a_sweep_are_jobs(cluster, folder, empty_tracker):
    shutil.copy(empty_tracker, folder)
    tiny = ("engine=plain", "cluster.backend=local", "cluster.workers=1", "model.width=16")
    tiny += ("cluster.gpus_per_worker=0", "model.depth=1", "train.global_batch=64")
    tiny += ("train.total_images=64", "eval.samples=20", "eval.sampler.steps=2")
    words = ("-m", "+exp=digits", *tiny, "train.seed=0,1", f"home={folder}", "--jobs", "1")
    sweep = end(begin(cluster, *words, "--json", cwd=ROOT, program=("-m", "trainer.launch")))
    assert sweep.code == 0, sweep.err
    told = json.loads(sweep.out)
    assert [each["outcome"] for each in told["runs"]] == ["complete", "complete"]
    (table,) = told["tables"]
    assert table["rows"][0]["runs"] == ["digits-seed-0", "digits-seed-1"]
    listed = json.loads(jobs(cluster, "status", "--json", cwd=folder).out)["jobs"]
    sent = [each for each in listed if each["metadata"].get("run", "").startswith("digits-seed-")]
    assert [each["driver_exit_code"] for each in sent] == [0, 0]


@pytest.mark.parametrize(
    ("script", "grace", "code", "stopped"), [("late", "30", 143, 0), ("ignores", "1", 137, 137)]
)
def test_a_stop_leaves_the_time_that_was_asked_for(cluster, folder, script, grace, code, stopped):
    command = ("--stop-grace", grace, "--id", script, "--", "python", "-u", f"{script}.py")
    followed = begin(cluster, "submit", "--json", *command, cwd=folder)
    assert followed.stderr is not None
    for line in followed.stderr:
        if line == "up\n":
            break
    stop = jobs(cluster, "stop", script, cwd=folder)
    assert stop.code == stopped, stop.err
    assert ("was killed" in stop.err) == bool(stopped)
    ended = end(followed)
    assert ended.code == code
    told = json.loads(ended.out)
    assert (told["status"], told["exit_code"]) == ("STOPPED", code)
    assert ("saved" in ended.err) == (code == 143)


class Relay:
    """Passes a server's connections on, and cuts them."""

    def __init__(self, address: str) -> None:
        upstream = urlsplit(address)
        self._upstream = (str(upstream.hostname), int(upstream.port or 0))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self.connections = 0
        self.passed_bytes = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Resets all connections; new ones are taken."""
        while self._open:
            with suppress(OSError):
                self._open.pop().shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(self._upstream)
                self._open += [near, far]
                self.connections += 1
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def close(self) -> None:
        """Takes nothing any more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while content := source.recv(1 << 16):
                target.sendall(content)
                self.passed_bytes += len(content)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


@contextmanager
def relay(address: str) -> Iterator[Relay]:
    opened = Relay(address)
    try:
        yield opened
    finally:
        with suppress(OSError):
            opened.close()


def test_broken_connections_lose_no_line_and_not_the_exit_code(cluster, folder):
    numbers = "for i in $(seq 1 60); do echo line $i; sleep 0.15; done; exit 9"
    with relay(cluster.dashboard) as between:
        command = ("submit", "--id", "cut", "--address", between.address, "--")
        followed = begin(cluster, *command, "sh", "-c", numbers, cwd=folder)
        assert followed.stdout is not None
        lines, cuts = [], 0
        for line in followed.stdout:
            lines.append(line)
            if line.rstrip() in ("line 5", "line 20", "line 40"):
                between.cut()
                cuts += 1
        ended = end(followed)
    assert ended.code == 9, ended.err
    assert cuts == 3
    seen = [line.rstrip() for line in lines if line.startswith("line ")]
    assert seen == [f"line {number}" for number in range(1, 61)]


def test_how_a_job_was_stopped_is_told_without_all_that_it_wrote(cluster, folder):
    writes = "yes | head -c 3000000; echo; echo up; exec sleep 600"
    command = ("submit", "--id", "wordy", "--", "sh", "-c", writes)
    followed = begin(cluster, *command, cwd=folder)
    assert followed.stdout is not None
    for line in followed.stdout:
        if line == "up\n":
            break
    stop = jobs(cluster, "stop", "wordy", cwd=folder)
    assert (stop.code, "exit code 143" in stop.out) == (0, True)
    assert end(followed).code == 143
    with relay(cluster.dashboard) as between:
        told = jobs(cluster, "status", "wordy", "--address", between.address, cwd=folder)
    assert "exit code 143" in told.out
    assert 0 < between.passed_bytes < 100_000


def test_a_server_that_stays_away_is_told_and_the_job_goes_on(cluster, folder):
    impatient = (
        "import sys; from cluster import job_server; from trainer.cli import jobs\n"
        "job_server._AWAY_S = 2.0\n"
        "sys.exit(jobs.main(sys.argv[1:]))"
    )
    sleeps = ("--id", "alone", "--", "sh", "-c", "echo up; sleep 600")
    with relay(cluster.dashboard) as between:
        words = ("submit", "--address", between.address, *sleeps)
        followed = begin(cluster, *words, cwd=folder, program=("-c", impatient))
        assert followed.stdout is not None
        for line in followed.stdout:
            if line == "up\n":
                break
        between.close()
        lost = end(followed)
    assert lost.code == 4
    assert "python -m cluster.jobs logs alone" in lost.err
    told = json.loads(jobs(cluster, "status", "alone", "--json", cwd=folder).out)
    assert told["status"] == "RUNNING"
    stop = jobs(cluster, "stop", "alone", cwd=folder)
    assert (stop.code, "stopped, exit code 143" in stop.out) == (0, True)


def test_a_driver_ends_with_its_entrypoint(cluster, folder):
    """Sent by Ray's own command, whose shell leaves the driver to itself."""
    place = folder / "place"
    sent = cluster.job(
        *("submit", "--no-wait", "--submission-id", "shell", "--working-dir", str(folder)),
        *("--", "env", f"PYTHONPATH={ROOT}", sys.executable, "drives.py", str(place)),
    )
    assert sent.returncode == 0, sent.stderr
    wait_for(place.exists)
    wait_for(place.read_text)
    driver, shell = map(int, place.read_text().split())
    os.kill(shell, signal.SIGKILL)
    wait_for(lambda: place.read_text() == "ended")
    wait_for(lambda: not Path(f"/proc/{driver}").exists())
    assert "The job's entrypoint has ended" in cluster.job("logs", "shell").stdout


def test_a_spot_notice_drains_the_node(cluster, folder):
    """Ray ends a drained node's raylet once nothing runs there; so this is the last test."""
    node = psutil.Process(cluster.nodes[HOST].pid)

    def is_up() -> bool:
        titles = []
        for each in node.children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # or it is a zombie
                titles.append(" ".join(each.cmdline()))
        return any("/raylet/raylet" in title for title in titles)

    assert is_up()
    with metadata_service() as instance:
        watch = begin(
            cluster,
            *("--service", instance.address),
            cwd=folder,
            program=("-m", "cluster.spot_notice"),
            RAY_ADDRESS=cluster.address,
        )
        wait_for(lambda: len(instance.asked) >= 2)
        assert watch.poll() is None
        instance.announce("terminate", time.time() + 120)
        ended = end(watch)
    assert ended.code == 0, ended.err
    assert "DRAIN_NODE_REASON_PREEMPTION" in ended.err
    wait_for(lambda: not is_up())
