"""Settings of what draws and measures with a checkpoint's model, read without torch."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Literal

from pydantic import Field

from models.flow.sampler_config import SamplerConfig
from pipelines.domains import Checked
from pipelines.order import StreamConfig
from trainer.config.job import EvalConfig, FeatureConfig, FeatureName, check_reference_name
from trainer.config.reading import ConfigError
from trainer.storage.store import StoreConfig

Precision = Literal["fp32", "tf32", "bf16"]
"""What a network computes in; states, times and what a codec decodes are in float32 always.

"fp32" rounds every product as float32 does; "tf32" lets a GPU round what goes into a product to 10
bits of mantissa and add up in float32; "bf16" has weights and activations in bfloat16, and products
of float32 as "tf32" has them.
"""
PrecisionChoice = Literal["auto", "fp32", "tf32", "bf16"]
"""A precision; "auto" is bf16 on a GPU that has it, and fp32 elsewhere."""
FormatName = Literal["png", "npz", "mds"]
"""How a set of samples is kept."""

_WEIGHTS = re.compile(r"master|ema(?::(?P<decay>0?\.\d{1,20}|0))?")


def decay_of(weights: str) -> float | None:
    """Return the decay that weights are named by, as in "ema:0.999"; None for "ema" and "master".

    Raises:
        ConfigError: The text is none of these, whatever the checkpoint.
    """
    found = _WEIGHTS.fullmatch(weights)
    if found is None:
        raise ConfigError(
            f"weights={weights!r} names none: give ema, master, or ema:0.999 for one of "
            "train.ema.decays"
        )
    return None if found["decay"] is None else float(found["decay"])


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
        decay_of(self.weights)  # refuses what names none


@dataclass(frozen=True, kw_only=True)
class RealImagesConfig(Checked):
    """Where the real images are.

    Attributes:
        prefix: Folder or `s3://…` with the shards' `train/` and `test/`; None is where the run
            read them.
        streams: The streams of a run that read several, with their weights; none are the run's own.
        images_prefix: For a run that read latents, where the images are; None is where the run
            looked for them.
    """

    prefix: str | None = field(default=None, metadata={"place": "uri"})
    streams: tuple[StreamConfig, ...] = ()
    images_prefix: str | None = field(default=None, metadata={"place": "uri"})


@dataclass(frozen=True, kw_only=True)
class CheckpointEvaluationConfig(ModelSource):
    """What to measure.

    Attributes:
        checkpoint: URI of a checkpoint, or of a run (`…/runs/NAME`).
        runs: More of such URIs. Over runs that differ in their seed alone the spread is told.
        checkpoints: Which ones of a run: the "newest", or "all".
        samples: Images to draw, classes in equal parts; None is the run's own `eval.samples`.
        batch: Most images in one network call; None is the run's own.
        seed: Seed of the noise; image i depends on it, on i and on its class alone; None is the
            run's own.
        seeds: How many sets of samples are measured, with `seed` and the numbers that follow it,
            each as another would be by itself; their mean and spread are told.
        sampler: Changes to the run's own `eval.sampler`: solver, steps and guidance.
        precision: What the network computes in: "fp32", "tf32" (a GPU's faster products of
            float32) or "bf16"; of several each is measured, and how the figures differ is told.
            None is what the run was trained in, on a GPU "tf32" for "fp32".
        reference: What distances are measured to: "test", "train", or `FILE.npz` with statistics as
            ADM's evaluation reads them; None is the run's own.
        write_samples: Write the samples beside the report, up to 1 GiB of pictures, as
            `samples.npz`.
        features: One or more extractors, with each of which the same samples are measured; None is
            the run's own.
        compared: Most images of a set that are compared pair by pair; None is the run's own.
        inception_weights, clip_weights, dinov2_weights, module, module_weights: Where extractors
            find their weights, see `eval.features`. What a run has recorded is no file of this
            machine, and no code of it.
        data: The real images.
        output: Folder for the results; None is the run's own `evaluation/`.
    """

    runs: tuple[str, ...] = field(default=(), metadata={"place": "run"})
    checkpoints: Literal["newest", "all"] = "newest"
    samples: Annotated[int, Field(ge=2, le=10_000_000)] | None = None
    batch: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    seeds: Annotated[int, Field(ge=1, le=1000)] = 1
    sampler: SamplerChoice = field(default_factory=SamplerChoice)
    precision: Precision | tuple[Precision, ...] | None = None
    reference: Literal["train", "test"] | str | None = field(
        default=None, metadata={"place": "uri"}
    )
    write_samples: bool = False
    features: tuple[FeatureName, ...] | None = None
    compared: Annotated[int, Field(ge=4, le=1_000_000)] | None = None
    inception_weights: str | None = field(default=None, metadata={"place": "uri"})
    clip_weights: str | None = field(default=None, metadata={"place": "uri"})
    dinov2_weights: str | None = field(default=None, metadata={"place": "uri"})
    module: str | None = None
    module_weights: str | None = field(default=None, metadata={"place": "uri"})
    data: RealImagesConfig = field(default_factory=RealImagesConfig)
    output: str | None = field(default=None, metadata={"place": "uri"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference is not None:
            check_reference_name(self.reference, key="reference")
        if self.features is not None and not self.features:
            raise ConfigError("features=[] must name an extractor, as in features=[random_conv]")
        if self.precision == () or len(set(self.precisions)) < len(self.precisions):
            raise ConfigError(
                f"precision={list(self.precisions)} must name different ones, as in "
                "precision=[fp32,bf16]"
            )
        if ("module" in (self.features or ())) != (self.module is not None):
            raise ConfigError(
                f"module={self.module!r} does not go with features={list(self.features or ())}: "
                "features=[module] needs module=package.module:Class, and no other takes one"
            )

    @property
    def precisions(self) -> tuple[Precision | Literal["run"], ...]:
        """What is measured in, one after the other; "run" is the run's own."""
        if self.precision is None:
            return ("run",)
        return self.precision if isinstance(self.precision, tuple) else (self.precision,)

    @property
    def extractor_weights(self) -> FeatureConfig:
        """Where extractors find their weights."""
        return FeatureConfig(
            name="random_conv" if self.module is None else "module",
            inception_weights=self.inception_weights,
            clip_weights=self.clip_weights,
            dinov2_weights=self.dinov2_weights,
            module=self.module,
            module_weights=self.module_weights,
        )

    def over(self, own: EvalConfig) -> EvalConfig:
        """Return a run's own settings with the changes; extractors are told by `features`."""
        return replace(
            own,
            samples=own.samples if self.samples is None else self.samples,
            batch=own.batch if self.batch is None else self.batch,
            seed=own.seed if self.seed is None else self.seed,
            sampler=self.sampler.over(own.sampler),
            reference=own.reference if self.reference is None else self.reference,
            compared=own.compared if self.compared is None else self.compared,
        )
