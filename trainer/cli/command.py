"""The frame of a command of the trainer, and of one whose settings are `key=value` words."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from pipelines.command import CommandParser, Outcome, add_answer_options, command_parser, run
from pipelines.console import as_typed
from trainer.cli.settings_page import ExplainAction, settings_page
from trainer.errors import is_user_error
from trainer.log_lines import show_logs
from trainer.storage.errors import CheckpointError

C = TypeVar("C")

TO_LEAVE_S = 30.0
"""What a driver gets beyond its last checkpoint: to tell, and to end its workers."""


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


def is_refusal(error: Exception) -> bool:
    """Tell whether an error is the user's or the store's, and has a message for people."""
    return is_user_error(error) or isinstance(error, CheckpointError)


def run_logged(
    parse: Callable[[Sequence[str]], argparse.Namespace],
    make: Callable[[argparse.Namespace], Outcome],
    arguments: Sequence[str] | None,
) -> int:
    """Run a command as `pipelines.command.run` does, and show what is logged meanwhile."""
    with show_logs():
        return run(parse, make, arguments, is_refusal=is_refusal)


def run_command(
    kind: type[C],
    make: Callable[[C], Outcome],
    arguments: Sequence[str] | None = None,
    *,
    module: str,
    description: str,
    example: str,
) -> int:
    """Read the settings, do the work, and answer.

    Args:
        kind: Dataclass of the settings.
        make: What the command does.
        arguments: Command line without the program's name; None takes the process's own.
        module: Name of its module, for help.
        description: Text for help.
        example: Settings that are enough, shown when one is missing.

    Returns:
        The exit code: what the command says, or 2 for settings or a checkpoint that cannot be used.
    """
    parser = command_parser(module, description=description, epilog=settings_epilog(kind))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--explain", action=ExplainAction, kind=lambda: kind)
    return run_logged(
        lambda words: parse_settings(parser, words),
        lambda options: make(read_settings(kind, options.overrides, f"{parser.prog} {example}")),
        arguments,
    )


def run_subcommands(
    commands: Mapping[str, Subcommand[Any]],
    arguments: Sequence[str] | None = None,
    *,
    module: str,
    description: str,
) -> int:
    """Do one of several things with what a URI names, and answer.

    The command line is `NAME URI [key=value …]`; a setting that is true or false may also be given
    as `--key`.

    Args:
        commands: The things to do, by name.
        arguments: Command line without the program's name; None takes the process's own.
        module: Name of the command's module, for help.
        description: Text for help.

    Returns:
        The exit code: what the sub-command says, or 2 for settings or a checkpoint that cannot be
        used.
    """
    parser = command_parser(module, description=description)
    subparsers = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    for name, command in commands.items():
        subparser = subparsers.add_parser(
            name,
            help=command.summary,
            description=as_typed(command.description),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=settings_epilog(command.kind),
        )
        subparser.add_argument("--explain", action=ExplainAction, kind=partial(_kind, command))
        subparser.add_argument("uri", metavar="URI")
        subparser.add_argument("overrides", nargs="*", metavar="key=value")
        for key in _flags(command.kind):
            subparser.add_argument(f"--{key}", action="store_true", help=f"the same as {key}=true")
        add_answer_options(subparser, default=argparse.SUPPRESS)

    def make(options: argparse.Namespace) -> Outcome:
        command = commands[options.name]
        example = f"{parser.prog} {options.name} {command.example}"
        return command.make(read_settings(command.kind, options.overrides, example))

    return run_logged(lambda words: _parse_subcommand(parser, words, commands), make, arguments)


def parse_settings(parser: CommandParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse a command line whose `overrides` may stand before, between and behind its flags."""
    options, rest = parser.parse_known_args(words)
    if flags := [word for word in rest if word.startswith("-")]:
        name = flags[0].lstrip("-").partition("=")[0].replace("-", "_")
        told = f"; a setting is written without dashes, {name}=VALUE" if name else ""
        parser.error(f"unrecognized arguments: {' '.join(flags)}{told}")
    # It was a setting of `checkpoints list`, and is understood everywhere.
    given = [*options.overrides, *rest]
    options.json |= any(word.lower() == "json=true" for word in given)
    options.overrides = [word for word in given if word.lower() not in ("json=true", "json=false")]
    return options


def _parse_subcommand(
    parser: CommandParser, words: Sequence[str], commands: Mapping[str, Subcommand[Any]]
) -> argparse.Namespace:
    """Parse the words of one of several commands; all its settings become `overrides`."""
    options = parse_settings(parser, words)
    kind = commands[options.name].kind
    if options.uri.partition("=")[0].partition(".")[0] in {*typing.get_type_hints(kind), "json"}:
        parser.error(f"the URI comes before the settings: {options.name} URI {options.uri}")
    flags = [f"{key}=true" for key in _flags(kind) if vars(options)[key]]
    options.overrides = [f"uri={options.uri}", *options.overrides, *flags]
    return options


def read_settings(kind: type[C], overrides: Sequence[str], example: str) -> C:
    """Read the settings of a command from its words.

    Args:
        kind: Dataclass of the settings.
        overrides: The words, `key=value`.
        example: A command line that is enough, for the error where a setting is missing.

    Raises:
        ConfigError: A word is none, or a setting is missing or cannot have that value.
    """
    # Not for those who refuse their words, or ask for help.
    from trainer.config.composition import MissingSettingError, parse_words
    from trainer.config.reading import ConfigError

    try:
        return parse_words(kind, overrides)
    except MissingSettingError as error:
        raise ConfigError(f"{error}, for example: {example}") from error


def _flags(kind: type[Any]) -> list[str]:
    return [key for key, wanted in typing.get_type_hints(kind).items() if wanted is bool]


def settings_epilog(kind: type[Any]) -> str:
    """Return what the help of a command says of its settings."""
    return f"settings and their defaults (null is None):\n{settings_page(kind)}"


def _kind(command: Subcommand[Any]) -> type[Any]:
    return command.kind
