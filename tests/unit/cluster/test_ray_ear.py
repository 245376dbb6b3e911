"""What workers hear of their driver: one of a node asks for all, and none lives on without it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import ray

from cluster import ray_ear, ray_mailbox
from cluster.failure import STOOD_STILL
from cluster.ray_ear import Board, Ear, Heard
from cluster.ray_mailbox import GO, HEAR_S, Mailbox, Request


class Line:
    """The mailbox's worker side: what is wanted, who asked for it, and whether it answers."""

    def __init__(self) -> None:
        self.wanted = GO
        self.calls: list[int] = []

    def hear(self, attempt: int, known: Request) -> Request:
        self.calls.append(attempt)
        limit = time.monotonic() + 0.2
        while self.wanted == known and time.monotonic() < limit:
            time.sleep(0.01)
        return self.wanted


def ears(line: Line, count: int) -> list[Ear]:
    """Those of one node; each has an attempt of its own here, to be told apart by."""
    own = Board()
    boards = [own, *(Board(own.path) for _ in range(count - 1))]
    return [Ear(line, number, board) for number, board in enumerate(boards)]  # type: ignore[arg-type]


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def test_what_is_written_is_read_and_half_of_it_is_not() -> None:
    own = Board()
    other = Board(own.path)
    assert other.read() is None
    for heard in (
        Heard(1, GO),
        Heard(2**40, Request("leave", 27.5)),
        Heard(3, Request("leave", 0.0)),
        Heard(4, Request("stop"), lost=True),
    ):
        own.write(heard)
        assert other.read() == heard
    whole = os.pread(own._file, 99, 0)
    own.write(Heard(5, GO))
    os.pwrite(own._file, whole[:9], 0)  # the other half is new
    assert other.read() is None


def test_one_worker_of_a_node_asks_and_all_hear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_ear, "_SILENT_S", 3600)
    line = Line()
    heard = ears(line, 8)
    for ear in heard:
        ear.start()
    line.wanted = Request("leave", 30.0)
    wait_for(lambda: all(ear.request == line.wanted for ear in heard))
    assert all(0 < (ear.grace_s() or 0) <= 30 for ear in heard)
    line.wanted = Request("stop")
    wait_for(lambda: all(ear.request == line.wanted for ear in heard))
    assert set(line.calls) == {0}
    for ear in heard:
        ear.close()


def test_where_the_one_that_asks_falls_silent_each_asks_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_ear, "_SILENT_S", 0.1)
    line = Line()
    first, *others = ears(line, 3)
    for ear in others:
        ear.start()
    line.wanted = Request("stop")
    wait_for(lambda: all(ear.request == line.wanted for ear in others))
    assert set(line.calls) == {1, 2}
    first.start()  # it stood still, and goes on
    wait_for(lambda: 0 in line.calls)
    for ear in (first, *others):
        ear.close()


def test_an_older_answer_of_the_one_that_asks_takes_nothing_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line, own = Line(), Board()
    ear = Ear(line, 0, Board(own.path))  # type: ignore[arg-type]
    monkeypatch.setattr(ray_ear, "_LOOK_S", 0.0)
    for answers, (heard, older) in enumerate(
        [(Request("leave", 30.0), GO), (Request("stop"), Request("leave", 30.0))], start=1
    ):
        line.wanted = heard
        ear._ask()  # by itself
        left_s = ear.grace_s() or 0.0
        own.write(Heard(answers, older))
        assert ear._look(ear._board)  # type: ignore[arg-type]
        assert (ear.request, ear.is_stop_wanted()) == (heard, True)
        assert (ear.grace_s() or 0.0) <= left_s


def test_what_is_asked_for_later_gives_no_more_time_but_may_give_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line, now_s = Line(), [100.0]
    monkeypatch.setattr(ray_ear, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    ear = Ear(line, 0)  # type: ignore[arg-type]

    def left_s(wanted: Request) -> float | None:
        line.wanted = wanted
        ear.listen()
        assert ear.request == wanted
        return ear.grace_s()

    assert left_s(Request("leave")) is None  # as there is room for more of them
    assert left_s(Request("leave", 100.0)) == 100.0
    now_s[0] += 10.0
    assert left_s(Request("leave", 25.0)) == 25.0  # another node goes, and sooner
    now_s[0] += 5.0
    assert left_s(Request("stop")) == 20.0  # the node does not wait for it
    now_s[0] += 30.0
    assert ear.grace_s() == 0.0
    ear = Ear(line, 1)  # type: ignore[arg-type]
    assert left_s(Request("stop", 147.0)) == 147.0


_LOST = """
import ray, sys, time
from cluster.ray_ear import Board, Ear
class Line:
    def hear(self, attempt, known):
        assert attempt == 0, "the first one asks"
        time.sleep(0.1)
        raise ray.exceptions.GetTimeoutError("no answer")
path = sys.stdin.readline().strip()
board = Board(path or None)
print(board.path, flush=True)
sys.stdin.readline()
Ear(Line(), 1 if path else 0, board).start()
time.sleep(3600)
"""


@pytest.mark.slow
def test_workers_leave_together_when_the_one_that_asks_has_no_answer() -> None:
    """In processes of their own, of which the second never asks."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _LOST],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    path = ""
    for worker in workers:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(f"{path}\n")
        worker.stdin.flush()
        path = worker.stdout.readline().strip()
    # The second one first, so that it looks for an answer already when there is none.
    for worker in workers[::-1]:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    told = [worker.communicate()[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [STOOD_STILL, STOOD_STILL]
    assert all("out of reach" in text for text in told)


def test_a_driver_that_is_silent_for_30_s_is_lost_and_no_sooner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The numbers that docs/operations.md gives."""
    passed_s = [0.0]

    def get(_call: object, *, timeout: float) -> Request:
        passed_s[0] += timeout
        raise ray.exceptions.GetTimeoutError("no answer")

    monkeypatch.setattr(ray_mailbox.ray, "get", get)
    actor = SimpleNamespace(hear=SimpleNamespace(remote=lambda *_: None))
    ear = Ear(Mailbox(actor), 0, Board())
    left_s: list[float] = []

    def leave() -> None:
        left_s.append(passed_s[0])
        ear.close()

    monkeypatch.setattr(ear, "_leave", leave)
    ear.run()
    assert left_s == [30.0]
    assert HEAR_S < ray_mailbox.ANSWER_S  # for so long a mailbox that is there may not answer
    assert ray_ear._SILENT_S == 10.0  # after which the others of a node ask by themselves


def test_a_driver_that_answers_once_more_is_not_lost() -> None:
    line = Line()
    ear = Ear(line, 0, None)  # type: ignore[arg-type]
    answers = iter([False, True, False, True])

    def hear(attempt: int, known: Request) -> Request:
        if next(answers, None) is None:
            ear.close()
        elif len(line.calls) % 2 == 0:
            line.calls.append(0)
            raise ray.exceptions.GetTimeoutError("no answer")
        line.calls.append(0)
        return GO

    line.hear = hear  # type: ignore[method-assign]
    ear.run()  # it would end this process
    assert len(line.calls) == 5


def test_a_worker_that_came_to_its_end_has_not_left() -> None:
    ear = Ear(None, 0)  # type: ignore[arg-type]
    assert (ear.request, ear.has_interrupted()) == (GO, False)
    ear.request = Request("leave")
    assert ear.has_interrupted()
    ear.note_completion()
    assert not ear.has_interrupted()
