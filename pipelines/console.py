"""Lines for people, written to what may be gone before the work is done; and help.

`… | head` closes the pipe, a terminal is closed, a disk fills up, a locale lacks a character. None
of it may end a run of days: what cannot be written is dropped.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
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


def command_parser(
    module: str, *, prog: str | None, description: str, epilog: str | None = None
) -> argparse.ArgumentParser:
    """Return the parser of a command, whose help is laid out and names it as it was called.

    Args:
        module: Module that `python -m` runs.
        prog: What was typed for the command; None is `python -m` and the module.
        description: Text of the help, whose examples call `python -m` and the module.
        epilog: What follows the options.
    """
    command = prog or f"python -m {module}"
    return argparse.ArgumentParser(
        prog=command,
        description=as_called(description, module=module, prog=command),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def as_called(text: str, *, module: str, prog: str) -> str:
    """Have a text's examples call a command by the name that was typed."""
    return text.replace(f"python -m {module}", prog)
