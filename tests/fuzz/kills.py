"""A try of kills: a command ended at a random moment, perhaps more than once, and run again."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from cluster import local
from pipelines.ingest.__main__ import main as ingest
from tests.fuzz.attempt import Try, announce
from tests.fuzz.damage.kind import plain, usual_results
from tests.fuzz.damage.readers import READERS
from tests.fuzz.material import (
    Material,
    copied_home,
    data_of,
    evaluate_arguments,
    ingest_arguments,
    launch_arguments,
    run_of,
)
from tests.fuzz.verdict import TRACEBACK, Seen, Verdict
from tests.support.forked import forked, ranks_by_fork
from trainer.cli.evaluate import main as evaluate
from trainer.cli.launch import main as launch

HANGS = "hangs"
_MAX_KILLS = 3
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Command:
    """A command that can be killed at any time, and be run again.

    Attributes:
        main: The command.
        words: Its words, by material and home.
        seconds: About how long it takes.
        undo: Takes away from a finished home what the command makes.
        result: Name of the reader that reads it; the one of the command's own name runs it too.
    """

    main: Callable[[list[str]], int]
    words: Callable[[Material, Path], list[str]]
    seconds: float
    undo: Callable[[Path], None]
    result: str


def _untrain(home: Path) -> None:
    shutil.rmtree(run_of(home))


def _unmeasure(home: Path) -> None:
    for folder in run_of(home).glob("evaluation/*/*/"):
        shutil.rmtree(folder)
    shutil.rmtree(home / "cache" / "features")


def _uningest(home: Path) -> None:
    shutil.rmtree(data_of(home))


COMMANDS: Mapping[str, Command] = {
    "launch": Command(launch, lambda _, home: launch_arguments(home), 6.0, _untrain, "launch"),
    "evaluate": Command(
        evaluate, lambda _, home: evaluate_arguments(home), 3.0, _unmeasure, "evaluate"
    ),
    "ingest": Command(
        ingest,
        lambda material, home: ingest_arguments(material.images, data_of(home)),
        1.0,
        _uningest,
        "read the data",
    ),
}


def kills(attempt: Try) -> Seen:
    """Kill a command's process or one of its ranks, then have it finish, and compare the result."""
    chance = attempt.chance
    name = chance.choice(sorted(COMMANDS))
    command = COMMANDS[name]
    target = f"kills: {name}"
    home = copied_home(attempt.material, attempt.sandbox.inside / "home")
    command.undo(home)
    words = command.words(attempt.material, home)
    done: list[str] = []
    said = ""
    for number in range(chance.randint(1, _MAX_KILLS)):
        folder = attempt.sandbox.inside / f"kill-{number}"
        announce(target, "; ".join([*done, "another kill"]))
        done.append(killed(command, words, folder, chance))
        said += (folder / "output").read_text()
        if done[-1].endswith(HANGS):
            return Seen(verdict=Verdict.RAW, target=target, attack="; ".join(done), said=said)
    attack = "; ".join(done)
    announce(target, attack)
    if TRACEBACK in said:
        return Seen(verdict=Verdict.RAW, target=target, attack=attack, said=said)
    if name == "ingest" and (code := _run_again(command, words, attempt.sandbox.inside)) != 0:
        return Seen(verdict=Verdict.RAW, target=target, attack=attack, said=f"exit code {code}")
    (scratch := attempt.sandbox.inside / "scratch").mkdir()
    read = READERS[command.result].read(home, scratch)
    value, usual = plain(read.value), usual_results(attempt.material)[command.result]
    if read.raw or read.refusal:
        return Seen(verdict=Verdict.RAW, target=target, attack=attack, said=read.said)
    if problems := attempt.sandbox.problems(said + read.said):
        return Seen(verdict=Verdict.WRONG, target=target, attack=attack, said="\n".join(problems))
    if value != usual:
        text = f"instead of {usual}\nthere was  {value}\nand it said: {read.said}"
        return Seen(verdict=Verdict.WRONG, target=target, attack=attack, said=text)
    return Seen(verdict=Verdict.HARMLESS, target=target, attack=attack, said=read.err[-500:])


def killed(command: Command, words: list[str], folder: Path, chance: random.Random) -> str:
    """Start the command and kill it, or one of its ranks; return what was done in words."""
    (ranks := folder / "ranks").mkdir(parents=True)
    (folder / "output").touch()  # a kill may come before the command has said anything
    process = forked.Process(
        target=_run, args=(command.main, words, dict(os.environ), str(Path.cwd()), folder)
    )
    process.start()
    process.join(after := chance.uniform(0.0, command.seconds))
    if not process.is_alive():
        return f"at its end after less than {after:.2f} s"
    pids = sorted(int(path.name) for path in ranks.iterdir())
    victim, who = process.pid, "the command"
    if pids and chance.random() < 0.5:
        rank = chance.randrange(len(pids))
        victim, who = pids[rank], f"rank {rank}"
    assert victim is not None
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        who = f"{who}, which had ended"
    process.join(_PATIENCE_S)
    if process.is_alive():
        process.kill()
        return f"{who} killed after {after:.2f} s, and the rest {HANGS}"
    # They end when they hear that the command is gone, before anybody could type it again.
    left = [psutil.Process(int(path.name)) for path in ranks.iterdir() if _lives(int(path.name))]
    psutil.wait_procs(left, timeout=_PATIENCE_S)
    return f"{who} killed after {after:.2f} s"


def _lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _run_again(command: Command, words: list[str], folder: Path) -> int | None:
    (again := folder / "again" / "ranks").mkdir(parents=True)
    process = forked.Process(
        target=_run, args=(command.main, words, dict(os.environ), str(Path.cwd()), again.parent)
    )
    process.start()
    process.join()
    return process.exitcode


def _run(
    main: Callable[[list[str]], int],
    words: list[str],
    environment: Mapping[str, str],
    directory: str,
    folder: Path,
) -> None:
    """The command's own process; the numbers of its ranks become names in a folder."""
    os.setsid()
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    for number in (1, 2):
        os.dup2(output, number)
    with ranks_by_fork():
        make = local.multiprocessing.get_context("spawn").Process

        def recorded(**settings: Any) -> Any:
            rank = make(**settings)

            def start() -> None:
                rank.__class__.start(rank)
                (folder / "ranks" / str(rank.pid)).touch()

            return _WithStart(rank, start)

        own = SimpleNamespace(Pipe=forked.Pipe, Process=recorded)
        local.multiprocessing = SimpleNamespace(get_context=lambda _method: own)  # type: ignore[assignment]
        os._exit(main(words))


class _WithStart:
    """A process that is started in another way."""

    def __init__(self, process: Any, start: Callable[[], None]) -> None:
        self._process = process
        self.start = start

    def __getattr__(self, name: str) -> Any:
        return getattr(self._process, name)
