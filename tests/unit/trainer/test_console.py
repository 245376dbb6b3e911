"""What a launch hears is shown to people, told to programs as events, and counted on a bar."""

import argparse
import json
import re
from datetime import datetime, timedelta

import pytest

from pipelines.command import Outcome, run
from pipelines.progress import Pace
from trainer.cli.console import Console
from trainer.cli.launch import _parser

PROGRESS = {
    "kind": "progress",
    "images": 640,
    "total_images": 6400,
    "images_per_s": 1234.5,
    "remaining_s": 90.0,
    "loss": {"loss/total": 0.5},
    "text": "640/6,400 images",
}
SAVED = {"attempt": 2, "rank": 0, "images": 640, "uri": "s3://me:hunter2@bucket/x", "text": "full"}
CHECKPOINT = {"kind": "checkpoint", **SAVED}
WHEN = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ"


def told(capsys, *words: str) -> tuple[list[str], str]:
    """What a command says that hears of a run: lines of standard output, and the rest."""

    def make(_: argparse.Namespace) -> Outcome:
        console = Console()
        console.note("starting")
        for message in (PROGRESS, CHECKPOINT, {"kind": "time", "images": 700, "attempt": 0,
                        "seconds": {}}, {"kind": "progress", "images": 704, "text": "late",
                        "remaining_s": float("inf")}):  # fmt: skip
            console.message(message)
        return Outcome("the end", {"images": console.images})

    assert run(_parser().parse_args, make, list(words), is_refusal=lambda _: False) == 0
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err


def test_events_are_lines_of_json_and_end_with_the_answer(capsys):
    lines, people = told(capsys, "--events")
    events = [json.loads(line) for line in lines]
    assert [each.pop("event") for each in events] == [
        *("note", "progress", "checkpoint", "progress", "answer")
    ]
    times = [datetime.fromisoformat(each.pop("time")) for each in events[:-1]]
    assert times == sorted(times)
    assert times[0].utcoffset() == timedelta(0)
    assert events[0] == {"text": "starting"}
    assert events[1] == {name: value for name, value in PROGRESS.items() if name != "kind"}
    assert events[2]["uri"] == "s3://***@bucket/x"
    assert (events[2]["attempt"], events[2]["rank"]) == (2, 0)
    assert events[3]["remaining_s"] is None
    assert events[4] == {"images": 704, "exit_code": 0}
    assert "640/6,400 images" in people
    assert "hunter2" not in "".join(lines) + people


def test_without_being_asked_for_there_are_no_events(capsys):
    lines, _ = told(capsys)
    saved = re.sub(rf"^{WHEN} ", "", lines.pop(2))
    assert saved == "attempt 2: rank 0: checkpoint: s3://***@bucket/x"
    assert lines == ["starting", "640/6,400 images", "late", "the end"]
    (answer, *rest), _ = told(capsys, "--json", "-q")
    assert json.loads("".join([answer, *rest])) == {"images": 704, "exit_code": 0}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("checkpoint", "checkpoint: /store/x"),
        ("checkpoint_failed", "warning: /store/x could not be saved: full"),
        ("resumed", "resumed after 640 images from /store/x"),
    ],
)
def test_what_is_saved_and_read_is_told_with_time_attempt_and_rank(capsys, kind, words):
    Console().message({**SAVED, "kind": kind, "uri": "/store/x"})
    line = capsys.readouterr().out.rstrip("\n")
    assert re.fullmatch(rf"{WHEN} attempt 2: rank 0: {words}", line)


def test_what_is_refused_is_the_one_event(capsys):
    with pytest.raises(SystemExit):
        run(_parser().parse_args, lambda _: Outcome(""), ["--events", "--none"],
            is_refusal=lambda _: False)  # fmt: skip
    (line,) = capsys.readouterr().out.splitlines()
    event = json.loads(line)
    assert (event["event"], event["exit_code"]) == ("answer", 2)
    assert "--none" in event["error"]


def test_a_bar_counts_images_also_of_a_run_that_goes_on_or_back():
    console = Console()
    with console.show_bar("training a", 6400):
        bar = console._bar
        assert bar is not None
        for images in (640, 1280, 640, 1920):
            console.message({**PROGRESS, "images": images})
            assert bar.done == images
        console.message({**SAVED, "kind": "resumed", "images": 1280})
        assert bar.done == 1280
        pace = Pace(done=640, total=6400, fraction=0.1, rate=0, left_s=0)
        assert console._figures(pace) == " 10%  1,234 images/s  ETA 1m30s"
    assert console._bar is None
    assert Console()._figures(pace) == " 10%"
