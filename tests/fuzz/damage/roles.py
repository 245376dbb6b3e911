"""Files of a finished run by what they are for, so that small important ones get their share."""

from __future__ import annotations

import re
from pathlib import Path

ROLES = {
    "manifest": r"store/runs/.*/MANIFEST\.json",
    "checkpoint object": r"store/runs/.*/rank-\d+\.safetensors",
    "report of the run": r"store/runs/.*/evaluation/\d+/report\.json",
    "report of evaluate": r"store/runs/.*/evaluation/\d+/\w+/report\.json",
    "history of the run": r"store/runs/.*/history/[\d-]+\.json",
    "samples": r"store/runs/.*\.npz",
    "grid": r"store/runs/.*\.png",
    "index of shards": r"store/datasets/.*/index\.json",
    "ingest.json": r"store/datasets/.*/ingest\.json",
    "shard": r"store/datasets/.*\.mds",
    "learned features": r"cache/features/.*",
    "MLflow's database": r"mlflow\.db",
    "MLflow's artifacts": r"mlartifacts/.*",
    "other": r".*",
}
"""What a file is, by its place in the home; the first that fits."""


def role_of(name: str) -> str:
    """Return what a file of the home is for."""
    return next(role for role, pattern in ROLES.items() if re.fullmatch(pattern, name))


def by_role(home: Path) -> dict[str, list[Path]]:
    """Return the files of a home by role, each in an order that random names do not decide."""
    found: dict[str, list[Path]] = {}
    for path in sorted((p for p in home.rglob("*") if p.is_file()), key=_settled):
        found.setdefault(role_of(str(path.relative_to(home))), []).append(path)
    return found


def _settled(path: Path) -> tuple[str, ...]:
    """The place without the names that a run draws at random."""
    return tuple(re.sub(r"[0-9a-f]{12,32}(?=\b)", _kept_number, part) for part in path.parts)


def _kept_number(found: re.Match[str]) -> str:
    return found[0] if found[0].isdigit() and found[0].startswith("0") else "-"
