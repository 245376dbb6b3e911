"""A run of a tiny model, with the images that it was trained on, to be measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from models.flow.config import FlowConfig
from models.flow.sampler_config import SamplerConfig
from models.transformer.config import TransformerConfig
from models.transformer.lapflow import LapFlowTransformer
from pipelines.encoded import as_png
from pipelines.ingest.write import LabelledImage, write_dataset
from pipelines.shards import ShardedDataset, ShardsConfig
from tests.support.saved import save_now
from tests.unit.trainer.evaluation.two_kinds import two_kinds
from trainer.config.job import DataConfig, EvalConfig, FeatureConfig
from trainer.config.reading import to_dict
from trainer.evaluation.config import CheckpointEvaluationConfig
from trainer.evaluation.reports import EvaluationReport, Origin
from trainer.state import Fragment
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig

DATA = DataConfig(name="kinds", image_size=8, channels=1, classes=2)
CPU = torch.device("cpu")
MODEL = TransformerConfig(depth=1, width=16, heads=2)
OWN = EvalConfig(
    samples=20,
    batch=6,
    seed=3,
    sampler=SamplerConfig(solver="midpoint", steps=20, guidance_scale=1.5),
    features=FeatureConfig(name="random_conv"),
)
"""How the run of these tests measures itself."""


def write_images(prefix: Path, seed: int) -> None:
    """Images to train on and to hold out."""
    for split, count in (("train", 32), ("test", 20)):
        images, labels = two_kinds(count, seed)
        pixels = (images * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        write_dataset(
            [LabelledImage(as_png(p), int(y)) for p, y in zip(pixels, labels, strict=True)],
            f"{prefix}/{split}",
        )


def science_of(place: Path) -> dict[str, object]:
    """What decides the bits of that run."""
    images = ShardedDataset(f"{place}/datasets/kinds/train", config=ShardsConfig())
    return {
        "data": {k: v for k, v in to_dict(DATA).items() if k not in ("prefix", "prepare")},
        "model": to_dict(MODEL),
        "flow": to_dict(FlowConfig()),
        "data_set": {"index_sha256": images.digest},
        "train": {"label_dropout": 0.1},
        "eval": to_dict(OWN),
    }


def write_store(place: Path) -> None:
    """A data set and a run of two checkpoints, whose EMA is not its master."""
    write_images(place / "datasets" / "kinds", 0)
    science = science_of(place)
    torch.manual_seed(0)
    model = LapFlowTransformer(MODEL, scales=2, channels=1, image_size=8, classes=2)
    store = open_store(f"{place}/runs", StoreConfig())
    for seen in (100, 200):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        fragments = [
            Fragment(
                name=name,
                start=0,
                shape=tuple(p.shape),
                tensors={
                    "master": p.detach().flatten().clone(),
                    "ema": 0.5 * p.detach().flatten(),
                },
            )
            for name, p in model.named_parameters()
        ]
        save_now(store, run="small", images=seen, fragments=fragments, science=science)


def config(place: Path, **changes: Any) -> CheckpointEvaluationConfig:
    """The settings that measure it, on this processor."""
    base = CheckpointEvaluationConfig(
        checkpoint=f"{place}/runs/small", home=str(place / "home"), device="cpu"
    )
    return dataclasses.replace(base, **changes)


def quiet(_text: str) -> None:
    """Take a line and show it to nobody."""


def report_of(config: EvalConfig) -> EvaluationReport:
    """What the run tells of its second checkpoint."""
    return EvaluationReport(
        images=200,
        samples=config.samples,
        features="random_conv",
        frechet=1.0,
        frechet_untrained=2.0,
        network_evaluations=1.0,
        segment_evaluations=(1.0,),
        settings=to_dict(config),
        origin=Origin(run="small", attempt="x", held_out_index="y", extractor=""),
    )
