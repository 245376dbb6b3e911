"""The frame of a command whose settings are `key=value` words."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from pipelines.console import as_called, command_parser, say, say_error
from trainer.cli.settings_page import ExplainAction, settings_page
from trainer.config.composition import MissingSettingError, configured
from trainer.errors import is_user_error
from trainer.log_lines import show_logs
from trainer.storage.errors import CheckpointError

C = TypeVar("C")


class Outcome(NamedTuple):
    """What a sub-command has to say, and its exit code."""

    text: str
    exit_code: int = 0


@dataclass(frozen=True, kw_only=True)
class Subcommand(Generic[C]):
    """One of the things that a command does with what a URI names.

    Attributes:
        kind: Dataclass of the settings; its `uri` is the first word.
        make: What is done.
        summary: One line for the command's help.
        description: Text for its own help.
        example: URI and settings that are enough, shown when one is missing.
    """

    kind: type[C]
    make: Callable[[C], Outcome]
    summary: str
    description: str
    example: str


def run_command(
    kind: type[C],
    make: Callable[[C], Outcome | Path | str],
    *,
    module: str,
    description: str,
    example: str,
    arguments: Sequence[str] | None,
    prog: str | None,
) -> int:
    """Read the settings, do the work, and print what it gives: where a file is, or a text.

    Args:
        kind: Dataclass of the settings.
        make: What the command does.
        module: Name of its module, for help.
        description: Text for help.
        example: Settings that are enough, shown when one is missing.
        arguments: Command line without the program's name; None takes the process's own.
        prog: What was typed for the command; None is `python -m` and its module.

    Returns:
        The exit code: what the command says or 0, or 2 for settings or a checkpoint that cannot be
        used.
    """

    def outcome(config: C) -> Outcome:
        made = make(config)
        return made if isinstance(made, Outcome) else Outcome(f"{made}")

    parser = command_parser(module, prog=prog, description=description, epilog=_settings(kind))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--explain", action=ExplainAction, kind=lambda: kind)
    overrides = parser.parse_args(arguments).overrides
    return _answered(kind, outcome, overrides, f"{parser.prog} {example}")


def run_subcommands(
    commands: Mapping[str, Subcommand[Any]],
    *,
    module: str,
    description: str,
    arguments: Sequence[str] | None,
    prog: str | None,
) -> int:
    """Do one of several things with what a URI names, and print what it gives.

    The command line is `NAME URI [key=value …]`; a setting that is true or false may also be given
    as `--key`.

    Args:
        commands: The things to do, by name.
        module: Name of the command's module, for help.
        description: Text for help.
        arguments: Command line without the program's name; None takes the process's own.
        prog: What was typed for the command; None is `python -m` and its module.

    Returns:
        The exit code: what the sub-command says, or 2 for settings or a checkpoint that cannot be
        used.
    """
    parser = command_parser(module, prog=prog, description=description)
    subparsers = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    for name, command in commands.items():
        types = typing.get_type_hints(command.kind)
        subparser = subparsers.add_parser(
            name,
            help=command.summary,
            description=as_called(command.description, module=module, prog=parser.prog),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=_settings(command.kind),
        )
        subparser.add_argument("--explain", action=ExplainAction, kind=partial(_kind, command))
        subparser.add_argument("uri", metavar="URI")
        subparser.add_argument("overrides", nargs="*", metavar="key=value")
        for key in (key for key, kind in types.items() if kind is bool):
            subparser.add_argument(f"--{key}", action="store_true", help=f"the same as {key}=true")
    # Words after a flag are left over by argparse, which expects all of them together.
    options, rest = parser.parse_known_args(arguments)
    if flags := [word for word in rest if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    command = commands[options.name]
    types = typing.get_type_hints(command.kind)
    if options.uri.partition("=")[0].partition(".")[0] in types:
        parser.error(f"the URI comes before the settings: {options.name} URI {options.uri}")
    flags = [f"{key}=true" for key, kind in types.items() if kind is bool and vars(options)[key]]
    return _answered(
        command.kind,
        command.make,
        [f"uri={options.uri}", *options.overrides, *rest, *flags],
        f"{parser.prog} {options.name} {command.example}",
    )


def _settings(kind: type[Any]) -> str:
    return f"settings and their defaults (null is None):\n{settings_page(kind)}"


def _kind(command: Subcommand[Any]) -> type[Any]:
    return command.kind


@show_logs()
def _answered(
    kind: type[C], make: Callable[[C], Outcome], overrides: Sequence[str], example: str
) -> int:
    try:
        made = make(configured(kind, overrides))
    except (CheckpointError, ValueError) as error:
        if not is_user_error(error) and not isinstance(error, CheckpointError):
            raise
        missing = isinstance(error, MissingSettingError)
        hint = f", for example: {example}" if missing else ""
        say_error(f"{error}{hint}")
        return 2
    say(made.text)
    return made.exit_code
