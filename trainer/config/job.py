"""The job's configuration: every component's own dataclass, joined.

Defaults live in the dataclasses. Hydra's YAML only picks and overrides; `trainer.config.reading`
turns what it composed into dataclasses and refuses what does not fit, `trainer.training.validate`
what cannot be combined.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from cluster.contract import ClusterConfig
from models.ema import EmaConfig
from models.flow.config import FlowConfig
from models.flow.sampler_config import SamplerConfig
from models.transformer.config import TransformerConfig
from pipelines.augment import AugmentConfig
from pipelines.domains import Checked
from pipelines.loading.config import LoaderConfig
from pipelines.order import StreamConfig
from pipelines.shards import ShardsConfig
from trainer.autoencoder.config import CodecConfig
from trainer.checkpoint.config import CheckpointConfig
from trainer.config.reading import ConfigError, defaults, to_dict
from trainer.config.renamed import with_current_names
from trainer.engine.optimizer import OptimConfig
from trainer.engine.protocol import EngineConfig
from trainer.metrics.tracker import TrackingConfig
from trainer.storage.store import StoreConfig

FeatureName = Literal["random_conv", "learned_conv", "inception", "clip", "dinov2", "module"]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
    """The images a run is trained on.

    Attributes:
        name: Name of the data set, and of its folder in the store.
        prefix: Where its MDS shards are (`train/` and `test/` below it), a folder or `s3://…`;
            None is `datasets/<name>` in the store.
        streams: Several such prefixes instead, perhaps with weights: `[{prefix: …, weight: 2}, …]`.
        prepare: Write the shards when they are missing: "digits" from scikit-learn, or "none".
        space: What the shards hold: "pixel" images, or "latent" moments that
            `pipelines.ingest.latents` has computed.
        images_prefix: For latents, where the images are that samples are compared with; None is
            where the latents were made of.
        image_size: Height and width of what the shards hold; images of another size are resized.
        channels: Channels of what the shards hold.
        classes: Number of classes; 0 takes it from the data set's list of classes.
        augment: How training images vary from epoch to epoch.
    """

    name: str = "digits"
    prefix: str | None = field(default=None, metadata={"place": "uri"})
    streams: tuple[StreamConfig, ...] = ()
    prepare: Literal["none", "digits"] = "none"
    space: Literal["pixel", "latent"] = "pixel"
    images_prefix: str | None = field(default=None, metadata={"place": "uri"})
    image_size: Annotated[int, Field(ge=1)] = 8
    channels: Annotated[int, Field(ge=1)] = 1
    classes: Annotated[int, Field(ge=0)] = 10
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked):
    """What one training run is, apart from model, data and optimizer.

    Attributes:
        seed: Seed of every random stream and of the initial weights.
        total_images: Length of the run; an image seen twice counts twice.
        global_batch: Images per update over all ranks.
        label_dropout: Share of labels replaced by the null label, which guidance needs.
        ema: The weights' moving average.
        max_skipped_updates: Updates in a row that may be skipped for a non-finite gradient before
            the run stops. It is looked once in so many updates and one, for the host to wait for
            the device no more often.
    """

    seed: Annotated[int, Field(ge=0)] = 0
    total_images: Annotated[int, Field(ge=1)] = 1_000_000
    global_batch: Annotated[int, Field(ge=1)] = 256
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    ema: EmaConfig = field(default_factory=EmaConfig)
    max_skipped_updates: Annotated[int, Field(ge=0)] = 10


@dataclass(frozen=True, kw_only=True)
class FeatureConfig(Checked):
    """Which features measure distance, and where those who have weights find them.

    Weights are files of tensors, of this machine or in an object store (`s3://…`).

    Attributes:
        name: "random_conv", "learned_conv", "inception", "clip", "dinov2", or "module".
        inception_weights: The FID Inception weights (pt_inception-2015-12-05-6726825d.pth); None
            downloads them when online.
        clip_weights: CLIP's weights; None downloads those of ViT-B/32 when online.
        dinov2_weights: DINOv2's weights, the safetensors of facebook/dinov2-large say.
        module: For "module", the class to import: `package.module:Class`, a torch.nn.Module that
            takes images in [-1, 1].
        module_weights: Its weights; None leaves them as the class makes them, at a fixed seed.
    """

    name: FeatureName = "random_conv"
    inception_weights: str | None = field(default=None, metadata={"place": "uri"})
    clip_weights: str | None = field(default=None, metadata={"place": "uri"})
    dinov2_weights: str | None = field(default=None, metadata={"place": "uri"})
    module: str | None = None
    module_weights: str | None = field(default=None, metadata={"place": "uri"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.name == "module") != (self.module is not None):
            raise ConfigError(
                f"eval.features.name={self.name} does not go with "
                f"eval.features.module={self.module!r}: name=module needs "
                "module=package.module:Class, and no other name takes one"
            )


@dataclass(frozen=True, kw_only=True)
class DuringConfig(Checked):
    """Evaluation while training goes on.

    Attributes:
        every_images: How often a checkpoint is saved and measured; 0 is never. The end is measured
            in any case.
        where: "inline" has all ranks measure it, and training wait for them. "beside" has a task on
            the Ray cluster do so, on `cluster.beside_cpus` and `cluster.beside_gpus` of its own,
            while training goes on.
        samples: Images drawn each time; None is `eval.samples`, so that the end of the run ends the
            same curve.
    """

    every_images: Annotated[int, Field(ge=0)] = 0
    where: Literal["inline", "beside"] = "inline"
    samples: Annotated[int, Field(ge=2, le=10_000_000)] | None = None


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Checked):
    """What is sampled and measured.

    Attributes:
        samples: Images drawn for the final figures; classes in equal parts.
        batch: Most images in one network call on one rank. Ranks draw whole batches, so as many
            batches as ranks, or a multiple, keep all of them busy.
        seed: Seed of the samples' noise.
        sampler: Solver, steps and guidance.
        reference: What distances are measured to: the held-out images ("test"), the training images
            ("train"), or a file of statistics as ADM's evaluation reads them (`FILE.npz`, also in
            `s3://…`).
        features: Feature extractor of the Fréchet distance.
        during: What is measured of checkpoints before the end.
        compared: Most samples, and most real images, whose features are kept, to compare pairs for
            precision, recall, kernel and sliced distances; memory grows with it. 50000 is ADM's.
        classifier: Train a classifier on the real images and let it read the samples; meant for
            small images, which it holds in memory.
        grid_interval_images: How often a sample grid is drawn during training, from its start on; 0
            is never.
        grid_columns: Images per class in a grid.
        grid_classes: Classes shown in a grid, from the first; at most all that there are.
    """

    samples: Annotated[int, Field(ge=2, le=10_000_000)] = 1000
    batch: Annotated[int, Field(ge=1)] = 125
    seed: Annotated[int, Field(ge=0)] = 1
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    reference: Literal["train", "test"] | str = field(default="test", metadata={"place": "uri"})
    features: FeatureConfig = field(default_factory=FeatureConfig)
    during: DuringConfig = field(default_factory=DuringConfig)
    compared: Annotated[int, Field(ge=4, le=1_000_000)] = 5_000
    classifier: bool = False
    grid_interval_images: Annotated[int, Field(ge=0)] = 0
    grid_columns: Annotated[int, Field(ge=1)] = 10
    grid_classes: Annotated[int, Field(ge=1)] = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reference_name(self.reference, key="eval.reference")


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig(Checked):
    """What a run prints and writes along the way; it cannot change the result.

    Attributes:
        log_interval_images: Images between two progress lines and metric points; 0 has
            them at the end alone.
        hang_s: The workers are started again if no update is done for so many seconds more than a
            loader may wait for a file (`shards.download_patience_s` and three times
            `shards.download_timeout_s`), or for 20 times as long as the slowest update of late,
            whichever is longer; 0 waits for ever.
        profile: `START:COUNT` has torch's profiler look at COUNT updates of every rank after START
            updates of the launch; their traces go into the store and to MLflow. None looks at none.
        timing: Print a table of where the time from the command to the first update went.
    """

    log_interval_images: Annotated[int, Field(ge=0)] = 5000
    hang_s: Annotated[float, Field(ge=0)] = 300.0
    profile: str | None = None
    timing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = ("0:1" if self.profile is None else self.profile).split(":")
        if not (len(parts) == 2 and all(map(str.isdecimal, parts)) and 1 <= int(parts[1]) <= 100):
            raise ConfigError(
                f"runtime.profile={self.profile!r} is not START:COUNT, two whole numbers of "
                "updates of which COUNT is from 1 to 100, as in runtime.profile=20:3"
            )

    @property
    def profiled_updates(self) -> range:
        """Updates of a launch that are profiled, counted from 0."""
        if self.profile is None:
            return range(0)
        start, count = map(int, self.profile.split(":"))
        return range(start, start + count)


@dataclass(frozen=True, kw_only=True)
class JobConfig(Checked):
    """Everything one job needs.

    Attributes:
        run: Name of the run; running the same name again resumes it.
        home: Folder for what stays on this machine: caches, logs, the default store and tracker.
        resume: "auto" continues the run from its newest valid checkpoint, "never" insists on a new
            run, a checkpoint's URI starts the run from there.
        resume_changed: Resume also with scientific settings other than the checkpoint's.
        dry_run: Print the resolved configuration and its cost, then stop.
        data: The images.
        codec: Whether the flow works on pixels or on latents of which autoencoder.
        model: The transformer.
        flow: The flow over scales.
        optim: Optimizer and schedule.
        train: Seed, length, batch, label dropout, EMA.
        eval: Samples and figures.
        engine: Sharding and precision.
        cluster: Workers and failure policy.
        loader: Decoding and prefetching.
        shards: How shards are fetched and kept on each node.
        store: The object store of shards, checkpoints and results.
        checkpoint: How often, and how many are kept.
        tracking: MLflow.
        runtime: Progress.
    """

    run: str = "run"
    home: str = field(default="~/lapflow", metadata={"place": "path"})
    resume: Literal["auto", "never"] | str = field(default="auto", metadata={"place": "uri"})
    resume_changed: bool = False
    dry_run: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    model: TransformerConfig
    flow: FlowConfig = field(default_factory=FlowConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


# Recorded with the science, but free to change, like all of `eval`: what it takes to find the run's
# images and its autoencoder again, and to measure as the run does. Before there was `engine.tf32`
# no run was trained in TF32, so its user may choose for the rest.
_RECORDED = {
    "codec": {"source"},
    "data": {"prefix", "streams", "prepare", "images_prefix"},
    "engine": {"tf32"},
    "loader": {"decoder"},
}


def science(job: JobConfig, *, data_digest: str, codec_digest: str | None = None) -> dict[str, Any]:
    """Return what decides the trained weights: what a resumed run must not change.

    It also records what does not count: where images and autoencoder are, and how the run measures.

    Args:
        job: The configuration.
        data_digest: Which version of which data set it is trained on.
        codec_digest: Which autoencoder it works with; None in pixel space.
    """
    everything = to_dict(job)
    groups = ("data", "codec", "model", "flow", "optim", "train", "eval")
    chosen = {group: everything[group] for group in groups}
    del chosen["train"]["max_skipped_updates"]
    del chosen["train"]["ema"]["device"]  # it changes no bit
    chosen["data_set"] = {"index_sha256": data_digest}
    if codec_digest is not None:
        chosen["autoencoder"] = {"sha256": codec_digest}
    numbers = ("precision", "tf32", "grad_accum_dtype", "deepspeed")
    chosen["engine"] = {key: everything["engine"][key] for key in numbers}
    kept = ("shuffle_block_samples", "decoder")
    chosen["loader"] = {key: everything["loader"][key] for key in kept}
    if job.optim.decay == "constant":
        # Then the length is only when to stop: a finished run may go on.
        del chosen["train"]["total_images"]
    return chosen


def fingerprinted(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is recorded and free to change."""
    return {
        group: {
            key: value for key, value in settings.items() if key not in _RECORDED.get(group, set())
        }
        if isinstance(settings, Mapping)
        else settings
        for group, settings in chosen.items()
        if group != "eval"
    }


def config_fingerprint(chosen: Mapping[str, Any]) -> str:
    """Return a short digest of the scientific settings that count."""
    text = json.dumps(fingerprinted(chosen), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def difference(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the settings that differ, as `key: old -> new`."""
    lines: list[str] = []
    for key in sorted(set(before) | set(after)):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += difference(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old} -> {new}")
    return lines


def changed_science(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """List the scientific settings that count and differ, as `key: old -> new`.

    Args:
        before: What a checkpoint records of its run, perhaps of an older version. A setting that it
            does not know came after it, and its default is what was done then.
        after: The science of another one, or of a job.
    """
    trained = _fill_defaults(with_current_names(before), after, defaults(JobConfig))
    return difference(fingerprinted(trained), fingerprinted(after))


def _fill_defaults(
    trained: Mapping[str, Any], wanted: Mapping[str, Any], known: Mapping[str, Any]
) -> dict[str, Any]:
    """Give settings that are wanted but were not recorded their defaults."""
    completed = dict(trained)
    for key in wanted.keys() & known.keys():
        if isinstance(wanted[key], Mapping) and isinstance(known[key], Mapping):
            own = trained.get(key, {})
            if isinstance(own, Mapping):
                completed[key] = _fill_defaults(own, wanted[key], known[key])
        elif key not in trained:
            completed[key] = known[key]
    return completed


def micro_batch(job: JobConfig) -> int:
    """Return images per rank and forward pass."""
    images = job.engine.micro_batch
    return job.train.global_batch // job.cluster.workers if images is None else images


def with_workers(job: JobConfig, workers: int) -> JobConfig:
    """Return the job as it is on so many workers, and no fewer."""
    return replace(job, cluster=replace(job.cluster, workers=workers, min_workers=None))


def check_reference_name(reference: str, *, key: str) -> None:
    """Refuse what is neither a split nor a file of statistics.

    Raises:
        ConfigError: If so.
    """
    if reference not in ("train", "test") and not reference.endswith(".npz"):
        raise ConfigError(
            f"{key}={reference} is neither train nor test, nor a file of statistics, whose name "
            "ends in .npz"
        )


def check_guidance(scale: float, *, label_dropout: float, key: str) -> None:
    """Refuse guidance by a null label that was never trained, whose row is as it was drawn.

    Args:
        scale: Guidance scale.
        label_dropout: Share of the labels that training replaces by the null label.
        key: What the scale is called where it was asked for.

    Raises:
        ConfigError: If the scale is not 1 and no label is ever replaced.
    """
    if scale != 1.0 and label_dropout == 0.0:
        raise ConfigError(
            f"{key}={scale} needs a null label, which train.label_dropout=0 never trains; set "
            f"{key}=1, or train with train.label_dropout=0.1"
        )
