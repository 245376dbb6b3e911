"""Checkpoint loading: the model that a checkpoint holds, with its codec, ready to sample from.

The checkpoint's own manifest says what model it is, so nothing else has to be configured.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import nn

from models.codec import Codec
from models.flow.flow import Flow, FlowConfig
from models.flow.sampler_config import SamplerConfig
from models.transformer.config import TransformerConfig, TransformerConfigError
from models.transformer.cost import ModelShape, parameters
from models.transformer.lapflow import LapFlowTransformer
from pipelines.documents import validate_as
from pipelines.domains import Checked
from pipelines.loading.loader import LoaderConfig
from trainer.autoencoder.codec import CodecConfig, load_codec
from trainer.checkpoint.content import load_weights
from trainer.checkpoint.errors import CheckpointMismatch, InvalidManifest
from trainer.checkpoint.layout import manifest_key
from trainer.checkpoint.manifest import MAX_ELEMENTS, Manifest
from trainer.checkpoint.reader import CheckpointReader
from trainer.config import paths
from trainer.config.job import DataConfig, EvalConfig, TrainConfig, check_guidance
from trainer.config.reading import ConfigError, from_dict
from trainer.config.shapes import ImageShape, flow_shape
from trainer.engine.protocol import EngineConfig
from trainer.evaluation.choice import choose_checkpoints
from trainer.evaluation.reports import EvaluationReport, evaluation_key
from trainer.evaluation.samples import ImageSampler
from trainer.storage.errors import MissingObject
from trainer.storage.kept import read_sealed
from trainer.storage.store import Store, StoreConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")

Weights = Literal["ema", "master"]


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
class SamplerChoice(Checked):
    """What a command changes of the run's own sampler, `eval.sampler`; None changes nothing.

    Attributes:
        solver: "euler", "midpoint", "heun" or "ab2" with fixed steps, or "dopri5".
        steps: Steps over the whole time axis; dopri5 does not use them.
        absolute_tolerance: Error that dopri5 allows in one step, whatever the state.
        relative_tolerance: Error that dopri5 allows in one step, in proportion to the state.
        adaptive_group: Images that dopri5 integrates together, with common steps.
        guidance_scale: Classifier-free guidance scale; 1 is no guidance.
        guidance_interval: First and last time at which guidance acts; [0,1] is always.
    """

    solver: Literal["euler", "midpoint", "heun", "ab2", "dopri5"] | None = None
    steps: int | None = None
    absolute_tolerance: float | None = None
    relative_tolerance: float | None = None
    adaptive_group: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.over(SamplerConfig())  # refuses values that no sampler takes

    def over(self, own: SamplerConfig) -> SamplerConfig:
        """Return a run's own sampler with the changes."""
        changes = {name: value for name, value in asdict(self).items() if value is not None}
        return replace(own, **changes)


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
    return replace(own, features=replace(own.features, inception_weights=None))


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
            engine=_recorded(manifest, "engine", EngineConfig, only=["precision"])
            or EngineConfig(),
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

    def check_guidance(self, sampler: SamplerConfig) -> None:
        """Refuse guidance by a null label that was never trained.

        Raises:
            ConfigError: If the sampler asks for it.
        """
        check_guidance(
            sampler.guidance_scale, label_dropout=self.label_dropout, key="sampler.guidance_scale"
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


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """What it takes to sample images.

    Attributes:
        checkpoint: URI of what was loaded.
        model: The network, in evaluation mode, on its device.
        record: What the checkpoint says of it.
        flow: The flow it was trained with.
        codec: Between images and what the flow works on.
        device: Where model and codec are.
        own: How the run samples and measures itself; the defaults for older checkpoints, which do
            not record it.
    """

    checkpoint: str
    model: nn.Module
    record: ModelRecord
    flow: Flow
    codec: Codec
    device: torch.device
    own: EvalConfig

    @property
    def shape(self) -> ImageShape:
        """Shape of what the flow works on."""
        return self.record.shape

    def check_classes(self, classes: Sequence[int]) -> None:
        """Refuse classes that the model does not know.

        Raises:
            ConfigError: Naming those classes.
        """
        beyond = [label for label in classes if not 0 <= label < self.shape.classes]
        if beyond:
            raise ConfigError(f"classes={beyond} are not among 0 … {self.shape.classes - 1}")

    def image_sampler(self, sampler: SamplerConfig, *, seed: int, batch: int) -> ImageSampler:
        """Decide how to sample.

        Args:
            sampler: Solver, steps and guidance.
            seed: Seed of the noise.
            batch: Most images in one network call.

        Raises:
            ConfigError: For guidance by a null label that was never trained.
            SamplerConfigError: For a batch below 1.
        """
        self.record.check_guidance(sampler)
        return ImageSampler(
            flow=self.flow,
            sampler=sampler,
            shape=self.shape,
            codec=self.codec,
            seed=seed,
            batch=batch,
            device=self.device,
        )


@dataclass(frozen=True, kw_only=True)
class ModelSource(Checked):
    """Which checkpoint a model is loaded from, and how.

    Attributes:
        checkpoint: URI of a checkpoint, or of a run (`…/runs/NAME`), whose newest one is taken.
        weights: "ema", or "master" for the weights without averaging.
        device: "auto" takes a GPU when there is one.
        codec_source: Where the autoencoder is of a checkpoint in latent space; None looks where the
            run had it.
        home: Folder for caches; None is $LAPFLOW_HOME, or ~/lapflow.
        store: How to reach the store.
    """

    checkpoint: str = field(metadata={"place": "run"})
    weights: Weights = "ema"
    device: str = "auto"
    codec_source: str | None = field(default=None, metadata={"place": "hub"})
    home: str | None = field(default=None, metadata={"place": "path"})
    store: StoreConfig = field(default_factory=StoreConfig)

    def load(self, *, precision: Literal["fp32", "run"] = "fp32") -> LoadedModel:
        """Load the model.

        Args:
            precision: Of the weights: "fp32", or that in which the run computed with them.

        Raises:
            ConfigError: If there is no valid checkpoint there, or the device cannot be used.
            AutoencoderError: If the autoencoder of its latents cannot be had.
            CheckpointError: If the checkpoint is damaged, or the store fails.
        """
        logger.info("reading the checkpoint %s", self.checkpoint)
        device = usable_device(self.device)
        _, store, (manifest,) = choose_checkpoints(
            self.checkpoint, which="newest", config=self.store
        )
        record = ModelRecord.of(manifest)
        record.check_parameters(manifest)
        codec = record.load_codec(
            source=self.codec_source,
            cache=paths.cache_folder(self.home),
            store=self.store,
            device=device,
        )
        # Before memory is taken for a model that the checkpoint may only claim to hold.
        weights = load_weights(store, manifest, self.weights)
        model = record.build()
        model.load_state_dict(weights)
        if precision == "run":
            # As the engines have it: buffers stay in float32.
            for parameter in model.parameters():
                parameter.data = parameter.data.to(record.engine.dtype)
        return LoadedModel(
            checkpoint=CheckpointReader(store, run=manifest.run).uri(manifest.images),
            model=model.to(device).eval(),
            record=record,
            flow=Flow(record.flow),
            codec=codec,
            device=device,
            own=own_eval(store, manifest) or EvalConfig(),
        )
