"""The table of where the time from the command to the first update went."""

import logging

import pytest

from cluster.contract import Line
from trainer.cli.start_times import StartTimes
from trainer.log_lines import FIRST_UPDATE


class Clock:
    """Seconds since the epoch, as far as a test sets them."""

    at = 1000.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def shown() -> list[str]:
    return []


@pytest.fixture
def start(clock, shown) -> StartTimes:
    return StartTimes(shown.append, now=clock, began=1000.0)


def say(start: StartTimes, clock: Clock, at: float, rank: int, text: str, **more) -> None:
    clock.at = 1000.0 + at
    line = {"node": "", "attempt": 0, "level": "INFO", **more}
    start.hear_worker(Line(rank=rank, text=text, **line))


def cells(shown: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("  ") if cell] for line in shown]


def test_a_row_lasts_until_the_next_thing_and_is_the_slowest_worker(start, clock, shown):
    with start.listening():
        clock.at = 1001.5
        logging.getLogger("trainer.any").warning("no row")
        logger = logging.getLogger("trainer.any")
        before = logger.level
        logger.setLevel(logging.INFO)
        logger.info("checking")
        logger.setLevel(before)
    clock.at = 1004.0
    start.hear_driver("waiting for workers")
    say(start, clock, 6.0, 0, "met")
    say(start, clock, 6.1, 1, "met")
    start.hear_driver("no row, for workers are at work")
    say(start, clock, 7.0, 0, "building")
    say(start, clock, 9.0, 1, "building")
    say(start, clock, 9.5, 0, FIRST_UPDATE)
    assert shown == []
    say(start, clock, 10.0, 1, FIRST_UPDATE)

    head, *rows = cells(shown)
    assert head == ["where the start went", "began", "took", "slowest"]
    assert rows[1:] == [
        ["checking", "1.5 s", "2.5 s"],
        ["waiting for workers", "4.0 s", "2.0 s"],
        ["met", "6.0 s", "2.9 s", "worker 1"],
        ["building", "7.0 s", "2.5 s", "worker 0"],
        ["all until the first update", "10.0 s"],
    ]
    assert rows[0][1:] == ["0.0 s", "1.5 s"]


def test_what_a_worker_goes_on_with_does_not_hide_that_it_has_started(start, clock, shown):
    for rank in (0, 1):
        say(start, clock, 2.0, rank, "met")
    say(start, clock, 3.0, 0, FIRST_UPDATE)
    say(start, clock, 3.1, 0, "compiled 8 passes of blocks in 20.0 s")
    say(start, clock, 3.2, 0, "drawing 10 images")
    assert shown == []
    say(start, clock, 4.0, 1, FIRST_UPDATE)
    _, *rows = cells(shown)
    assert rows[1:] == [
        ["met", "2.0 s", "2.0 s", "worker 1"],
        ["all until the first update", "4.0 s"],
    ]


def test_it_is_told_once_and_of_the_first_start_alone(start, clock, shown):
    say(start, clock, 1.0, 0, "met", attempt=1)
    say(start, clock, 1.5, 0, "a line that somebody has printed", level=None)
    say(start, clock, 2.0, 0, "met")
    say(start, clock, 3.0, 0, FIRST_UPDATE)
    told = len(shown)
    assert told > 0

    say(start, clock, 4.0, 0, "training")
    say(start, clock, 5.0, 0, FIRST_UPDATE)
    assert len(shown) == told
