"""What an ingest of hostile files has left, held against the files by another look at them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.console import visible
from pipelines.ingest.__main__ import main as ingest
from pipelines.shards import ShardedDataset
from tests.fuzz.watched import commanded

LEFT_OUT = r"[1-9][\d,]* skipped|passed over|left out"
"""What an ingest says where it did not take everything."""


def stored(prefix: Path, split: str = "train") -> list[tuple[bytes, int]]:
    """Read all samples of the split that was written."""
    dataset = ShardedDataset(str(prefix / split))
    samples = [dataset.read(number) for number in range(len(dataset))]
    return [(sample.data, sample.label) for sample in samples]


def complaint(
    prefix: Path,
    *,
    given: Mapping[bytes, set[str]],
    must: Mapping[bytes, str],
    left_out: int | None,
) -> str | None:
    """Say what is wrong with a dataset whose images were taken over byte by byte.

    Args:
        prefix: Where it is.
        given: The classes that each content was given with, of all that may be in it.
        must: Contents that must be in it, with their class: those that nobody has damaged.
        left_out: How many files must be in it or be named as left out; None for any number.
    """
    about = json.loads((prefix / "train" / "ingest.json").read_text())
    classes = about["classes"]
    found = stored(prefix)
    for data, label in found:
        if data not in given:
            return f"a sample of {len(data)} bytes is none that was given: {data[:40]!r}"
        names = {visible(name) for name in given[data]}  # as documents tell of them
        if classes[label] not in names:
            return f"a sample is of class {classes[label]!r} instead of {names}"
    lost = [name for data, name in must.items() if data not in {data for data, _ in found}]
    told = _left_out(about)
    if len(lost) > told:  # what a damaged archive calls otherwise may be no image by its name
        return f"good images are lost, of {lost}"
    if left_out is not None and len(found) + told != left_out:
        return f"{len(found)} stored and {told} named as left out, of {left_out}"
    return _unreadable(prefix)


def _left_out(about: Mapping[str, Any]) -> int:
    return len(about["skipped"]) + sum(number for _, number in about["passed_over"])


def _unreadable(prefix: Path) -> str | None:
    """What was taken in has to be decodable by what trains on it."""
    words = ["verify", str(prefix / "train"), "--workers", "1"]
    done = commanded(ingest, words, codes=(0, 1))
    if done.raw or done.value != 0:
        return f"what was taken in is found bad by verify: {done.said[-1500:]}"
    return None
