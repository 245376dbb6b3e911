"""The console script `lapflow`, and `python -m trainer`: all commands under one name."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from pipelines.formats import format_table


class _Command(NamedTuple):
    """A command: the module whose `main` it is, and one line for the help."""

    module: str
    summary: str


COMMANDS = {
    "train": _Command("trainer.cli.launch", "train a model, or continue a run"),
    "sample": _Command("trainer.cli.sample", "draw a grid of samples from a checkpoint"),
    "inpaint": _Command("trainer.cli.inpaint", "fill in what is missing of a picture"),
    "evaluate": _Command("trainer.cli.evaluate", "measure checkpoints against held-out images"),
    "checkpoints": _Command(
        "trainer.cli.checkpoints", "list, verify, export and prune the checkpoints of a run"
    ),
    "plan": _Command("trainer.cli.plan", "predict what each placement of the experts costs"),
    "ui": _Command("trainer.cli.ui", "show runs as MLflow's pages"),
    "compare-losses": _Command(
        "trainer.cli.compare_losses", "tell whether two runs have the same losses"
    ),
    "doctor": _Command("trainer.cli.doctor", "look at what is installed"),
    "ingest": _Command("pipelines.ingest.__main__", "write a dataset of images, or check one"),
    "ingest-latents": _Command(
        "trainer.cli.latents", "encode the images of a dataset once, or take in latents"
    ),
}
"""All commands, by the word that chooses one."""


def main(arguments: Sequence[str] | None = None, *, prog: str = "lapflow") -> int:
    """Run the command that the first word names, which alone is imported.

    Args:
        arguments: Command line without the program's name; None takes the process's own.
        prog: The program's name, for help.

    Returns:
        The command's exit code.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    name = _parser(prog).parse_args(words[:1]).command
    command = importlib.import_module(COMMANDS[name].module)
    code: int = command.main(words[1:], prog=f"{prog} {name}")
    return code


def _parser(prog: str) -> argparse.ArgumentParser:
    listed = format_table([(f"  {name}", each.summary) for name, each in COMMANDS.items()])
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} COMMAND ...",
        description="Train LapFlow, and work with what it has trained.",
        epilog=f"commands:\n{listed}\n\n{prog} COMMAND --help says more of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    return parser
