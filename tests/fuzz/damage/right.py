"""When another result is right after damage: what is read instead, and whether that is said.

Without a word another result is right in one case alone: a file is gone, and its absence has a
meaning that is told elsewhere. A checkpoint without a manifest is one whose save was not finished;
a checkpoint without a report was not measured; a data set without ingest.json has no names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.damage.readers import DAMAGED
from tests.fuzz.damage.roles import role_of
from tests.fuzz.material import INTERVAL, LAST


@dataclass(frozen=True)
class Struck:
    """What was damaged.

    Attributes:
        home: The damaged home.
        names: The files, by their places in it.
        gone: Those of them that are no files any more.
    """

    home: Path
    names: Collection[str]
    gone: Collection[str]

    def is_named(self, said: str) -> bool:
        """Tell whether a text names one of the files, or the checkpoint that it belongs to."""
        return any(word in said for name in self.names for word in _words(name))

    def is_gone(self, *roles: str) -> bool:
        """Tell whether what was struck of some roles is no file any more."""
        mine = [name for name in self.names if role_of(name) in roles]
        return bool(mine) and all(name in self.gone for name in mine)

    def has(self, role: str) -> bool:
        """Tell whether a file of that role was struck."""
        return any(role_of(name) == role for name in self.names)

    @property
    def checkpoints(self) -> set[int]:
        """Images of the checkpoints of which something was struck."""
        parts = (name.split("/checkpoints/") for name in self.names)
        return {int(found[1].split("/")[0]) for found in parts if len(found) == 2}


def _words(name: str) -> list[str]:
    parts = name.split("/")
    if "checkpoints" in parts:
        folder = parts[parts.index("checkpoints") + 1]
        return [folder, f"{int(folder):,} images"]
    return ["/".join(parts[-2:]), *([parts[-1]] if len(parts) < 3 else [])]


@dataclass(frozen=True)
class Case:
    """Another result than before, to be judged.

    Attributes:
        value: The result.
        usual: Results by reader of what is undamaged; at a position as `NAME at IMAGES`.
        struck: What was damaged.
        named: Whether what was said names it.
        said: All that was said.
    """

    value: Any
    usual: Mapping[str, Any]
    struck: Struck
    named: bool
    said: str

    def older(self, name: str) -> bool:
        """Tell whether the result is that of an older checkpoint, and why is known."""
        positions = range(INTERVAL, LAST, INTERVAL)
        known = self.named or self.struck.is_gone("manifest")
        return known and self.value in [self.usual[f"{name} at {images}"] for images in positions]


def _listed(case: Case) -> bool:
    usual = {each["images"]: each for each in case.usual["checkpoints list"]["checkpoints"]}
    found = {each["images"]: each for each in case.value["checkpoints"]}
    whole = [images for images, each in found.items() if each["state"] == "whole"]
    if found.keys() != usual.keys() or f"{max(whole):012d}" not in case.value["resume_from"]:
        return False
    reports = ("report of the run", "report of evaluate")
    unmeasured = case.named or case.struck.is_gone(*reports)
    for images, each in found.items():
        now, before = dict(each), dict(usual[images])
        if images in case.struck.checkpoints:
            for changed in ("size_bytes", "objects"):
                now.pop(changed), before.pop(changed)
            if now["state"] != "whole":
                # What is told of a damaged one is told as damaged.
                continue
        now.pop("kept"), before.pop("kept")
        others = case.value["features"] != case.usual["checkpoints list"]["features"]
        if now["frechet"] is None or others:
            if now["frechet"] != before["frechet"] and not unmeasured:
                return False
            now.pop("frechet"), before.pop("frechet")
        if now != before:
            return False
    return True


def _verified(case: Case) -> bool:
    code, states = case.value
    bad = {int(images.replace(",", "")) for images, state in states.items() if state == "DAMAGED"}
    seen = {int(images.replace(",", "")) for images in states}
    lost = set(range(INTERVAL, LAST + 1, INTERVAL)) - seen
    there = not lost or (case.struck.is_gone("manifest") and lost <= case.struck.checkpoints)
    return there and bad <= case.struck.checkpoints and code == int(bool(bad))


def _data_verified(case: Case) -> bool:
    for (code, found), (_, usual) in zip(case.value, case.usual["ingest verify"], strict=True):
        if found == usual or code == 1:
            continue
        if case.struck.has("index of shards") and {**found, "digest": usual["digest"]} == usual:
            continue  # the same images, by an index that it calls another one
        without = {"classes": None, "left_out": usual["left_out"]}
        if not (case.struck.is_gone("ingest.json") and found == {**usual, **without}):
            return False
    return True


def _about(case: Case) -> bool:
    usual = case.usual["names of classes"]
    left = all(now in (None, was) for now, was in zip(case.value, usual, strict=True))
    return case.struck.is_gone("ingest.json") and left


def _reported(case: Case) -> bool:
    gone = case.struck.is_gone("manifest", "report of the run")
    # With another index the held-out images count as others, and the report as one of others.
    others = case.struck.has("index of shards") and "so it is measured again" in case.said
    return case.value is None and (case.named or gone or others)


def _scored(case: Case) -> bool:
    gone = case.struck.is_gone("manifest", "report of the run", "report of evaluate")
    usual = case.usual["scores for keep_best"]
    return (case.named or gone) and all(
        usual.get(features, {}).get(images) == frechet
        for features, scores in case.value.items()
        for images, frechet in scores.items()
    )


def _page(case: Case) -> bool:
    """What is left of it is right; what is missing was named, or its file is gone."""
    roles = ("manifest", "report of the run", "report of evaluate", "history of the run")
    usual = case.usual["page"]
    measured = usual["measured"].items() >= case.value["measured"].items()
    curves = case.value["curves"] in ({}, usual["curves"])
    return (case.named or case.struck.is_gone(*roles)) and measured and curves


def _launched(case: Case) -> bool:
    """A complete run is told as such without a look at all its bytes, and stays as it is."""
    usual = case.usual["launch"]
    untouched = case.value["state"] == DAMAGED and LAST in case.struck.checkpoints
    return untouched and case.value["frechet"] == usual["frechet"]


RIGHT: Mapping[str, Callable[[Case], bool]] = {
    "restore": lambda case: case.older("restore"),
    "checkpoints list": _listed,
    "checkpoints verify": _verified,
    "checkpoints export": lambda case: case.older("checkpoints export"),
    "ingest verify": _data_verified,
    "names of classes": _about,
    "final report": _reported,
    "scores for keep_best": _scored,
    "page": _page,
    "own settings": lambda case: case.older("own settings"),
    "launch": _launched,
    "evaluate": lambda case: case.older("evaluate"),
    "evaluate anew": lambda case: case.older("evaluate anew"),
}
"""For each reader whether another result is right; where there is none, it never is."""
