"""One try in a process of its own, with bounds on time and memory."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from tests.fuzz.material import Material
from tests.fuzz.sandbox import Sandbox
from tests.fuzz.verdict import TRACEBACK, Seen, Verdict
from tests.support.forked import PRELOADED, forked

forked.set_forkserver_preload([*PRELOADED, "tests.fuzz.warm"])

MEMORY_BYTES = 3 << 30
"""Address space that a try may take beyond what the imports take."""
PATIENCE_S = 120.0
"""After which a try counts as one that hangs; most take a tenth of a second."""


@dataclass(frozen=True)
class Task:
    """A try to make: the same task does the same again.

    Attributes:
        kind: Name of the kind.
        seed: Of the campaign.
        number: Of the try.
    """

    kind: str
    seed: int
    number: int

    def chance(self) -> random.Random:
        """Return what decides this try."""
        return random.Random(f"{self.seed} {self.number} {self.kind}")


@dataclass(frozen=True)
class Try:
    """What a kind gets to make a try.

    Attributes:
        chance: Decides everything.
        sandbox: Where to do it.
        material: What to copy from.
    """

    chance: random.Random
    sandbox: Sandbox
    material: Material


Kind = Callable[[Try], Seen]


class ToolError(RuntimeError):
    """The tool itself failed, which is no finding."""


class Attempt:
    """A try that runs.

    Args:
        task: What to try.
        kind: Does it.
        material: What to attack copies of.
        folder: An empty folder for it.
    """

    def __init__(self, task: Task, kind: Kind, *, material: Material, folder: Path) -> None:
        self.task = task
        self._output = folder / "output"
        self._receiver, sender = forked.Pipe(duplex=False)
        arguments = (task, kind, material, folder, self._output, sender)
        self.process: BaseProcess = forked.Process(target=_begin, args=arguments)
        self.process.start()
        sender.close()

    @property
    def sentinel(self) -> int:
        """Is ready when the process has ended."""
        return self.process.sentinel

    def result(self, patience_s: float = PATIENCE_S) -> Seen:
        """Wait for the end and say how it was.

        Raises:
            ToolError: The tool itself failed.
        """
        seen = self._heard(patience_s)
        if seen is None and self.process.is_alive():
            self.end()
            return self._raw("hangs: still running after its time")
        self.process.join()
        if seen is None:
            return self._raw(f"the process died with {self.process.exitcode}")
        if isinstance(seen, str):
            raise ToolError(seen)
        printed = self._printed()
        if TRACEBACK in printed and not seen.verdict.is_bad:
            return Seen(
                verdict=Verdict.RAW, target=seen.target, attack=seen.attack, said=printed[-3000:]
            )
        return seen

    def _heard(self, patience_s: float) -> Seen | str | None:
        self._attacked: Seen | None = None
        while wait([self._receiver], patience_s):
            try:
                heard = self._receiver.recv()
            except EOFError:
                self.process.join()  # the end of a process is heard of a little later
                return None
            if isinstance(heard, Announcement):
                self._attacked = heard.seen
                continue
            return heard  # type: ignore[no-any-return]
        return None

    def _raw(self, what: str) -> Seen:
        attacked = self._attacked
        return Seen(
            verdict=Verdict.RAW,
            target=attacked.target if attacked else self.task.kind,
            attack=attacked.attack if attacked else "before the attack was announced",
            said=f"{what}\n{self._printed()[-3000:]}",
        )

    def _printed(self) -> str:
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    def end(self) -> None:
        """End the process and what it started: all of it is in its session."""
        with suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            for process in [*own.children(recursive=True), own]:
                process.kill()
        self.process.join()


@dataclass(frozen=True)
class Announcement:
    """What a try is about to look at, should it not come to say so at its end."""

    seen: Seen


_heard_by: list[Connection] = []  # in the process of a try, who is told of it


def announce(target: str, attack: str) -> None:
    """Tell what was done, before the program is let at it."""
    for pipe in _heard_by:
        pipe.send(
            Announcement(Seen(verdict=Verdict.HARMLESS, target=target, attack=attack, said=""))
        )


def _begin(
    task: Task, kind: Kind, material: Material, folder: Path, output: Path, sender: Connection
) -> None:
    _heard_by.append(sender)
    os.setsid()
    number = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(number, 1)
    os.dup2(number, 2)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    sandbox = Sandbox(folder / "inside", folder / "outside")
    try:
        sandbox.enter()
        bound_memory()
        seen: Seen | str = kind(Try(task.chance(), sandbox, material))
    except BaseException:
        seen = traceback.format_exc()
    sender.send(seen)
    sys.stdout.flush()
    os._exit(0)


def bound_memory() -> None:
    """Have allocations fail that go far beyond what the program takes."""
    size = psutil.Process().memory_info().vms + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def first_ended(attempts: Sequence[Attempt], timeout_s: float) -> list[Attempt]:
    """Return those that have ended, after at most so long."""
    ready = wait([each.sentinel for each in attempts], timeout_s)
    return [each for each in attempts if each.sentinel in ready]
