"""A worker that is to end ends, whatever its other threads are at."""

import subprocess
import sys
from pathlib import Path

import pytest
import ray

from cluster.process_group import WorkersAbsent
from cluster.ray_worker import gather

_SILENT = "a call that is not answered"
_ENDING = """
import sys, threading, time
from cluster import ray_worker
ray_worker._TELL_END_S = 0.2
sending, does = threading.Event(), sys.argv[1]
class Line:
    def sender(self, name):
        return self
    def send(self, event):
        sending.set()
        if does == "stand still":
            time.sleep(3600)
        raise KeyError("no such colour")
    def send_last(self, event, *, timeout_s):
        raise KeyError("no such colour")
voice = ray_worker.Voice(Line(), 0, 1)
print("this is sent before a message", flush=True)
threading.Thread(target=voice.report, args=({"images": 1},), daemon=True).start()
sending.wait()
voice.end(75)
"""


@pytest.mark.slow
@pytest.mark.parametrize("does", ["stand still", "fail"])
def test_a_worker_ends_though_another_of_its_threads_stands_still_or_fails_while_it_tells(
    does: str, tmp_path: Path
) -> None:
    """In a process of its own, whose file of output has what is to be sent."""
    with (tmp_path / "out").open("wb") as out:
        ended = subprocess.run(
            [sys.executable, "-c", _ENDING, does],
            stdout=out,
            stderr=subprocess.DEVNULL,
            check=False,
        )
    assert ended.returncode == 75


def test_who_does_not_answer_its_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process that was stopped before it could come to the meeting."""

    def get(calls: list[str], *, timeout: float) -> list[str]:
        if _SILENT in calls:
            raise ray.exceptions.GetTimeoutError(f"{timeout}")
        return calls

    def wait(calls: list[str], **_: object) -> tuple[list[str], list[str]]:
        done = [call for call in calls if call != _SILENT]
        return done, [_SILENT]

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", wait)
    assert gather(["a", "b"], 5) == ["a", "b"]
    with pytest.raises(WorkersAbsent, match=r"1 of 3 workers .* within 5 s .*: worker 1") as late:
        gather(["a", _SILENT, "b"], 5)
    assert late.value.ranks == (1,)
    limits: list[float] = []
    monkeypatch.setattr(
        ray, "get", lambda calls, *, timeout: limits.append(timeout) or get(calls, timeout=timeout)
    )
    with pytest.raises(WorkersAbsent, match=r"took longer than 5 s .* each to load, to meet"):
        gather(["a", _SILENT, "b"], 5, each=("to load", "to meet"))
    assert limits == [10]
