"""The command `python -m tests.chaos`."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pipelines.console import say
from tests.chaos.campaign import Story, digest, length, plan, run_through
from tests.chaos.faults import FAULTS
from tests.chaos.picture import save_timeline
from tests.chaos.stand import run_undisturbed, stand
from tests.support.hosts import why_no_memory_limit, why_not

_DESCRIPTION = """\
Train on three hosts of this machine with a Ray cluster, have faults befall them by chance, and
compare what comes out with an undisturbed run. It takes root, about 6 GB of memory, and on two
cores about two minutes a fault.

  python -m tests.chaos --faults 20
  python -m tests.chaos --faults 3 --only "power cut" --seed 7

exit codes: 0 the run reached its goal, equal to the bit, and lost nothing that was saved; 1 it did
not; 2 the arguments cannot be used, or there can be no hosts here"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    names = options.only or tuple(FAULTS)
    if (no_limit := why_no_memory_limit()) and "memory exhausted" in names:
        say(f"without 'memory exhausted': {no_limit}")
        names = [name for name in names if name != "memory exhausted"]
    if unknown := set(names) - set(FAULTS):
        say(f"error: --only {unknown.pop()!r}: choose among {', '.join(FAULTS)}", to=sys.stderr)
        return 2
    if reason := why_not():
        say(f"error: {reason}", to=sys.stderr)
        return 2
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    say(f"seed {seed}")
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        try:
            return _campaign(options, seed, names, Path(name))
        finally:
            log = Path(name) / "driver.log"
            if options.log is not None and log.exists():
                shutil.copy(log, options.log)


def _campaign(options: argparse.Namespace, seed: int, names: Sequence[str], folder: Path) -> int:
    images = length(options.faults)
    say(f"an undisturbed run of {images:,} images, to compare with")
    undisturbed = folder / "undisturbed"
    undisturbed.mkdir()
    run_undisturbed(undisturbed, images=images)
    wanted = digest(undisturbed)
    shutil.rmtree(undisturbed)
    say("starting three hosts")
    plans = plan(seed, options.faults, names=names)
    began = time.monotonic()
    with stand(folder, images=images) as there:
        story = run_through(there, plans, images=images, seconds=options.seconds, report=say)
    if there.newest_saved() == images and (found := digest(folder)) != wanted:
        story.problems.append(f"the last checkpoint is {found}, undisturbed it is {wanted}")
    save_timeline(story, options.picture)
    if options.json is not None:
        options.json.write_text(f"{json.dumps(_values(story, seed), indent=2)}\n")
    say(f"\n{story.table()}\n")
    say(
        f"seed {seed}, {len(story.incidents)} faults in {time.monotonic() - began:.0f} s, "
        f"{images:,} images; timeline: {options.picture}"
    )
    for problem in story.problems:
        say(f"error: {problem}", to=sys.stderr)
    if not story.problems:
        say(f"equal to the undisturbed run to the bit: {wanted[:16]}")
    return 1 if story.problems else 0


def _values(story: Story, seed: int) -> dict[str, object]:
    incidents = [asdict(each) for each in story.incidents]
    for each in incidents:
        for name in ("time", "recovered"):
            each[name] = round(each[name] - story.began, 1)
    return {
        "seed": seed,
        "seconds": round(story.ended - story.began, 1),
        "incidents": incidents,
        "problems": story.problems,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description=_DESCRIPTION,
        epilog=f"faults: {', '.join(FAULTS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--faults", type=int, default=20, help="how many (%(default)s)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=3600,
        help="no fault begins after this long; the run still goes to its end (%(default)s)",
    )
    parser.add_argument("--seed", type=int, help="decides all faults; default: one by chance")
    parser.add_argument("--only", action="append", metavar="FAULT", help="these kinds alone")
    parser.add_argument(
        "--picture",
        type=Path,
        default=Path("chaos.png"),
        help="file for the timeline (%(default)s)",
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--log", type=Path, help="file for what the run said")
    return parser


if __name__ == "__main__":
    sys.exit(main())
