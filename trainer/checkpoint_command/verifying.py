"""Whether the checkpoints of a run are whole to the last byte."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from pipelines.console import say, visible
from trainer.checkpoint.inventory import Inventory
from trainer.checkpoint.store import StoreConfig
from trainer.checkpoint.verification import ReadProgress, damaged_objects
from trainer.checkpoint_command.run_place import RunPlace, open_run
from trainer.command import Outcome

_DAMAGED = 1


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
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
    place = open_run(config.uri, config.store)
    inventory = place.committed(place.images)
    damage = _damage(place, inventory)
    lines = []
    for images, problems in damage.items():
        lines.append(f"{images:>15,}  {'DAMAGED' if problems else 'whole'}")
        lines += [f"{'':17}{visible(problem)}" for problem in problems]
    whole = [images for images, problems in damage.items() if not problems]
    number = len(damage) - len(whole)
    lines += ["", f"{len(whole)} whole to the last byte, {number} damaged"]
    if number:
        lines += _advice(place, newest=max(whole, default=None))
    return Outcome("\n".join(lines), _DAMAGED if number else 0)


def _damage(place: RunPlace, inventory: Inventory) -> dict[int, list[str]]:
    """Return what is wrong with each checkpoint, oldest first."""
    progress = ReadProgress(
        sum(each.size_bytes for found in inventory.manifests.values() for each in found.objects),
        tell=_say,
    )
    damage = {}
    for images in sorted({*inventory.manifests, *inventory.damaged}):
        manifest = inventory.manifests.get(images)
        if manifest is None:
            problems = [inventory.damaged[images]]
        else:
            problems = list(damaged_objects(place.store, manifest, progress).values())
        if problems and not place.is_committed(images):
            continue  # its run has retired it meanwhile
        damage[images] = problems
    return damage


def _advice(place: RunPlace, *, newest: int | None) -> list[str]:
    """Say what to do about damage."""
    if place.images is not None:
        left = f"look for one that is whole with {place.uri}"
    elif newest is None:
        left = "no checkpoint of this run is whole"
    else:
        left = (
            f"the newest that is whole, which this run resumes from: {place.catalogue.uri(newest)}"
        )
    return [
        left,
        "restore the damaged objects from a copy and verify again, or delete the folder of the "
        "damaged checkpoint; and find out what damages this store",
    ]


def _say(line: str) -> None:
    say(line, to=sys.stderr)
