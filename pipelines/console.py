"""Lines for people, written to what may be gone before the work is done.

`… | head` closes the pipe, a terminal is closed, a disk fills up, a locale lacks a character. None
of it may end a run of days: what cannot be written is dropped.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

from pipelines.addresses import hide_credentials

_LAYOUT = "\n\t"
# Not where a path comes before it: that Python may be another one than the console script's.
_COMMAND = re.compile(r"(?<![\w./])python -m (\w+(?:\.\w+)*)")


class _State:
    """What holds for this process as a whole, whichever thread speaks.

    Attributes:
        is_command: Whether this process is a command that people look at, and no worker of one.
        quiet: Whether news are dropped.
        typed: What the user types for a module that `python -m` runs, where it is something else.
        above: Writes a line above the progress bar on the terminal, while there is one.
    """

    is_command = False
    quiet = False
    typed: Mapping[str, str] = {}
    above: Callable[[str], None] | None = None


def visible(text: str) -> str:
    r"""Put text from outside, such as a file's name, into one line of characters that can be seen.

    What a terminal would obey, what turns the direction of writing, line breaks and bytes that are
    no text in the file system's encoding become escapes such as ``\x1b`` and ``\udcff``.
    """
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def say(text: str, *, to: TextIO | None = None) -> None:
    """Tell news, unless nobody wants to hear any: write a line at once, as far as it can be.

    Args:
        text: See `write`. One that begins with "warning: " is no news, and told in any case.
        to: Where; None is standard output as it is now.
    """
    if not _State.quiet:
        write(text, to or sys.stdout)
    elif text.startswith("warning: "):
        write(text, sys.stderr)


def say_error(error: object) -> None:
    """Write an error to standard error as one line, whatever it quotes."""
    write(f"error: {visible(str(error))}", sys.stderr)


def write(
    text: str, stream: TextIO | None, *, for_programs: bool = False, verbatim: bool = False
) -> None:
    """Write a line at once, as far as it can be written, without what may be credentials.

    Args:
        text: The line, or several that are laid out here; what comes from outside has been made
            `visible`, or it could add lines. What a terminal would obey, and what the stream's
            encoding lacks, is escaped.
        stream: Where; None if that was closed before the program began.
        for_programs: It is JSON, whose values stay as they are.
        verbatim: It is a file for another program, and stays as it is altogether.
    """
    if stream is None or stream.closed:
        return
    encoding = stream.encoding or "utf-8"
    if not verbatim:
        text = "".join(
            letter if letter.isprintable() or letter in _LAYOUT else _escaped(letter)
            for letter in as_typed(text)
        )
    if not verbatim and not for_programs:
        text = hide_credentials(text)  # after escaping, or a control character would end a word
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        if _State.above is not None and stream.isatty():
            _State.above(text)
            return
        stream.write(f"{text}\n")
        stream.flush()
    except OSError:
        drop_buffered(stream)
    except RuntimeError:
        return  # a signal handler speaks while the line that it interrupts is being written


class SayingHandler(logging.Handler):
    """Logs to standard error by `say`; warnings in any case."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        if record.levelno >= logging.WARNING or not _State.quiet:
            write(self.format(record), sys.stderr)


class WarningLines(logging.Formatter):
    """A warning as one line with its origin, whatever it quotes."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without a traceback."""
        return f"{record.levelname} {record.name}: {visible(record.getMessage())}"


def attach_warnings() -> logging.Handler:
    """Have everyone's warnings written by `WarningLines`, and not as they are by Python itself."""
    handler = SayingHandler(logging.WARNING)
    handler.setFormatter(WarningLines())
    logging.getLogger().addHandler(handler)
    return handler


@contextmanager
def show_warnings() -> Iterator[None]:
    """Do so in a `with` block."""
    handler = attach_warnings()
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def drop_buffered(stream: TextIO) -> None:
    """Empty the stream's buffers into nowhere, or Python would fail to flush them at its exit."""
    try:
        number = stream.fileno()
        kept, nowhere = os.dup(number), os.open(os.devnull, os.O_WRONLY)
    except OSError:
        return
    try:
        os.dup2(nowhere, number)
        stream.flush()
    finally:
        os.dup2(kept, number)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def speak_as_command(*, quiet: bool) -> Iterator[None]:
    """Let progress have the terminal in a `with` block, or have nobody tell news."""
    before = _State.is_command, _State.quiet
    _State.is_command, _State.quiet = True, quiet
    try:
        yield
    finally:
        _State.is_command, _State.quiet = before


@contextmanager
def lines_above(put: Callable[[str], None]) -> Iterator[None]:
    """Have lines for the terminal written by `put`, above a progress bar, in a `with` block."""
    _State.above = put
    try:
        yield
    finally:
        _State.above = None


def has_room_for_a_bar() -> bool:
    """Tell whether a progress bar would be seen, and fight with nothing."""
    return (
        _State.is_command
        and not _State.quiet
        and _State.above is None
        and os.environ.get("TERM", "dumb") != "dumb"
        and not os.environ.get("CI")
        and all(
            stream is not None and not stream.closed and stream.isatty()
            for stream in (sys.stdout, sys.stderr)
        )
    )


@contextmanager
def typed_as(names: Mapping[str, str]) -> Iterator[None]:
    """Have help, hints and errors call commands as the user types them, in a `with` block.

    Args:
        names: What is typed for each module that `python -m` runs.
    """
    before, _State.typed = _State.typed, names
    try:
        yield
    finally:
        _State.typed = before


def typed(module: str, *, python: str = "python") -> str:
    """Return what the user types to run a module: `python -m` and its name, unless `typed_as`."""
    return _State.typed.get(module, f"{python} -m {module}")


def as_typed(text: str) -> str:
    """Have a text call commands as the user types them."""
    return _COMMAND.sub(lambda found: typed(found[1]), text)
