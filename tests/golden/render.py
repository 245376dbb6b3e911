"""Render every experiment's resolved configuration and cost: `make golden` rewrites the files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.support.configuration import configuration
from trainer.cli.launch import describe
from trainer.config.groups import members

FOLDER = Path(__file__).parent / "configs"


def rendered(experiment: str) -> str:
    """Return an experiment's configuration as YAML, its cost table below as comments.

    One that takes the number of classes from its data set is shown with one class.
    """
    job = configuration(f"+exp={experiment}")
    if job.data.classes == 0:
        job = configuration(f"+exp={experiment}", "data.classes=1")
    return f"{describe(replace(job, home='HOME')).text}\n"


def main() -> None:
    """Write the files of all experiments and remove those of experiments that are gone."""
    for stale in FOLDER.rglob("*.yaml"):
        stale.unlink()
    for experiment in members("exp"):
        file = FOLDER / f"{experiment}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(rendered(experiment))


if __name__ == "__main__":
    main()
