"""Lines for people, written to what may be gone before the work is done; and Ctrl-C.

`… | head` closes the pipe, a terminal is closed, a disk fills up, a locale lacks a character. None
of it may end a run of days: what cannot be written is dropped.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import TracebackType
from typing import TextIO

_LAYOUT = "\n\t"


def visible(text: str) -> str:
    r"""Put text from outside, such as a file's name, into one line of characters that can be seen.

    What a terminal would obey, what turns the direction of writing, line breaks and bytes that are
    no text in the file system's encoding become escapes such as ``\x1b`` and ``\udcff``.
    """
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def say(text: str, *, to: TextIO | None = None) -> None:
    """Write a line at once, as far as it can be written.

    Args:
        text: The line, or several that are laid out here; what comes from outside has been made
            `visible`, or it could add lines. What a terminal would obey, and what the stream's
            encoding lacks, is escaped.
        to: Where; None is standard output as it is now.
    """
    stream: TextIO | None = to or sys.stdout
    if stream is None or stream.closed:  # standard output was closed before the program began
        return
    encoding = stream.encoding or "utf-8"
    text = "".join(
        letter if letter.isprintable() or letter in _LAYOUT else _escaped(letter) for letter in text
    )
    try:
        stream.write(f"{text.encode(encoding, 'backslashreplace').decode(encoding)}\n")
        stream.flush()
    except OSError:
        _drop_buffered(stream)
    except RuntimeError:
        return  # a signal handler speaks while the line that it interrupts is being written


def say_error(error: object) -> None:
    """Write an error to standard error as one line, whatever it quotes."""
    say(f"error: {visible(str(error))}", to=sys.stderr)


class SayingHandler(logging.Handler):
    """Logs to standard error by `say`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        say(self.format(record), to=sys.stderr)


def _drop_buffered(stream: TextIO) -> None:
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


EXIT_CODE = 128 + signal.SIGINT


def end_quietly_when_interrupted() -> None:
    """Have an interrupt that nobody catches end the command that this process is.

    A package calls it when it is imported, so that it also holds while a command's other imports
    are under way. Only `python -m` imports a package with "-m" in the program's place: programs
    that use the package for something else keep their own ways.
    """
    if sys.argv[:1] != ["-m"] or sys.excepthook is not sys.__excepthook__:
        return
    sys.excepthook = _end


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        raise SystemExit(EXIT_CODE)
    sys.__excepthook__(kind, error, trace)
