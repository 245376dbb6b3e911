"""One run on a private Ray cluster, as a terminal sees it: a lost worker, a Ctrl-C, nothing left.

The run takes place once, in a process group of its own; each test looks at another side of it.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from cluster.contract import ClusterConfig, Message, Payload, WorkerContext
from cluster.launcher import run

pytestmark = pytest.mark.slow

TIMEOUT_S = 540  # less than a test may take, so that nothing is left of it


def lose_one_then_wait(context: WorkerContext, payload: Payload) -> None:
    import torch.distributed as dist

    dist.barrier()
    context.report({"begun": context.rank, "attempt": context.attempt})
    if context.attempt == 0:
        # Long enough for the message to leave.
        time.sleep(1)
        if context.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    limit = time.monotonic() + TIMEOUT_S
    while not context.stop_requested():
        assert time.monotonic() < limit
        time.sleep(0.01)
    # The last checkpoint: work, and collectives, after the interrupt.
    time.sleep(0.5)
    dist.barrier()
    context.report({"ended": context.rank})


def drive() -> None:
    """The command under test: prints its messages and its outcome, a line of JSON each."""

    def say(message: Message) -> None:
        print(json.dumps(message), flush=True)  # noqa: T201

    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    config = ClusterConfig(workers=2, gpus_per_worker=0, address="local", max_failures=1)
    outcome = run(config, lose_one_then_wait, {}, on_message=say, stop=stop)
    say({"status": outcome.status, "restarts": outcome.restarts})


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """What was seen of the run."""

    exit_code: int
    said: list[dict[str, Any]]
    errors: str
    listening: set[str]
    titles: list[str]
    left: list[psutil.Process]


@pytest.fixture(scope="module")
def transcript() -> Iterator[Transcript]:
    with subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import drive; drive()"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as driver:
        watchdog = threading.Timer(TIMEOUT_S, driver.kill)
        watchdog.start()
        try:
            yield watch(driver)
        finally:
            watchdog.cancel()
            driver.kill()


def watch(driver: subprocess.Popen[str]) -> Transcript:
    assert driver.stdout is not None
    said: list[dict[str, Any]] = []
    family: list[psutil.Process] = []
    listening: set[str] = set()
    titles: list[str] = []
    for line in driver.stdout:
        if not line.startswith("{"):
            continue  # Ray itself remarks on the killed worker.
        said.append(json.loads(line))
        if len([one for one in said if one.get("attempt") == 1]) == 2 and not family:
            family = psutil.Process(driver.pid).children(recursive=True)
            listening = {address for process in family for address in listening_on(process)}
            titles = [" ".join(process.cmdline()) for process in family]
            os.killpg(driver.pid, signal.SIGINT)
    _, errors = driver.communicate()
    # The system may take its time over the dead; what goes on is never dead.
    _, left = psutil.wait_procs(family, timeout=TIMEOUT_S / 4)
    return Transcript(
        exit_code=driver.returncode,
        said=said,
        errors=errors,
        listening=listening,
        titles=titles,
        left=left,
    )


def listening_on(process: psutil.Process) -> set[str]:
    try:
        sockets = process.net_connections(kind="tcp")
    except psutil.NoSuchProcess:
        return set()
    return {socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN}


def test_a_killed_worker_is_started_again(transcript: Transcript) -> None:
    begun = [(one["attempt"], one["begun"]) for one in transcript.said if "begun" in one]
    assert sorted(begun) == [(0, 0), (0, 1), (1, 0), (1, 1)], transcript.errors
    assert transcript.said[-1]["restarts"] == 1


def test_an_interrupt_of_the_whole_process_group_is_a_clean_stop(transcript: Transcript) -> None:
    assert {one["ended"] for one in transcript.said if "ended" in one} == {0, 1}, transcript.errors
    assert transcript.said[-1]["status"] == "stopped"
    assert transcript.exit_code == 0


def test_nothing_is_left_of_the_cluster(transcript: Transcript) -> None:
    assert transcript.left == []


def test_everything_listens_on_loopback(transcript: Transcript) -> None:
    assert transcript.listening
    assert {address.removeprefix("::ffff:") for address in transcript.listening} == {"127.0.0.1"}


def test_no_process_is_started_for_nothing(transcript: Transcript) -> None:
    """Neither Ray's agent for a dashboard nor the actor at which its workers would meet."""
    kinds = ("gcs_server", "raylet --", "ray_agent.py", "RuntimeEnvAgent", "Box")
    of_kinds = {kind: [title for title in transcript.titles if kind in title] for kind in kinds}
    # The raylet's words have those of what it starts.
    of_kinds["ray_agent.py"] = [
        title for title in of_kinds["ray_agent.py"] if "--raylet_socket" not in title
    ]
    assert {kind: len(found) for kind, found in of_kinds.items()} == dict.fromkeys(kinds, 1)
    workers = [title for title in transcript.titles if "RayTrainWorker" in title]
    assert len(workers) == 2
    assert len(transcript.titles) == len(kinds) + len(workers), transcript.titles
