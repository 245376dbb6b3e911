"""A trained model as a checkpoint holds it, with its codec, ready to draw from.

The checkpoint's own manifest says what model it is, so nothing else has to be configured.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from models.codec import Codec
from models.flow.flow import Flow, FlowConfig
from models.flow.sampler_config import SamplerConfig
from models.transformer.config import TransformerConfig
from models.transformer.lapflow import LapFlowTransformer
from trainer.autoencoder.codec import CodecConfig, load_codec
from trainer.checkpoint.content import load_weights
from trainer.config import paths
from trainer.config.evaluation import EvalConfig, check_guidance
from trainer.config.job import DataConfig
from trainer.config.reading import ConfigError, from_dict
from trainer.config.shapes import ImageShape, flow_shape
from trainer.engine.protocol import EngineConfig
from trainer.evaluation.choice import choose_checkpoints
from trainer.evaluation.own_settings import label_dropout, own_eval
from trainer.evaluation.samples import ImageSampler
from trainer.storage.store import StoreConfig


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


class CheckpointCodec(NamedTuple):
    """What it takes to make images of a checkpoint's samples."""

    codec: Codec
    """Decodes."""
    shape: ImageShape
    """Shape of what the flow works on."""


def recorded_shape(science: Mapping[str, Any]) -> ImageShape:
    """Return the shape of what a checkpoint's flow works on."""
    return flow_shape(from_dict(DataConfig, science["data"]), recorded_codec(science))


def recorded_codec(science: Mapping[str, Any]) -> CodecConfig:
    """Return the codec that a checkpoint names; older ones, which name none, are of pixels."""
    return from_dict(CodecConfig, science.get("codec", {}))


def codec_of(
    science: Mapping[str, Any],
    *,
    source: str | None,
    cache: Path,
    store: StoreConfig,
    device: torch.device,
) -> CheckpointCodec:
    """Load the codec of a checkpoint and make sure that it is the one of its training.

    Args:
        science: The science in the checkpoint's manifest.
        source: Where the autoencoder is now; None looks where the run had it.
        cache: Folder on this machine for what has to be fetched.
        store: How to reach an object store.
        device: Where it is to work.

    Raises:
        AutoencoderError: The autoencoder is missing, damaged, or not as the checkpoint says.
        ConfigError: It is another one than that of the training, or none was used.
        StoreError: The object store fails or refuses.
    """
    config = recorded_codec(science)
    if source is not None:
        if config.kind == "identity":
            raise ConfigError(
                f"codec_source={source}: this checkpoint works on pixels; leave codec_source out"
            )
        config = dataclasses.replace(config, source=source)
    codec, sha256 = load_codec(config, cache=cache, store=store, device=device)
    trained_with = science.get("autoencoder", {}).get("sha256")
    if sha256 != trained_with:
        raise ConfigError(
            f"the autoencoder at {config.source} is not the one of the training (SHA-256 "
            f"{str(sha256)[:12]}… instead of {str(trained_with)[:12]}…); give "
            "codec_source=PLACE of the right one"
        )
    return CheckpointCodec(codec=codec, shape=recorded_shape(science))


logger = logging.getLogger(__name__)

Weights = Literal["ema", "master"]


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """What it takes to draw images.

    Attributes:
        model: The network, in evaluation mode, on its device.
        flow: The flow it was trained with.
        codec: Between images and what the flow works on.
        shape: Shape of what the flow works on.
        device: Where model and codec are.
        label_dropout: Share of labels that training replaced by the null label.
        own: How the run samples and measures itself; the defaults for older checkpoints, which do
            not record it.
    """

    model: nn.Module
    flow: Flow
    codec: Codec
    shape: ImageShape
    device: torch.device
    label_dropout: float
    own: EvalConfig

    def check_classes(self, classes: Sequence[int]) -> None:
        """Refuse classes that the model does not know.

        Raises:
            ConfigError: Naming those classes.
        """
        beyond = [label for label in classes if not 0 <= label < self.shape.classes]
        if beyond:
            raise ConfigError(f"classes={beyond} are not among 0 … {self.shape.classes - 1}")

    def image_sampler(self, sampler: SamplerConfig, *, seed: int, batch: int) -> ImageSampler:
        """Decide how to draw.

        Args:
            sampler: Solver, steps and guidance.
            seed: Seed of the noise.
            batch: Most images in one network call.

        Raises:
            ConfigError: For guidance by a null label that was never trained.
            SamplerConfigError: For a batch below 1.
        """
        self.check_guidance(sampler)
        return ImageSampler(
            flow=self.flow,
            sampler=sampler,
            shape=self.shape,
            codec=self.codec,
            seed=seed,
            batch=batch,
            device=self.device,
        )

    def check_guidance(self, sampler: SamplerConfig) -> None:
        """Refuse guidance by a null label that was never trained.

        Raises:
            ConfigError: If the sampler asks for it.
        """
        check_guidance(
            sampler.guidance_scale, label_dropout=self.label_dropout, key="sampler.guidance_scale"
        )


def load_trained_model(
    checkpoint: str,
    *,
    weights: Weights,
    device: str,
    store: StoreConfig,
    codec_source: str | None,
    home: str | None,
    precision: Literal["fp32", "run"] = "fp32",
) -> TrainedModel:
    """Load the model of a checkpoint.

    Args:
        checkpoint: URI of the checkpoint, or of a run, whose newest valid one is taken.
        weights: "ema", or "master" for the weights without averaging.
        device: A device of torch; "auto" takes a GPU when there is one.
        store: How to reach the store.
        codec_source: Where the autoencoder is of a checkpoint in latent space; None looks where
            the run had it.
        home: Folder for caches; None is $LAPFLOW_HOME, or ~/lapflow.
        precision: Of the weights: "fp32", or that in which the run computed with them.

    Raises:
        ConfigError: If there is no valid checkpoint there, or the device cannot be used.
        AutoencoderError: If the autoencoder of its latents cannot be had.
        CheckpointError: If the checkpoint is damaged, or the store fails.
    """
    logger.info("reading the checkpoint %s", checkpoint)
    place = usable_device(device)
    _, opened, (manifest,) = choose_checkpoints(checkpoint, which="newest", config=store)
    codec, shape = codec_of(
        manifest.science,
        source=codec_source,
        cache=paths.cache_folder(home),
        store=store,
        device=place,
    )
    flow = Flow(from_dict(FlowConfig, manifest.science["flow"]))
    model = LapFlowTransformer(
        from_dict(TransformerConfig, manifest.science["model"]),
        scales=flow.stages.scales,
        channels=shape.channels,
        image_size=shape.size,
        classes=shape.classes,
    )
    model.load_state_dict(load_weights(opened, manifest, weights))
    if precision == "run":
        # As the engines have it: buffers stay in float32.
        engine = manifest.science.get("engine", {})
        trained = EngineConfig(precision=engine.get("precision", EngineConfig.precision))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(trained.dtype)
    return TrainedModel(
        model=model.to(place).eval(),
        flow=flow,
        codec=codec,
        shape=shape,
        device=place,
        label_dropout=label_dropout(manifest.science),
        own=own_eval(opened, manifest) or EvalConfig(),
    )
