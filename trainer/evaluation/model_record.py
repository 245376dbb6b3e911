"""What a checkpoint's manifest says of its model and its run, checked before it is believed."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch

from models.codec import Codec
from models.ema import EmaConfig, ema_kind
from models.flow.config import FlowConfig
from models.flow.sampler_config import SamplerConfig, check_shared
from models.transformer.config import TransformerConfig, TransformerConfigError
from models.transformer.cost import ModelShape, parameters
from models.transformer.lapflow import LapFlowTransformer
from pipelines.console import visible
from pipelines.documents import validate_as
from pipelines.loading.config import LoaderConfig
from trainer.autoencoder.codec import load_codec
from trainer.autoencoder.config import CodecConfig
from trainer.checkpoint.errors import CheckpointMismatch, InvalidManifest
from trainer.checkpoint.layout import manifest_key
from trainer.checkpoint.manifest import MAX_ELEMENTS, Manifest
from trainer.config.job import (
    DataConfig,
    EvalConfig,
    FeatureConfig,
    TrainConfig,
    check_guidance,
)
from trainer.config.reading import ConfigError, from_dict
from trainer.config.shapes import ImageShape, flow_shape
from trainer.engine.protocol import EngineConfig
from trainer.evaluation.config import decay_of
from trainer.evaluation.reports import EvaluationReport, evaluation_key
from trainer.storage.errors import MissingObject
from trainer.storage.kept import read_sealed
from trainer.storage.store import Store, StoreConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")


def own_eval(store: Store, manifest: Manifest) -> EvalConfig | None:
    """Return the settings by which a run measures a checkpoint at its end.

    Those of its report come first, which a later launch may have measured anew; without a report
    that can be believed it is those that the checkpoint records. None for older checkpoints, which
    record none. Who can write to the store names no file of this machine by them.

    Raises:
        InvalidManifest: The checkpoint records settings that no run can have.
    """
    key = evaluation_key(manifest.run, manifest.images, "report.json")
    try:
        report = validate_as(EvaluationReport, read_sealed(store, key))
        return _with_no_file(from_dict(EvalConfig, report.settings, path="eval."))
    except MissingObject:
        pass
    except ValueError as error:  # damaged, or of a version that measured otherwise
        logger.warning("passing over the report %s: %s", store.uri(key), error)
    own = _recorded(manifest, "eval", EvalConfig)
    return None if own is None else _with_no_file(own)


def _with_no_file(own: EvalConfig) -> EvalConfig:
    reference = own.reference
    if reference not in ("test", "train") and not reference.startswith("s3://"):
        logger.warning(
            "the run measures to the statistics in %s, a file that is not taken from a store's "
            "word; here distances are to the held-out images, unless reference=FILE.npz is given",
            visible(reference),
        )
        reference = "test"
    features = FeatureConfig()
    if own.features.name == "module":
        logger.warning(
            "the run measures by the code of %s, which is not run on a store's word; here the "
            "features are random_conv, unless features=[module] and module=… are given",
            visible(own.features.module or ""),
        )
    else:
        features = FeatureConfig(name=own.features.name)
    return replace(own, features=features, reference=reference)


def _recorded(
    manifest: Manifest, group: str, kind: type[T], *, only: Collection[str] | None = None
) -> T | None:
    """Read a group of settings that a checkpoint records as those that users type are read.

    Args:
        manifest: The checkpoint.
        group: Its name.
        kind: Dataclass of the settings.
        only: The settings that matter; None is all.

    Returns:
        None where it is not recorded, as in checkpoints of before it was.

    Raises:
        InvalidManifest: It is no such group.
    """
    if group not in manifest.science:
        return None
    values = manifest.science[group]
    if only is not None and isinstance(values, Mapping):
        values = {name: values[name] for name in only if name in values}
    try:
        return from_dict(kind, values, path=f"{group}.")
    except ValueError as error:
        raise _invalid(manifest, str(error)) from error


def _engine(manifest: Manifest) -> EngineConfig:
    """Read how a run computes; before `engine.tf32` was recorded no run did so in TF32."""
    engine = _recorded(manifest, "engine", EngineConfig, only=["precision", "tf32"])
    engine = engine or EngineConfig()
    is_told = "tf32" in manifest.science.get("engine", {})
    return engine if is_told else replace(engine, tf32=False)


def _invalid(manifest: Manifest, reason: str) -> InvalidManifest:
    return InvalidManifest(
        f"The manifest {manifest_key(manifest.run, manifest.images)} cannot be used: what it says "
        f"of the run is not what this version records ({reason}). It was edited, or another "
        "version wrote it: restore it, or use another checkpoint."
    )


@dataclass(frozen=True, kw_only=True)
class _DataSet:
    """What a run was trained on.

    Attributes:
        index_sha256: SHA-256 of its index.
    """

    index_sha256: str


@dataclass(frozen=True, kw_only=True)
class _Autoencoder:
    """What made the latents that a run was trained on.

    Attributes:
        sha256: Its digest.
    """

    sha256: str


def kind_of_weights(manifest: Manifest, text: str) -> str:
    """Return the kind of values that a name of weights means in a checkpoint.

    Args:
        manifest: The checkpoint.
        text: See `decay_of`.

    Raises:
        ConfigError: The checkpoint has no such average.
        InvalidManifest: What it says of its averages makes no sense.
    """
    decay = decay_of(text)
    if decay is None:
        return text
    train = _recorded(manifest, "train", _Averages, only=["ema"]) or _Averages()
    kind = ema_kind(decay, main=train.ema.decay)
    if kind not in manifest.kinds:
        kept = ", ".join(f"{each:g}" for each in (train.ema.decay, *train.ema.decays))
        raise ConfigError(
            f"weights={text}: the checkpoint of {manifest.run} after {manifest.images:,} images "
            f"has no average of that decay, but of {kept}; train.ema.decays keeps further ones"
        )
    return kind


@dataclass(frozen=True, kw_only=True)
class _Averages:
    """What a run keeps of averages.

    Attributes:
        ema: Their decays.
    """

    ema: EmaConfig = field(default_factory=EmaConfig)


_MAX_TOKENS = 2**21
"""Of all scales of one image; their positions are no weights, so no checkpoint has to hold them."""


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """Everything but the weights of a checkpoint's model, and where its images are.

    Attributes:
        transformer: The network.
        flow: The flow it was trained with.
        data: The images it was trained on.
        index_sha256: SHA-256 of their index; None for checkpoints that do not record it.
        codec: How images become what the flow works on.
        autoencoder_sha256: Digest of the autoencoder; None in pixel space.
        label_dropout: Fraction of labels that training replaced by the null label; without it there
            is nothing to guide by.
        engine: In which precision it was trained.
        loader: By which decoder images were read.
    """

    transformer: TransformerConfig
    flow: FlowConfig
    data: DataConfig
    index_sha256: str | None
    codec: CodecConfig
    autoencoder_sha256: str | None
    label_dropout: float
    engine: EngineConfig
    loader: LoaderConfig

    @classmethod
    def of(cls, manifest: Manifest) -> ModelRecord:
        """Read what a checkpoint's manifest says, believing nothing.

        Raises:
            InvalidManifest: It describes no model that this version can build.
        """
        transformer = _recorded(manifest, "model", TransformerConfig)
        flow, data = (
            _recorded(manifest, "flow", FlowConfig),
            _recorded(manifest, "data", DataConfig),
        )
        if transformer is None or flow is None or data is None:
            raise _invalid(manifest, "it lacks model, flow or data")
        data_set = _recorded(manifest, "data_set", _DataSet, only=["index_sha256"])
        autoencoder = _recorded(manifest, "autoencoder", _Autoencoder, only=["sha256"])
        train = _recorded(manifest, "train", TrainConfig, only=["label_dropout"])
        record = cls(
            transformer=transformer,
            flow=flow,
            data=data,
            index_sha256=None if data_set is None else data_set.index_sha256,
            # Older checkpoints name no codec: they are of pixels.
            codec=_recorded(manifest, "codec", CodecConfig) or CodecConfig(),
            autoencoder_sha256=None if autoencoder is None else autoencoder.sha256,
            label_dropout=(train or TrainConfig()).label_dropout,
            engine=_engine(manifest),
            loader=_recorded(manifest, "loader", LoaderConfig, only=["decoder"]) or LoaderConfig(),
        )
        try:
            tokens = sum(record.sizes.tokens)
        except TransformerConfigError as error:
            raise _invalid(manifest, str(error)) from error
        if tokens > _MAX_TOKENS:
            raise _invalid(manifest, f"an image of it has {tokens} tokens")
        return record

    @property
    def shape(self) -> ImageShape:
        """Shape of what the flow works on."""
        return flow_shape(self.data, self.codec)

    @property
    def sizes(self) -> ModelShape:
        """All sizes of the network."""
        return ModelShape.of(
            self.transformer,
            scales=self.flow.scales,
            channels=self.shape.channels,
            image_size=self.shape.size,
            classes=self.shape.classes,
        )

    def check_parameters(self, manifest: Manifest) -> None:
        """Refuse a checkpoint whose parameters are not those of the model that it describes.

        Whether they can be is told by a formula; only then are they built, without memory.

        Raises:
            CheckpointMismatch: They are not.
        """
        held, wanted = manifest.parameters, dict[str, tuple[int, ...]]()
        count = parameters(self.sizes).total
        # Each block has weights of its own.
        if count <= MAX_ELEMENTS and self.transformer.depth <= len(held):
            with torch.device("meta"):
                built = self.build()
            wanted = {name: tuple(value.shape) for name, value in built.named_parameters()}
        if wanted != held:
            odd, *_ = min({*wanted.items()} ^ {*held.items()}, default=("any",))
            raise CheckpointMismatch(
                f"The checkpoint of {manifest.run} after {manifest.images} images does not hold "
                f"the parameters of the model that it describes, such as {odd}: use the version of "
                "the code that saved it."
            )

    @property
    def on_latents(self) -> bool:
        """Whether the flow works on latents of an autoencoder."""
        return self.codec.kind != "identity"

    def build(self) -> LapFlowTransformer:
        """Build the network with fresh weights."""
        return LapFlowTransformer(
            self.transformer,
            scales=self.flow.scales,
            channels=self.shape.channels,
            image_size=self.shape.size,
            classes=self.shape.classes,
        )

    def check_classes(self, classes: Sequence[int]) -> None:
        """Refuse classes that the model does not know.

        Raises:
            ConfigError: Naming those classes.
        """
        beyond = [label for label in classes if not 0 <= label < self.shape.classes]
        if beyond:
            raise ConfigError(f"classes={beyond} are not among 0 … {self.shape.classes - 1}")

    def check_guidance(self, sampler: SamplerConfig) -> None:
        """Refuse guidance by a null label that was never trained.

        Raises:
            ConfigError: If the sampler asks for it.
        """
        check_guidance(
            sampler.guidance_scale, label_dropout=self.label_dropout, key="sampler.guidance_scale"
        )

    def check_shared(self, share_coarse: int, sampler: SamplerConfig) -> None:
        """Refuse variations of one layout that the model or the sampler cannot draw.

        Raises:
            ConfigError: Coarse scales of the model depend on the finest.
            SamplerConfigError: There is no coarse scale, or the solver chooses its own steps.
        """
        # However many layouts there are; here it is one.
        check_shared(share_coarse, stages=self.flow.stages, config=sampler, images=share_coarse)
        if share_coarse > 1 and self.transformer.attention == "full":
            raise ConfigError(
                f"share_coarse={share_coarse} cannot be drawn by a model of attention=full: its "
                "coarse scales see the finest; leave share_coarse out"
            )

    def load_codec(
        self, *, source: str | None, cache: Path, store: StoreConfig, device: torch.device
    ) -> Codec:
        """Load the codec and make sure that it is the one of the training.

        Args:
            source: Where the autoencoder is now; None looks where the run had it.
            cache: Folder on this machine for what has to be fetched.
            store: How to reach an object store.
            device: Where it is to work.

        Raises:
            AutoencoderError: The autoencoder is missing, damaged, or not as the checkpoint says.
            ConfigError: It is another one than that of the training, or none was used.
            StoreError: The object store fails or refuses.
        """
        config = self.codec
        if source is not None:
            if not self.on_latents:
                raise ConfigError(
                    f"codec_source={source}: this checkpoint works on pixels; leave codec_source "
                    "out"
                )
            config = replace(config, source=source)
        codec, sha256 = load_codec(config, cache=cache, store=store, device=device)
        trained_with = self.autoencoder_sha256
        if sha256 != trained_with:
            raise ConfigError(
                f"the autoencoder at {config.source} is not the one of the training (SHA-256 "
                f"{str(sha256)[:12]}… instead of {str(trained_with)[:12]}…); give "
                "codec_source=PLACE of the right one"
            )
        return codec
