"""The command that lists, verifies, exports and prunes the checkpoints of a run."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from pydantic import Field

from pipelines.command import Outcome
from pipelines.console import say, visible
from pipelines.domains import Checked
from pipelines.formats import format_bytes, format_count
from trainer.checkpoint.errors import DamagedCheckpoint
from trainer.checkpoint.retention import CheckpointListing, DeletionPlan
from trainer.cli.checkpoint_table import STATES, Entry, table
from trainer.cli.command import Subcommand, run_subcommands
from trainer.cli.run_handle import RetentionSettings, RunHandle, open_run, retained_checkpoints
from trainer.config.reading import ConfigError
from trainer.export.config import ExportSettings
from trainer.storage.store import StoreConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ExportSettings):
    """Which checkpoint to export, and what of it.

    Attributes:
        uri: URI of a checkpoint, or of a run.
        choose: Images of the run's checkpoint to take; None takes the newest valid one.
        store: How to reach the store.
    """

    uri: str = field(metadata={"place": "run"})
    choose: Annotated[int, Field(ge=0)] | None = None
    store: StoreConfig = field(default_factory=StoreConfig)


def export_chosen_checkpoint(config: ExportConfig) -> Outcome:
    """Export a checkpoint, or the newest valid one of a run.

    Raises:
        ConfigError: If there is no such checkpoint, or `output` cannot be written.
        CheckpointError: If the checkpoint is damaged, or the store fails.
    """
    handle = open_run(config.uri, config.store)
    if handle.images is not None and config.choose is not None:
        raise ConfigError(
            f"choose={config.choose} needs the URI of a run, but {config.uri} is one checkpoint; "
            f"give {handle.uri}"
        )
    images = handle.images if config.choose is None else config.choose
    found = handle.list_committed(images)
    if found.newest_valid is None:
        raise DamagedCheckpoint(
            f"{config.uri} cannot be exported: {found.damaged[max(found.damaged)]}"
        )
    for newer in sorted(each for each in found.damaged if each > found.newest_valid.images):
        logger.warning(
            "passing over checkpoint %s: %s", handle.index.uri(newer), found.damaged[newer]
        )
    # Not for those who ask for help, or list what is there: it needs torch.
    from trainer.export.export import export_checkpoint

    output = export_checkpoint(handle.store, found.newest_valid, config)
    uri = handle.index.uri(found.newest_valid.images)
    values = {"output": output, "checkpoint": uri, "weights": config.weights, "file": config.file}
    return Outcome(f"{output}", values)


def list_checkpoints(config: RetentionSettings) -> Outcome:
    """List the checkpoints of a run.

    Raises:
        ConfigError: If there is no run, or no checkpoint of it.
        StoreError: If the store fails.
    """
    shown = retained_checkpoints(config)
    newest = shown.listing.newest_valid
    resume_from = None if newest is None else shown.handle.index.uri(newest.images)
    total = sum(shown.listing.sizes.values())
    lines = [
        table(shown.entries, features=shown.features),
        "",
        f"{_counts(shown.entries)}, {format_bytes(total)} in all",
        f"resume from {resume_from}" if resume_from else "there is nothing to resume from",
        *shown.notes,
    ]
    values = {
        "run": shown.handle.uri,
        "resume_from": resume_from,
        "size_bytes": total,
        "features": shown.features,
        "policy": config.kept,
        "checkpoints": shown.entries,
    }
    return Outcome("\n".join(lines), values)


def _counts(listed: Sequence[Entry]) -> str:
    found = Counter(each.state for each in listed)
    return ", ".join(f"{found[state]} {state}" for state in STATES if found[state])


@dataclass(frozen=True, kw_only=True)
class PruneConfig(RetentionSettings):
    """What to keep, and whether to delete the rest.

    Attributes:
        yes: Delete; otherwise only show.
    """

    yes: bool = False


def prune_checkpoints(config: PruneConfig) -> Outcome:
    """Show what can be deleted of a run, or delete it.

    Raises:
        ConfigError: If there is no run, or no checkpoint of it.
        StoreError: If the store fails; what is left over can go at the next time.
    """
    shown = retained_checkpoints(config)
    plan, sizes = shown.plan, shown.listing.sizes
    shown_table = table(
        shown.entries, features=shown.features, gone="deleted" if config.yes else "to be deleted"
    )
    going = (*plan.manifests, *plan.content)
    freed_bytes = sum(sizes[key] for key in going)
    freed = f"{format_bytes(freed_bytes)} of {format_bytes(sum(sizes.values()))}"
    what = format_count(len(plan.expired), "checkpoint")
    if left := _left_behind(shown.listing, plan):
        what += f" and {format_count(left, 'object')} that no checkpoint uses"
    policy = " ".join(f"{key}={value}" for key, value in config.kept.items())
    lines = [shown_table, "", f"kept by {policy}", *shown.notes]
    if config.yes:
        aborted = shown.handle.index.clear(plan)
        uploads = f", and {format_count(aborted, 'unfinished upload')}" if aborted else ""
        lines.append(f"deleted {what}{uploads}: {freed} freed")
    elif going:
        lines.append(f"would delete {what}: frees {freed}")
        lines.append("nothing was deleted; add yes=true to delete it")
    else:
        lines.append("there is nothing to delete")
    values = {
        "run": shown.handle.uri,
        "deleted": config.yes,
        "expired": plan.expired,
        "objects": len(going),
        "freed_bytes": freed_bytes,
        "policy": config.kept,
        "checkpoints": shown.entries,
    }
    return Outcome("\n".join(lines), values)


def _left_behind(listing: CheckpointListing, plan: DeletionPlan) -> int:
    """Count the objects to delete that are no part of a checkpoint that expires."""
    own = {
        entry.key
        for images in plan.expired
        if images in listing.manifests
        for entry in listing.manifests[images].objects
    }
    return len(set(plan.content) - own)


_DAMAGED = 1


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Checked):
    """What to verify.

    Attributes:
        uri: URI of a run or of one checkpoint.
        store: How to reach the store.
    """

    uri: str = field(metadata={"place": "run"})
    store: StoreConfig = field(default_factory=StoreConfig)


def verify_checkpoints(config: VerifyConfig) -> Outcome:
    """Read every byte of one checkpoint, or of all of a run.

    Returns:
        What was found, and the exit code 1 if a checkpoint is damaged.

    Raises:
        ConfigError: If there is no such checkpoint.
        StoreError: If the store fails.
    """
    handle = open_run(config.uri, config.store)
    listing = handle.list_committed(handle.images)
    damage = _damage(handle, listing)
    lines = []
    for images, problems in damage.items():
        lines.append(f"{images:>15,}  {'DAMAGED' if problems else 'whole'}")
        lines += [f"{'':17}{visible(problem)}" for problem in problems]
    whole = [images for images, problems in damage.items() if not problems]
    number = len(damage) - len(whole)
    lines += ["", f"{len(whole)} whole to the last byte, {number} damaged"]
    if number:
        lines += _advice(handle, newest=max(whole, default=None))
    checkpoints = [
        {"images": images, "uri": handle.index.uri(images), "whole": not found, "problems": found}
        for images, found in damage.items()
    ]
    values = {"run": handle.uri, "damaged": number, "checkpoints": checkpoints}
    return Outcome("\n".join(lines), values, _DAMAGED if number else 0)


def _damage(handle: RunHandle, listing: CheckpointListing) -> dict[int, list[str]]:
    """Return what is wrong with each checkpoint, oldest first."""
    # Not for those who ask for help, or list what is there: it needs torch.
    from trainer.checkpoint.content import ReadProgress, damaged_objects

    total = sum(each.size_bytes for found in listing.manifests.values() for each in found.objects)
    damage = {}
    with ReadProgress(total, report=partial(say, to=sys.stderr), what=handle.run) as progress:
        for images in sorted({*listing.manifests, *listing.damaged}):
            manifest = listing.manifests.get(images)
            if manifest is None:
                problems = [listing.damaged[images]]
            else:
                problems = list(damaged_objects(handle.store, manifest, progress).values())
            if problems and not handle.index.is_committed(images):
                continue  # its run has retired it meanwhile
            damage[images] = problems
    return damage


def _advice(handle: RunHandle, *, newest: int | None) -> list[str]:
    """Say what to do about damage."""
    if handle.images is not None:
        left = f"look for one that is whole with {handle.uri}"
    elif newest is None:
        left = "no checkpoint of this run is whole"
    else:
        left = f"the newest that is whole, which this run resumes from: {handle.index.uri(newest)}"
    return [
        left,
        "restore the damaged objects from a copy and verify again, or delete the folder of the "
        "damaged checkpoint; and find out what damages this store",
    ]


_MODULE = "trainer.checkpoints"
_RUN = "~/lapflow/store/runs/digits"
_DESCRIPTION = f"""\
Look at the checkpoints of a run, verify, export and prune them.

  python -m {_MODULE} list {_RUN}
  python -m {_MODULE} verify s3://bucket/runs/NAME store.endpoint_url=http://HOST:PORT
  python -m {_MODULE} export {_RUN} output=digits-weights
  python -m {_MODULE} prune {_RUN} keep_last=2 keep_every_images=1000000

exit codes: 0 done, 1 verify found damage, 2 the settings or the store cannot be used"""
_LIST = f"""\
List the checkpoints of a run: what is there, what is whole as far as can be told without reading
it, why it is kept, and which one a run resumes from.

  python -m {_MODULE} list {_RUN}
  python -m {_MODULE} list {_RUN} keep_every_images=1000000 keep_best=2 features=inception
  python -m {_MODULE} list {_RUN} --json

A run does not record what it keeps: give keep_last, keep_every_images and keep_best as it was
launched, to see what stays at its next save. Distances are those of features=EXTRACTOR; without it,
of the extractor that most checkpoints were measured with."""
_VERIFY = f"""\
Read every byte of all checkpoints of a run, or of one, and compare it with the manifest.

  python -m {_MODULE} verify {_RUN}
  python -m {_MODULE} verify {_RUN}/checkpoints/000000256000

exit codes: 0 all are whole, 1 one is damaged, 2 they cannot be read"""
_EXPORT = f"""\
Write the weights of a checkpoint, of a run its newest valid one, for other programs.

  python -m {_MODULE} export {_RUN} output=digits-weights
  python -m {_MODULE} export {_RUN} output=digits-weights choose=256000 weights=both
  python -m {_MODULE} export {_RUN} output=digits.safetensors file=safetensors"""
_PRUNE = f"""\
Show what can be deleted, and why the rest stays; delete it with yes=true.

  python -m {_MODULE} prune {_RUN} keep_last=1
  python -m {_MODULE} prune {_RUN} keep_last=1 keep_best=2 features=inception yes=true

The newest valid checkpoint is never deleted, nor what may belong to a save under way. Whether a
checkpoint is valid is told without reading it: run verify first where that is not enough."""


_COMMANDS: dict[str, Subcommand[Any]] = {
    "list": Subcommand(
        kind=RetentionSettings,
        make=list_checkpoints,
        summary="what is there, what is whole, why it is kept, what a run resumes from",
        description=_LIST,
        example=_RUN,
    ),
    "verify": Subcommand(
        kind=VerifyConfig,
        make=verify_checkpoints,
        summary="read every byte and compare it with the manifest",
        description=_VERIFY,
        example=_RUN,
    ),
    "export": Subcommand(
        kind=ExportConfig,
        make=export_chosen_checkpoint,
        summary="write the weights for other programs",
        description=_EXPORT,
        example=f"{_RUN} output=digits-weights",
    ),
    "prune": Subcommand(
        kind=PruneConfig,
        make=prune_checkpoints,
        summary="show what can be deleted, or delete it",
        description=_PRUNE,
        example=_RUN,
    ),
}

main = partial(run_subcommands, _COMMANDS, module=_MODULE, description=_DESCRIPTION)
"""Runs the command, given its words or none for the process's own, and returns its exit code."""
