"""Checkpoint loading: the model that a checkpoint holds, with its codec, ready to sample from.

The checkpoint's own manifest says what model it is, so nothing else has to be configured.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import nn

from models.codec import Codec
from models.flow.flow import Flow
from models.flow.sampler_config import SamplerConfig
from pipelines.domains import Checked
from trainer.checkpoint.content import load_weights
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.reader import CheckpointReader
from trainer.config import paths
from trainer.config.job import EvalConfig
from trainer.config.reading import ConfigError
from trainer.config.shapes import ImageShape
from trainer.evaluation.choice import choose_checkpoints
from trainer.evaluation.graphs import with_graphs
from trainer.evaluation.model_record import (
    ModelRecord,
    check_weights,
    kind_of_weights,
    own_eval,
)
from trainer.evaluation.precision import (
    Precision,
    PrecisionChoice,
    drawing_precision,
    precision_of_training,
)
from trainer.evaluation.samples import ImageSampler
from trainer.storage.store import Store, StoreConfig

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


@dataclass(frozen=True, kw_only=True)
class ModelSource(Checked):
    """Which checkpoint a model is loaded from, and how.

    Attributes:
        checkpoint: URI of a checkpoint, or of a run (`…/runs/NAME`), whose newest one is taken.
        weights: "ema", "ema:0.999" for one of `train.ema.decays`, or "master" for the weights
            without averaging.
        device: "auto" takes a GPU when there is one.
        graphs: Record network calls as CUDA graphs, one for each shape, and replay them: small
            batches on a GPU are drawn faster. Where that cannot be done a warning says so.
        codec_source: Where the autoencoder is of a checkpoint in latent space; None looks where the
            run had it.
        home: Folder for caches; None is $LAPFLOW_HOME, or ~/lapflow.
        store: How to reach the store.
    """

    checkpoint: str = field(metadata={"place": "run"})
    weights: str = "ema"
    device: str = "auto"
    graphs: bool = False
    codec_source: str | None = field(default=None, metadata={"place": "hub"})
    home: str | None = field(default=None, metadata={"place": "path"})
    store: StoreConfig = field(default_factory=StoreConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(self.weights)

    def choose(self) -> ChosenModel:
        """Find the checkpoint, and see whether it holds the model that it describes.

        Raises:
            ConfigError: If there is no valid checkpoint there.
            CheckpointError: If what it says makes no sense, or the store fails.
        """
        logger.info("reading the checkpoint %s", self.checkpoint)
        _, store, (manifest,) = choose_checkpoints(
            self.checkpoint, which="newest", config=self.store
        )
        record = ModelRecord.of(manifest)
        record.check_parameters(manifest)
        kind_of_weights(manifest, self.weights)
        uri = CheckpointReader(store, run=manifest.run).uri(manifest.images)
        return ChosenModel(store, manifest, record, uri)

    def load(self, *, precision: PrecisionChoice | Literal["run"] = "auto") -> LoadedModel:
        """Load the model.

        Args:
            precision: What it is to compute in; "run" is what the run draws its own samples in.

        Raises:
            ConfigError: If there is no valid checkpoint there, or the device cannot be used, or
                not in this precision.
            AutoencoderError: If the autoencoder of its latents cannot be had.
            CheckpointError: If the checkpoint is damaged, or the store fails.
        """
        device = usable_device(self.device)
        if precision != "run":
            precision = drawing_precision(precision, device)
        chosen = self.choose()
        record = chosen.record
        if precision == "run":
            precision = precision_of_training(record.engine, device)
        codec = record.load_codec(
            source=self.codec_source,
            cache=paths.cache_folder(self.home),
            store=self.store,
            device=device,
        )
        # Before memory is taken for a model that the checkpoint may only claim to hold.
        kind = kind_of_weights(chosen.manifest, self.weights)
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
            model=with_graphs(model, device) if self.graphs else model,
            record=record,
            flow=Flow(record.flow),
            codec=codec,
            device=device,
            precision=precision,
            own=chosen.own,
        )
