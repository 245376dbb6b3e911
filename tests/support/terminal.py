"""A machine that nothing was set up on, and terminals of it, to type what the documentation says.

The machine is a set of Linux namespaces: a network with nobody else's ports, a `/tmp` and a home
folder that are empty, and processes that end with it. So every command runs with its own defaults,
and its environment holds only what a login sets.
"""

from __future__ import annotations

import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.job import ROOT

_UNSHARE = (
    *("unshare", "--user", "--map-root-user", "--net", "--mount", "--pid", "--fork"),
    *("--kill-child", "--mount-proc"),
)
_END = "the-line-ended-with"


class Machine:
    """A machine that is up.

    Args:
        folder: Its `/tmp`, seen from here.
        pid: Its first process.
    """

    def __init__(self, folder: Path, pid: int) -> None:
        self._folder = folder
        self._pid = pid

    def path(self, inside: str) -> Path:
        """Where a file under the machine's `/tmp` is, seen from here."""
        return self._folder / Path(inside).relative_to("/tmp")

    @contextmanager
    def terminal(self) -> Iterator[Terminal]:
        """A shell in the fresh working copy."""
        terminal = Terminal(self._pid)
        try:
            yield terminal
        finally:
            terminal.close()


class Terminal:
    """A shell that lines are typed into.

    Args:
        pid: A process of the machine.
    """

    def __init__(self, pid: int) -> None:
        enter = ("nsenter", "--target", str(pid), "--user", "--net", "--mount", "--pid")
        login = {
            "HOME": "/tmp/home",
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            "TERM": "dumb",
            "USER": "user",
        }
        self._shell = subprocess.Popen(
            [*enter, "bash", "--noprofile", "--norc"],
            env=login,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self.type("cd /tmp/lapflow")

    def type(self, line: str, *, code: int = 0, timeout_s: float = 540) -> str:
        """Type a line, wait for its end, and return what it printed.

        Args:
            line: As the documentation has it, comment included.
            code: The exit code that it must have.
            timeout_s: How long it may take; only what hangs takes so long.
        """
        self._send(f"{{ {line}\n}} < /dev/null\nprintf '\\n%s %s\\n' {_END} $?\n")
        printed = self._until(re.compile(rf"^{_END} (\d+)$"), timeout_s)
        *output, end = printed
        assert end == f"{_END} {code}", f"$ {line}\n" + "\n".join(printed)
        return "\n".join(output)

    def begin(self, line: str, until: str, *, timeout_s: float = 540) -> str:
        """Type a line that goes on until Ctrl-C, and return what it printed up to a pattern."""
        self._send(f"exec {line}\n")
        return "\n".join(self._until(re.compile(until), timeout_s))

    def close(self) -> None:
        """Close the window: Ctrl-C, then the end."""
        if self._shell.poll() is None:
            os.killpg(self._shell.pid, signal.SIGINT)
            os.killpg(self._shell.pid, signal.SIGKILL)
        self._shell.wait(30)

    def _send(self, text: str) -> None:
        assert self._shell.stdin is not None
        self._shell.stdin.write(text)
        self._shell.stdin.flush()

    def _read(self) -> None:
        assert self._shell.stdout is not None
        for line in self._shell.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def _until(self, pattern: re.Pattern[str], timeout_s: float) -> list[str]:
        deadline = time.monotonic() + timeout_s
        printed: list[str] = []
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                line = None
            if line is None:
                raise AssertionError(f"{pattern.pattern!r} did not come:\n" + "\n".join(printed))
            printed.append(line)
            if pattern.search(line):
                return printed


@contextmanager
def machine(folder: Path) -> Iterator[Machine]:
    """Start a machine with a working copy of this repository in `/tmp/lapflow`.

    Args:
        folder: An empty folder, which becomes its `/tmp`.

    Raises:
        RuntimeError: This kernel does not let its user make namespaces.
    """
    (folder / "home").mkdir()
    _copy_repository(folder / "lapflow")
    up = (
        f"{_python_kept(folder)} mount --rbind {folder} /tmp && ip link set lo up && echo up && "
        "while sleep 1; do :; done"
    )
    first = subprocess.Popen(
        [*_UNSHARE, "bash", "-c", up], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert first.stdout is not None
        said = first.stdout.readline()
        if said != "up\n":
            raise RuntimeError(f"no namespaces here: {said}")
        (inner,) = _children(first.pid)
        yield Machine(folder, inner)
    finally:
        first.kill()
        first.wait(30)


def _python_kept(folder: Path) -> str:
    """What keeps Python where it is, if that is under the `/tmp` that the machine does not see."""
    commands = ""
    for prefix in sorted({Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}):
        if prefix.is_relative_to("/tmp"):
            place = folder / prefix.relative_to("/tmp")
            commands += f"mkdir -p {place} && mount --bind {prefix} {place} && "
    return commands


def _copy_repository(target: Path) -> None:
    """What a clone has, and this environment as `make setup` would have left it there."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    (target / ".venv").mkdir()
    for part in ("bin", "lib", "pyvenv.cfg"):
        (target / ".venv" / part).symlink_to(Path(sys.prefix) / part)
    (target / ".venv" / "ready").touch()


def _children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
