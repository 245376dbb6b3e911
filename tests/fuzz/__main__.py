"""The command `python -m tests.fuzz`."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from pipelines.console import say

_DESCRIPTION = """\
Attack the program by chance and count what becomes of it: damage to everything that a finished run
leaves, hostile input of every kind, kills at random times.

  python -m tests.fuzz --seconds 600
  python -m tests.fuzz --seconds 60 --only damage
  python -m tests.fuzz --seed 7 --only damage --try 123        one try again, and what was said

A try is detected (a clear error or a warning, and the right result afterwards), harmless (the
result is the same to the bit, or right by another reading), wrong (another result without a word)
or raw (a foreign exception, a crash, a hang). See docs/fuzz.md.

exit codes: 0 nothing was wrong or raw, 1 something was, 2 the arguments cannot be used"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    # Costs seconds to import, which help does not need.
    from tests.fuzz.campaign import Campaign, tasks_of
    from tests.fuzz.kinds import KINDS
    from tests.fuzz.material import Material, make_material

    if options.only not in (None, *KINDS):
        say(f"error: --only {options.only}: choose among {', '.join(KINDS)}", to=sys.stderr)
        return 2
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    say(f"seed {seed}")
    began = time.monotonic()
    # What hung may still write while it is ended.
    with tempfile.TemporaryDirectory(prefix="lapflow-fuzz-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "tries").mkdir()
        if options.material is None:
            (folder / "material").mkdir()
            material = make_material(folder / "material", report=say)
        else:
            material = Material(options.material)
        campaign = Campaign(
            material,
            folder=folder / "tries",
            seed=seed,
            at_once=options.at_once,
            report=say,
        )
        say("reading what is undamaged, to compare with")
        campaign.learn()
        tasks = tasks_of(seed, only=options.only, first=options.number or 0)
        if options.number is not None:
            tasks = islice(tasks, 1)
        campaign.run(tasks, seconds=options.seconds, most=options.tries)
    tally = campaign.tally
    if options.json is not None:
        values = tally.to_dict(seconds=time.monotonic() - began)
        options.json.write_text(f"{json.dumps(values, indent=2)}\n")
    say(f"\n{tally.table()}\n")
    say(f"seed {seed}, {tally.tried:,} tries in {time.monotonic() - began:.0f} s")
    if tally.findings:
        say("\n" + "\n\n".join(each.text() for each in tally.findings), to=sys.stderr)
    return 1 if tally.findings else 0


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
