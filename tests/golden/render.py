"""Render every experiment's resolved configuration and cost: `make golden` rewrites the files."""

from __future__ import annotations

from pathlib import Path

from trainer.composition import composed, members
from trainer.launch import described

FOLDER = Path(__file__).parent / "configs"


def rendered(experiment: str) -> str:
    """Return an experiment's configuration as YAML, its cost table below as comments."""
    return f"{described(composed([f'+exp={experiment}', 'home=HOME']))}\n"


def main() -> None:
    """Write the files of all experiments and remove those of experiments that are gone."""
    FOLDER.mkdir(exist_ok=True)
    for stale in FOLDER.glob("*.yaml"):
        stale.unlink()
    for experiment in members("exp"):
        (FOLDER / f"{experiment}.yaml").write_text(rendered(experiment))


if __name__ == "__main__":
    main()
