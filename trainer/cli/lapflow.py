"""The console script `lapflow`, and `python -m trainer`: all commands under one name."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from pipelines.command import CommandParser
from pipelines.console import typed_as
from pipelines.formats import format_table


class _Command(NamedTuple):
    """A command: what `python -m` runs, and one line for the help."""

    module: str
    summary: str


COMMANDS = {
    "train": _Command("trainer.launch", "train a model, or continue a run"),
    "sample": _Command("trainer.sample", "draw samples from a checkpoint: a grid, or a set"),
    "inpaint": _Command("trainer.inpaint", "fill in what is missing of a picture"),
    "evaluate": _Command("trainer.evaluate", "measure checkpoints against held-out images"),
    "checkpoints": _Command(
        "trainer.checkpoints", "list, verify, export and prune the checkpoints of a run"
    ),
    "plan": _Command("trainer.plan", "predict what each placement of the experts costs"),
    "jobs": _Command("cluster.jobs", "send a job to a Ray cluster, follow it, stop it"),
    "manifests": _Command(
        "cluster.manifests", "write what Kubernetes, Slurm or AWS need to run a job"
    ),
    "ui": _Command("trainer.ui", "show runs as MLflow's pages"),
    "track": _Command("trainer.track", "send MLflow what it has not taken of a run"),
    "report": _Command("trainer.report", "write a page about runs, to read and to attach"),
    "compare-losses": _Command(
        "trainer.compare_losses", "tell whether two runs have the same losses"
    ),
    "doctor": _Command("trainer.doctor", "look at what is installed"),
    "ingest": _Command("pipelines.ingest", "write a dataset of images, or check one"),
    "ingest-latents": _Command(
        "pipelines.ingest.latents", "encode the images of a dataset once, or take in latents"
    ),
}
"""All commands, by the word that chooses one."""


def main(arguments: Sequence[str] | None = None, *, prog: str = "lapflow") -> int:
    """Run the command that the first word names, which alone is imported.

    Args:
        arguments: Command line without the program's name; None takes the process's own.
        prog: The program's name, by which help and errors call all commands.

    Returns:
        The command's exit code.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    module = COMMANDS[_parser(prog).parse_args(words[:1]).command].module
    with typed_as({each.module: f"{prog} {name}" for name, each in COMMANDS.items()}):
        is_file = module.startswith("trainer.")  # the others are folders
        command = importlib.import_module(module if is_file else f"{module}.__main__")
        code: int = command.main(words[1:])
    return code


def _parser(prog: str) -> argparse.ArgumentParser:
    listed = format_table([(f"  {name}", each.summary) for name, each in COMMANDS.items()])
    parser = CommandParser(
        prog=prog,
        usage=f"{prog} COMMAND ...",
        description="Train LapFlow, and work with what it has trained.",
        epilog=f"commands:\n{listed}\n\n{prog} COMMAND --help says more of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    return parser
