"""The tool finds what is planted, and does not find what is not there."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.fuzz.__main__ import main
from tests.fuzz.attempt import Attempt, Kind, Task, ToolError, Try, announce
from tests.fuzz.campaign import Campaign
from tests.fuzz.hostile.judging import judged
from tests.fuzz.kills import COMMANDS, killed
from tests.fuzz.kinds import KINDS, kind_of
from tests.fuzz.material import Material
from tests.fuzz.verdict import Seen, Verdict
from tests.fuzz.watched import watched

pytestmark = pytest.mark.slow

# Among so few tries of this seed is each kind.
TRIES, SEED = 22, 20275941


def made(kind: Kind, folder: Path, *, patience_s: float = 20) -> Seen:
    task = Task("planted", 1, 2)
    return Attempt(task, kind, material=Material(folder), folder=folder).result(
        patience_s=patience_s
    )


def read_by(reader: Callable[[Try], object], attempt: Try) -> Seen:
    """A try whose reader is to be found out."""
    announce("hostile: planted", "planted")
    seen = watched(partial(reader, attempt))
    return judged(attempt, "planted", "planted", seen, lambda: "wrong" if seen.value else None)


def _constant(value: bool, _attempt: Try) -> bool:
    return value


def lose_a_key(_attempt: Try) -> object:
    return {}["key"]


def refuse(_attempt: Try) -> object:
    from trainer.config.reading import ConfigError

    raise ConfigError("no")


def say(text: str, _attempt: Try) -> None:
    print(text)  # noqa: T201


def unpickle(attempt: Try) -> None:
    os.mkdir(attempt.sandbox.canary)


def write_beside(attempt: Try) -> None:
    (attempt.sandbox.outside.parent / "beside").write_text("")


def read_bait(attempt: Try) -> None:
    attempt.sandbox.bait.read_bytes()


def tell_the_environment(_attempt: Try) -> None:
    print(os.environ["AWS_SECRET_ACCESS_KEY"])  # noqa: T201


def die(_attempt: Try) -> None:
    os.kill(os.getpid(), signal.SIGBUS)


def hang(_attempt: Try) -> None:
    time.sleep(600)


def take_all_memory(_attempt: Try) -> None:
    bytearray(1 << 40)


PLANTED: dict[str, tuple[Callable[[Try], object], Verdict, str]] = {
    "nothing": (partial(_constant, False), Verdict.HARMLESS, ""),
    "refusal": (refuse, Verdict.DETECTED, "no"),
    "another result": (partial(_constant, True), Verdict.WRONG, "wrong"),
    "a warning": (partial(say, "WARNING x"), Verdict.DETECTED, "WARNING"),
    "KeyError": (lose_a_key, Verdict.RAW, "KeyError: 'key'"),
    "a printed traceback": (
        partial(say, "Traceback (most recent call last):"),
        Verdict.RAW,
        "Traceback",
    ),
    "escape sequence": (partial(say, "\x1b[31m"), Verdict.WRONG, "control character"),
    "canary": (unpickle, Verdict.WRONG, "os.mkdir"),
    "a file outside": (write_beside, Verdict.WRONG, "opened for writing"),
    "a private file": (read_bait, Verdict.WRONG, "read: "),
    "a secret": (tell_the_environment, Verdict.WRONG, "AWS_SECRET_ACCESS_KEY is in the output"),
    "death": (die, Verdict.RAW, f"died with {-signal.SIGBUS}"),
    "hang": (hang, Verdict.RAW, "hangs"),
    "memory": (take_all_memory, Verdict.RAW, "MemoryError"),
}


@pytest.mark.parametrize(("reader", "verdict", "said"), PLANTED.values(), ids=PLANTED.keys())
def test_what_is_planted_is_found(
    tmp_path: Path, reader: Callable[[Try], object], verdict: Verdict, said: str
) -> None:
    seen = made(partial(read_by, reader), tmp_path)
    assert seen.verdict is verdict, seen
    assert said in seen.said


def fail(_attempt: Try) -> Seen:
    raise KeyError("of the tool")


def sleep_for_ever(_words: list[str]) -> int:
    time.sleep(600)
    return 0


def end_at_once(_words: list[str]) -> int:
    return 0


def killed_in(main: Callable[[list[str]], int], attempt: Try) -> Seen:
    command = replace(COMMANDS["ingest"], main=main, seconds=300.0 if main is end_at_once else 0.2)
    said = killed(command, [], attempt.sandbox.inside / "kill", attempt.chance)
    return Seen(verdict=Verdict.HARMLESS, target="", attack="", said=said)


@pytest.mark.parametrize(
    ("main", "said"), [(sleep_for_ever, "the command killed after"), (end_at_once, "at its end")]
)
def test_a_command_is_killed_unless_it_has_ended(
    tmp_path: Path, main: Callable[[list[str]], int], said: str
) -> None:
    # The try starts a server of forks of its own, which imports everything first.
    assert said in made(partial(killed_in, main), tmp_path, patience_s=300).said


def test_what_fails_in_the_tool_is_no_finding(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="of the tool"):
        made(fail, tmp_path)


def test_a_short_campaign_finds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    # So many, not so long: a fast machine would come to other tries than a slow one.
    bounds = ["--tries", str(TRIES), "--seconds", "500"]
    code = main([*bounds, "--seed", str(SEED), "--json", str(file)])
    said, errors = capsys.readouterr()
    assert code == 0, errors
    assert said.startswith(f"seed {SEED}\n")
    figures = json.loads(file.read_text())
    assert figures["findings"] == []
    assert figures["tried"] == TRIES
    assert {kind_of(SEED, number) for number in range(TRIES)} == set(KINDS)
    table = {row.strip() for row in re.findall(r"^\| ([^|]+)\|", said, re.M)}
    assert {*figures["targets"]} <= table


def test_a_kind_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "nothing"]) == 2
    assert ", ".join(KINDS) in capsys.readouterr().err


def test_ctrl_c_shows_what_was_counted_until_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(seed: int, **_: object) -> Iterator[Task]:
        yield from (Task("settings", seed, number) for number in range(3))
        raise KeyboardInterrupt

    monkeypatch.setattr("tests.fuzz.campaign.tasks_of", pressed)
    monkeypatch.setattr(Campaign, "learn", lambda _: None)
    words = ["--material", str(tmp_path), "--seed", str(SEED), "--at-once", "2"]
    assert main([*words, "--json", str(tmp_path / "figures.json")]) == 128 + signal.SIGINT
    said = capsys.readouterr().out
    # The other of two may have been under way.
    (tried,) = re.findall(r", (\d) tries in \d+ s, interrupted", said)
    assert tried in "23"
    assert re.search(rf"^\| all +\| +{tried} \|", said, re.M)
    assert json.loads((tmp_path / "figures.json").read_text())["tried"] == int(tried)
    assert multiprocessing.active_children() == []


def test_a_failure_of_the_tool_shows_what_was_counted_until_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(seed: int, **_: object) -> Iterator[Task]:
        yield Task("settings", seed, 0)
        raise ToolError("out of ideas")

    monkeypatch.setattr("tests.fuzz.campaign.tasks_of", broken)
    monkeypatch.setattr(Campaign, "learn", lambda _: None)
    words = ["--material", str(tmp_path), "--seed", str(SEED), "--at-once", "1"]
    assert main(words) == 3
    said, errors = capsys.readouterr()
    assert "out of ideas" in errors
    assert re.search(r"^\| all +\| +1 \|", said, re.M)
