"""A checkpoint saved by one process, at once, perhaps of a random model; and a manifest of none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from models.flow.config import FlowConfig
from models.transformer.config import TransformerConfig
from models.transformer.lapflow import LapFlowTransformer
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.index import CheckpointIndex
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.saver import CheckpointSaver
from trainer.config.job import DataConfig, config_fingerprint
from trainer.config.reading import to_dict
from trainer.host_group import HostGroup
from trainer.state import Fragment
from trainer.storage.store import Store


def save_now(
    store: Store,
    *,
    run: str,
    images: int,
    fragments: Sequence[Fragment],
    science: Mapping[str, Any],
    train_state: Mapping[str, Any] | None = None,
    config_fingerprint: str = "x",
) -> None:
    """Saves a state and waits until it is committed."""
    saver = CheckpointSaver(
        store,
        index=CheckpointIndex(store, run=run),
        config=CheckpointConfig(keep_last=100),
        ranks=HostGroup(alone=True),
        aside=HostGroup(alone=True),
    )
    saver.save(
        images=images,
        fragments=fragments,
        train_state=train_state or {},
        science=science,
        config_fingerprint=config_fingerprint,
    )
    saver.finish()
    assert saver.is_saved(images)


def save_random_model(
    store: Store,
    *,
    run: str,
    images: int = 100,
    science: Mapping[str, Any] | None = None,
    averages: Mapping[str, float] = MappingProxyType({"ema": 0.5}),
) -> None:
    """Saves a small random model in colour: 8 pixels, two scales, two classes.

    Each average is the weights times a number.
    """
    torch.manual_seed(0)
    config = TransformerConfig(depth=1, width=16, heads=2)
    model = LapFlowTransformer(config, scales=2, channels=3, image_size=8, classes=2)
    fragments = []
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2)
        values = parameter.detach().flatten().clone()
        fragments.append(
            Fragment(
                name=name,
                start=0,
                shape=tuple(parameter.shape),
                tensors={"master": values, **{k: each * values for k, each in averages.items()}},
            )
        )
    data = DataConfig(name="colours", image_size=8, channels=3, classes=2)
    own = {"data": to_dict(data), "model": to_dict(config), "flow": to_dict(FlowConfig())}
    whole = {**own, **(science or {})}
    save_now(store, run=run, images=images, fragments=fragments, science=whole)


def manifest_of(
    science: Mapping[str, Any], *, train_state: Mapping[str, Any] | None = None
) -> Manifest:
    """What a checkpoint of no parameters says of its run, after 100 images."""
    settings = all(isinstance(group, Mapping) for group in science.values())
    return Manifest(
        run="run",
        images=100,
        attempt="a",
        saved_at="",
        world_size=1,
        config_fingerprint=config_fingerprint(science) if settings else "x",
        science=science,
        train_state=train_state or {},
        kinds=(),
        parameters={},
        cuts={},
        block_bytes=4,
        objects=(),
        versions={},
    )
