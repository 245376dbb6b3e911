"""Checkpoint loading: the model that a checkpoint holds, with its codec, ready to sample from.

The checkpoint's own manifest says what model it is, so nothing else has to be configured.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

from models.codec import Codec
from models.flow.flow import Flow
from models.flow.sampler_config import SamplerConfig
from trainer.checkpoint.content import load_weights
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.reader import CheckpointReader
from trainer.config import paths
from trainer.config.job import EvalConfig
from trainer.config.reading import ConfigError
from trainer.config.shapes import ImageShape
from trainer.evaluation.choice import choose_checkpoints
from trainer.evaluation.config import ModelSource, Precision, PrecisionChoice
from trainer.evaluation.graphs import with_graphs
from trainer.evaluation.model_record import (
    ModelRecord,
    kind_of_weights,
    own_eval,
)
from trainer.evaluation.precision import (
    drawing_precision,
    precision_of_training,
)
from trainer.evaluation.samples import ImageSampler
from trainer.storage.store import Store

logger = logging.getLogger(__name__)


def usable_device(name: str) -> torch.device:
    """Return the device of a name, once it has held a number and given it back.

    Args:
        name: A device of torch; "auto" takes a GPU when there is one.

    Raises:
        ConfigError: If torch knows no such device, or cannot use it here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    # Builds of torch without a kind of device fail an assertion, or an import of their own.
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigError(
            f"device={name} cannot be used here ({reason}); set device=cpu, or device=auto to take "
            "a GPU when there is one"
        ) from error
    return device


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """What it takes to sample images.

    Attributes:
        checkpoint: URI of what was loaded.
        attempt: The checkpoint's own random name.
        model: The network, in evaluation mode, on its device.
        record: What the checkpoint says of it.
        flow: The flow it was trained with.
        codec: Between images and what the flow works on.
        device: Where model and codec are.
        precision: What the model computes in.
        own: How the run samples and measures itself; the defaults for older checkpoints, which do
            not record it.
    """

    checkpoint: str
    attempt: str
    model: nn.Module
    record: ModelRecord
    flow: Flow
    codec: Codec
    device: torch.device
    precision: Precision
    own: EvalConfig

    @property
    def shape(self) -> ImageShape:
        """Shape of what the flow works on."""
        return self.record.shape

    def image_sampler(
        self, sampler: SamplerConfig, *, seed: int, batch: int, share_coarse: int = 1
    ) -> ImageSampler:
        """Decide how to sample.

        Args:
            sampler: Solver, steps and guidance.
            seed: Seed of the noise.
            batch: Most images in one network call.
            share_coarse: How many images are variations of one layout.

        Raises:
            ConfigError: For guidance by a null label that was never trained, or coarse scales that
                cannot be shared.
            SamplerConfigError: For a batch below 1 or below `share_coarse`.
        """
        self.record.check_guidance(sampler)
        self.record.check_shared(share_coarse, sampler)
        return ImageSampler(
            flow=self.flow,
            sampler=sampler,
            shape=self.shape,
            codec=self.codec,
            seed=seed,
            batch=batch,
            device=self.device,
            precision=self.precision,
            share_coarse=share_coarse,
        )


class ChosenModel(NamedTuple):
    """A checkpoint to load from, and what it says of its model; its weights are not read yet."""

    store: Store
    """Where its run is."""
    manifest: Manifest
    """The checkpoint."""
    record: ModelRecord
    """What the model is."""
    uri: str
    """URI of the checkpoint."""

    @property
    def own(self) -> EvalConfig:
        """How the run samples and measures itself, as `own_eval` finds it, or the defaults."""
        return own_eval(self.store, self.manifest) or EvalConfig()


def choose_model(source: ModelSource) -> ChosenModel:
    """Find the checkpoint, and see whether it holds the model that it describes.

    Args:
        source: Which checkpoint.

    Raises:
        ConfigError: If there is no valid checkpoint there.
        CheckpointError: If what it says makes no sense, or the store fails.
    """
    logger.info("reading the checkpoint %s", source.checkpoint)
    _, store, (manifest,) = choose_checkpoints(
        source.checkpoint, which="newest", config=source.store
    )
    record = ModelRecord.of(manifest)
    record.check_parameters(manifest)
    kind_of_weights(manifest, source.weights)
    uri = CheckpointReader(store, run=manifest.run).uri(manifest.images)
    return ChosenModel(store, manifest, record, uri)


def load_model(
    source: ModelSource, *, precision: PrecisionChoice | Literal["run"] = "auto"
) -> LoadedModel:
    """Load the model.

    Args:
        source: Which one, and how.
        precision: What it is to compute in; "run" is what the run draws its own samples in.

    Raises:
        ConfigError: If there is no valid checkpoint there, or the device cannot be used, or
            not in this precision.
        AutoencoderError: If the autoencoder of its latents cannot be had.
        CheckpointError: If the checkpoint is damaged, or the store fails.
    """
    device = usable_device(source.device)
    if precision != "run":
        precision = drawing_precision(precision, device)
    chosen = choose_model(source)
    record = chosen.record
    if precision == "run":
        precision = precision_of_training(record.engine, device)
    codec = record.load_codec(
        source=source.codec_source,
        cache=paths.cache_folder(source.home),
        store=source.store,
        device=device,
    )
    # Before memory is taken for a model that the checkpoint may only claim to hold.
    kind = kind_of_weights(chosen.manifest, source.weights)
    weights = load_weights(chosen.store, chosen.manifest, kind)
    model = record.build()
    model.load_state_dict(weights)
    if precision == "bf16":
        # As the engines have it: buffers stay in float32.
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    model = model.to(device).eval()
    return LoadedModel(
        checkpoint=chosen.uri,
        attempt=chosen.manifest.attempt,
        model=with_graphs(model, device) if source.graphs else model,
        record=record,
        flow=Flow(record.flow),
        codec=codec,
        device=device,
        precision=precision,
        own=chosen.own,
    )
