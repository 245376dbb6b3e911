"""The frame of every command: its parser, and its answer as text, as JSON, or after events."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn, TextIO

from pipelines.addresses import hide_credentials
from pipelines.console import as_typed, say_error, speak_as_command, typed, visible, write

REFUSED = 2
_INTERRUPTED = 130


@dataclass(frozen=True)
class Outcome:
    """What a command answers.

    Attributes:
        text: For people; "" is nothing.
        values: The same for programs: a mapping of what `plain_values` knows, or what makes one if
            it costs something.
        exit_code: Of the process.
        error: What went wrong, which is told below the text.
        then: What is still to do once the answer is out.
        verbatim: The text is a file for another program, of which each character counts.
    """

    text: str
    values: Mapping[str, Any] | Callable[[], Mapping[str, Any]] = field(default_factory=dict)
    exit_code: int = 0
    error: str = ""
    then: Callable[[], object] | None = None
    verbatim: bool = False


def plain_values(value: Any) -> Any:
    """Return what JSON can hold: a dataclass as an object, null for a number that is not finite."""
    if is_dataclass(value):
        return {each.name: plain_values(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_values(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


class _Answers:
    """Where the one JSON object of this process goes; None as long as people are answered.

    With events it is the last of several, one in each line.
    """

    stream: TextIO | None = None
    wanted = False
    with_events = False


class CommandParser(argparse.ArgumentParser):
    """Parser of a command, whose help is laid out and whose errors are answers too."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the words, and end."""
        _answer_error(message, REFUSED)
        super().error(visible(_without_credentials(message)))


def command_parser(module: str, *, description: str, epilog: str | None = None) -> CommandParser:
    """Return the parser of a command, whose help calls commands as they were typed.

    Args:
        module: Module that `python -m` runs.
        description: Text of the help, whose examples call `python -m` and modules.
        epilog: What follows the options.
    """
    parser = CommandParser(
        prog=typed(module),
        description=as_typed(description),
        epilog=as_typed(epilog or "") or None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_answer_options(parser, default=False)
    return parser


def add_answer_options(parser: argparse.ArgumentParser, *, default: Any) -> None:
    """Declare how a command answers.

    Args:
        parser: The command's.
        default: Of both; a sub-command suppresses it, for the command has one.
    """
    group = parser.add_argument_group("answers (docs/first-steps.md#answers)")
    group.add_argument(
        "--json", action="store_true", default=default, help="one JSON object on standard output"
    )
    group.add_argument(
        *("-q", "--quiet"),
        action="store_true",
        default=default,
        help="nothing but the answer, warnings and errors",
    )


def run(
    parse: Callable[[Sequence[str]], argparse.Namespace],
    make: Callable[[argparse.Namespace], Outcome],
    arguments: Sequence[str] | None,
    *,
    is_refusal: Callable[[Exception], bool],
) -> int:
    """Parse a command line, do what it says, and give the answer as it wants it.

    Args:
        parse: Parses the words; the options have `json` and `quiet`.
        make: What the command does.
        arguments: Command line without the program's name; None takes the process's own.
        is_refusal: Whether an error is one of the user's, which has a message for them.

    Returns:
        The exit code: what the command says, or 2 for what it refuses.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    with _answer_alone("--json" in words, with_events="--events" in words):
        options = parse(words)
    events = getattr(options, "events", False)
    with _answer_alone(options.json, with_events=events), speak_as_command(quiet=options.quiet):
        try:
            outcome = make(options)
        except KeyboardInterrupt:
            _answer_error("interrupted", _INTERRUPTED)
            raise
        except Exception as error:
            if not is_refusal(error):
                _answer_error(f"{type(error).__name__}: {error}", 1)
                raise
            outcome = Outcome("", exit_code=REFUSED, error=str(error))
        answer(outcome)
        return outcome.exit_code


def answer(outcome: Outcome) -> None:
    """Give the answer, on standard output."""
    if _Answers.wanted:
        made = outcome.values() if callable(outcome.values) else outcome.values
        values = plain_values(made)
        if error := outcome.error or values.get("error"):
            values["error"] = _without_credentials(error)
        _write_answer({**values, "exit_code": outcome.exit_code})
    elif outcome.text:
        write(outcome.text, sys.stdout, verbatim=outcome.verbatim)
    if outcome.error:
        say_error(outcome.error)
    if outcome.then is not None:
        outcome.then()


def _answer_error(message: str, exit_code: int) -> None:
    """Answer programs; people see what is raised."""
    if _Answers.wanted:
        _write_answer({"error": _without_credentials(message), "exit_code": exit_code})


def _write_answer(values: Mapping[str, Any]) -> None:
    if _Answers.with_events:
        tell_event("answer", values)
    else:
        write(json.dumps(values, indent=2), _Answers.stream, for_programs=True)


def tell_event(event: str, values: Mapping[str, Any]) -> None:
    """Tell programs what happens, in a line of JSON, where they have asked for events.

    Args:
        event: What it is; the last one of a command is "answer", the others carry their time.
        values: More of it, of what `plain_values` knows.
    """
    if _Answers.with_events:
        told = {
            name: _without_credentials(value) if isinstance(value, str) else plain_values(value)
            for name, value in values.items()
        }
        if event != "answer":
            told = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **told}
        line = json.dumps({"event": event, **told})
        write(line, _Answers.stream, for_programs=True)


def _without_credentials(error: str) -> str:
    return hide_credentials(as_typed(error))


@contextmanager
def _answer_alone(alone: bool, *, with_events: bool) -> Iterator[None]:
    """Keep standard output for the answer in a `with` block, and send all else to standard error.

    That holds for what other libraries and other processes write there too, which know the file
    descriptor alone.
    """
    if not alone and not with_events:
        yield
        return
    with _kept_stdout() as stream, redirect_stdout(sys.stderr):
        _Answers.stream, _Answers.wanted, _Answers.with_events = stream, True, with_events
        try:
            yield
        finally:
            _Answers.stream, _Answers.wanted, _Answers.with_events = None, False, False


@contextmanager
def _kept_stdout() -> Iterator[TextIO | None]:
    """Give what standard output was, while its descriptor is that of standard error."""
    stream = sys.stdout
    number = None
    with suppress(AttributeError, OSError, ValueError):
        number = stream.fileno()
    if number != 1:  # closed, or another object for the length of a test
        yield stream
        return
    stream.flush()
    with open(os.dup(1), "w", encoding=stream.encoding, errors="backslashreplace") as kept:
        with suppress(OSError):
            os.dup2(2, 1)
        try:
            yield kept
        finally:
            os.dup2(kept.fileno(), 1)
