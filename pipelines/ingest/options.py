"""Options that the commands share which write datasets, and what becomes of them."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.addresses import find_path_fault
from pipelines.command import Outcome
from pipelines.console import say, visible
from pipelines.errors import IngestSettingError
from pipelines.index import parse_index
from pipelines.ingest.about import read_about
from pipelines.ingest.listing import Listing, hold_out
from pipelines.ingest.plan import Plan, WriteConfig, carry_out, check_seed
from pipelines.source import Source, SourceConfig, is_url


def local_path(text: str) -> Path:
    """Read a path of this machine, as the type of an argument.

    Raises:
        ArgumentTypeError: It is an address, perhaps one with credentials.
    """
    if fault := find_path_fault(text):
        raise argparse.ArgumentTypeError(fault)
    return Path(text)


def add_target(parser: argparse.ArgumentParser) -> None:
    """Declare the place that is written to, which comes after the source."""
    parser.add_argument("prefix", help="local folder or s3:// URL; /train and /test are added")


class _Renamed(argparse.Action):
    """An option's old name, which is understood for one release."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        new = f"--{self.dest.replace('_', '-')}"
        say(f"note: {option_string} is called {new} now", to=sys.stderr)
        setattr(namespace, self.dest, values)


def add_writing_options(
    parser: argparse.ArgumentParser,
    *,
    workers: int | None = 2,
    workers_help: str = "processes (%(default)s)",
) -> None:
    """Declare how a dataset is written; see `writing_settings`."""
    default = WriteConfig()
    parser.add_argument("--workers", type=int, default=workers, help=workers_help)
    parser.add_argument(
        "--shard-mib", type=int, default=default.shard_bytes >> 20, help="(%(default)s)"
    )
    parser.add_argument(
        "--max-skipped-fraction",
        type=float,
        default=default.max_skipped_fraction,
        help="fraction of the images or arrays that may be damaged (%(default)s)",
    )
    parser.add_argument(
        "--max-skipped-share",
        type=float,
        dest="max_skipped_fraction",
        action=_Renamed,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--work-dir",
        type=local_path,
        default=default.work_dir,
        help="for unfinished shards of a remote dataset (%(default)s)",
    )


def writing_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Take the fields of `WriteConfig`, but for the processes, from a parsed command line."""
    return {
        "shard_bytes": options.shard_mib << 20,
        "max_skipped_fraction": options.max_skipped_fraction,
        "work_dir": options.work_dir,
    }


Add = Callable[..., argparse.Action]
"""`add_argument` of a parser, or of a group."""


def add_hold_out(add: Add) -> tuple[argparse.Action, ...]:
    """Declare what of a source goes to the split test."""
    return (
        add(
            "--hold-out",
            type=float,
            default=0.0,
            help="share of each class that goes to the split test (%(default)s)",
        ),
        add("--seed", type=int, default=0, help="of order and hold-out (%(default)s)"),
    )


def add_classes(add: Add) -> tuple[argparse.Action, ...]:
    """Declare the split that is written, and the names of its classes."""
    return (
        add("--split", default="train", help="split to write (%(default)s)"),
        add("--classes", type=local_path, help="class names in label order, one a line"),
    )


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Where what a source holds goes: one split, or one and what is held out of it.

    Attributes:
        root: Local folder or URL above the splits.
        split: Name of the split that is written.
        hold_out: Share of each class that goes to the split test instead.
        seed: Seed of what is held out.
        what: What the source holds.
        way_out: What else could be done about classes too small to hold some of each out, as a
            part of a sentence.

    Raises:
        IngestSettingError: A number is out of its range, or what is held out would meet the rest.
        LocationError: The root is a mistyped URL.
    """

    root: str
    split: str
    hold_out: float
    seed: int
    what: str = "images"
    way_out: str = ""

    def __post_init__(self) -> None:
        is_url(self.root)  # refused before a source is listed
        check_seed(self.seed)
        if not 0 <= self.hold_out < 1:
            raise IngestSettingError(f"--hold-out {self.hold_out} must lie in [0, 1).")
        if self.hold_out and self.split == "test":
            raise IngestSettingError(
                f"--hold-out {self.hold_out} goes to the split test, where the other {self.what} "
                "go too. Write them to another split, or leave --hold-out away."
            )

    @classmethod
    def from_options(
        cls, options: argparse.Namespace, *, split: str, what: str = "images", way_out: str = ""
    ) -> "Splits":
        """Take what `add_target` and `add_hold_out` declare from a parsed command line."""
        return cls(
            root=options.prefix.rstrip("/"),
            split=split,
            hold_out=options.hold_out,
            seed=options.seed,
            what=what,
            way_out=way_out,
        )

    def divide(self, listing: Listing) -> dict[str, Listing]:
        """Say what goes to which prefix.

        Raises:
            IngestSettingError: A split would be empty.
        """
        if not self.hold_out:
            return {f"{self.root}/{self.split}": listing}
        kept, held = hold_out(listing, fraction=self.hold_out, seed=self.seed)
        for split, part in ((self.split, kept), ("test", held)):
            if not part.images:
                raise IngestSettingError(
                    f"--hold-out {self.hold_out} leaves no {self.what} for {split}: of the "
                    f"{len(listing.images)} {self.what} of {len(listing.classes)} classes it takes "
                    f"the share of each class, rounded. Choose another share{self.way_out}; "
                    "nothing was written."
                )
        return {f"{self.root}/{self.split}": kept, f"{self.root}/test": held}


def carry_out_all(plans: Sequence[Plan]) -> Outcome:
    """Write datasets, and answer with them."""
    carry_out(plans, report=say)
    prefixes = [plan.prefix for plan in plans]
    told = f"complete: {visible(', '.join(prefixes))}"
    return Outcome(told, partial(describe_datasets, prefixes))


def describe_datasets(prefixes: Sequence[str]) -> dict[str, Any]:
    """Read what finished datasets say of themselves, for programs."""
    described = []
    for prefix in prefixes:
        source = Source(prefix, config=SourceConfig())
        shards = parse_index(source.read_index(), prefix=source.prefix)
        about = read_about(prefix)
        described.append(
            {
                "prefix": prefix,
                "shards": len(shards),
                "size_bytes": sum(shard.size_bytes for shard in shards),
                "samples": sum(shard.samples for shard in shards),
                "classes": about and about.classes,
                "skipped": about and about.skipped,
                "passed_over": about and about.passed_over,
            }
        )
    return {"datasets": described}
