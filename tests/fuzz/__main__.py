"""The command `python -m tests.fuzz`."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.console import say, speak_as_command

if TYPE_CHECKING:
    from tests.fuzz.table import Tally

_DESCRIPTION = """\
Attack the program by chance and count what becomes of it: damage to everything that a finished run
or a broken ingest leaves, documents changed and sealed again, hostile input of every kind, kills.

  python -m tests.fuzz --seconds 600
  python -m tests.fuzz --seconds 60 --only damage
  python -m tests.fuzz --seed 7 --only damage --try 123        one try again, and what was said

A try is detected (a clear error or a warning, and the right result afterwards), harmless (the
result is the same to the bit, or right by another reading), wrong (another result without a word)
or raw (a foreign exception, a crash, a hang). See docs/fuzz.md.

Ctrl-C ends the tries, and shows what was counted until then.

exit codes: 0 nothing was wrong or raw, 1 something was, 2 the arguments cannot be used, 3 the tool
itself failed, 130 interrupted"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    # Costs seconds to import, which help does not need.
    from tests.fuzz.attempt import ToolError
    from tests.fuzz.kinds import KINDS
    from tests.fuzz.table import Tally

    if options.only not in (None, *KINDS):
        say(f"error: --only {options.only}: choose among {', '.join(KINDS)}", to=sys.stderr)
        return 2
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    say(f"seed {seed}")
    tally = Tally(seed)
    began = time.monotonic()
    interrupted = False
    failed: ToolError | None = None
    try:
        # What hung may still write while it is ended.
        with (
            speak_as_command(quiet=False),
            tempfile.TemporaryDirectory(prefix="lapflow-fuzz-", ignore_cleanup_errors=True) as name,
        ):
            _try(options, tally, Path(name))
    except KeyboardInterrupt:
        interrupted = True
    except ToolError as error:  # what was counted until then stays worth reading
        failed = error
    if options.json is not None:
        values = tally.to_dict(seconds=time.monotonic() - began)
        options.json.write_text(f"{json.dumps(values, indent=2)}\n")
    say(f"\n{tally.table()}\n")
    ended = ", interrupted" if interrupted else ""
    say(f"seed {seed}, {tally.tried:,} tries in {time.monotonic() - began:.0f} s{ended}")
    if tally.findings:
        say("\n" + "\n\n".join(each.text() for each in tally.findings), to=sys.stderr)
    if failed is not None:
        say(f"\nThe tool itself failed; nothing is said of the program:\n{failed}", to=sys.stderr)
        return 3
    if interrupted:
        return 128 + signal.SIGINT
    return 1 if tally.findings else 0


def _try(options: argparse.Namespace, tally: Tally, folder: Path) -> None:
    """Make what is to be attacked, attack it, and count."""
    from tests.fuzz.campaign import Campaign, tasks_of
    from tests.fuzz.material import Material, make_material

    (folder / "tries").mkdir()
    if options.material is None:
        (folder / "material").mkdir()
        material = make_material(folder / "material", report=say)
    else:
        material = Material(options.material)
    campaign = Campaign(
        material, folder=folder / "tries", tally=tally, at_once=options.at_once, report=say
    )
    say("reading what is undamaged, to compare with")
    campaign.learn()
    tasks = tasks_of(tally.seed, only=options.only, first=options.number or 0)
    if options.number is not None:
        tasks = islice(tasks, 1)
    campaign.run(tasks, seconds=options.seconds, most=options.tries)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=120, help="time for tries (%(default)s)")
    parser.add_argument("--tries", type=int, help="most tries")
    parser.add_argument("--seed", type=int, help="decides all tries; default: one by chance")
    parser.add_argument("--only", metavar="KIND", help="tries of one kind")
    parser.add_argument("--try", type=int, dest="number", help="this try alone")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument(
        "--at-once", type=int, default=os.cpu_count() or 1, help="tries at a time (%(default)s)"
    )
    parser.add_argument(
        "--material",
        type=Path,
        help="folder of a finished run that make_material has made, instead of a new one",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
