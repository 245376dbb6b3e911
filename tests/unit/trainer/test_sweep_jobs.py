"""Runs of a sweep as jobs, on a job server that is made up: how many, which, and what of a stop."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.job_server import Job, JobServerLost
from trainer.cli import sweep, sweep_jobs
from trainer.cli.sweep import StopRequest, answer_in, ended
from trainer.cli.sweep_jobs import make_as_jobs
from trainer.config.sweeps import SweepPoint, expand_sweep


class Cluster:
    """Takes jobs, which end when they are told to."""

    def __init__(self) -> None:
        self.sent: dict[str, dict[str, Any]] = {}
        self.codes: dict[str, int] = {}
        self.over = threading.Event()
        self.running = self.most = 0
        self.error: Exception | None = None
        self._lock = threading.Lock()

    def __call__(self, _address: str | None) -> Cluster:
        return self

    def jobs(self) -> list[str]:
        return list(self.sent)

    def job(self, job_id: str) -> Job:
        metadata = self.sent[job_id]["metadata"]
        code = self.codes.get(metadata["run"], 0)
        return Job(
            id=job_id,
            status="RUNNING" if not self.over.is_set() else "FAILED" if code else "SUCCEEDED",
            message="",
            exit_code=code if self.over.is_set() else None,
            seconds=1.0,
            metadata=metadata,
        )

    def submit(self, words: list[str], **more: Any) -> str:
        self.sent[more["job_id"]] = {"words": words, **more}
        return str(more["job_id"])

    def wait(self, job_id: str, *, note: Any) -> Job:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        if self.error is not None:
            raise self.error
        self.over.wait()
        with self._lock:
            self.running -= 1
        return self.job(job_id)

    def last_lines(self, _job_id: str) -> str:
        return "[1s] loading libraries\nerror: no room\nerror: the disk is full\nmore\n"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()
    monkeypatch.setattr(sweep_jobs, "JobServer", made)
    return made


def once(cluster: Cluster, running: int, then: Callable[[], object]) -> None:
    """Do something as soon as so many jobs are waited for."""

    def wait() -> None:
        while cluster.running < running:
            time.sleep(0.01)
        then()

    threading.Thread(target=wait, daemon=True).start()


@pytest.fixture(scope="module")
def points() -> tuple[SweepPoint, ...]:
    return expand_sweep(["+exp=digits", "train.seed=0,1,2"]).points


def test_so_many_run_at_a_time_and_each_ends_as_its_command_does(cluster, points):
    cluster.codes["digits-seed-1"] = 1
    made = make_as_jobs(2, address=None)(points, StopRequest())
    once(cluster, 2, cluster.over.set)
    found = {each.point.job.run: each for each in made}
    assert cluster.most == 2
    assert {run: each.what for run, each in found.items()} == {
        "digits-seed-0": "complete",
        "digits-seed-1": "failed",
        "digits-seed-2": "complete",
    }
    assert found["digits-seed-1"].error.startswith("the disk is full; python -m cluster.jobs logs")
    for job in cluster.sent.values():
        assert job["words"][:3] == ["python", "-m", "trainer.launch"]
        assert f"run={job['metadata']['run']}" in job["words"]


def test_a_job_that_is_on_its_way_is_waited_for_and_no_second_one_sent(cluster, points):
    uri = f"{points[0].job.home}/store/runs/digits-seed-0"
    for job_id, place in (("digits-seed-0-1", "elsewhere"), ("digits-seed-0-2", uri)):
        cluster.submit([], job_id=job_id, metadata={"run": "digits-seed-0", "uri": place})
    once(cluster, 1, cluster.over.set)
    (only,) = make_as_jobs(1, address=None)(points[:1], StopRequest())
    assert only.what == "complete"
    assert len(cluster.sent) == 2


def test_a_stop_leaves_jobs_to_themselves_and_sends_no_more(cluster, points):
    stop = StopRequest()
    once(cluster, 1, lambda: setattr(stop, "received", 2))
    found = {each.point.job.run: each for each in make_as_jobs(1, address=None)(points, stop)}
    assert [found[f"digits-seed-{seed}"].what for seed in range(3)] == [
        *("stopped", "not begun", "not begun")
    ]
    (sent,) = cluster.sent
    assert f"python -m cluster.jobs stop {sent}" in found["digits-seed-0"].error
    cluster.over.set()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (JobServerLost("it is away"), "it is away"),
        (KeyError("metadata"), "KeyError: 'metadata'"),
    ],
)
def test_a_server_that_goes_away_or_answers_nonsense_fails_its_runs(cluster, points, error, told):
    cluster.error = error
    found = list(make_as_jobs(3, address=None)(points, StopRequest()))
    assert [(each.what, each.error) for each in found] == [("failed", told)] * 3


def test_a_stop_just_before_a_run_is_sent_sends_nothing(cluster, points):
    """Who has looked by then tells the run as not begun."""
    stop = StopRequest()
    cluster.over.set()

    class Waiting(queue.SimpleQueue[SweepPoint]):
        def get_nowait(self) -> SweepPoint:
            stop.received = signal.SIGINT
            return super().get_nowait()

    waiting = Waiting()
    waiting.put(points[0])
    sender = sweep_jobs._Sender(cluster, waiting, queue.SimpleQueue(), stop)
    sender.run()
    assert cluster.sent == {}
    assert sender.point is None


@pytest.mark.parametrize(
    ("numbers", "in_foreground", "passed_on"),
    [
        # Where a terminal sends signals too, the launch takes the first pair for one request.
        ([signal.SIGINT], True, 1),
        ([signal.SIGINT, signal.SIGINT], True, 1),
        ([signal.SIGINT], False, 1),
        ([signal.SIGINT, signal.SIGINT], False, 2),
        ([signal.SIGTERM], True, 1),
        ([signal.SIGTERM, signal.SIGTERM], True, 2),
    ],
)
def test_what_asks_the_sweep_to_stop_asks_the_launch_too(
    monkeypatch, numbers, in_foreground, passed_on
):
    """As a SIGTERM, which a launch takes for the same request where it follows a Ctrl-C."""
    monkeypatch.setattr(sweep, "_is_in_foreground", lambda: in_foreground)
    sent: list[int] = []
    stop = StopRequest()
    stop.process = cast("subprocess.Popen[str]", SimpleNamespace(send_signal=sent.append))
    with stop.listening():
        for number in numbers:
            os.kill(os.getpid(), number)
    assert stop.received == numbers[0]
    assert sent == [signal.SIGTERM] * passed_on


def test_a_launch_that_stops_by_itself_is_followed_by_no_other(monkeypatch, points):
    """As where this machine is about to be taken away."""
    whats = iter(("failed", "stopped", "complete"))
    begun: list[SweepPoint] = []

    def launch(point: SweepPoint, _stop: StopRequest, *, quiet: bool) -> sweep.Ended:
        begun.append(point)
        return sweep.Ended(point=point, what=next(whats))

    monkeypatch.setattr(sweep, "_launch_here", launch)
    made = list(sweep.make_here(quiet=True)(points[:3], StopRequest()))
    assert [run.what for run in made] == ["failed", "stopped", "not begun"]
    assert begun == list(points[:2])


@pytest.mark.parametrize(
    ("code", "what"),
    [
        *((0, "complete"), (1, "failed"), (2, "refused"), (3, "unsaved")),
        *((130, "stopped"), (143, "stopped"), (137, "failed")),
    ],
)
def test_exit_codes_tell_what_became_of_a_run(points, code, what):
    told = ended(points[0], code, error="", seconds=1.0)
    assert told.what == what
    assert told.error == ("" if what in ("complete", "stopped") else f"exit code {code}")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{\n  "run": "a",\n  "more": {\n    "b": 1\n  }\n}\n', {"run": "a", "more": {"b": 1}}),
        ('{"event": "begin"}\n{"event": "end"}\n', {"event": "end"}),
        ('{"event": "begin"}\n{\n "run": "a"\n}\n', {"run": "a"}),
        ("", {}),
        ("{ no JSON\n", {}),
        ('{"cut": ', {}),
    ],
)
def test_the_answer_is_the_last_object_that_a_launch_writes(text, found):
    assert answer_in(text) == found
