"""Commands that write and check datasets: ``python -m pipelines.ingest COMMAND --help``."""

import argparse
import sys
from collections.abc import Sequence

from pipelines.console import command_parser, say, say_error
from pipelines.errors import DataError
from pipelines.ingest import digits, huggingface, image_folder, verify

_REFUSED = 2


def main(arguments: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Command line without the program's name; None takes the process's own.
        prog: What was typed for the command; None is `python -m` and its module.

    Returns:
        Exit status: 0 done, 1 verified and found bad, 2 refused.
    """
    parser = command_parser(
        "pipelines.ingest",
        prog=prog,
        description="Write and check datasets.",
        epilog="python -m pipelines.ingest.latents --help: encode the images of a dataset once.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in (
        ("image-folder", image_folder),
        ("huggingface", huggingface),
        ("digits", digits),
        ("verify", verify),
    ):
        command = commands.add_parser(
            name,
            description=module.__doc__,
            help=(module.__doc__ or "").split("\n")[0],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options, say)
    except DataError as error:
        say_error(error)
        return _REFUSED
    return status


if __name__ == "__main__":
    sys.exit(main())
