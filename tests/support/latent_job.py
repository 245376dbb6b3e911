"""Small jobs on latents of the digits, in this process and of one worker."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.support.job import final_state
from trainer.cli.launch import main

_SETTINGS = (
    "+exp=digits",
    "data.prepare=none",
    "cluster.backend=local",
    "cluster.workers=1",
    "engine=plain",
    "model.depth=1",
    "model.width=16",
    "model.patch_size=2",
    "train.global_batch=32",
    "eval.samples=20",
    "eval.batch=8",
    "eval.sampler.steps=2",
    "eval.classifier=false",
    "codec.kind=autoencoder_kl",
)


@dataclass(frozen=True, kw_only=True)
class LatentJobs:
    """Jobs of one folder, with the autoencoder that is in it.

    Attributes:
        place: The folder; the jobs' home is below it.
        data: Name of the data below it.
        images: Length of a job; half way there is a checkpoint.
        settings: What else its jobs have in common.
    """

    place: Path
    data: str
    images: int
    settings: tuple[str, ...]

    def launch(self, *overrides: str) -> int:
        """Run the command and return its exit code."""
        half = self.images // 2
        return main(
            [
                *_SETTINGS,
                *self.settings,
                f"train.total_images={self.images}",
                f"checkpoint.interval_images={half}",
                f"runtime.log_interval_images={half}",
                f"eval.grid_interval_images={half}",
                f"home={self.place}/home",
                f"data.prefix={self.place}/{self.data}",
                f"codec.source={self.place}/autoencoder",
                *overrides,
            ]
        )

    def run(self, name: str) -> Path:
        """Return the folder of a run."""
        return self.place / "home" / "store" / "runs" / name

    def checkpoint(self, name: str, images: int) -> Path:
        """Return the folder of a run's checkpoint."""
        return self.run(name) / "checkpoints" / f"{images:012d}"

    def evaluation(self, name: str) -> Path:
        """Return the folder of a run's samples and figures."""
        return self.run(name) / "evaluation" / f"{self.images:012d}"

    def report(self, name: str) -> dict[str, Any]:
        """Read the figures of a run."""
        figures: dict[str, Any] = json.loads((self.evaluation(name) / "report.json").read_text())
        return figures

    def assert_same_to_the_bit(self, one: str, other: str) -> None:
        """Compare all that two runs trained, and the distance of their samples."""
        store = str(self.place / "home" / "store")
        before, after = final_state(store, one), final_state(store, other)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name]), name
        assert self.report(one)["frechet"] == self.report(other)["frechet"]
