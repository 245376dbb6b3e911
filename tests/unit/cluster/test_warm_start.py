"""Workers that are forks of a warmed process: what they have of it, and how they and it end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

RUN = "import sys; from tests.unit.cluster.warm_run import main; sys.exit(main(*sys.argv[1:]))"
ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.slow


@contextmanager
def running(tmp_path: Path, what: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, what, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "WARM_RUN_OF": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def told(process: "subprocess.Popen[str]", lines: int) -> list[dict[str, Any]]:
    assert process.stdout is not None
    return [json.loads(process.stdout.readline()) for _ in range(lines)]


def left(tmp_path: Path) -> list[psutil.Process]:
    """All processes of a run, which carry its mark, but for those that have ended."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("WARM_RUN_OF") == str(tmp_path):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def wait_until_gone(tmp_path: Path) -> None:
    deadline = time.monotonic() + 120
    while left(tmp_path):
        assert time.monotonic() < deadline, left(tmp_path)
        time.sleep(0.05)


def test_forks_have_its_imports_and_what_the_caller_is_now(tmp_path):
    with running(tmp_path, "tell") as process:
        first, second, ended = told(process, 3)
        assert process.wait(300) == 0

    assert ended == {"outcome": "finished"}
    # One process has imported for both, and is neither of them nor the caller.
    (server,) = {worker["imported_by"] for worker in (first, second)}
    assert {first["parent"], second["parent"]} == {server}
    assert len({server, first["pid"], second["pid"], process.pid}) == 4
    for worker in (first, second):
        assert worker["late"] == "2"
        assert worker["variables"] == []
        assert worker["folder"] == str(tmp_path)
        assert worker["threads"] == "1"
    # Each draws numbers of its own, whatever the server has seeded.
    assert first["draws"][0] != second["draws"][0]
    assert first["draws"][1] != second["draws"][1]
    wait_until_gone(tmp_path)


def test_how_a_fork_ended_is_told(tmp_path):
    with running(tmp_path, "kill") as process:
        *_, ended = told(process, 3)
        assert process.wait(300) == 1

    assert "SIGKILL" in ended["failed"]
    assert "worker 1" in ended["failed"].lower()
    wait_until_gone(tmp_path)


def test_signals_to_all_of_them_end_nothing_but_the_caller(tmp_path):
    with running(tmp_path, "wait") as process:
        told(process, 2)
        # As a terminal and a service manager do it; a worker or server that took them would fail.
        os.killpg(process.pid, signal.SIGTERM)
        (ended,) = told(process, 1)
        assert process.wait(300) == 0

    assert ended == {"outcome": "stopped"}
    wait_until_gone(tmp_path)


def test_all_end_with_a_caller_that_is_killed(tmp_path):
    with running(tmp_path, "wait") as process:
        told(process, 2)
        assert len(left(tmp_path)) >= 4
        process.kill()
        wait_until_gone(tmp_path)


def test_who_refuses_to_start_waits_for_no_import_and_leaves_none_behind(tmp_path):
    with running(tmp_path, "refuse") as process:
        (server,) = told(process, 1)
        assert psutil.Process(server["importing"]).ppid() == process.pid
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait(300) == 2
        wait_until_gone(tmp_path)
