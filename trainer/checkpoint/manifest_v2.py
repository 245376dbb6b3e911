"""Manifests of format 2, which list the slices of each object one by one."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from graphlib import CycleError
from typing import Any

from pipelines.json_document import DocumentError
from trainer.checkpoint import distrust, layout
from trainer.checkpoint.cuts import common_order, runs_of


def upgraded(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a manifest of format 3 would hold; the reader of that one checks the rest.

    Args:
        body: The manifest, without its checksum.

    Raises:
        DocumentError: It has not the form of one.
        InvalidKey: Its names are not fit for keys.
    """
    for name in ("run", "images", "attempt", "parameters", "objects"):
        if name not in body:
            raise DocumentError(f"it lacks {name}")
    shapes = distrust.mapping(body["parameters"], "parameters")
    prefix = layout.attempt_prefix(
        distrust.text(body["run"], "run"),
        distrust.whole(body["images"], "images", low=0, high=layout.MAX_IMAGES),
        distrust.text(body["attempt"], "attempt"),
    )
    slices: dict[str, list[tuple[int, int, int]]] = {name: [] for name in shapes}
    orders: list[list[str]] = [[name] for name in shapes]
    objects = []
    for each in distrust.sequence(body["objects"], "objects"):
        entry = distrust.mapping(each, "an object")
        distrust.only_fields(entry, "key", "size_bytes", "block_sha256", "fragments")
        rank = _rank(distrust.text(entry["key"], "key"), prefix=prefix)
        held = [_slice(fragment) for fragment in distrust.sequence(entry["fragments"], "fragments")]
        for name, start, numel in held:
            if name not in shapes:
                raise DocumentError(
                    f"rank {rank} holds {reprlib.repr(name)}, which is no parameter"
                )
            slices[name].append((start, numel, rank))
        orders.append([name for name, _, _ in held])
        objects.append(
            {"rank": rank, "size_bytes": entry["size_bytes"], "block_sha256": entry["block_sha256"]}
        )
    try:
        order = common_order(orders)
    except CycleError as error:
        raise DocumentError("its objects hold slices in different orders") from error
    return {
        **body,
        "format_version": 3,
        "parameters": [[name, shapes[name], _runs(slices[name])] for name in order],
        "objects": sorted(objects, key=lambda entry: entry["rank"]),
    }


def _rank(key: str, *, prefix: str) -> int:
    found = re.fullmatch(r"rank-([0-9]{5,9})\.safetensors", key.removeprefix(prefix))
    if found is None or not key.startswith(prefix):
        raise DocumentError(f"its object {reprlib.repr(key)} is no content of {prefix}")
    return int(found[1])


def _slice(value: object) -> tuple[str, int, int]:
    name, start, numel = distrust.sequence(value, "a slice", length=3)
    return (
        distrust.text(name, "a name"),
        distrust.whole(start, "a slice", low=0, high=2**63),
        distrust.whole(numel, "a slice", low=1, high=2**63),
    )


def _runs(slices: list[tuple[int, int, int]]) -> list[list[int]]:
    return [list(run) for run in runs_of(sorted(slices))]
