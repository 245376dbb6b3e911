"""The frame of a command whose settings are `key=value` words."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from trainer.checkpoint.errors import CheckpointError
from trainer.composition import MissingSettingError, settings
from trainer.mistakes import is_users_mistake
from trainer.schema import from_dict

C = TypeVar("C")


def run_command(
    kind: type[C],
    make: Callable[[C], Path | str],
    *,
    module: str,
    description: str,
    example: str,
    arguments: Sequence[str] | None,
) -> int:
    """Read the settings, do the work, and print what it gives: where a file is, or a text.

    Args:
        kind: Dataclass of the settings.
        make: What the command does.
        module: Name of its module, for help.
        description: Text for help.
        example: Settings that are enough, shown when one is missing.
        arguments: Command line without the program's name; None takes the process's own.

    Returns:
        The exit code: 0, or 2 for settings or a checkpoint that cannot be used.
    """
    annotations: dict[str, Any] = kind.__annotations__
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="settings: " + ", ".join(annotations),
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    try:
        made = make(from_dict(kind, settings(kind, options.overrides)))
    except (CheckpointError, ValueError) as error:
        if not is_users_mistake(error) and not isinstance(error, CheckpointError):
            raise
        missing = isinstance(error, MissingSettingError)
        hint = f", for example: python -m {module} {example}" if missing else ""
        sys.stderr.write(f"error: {error}{hint}\n")
        return 2
    sys.stdout.write(f"{made}\n")
    return 0
