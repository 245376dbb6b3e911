"""Render every experiment's resolved configuration and cost: `make golden` rewrites the files."""

from __future__ import annotations

from pathlib import Path

import yaml

from trainer.composition import composed, members
from trainer.cost_table import cost_table
from trainer.schema import to_dict

FOLDER = Path(__file__).parent / "configs"


def rendered(experiment: str) -> str:
    """Return an experiment's configuration as YAML, its cost table below as comments."""
    job = composed([f"+exp={experiment}", "home=HOME"])
    table = "\n".join(f"# {line}".rstrip() for line in cost_table(job).splitlines())
    return f"{yaml.safe_dump(to_dict(job), sort_keys=False)}\n{table}\n"


def main() -> None:
    """Write the files of all experiments and remove those of experiments that are gone."""
    FOLDER.mkdir(exist_ok=True)
    for stale in FOLDER.glob("*.yaml"):
        stale.unlink()
    for experiment in members("exp"):
        (FOLDER / f"{experiment}.yaml").write_text(rendered(experiment))


if __name__ == "__main__":
    main()
