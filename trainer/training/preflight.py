"""Checks before any process starts: what the run needs is there, writable, and of this run."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from trainer.autoencoder.config import codec_digest
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.reader import CheckpointReader
from trainer.config import paths
from trainer.config.job import JobConfig, science
from trainer.config.reading import ConfigError
from trainer.config.shapes import picture_shape
from trainer.data.splits import check_latents, open_split
from trainer.evaluation.choice import open_checkpoint
from trainer.evaluation.extractors import check_features
from trainer.evaluation.real_images import check_measurable
from trainer.metrics.mlflow_backend import TrackerUnreachable, check_tracker
from trainer.storage.open import open_store, set_environment
from trainer.storage.store import Store
from trainer.training.at_once import Look
from trainer.training.resume import all_damaged_error, check_start, science_changes
from trainer.training.tracking import tracking_ui_hint

logger = logging.getLogger(__name__)


def preflight(job: JobConfig, *, report: Callable[[str], None]) -> Manifest | None:
    """Check the home folder, the store, the tracker, the data set and the start.

    All that answers late is asked at once. Of several that fail the first of this order is told:
    the home folder, the store, weights of extractors, the data set, MLflow, the run's checkpoints,
    the autoencoder and stored latents, what samples are measured by, the start.

    Args:
        job: The validated configuration.
        report: Takes a line for the user.

    Returns:
        The run's newest valid checkpoint, if there is one.

    Raises:
        ConfigError: For a place that cannot be used or a start that would mix runs.
        StoreError: If the store cannot be reached or written.
        TrackerUnreachable: If MLflow cannot be used and `tracking.required` is true.
        DataError: If the data set is missing or damaged.
        AutoencoderError: If the codec's autoencoder is missing or not as the settings say.
        MissingWeights: If the weights of the extractor of features cannot be had.
    """
    logger.info("checking the store, the data set and MLflow")
    set_environment(job.store)
    _check_home(job)
    store = open_store(paths.runs_uri(job), job.store)
    writable = Look("the store", partial(_check_writable, store, job.run))
    pages = Look("MLflow", partial(_check_tracker, job))
    newest = Look("the run's checkpoints", partial(_newest, job, store))
    # Missing weights are found now and not after the last image.
    weights = Look("the extractor's weights", partial(check_features, job.eval.features, job.store))
    if job.data.prepare == "digits":
        writable.take()
        weights.take()
        _write_digits(job)
    train, test = (
        Look(f"the data set's {split}/", partial(open_split, job, split))
        for split in ("train", "test")
    )
    codec = Look("the autoencoder", partial(_check_codec, job))
    measurable = Look("the held-out images", partial(_check_measurable, job))

    writable.take()
    weights.take()
    images, held_out = train.take(), test.take()
    report(pages.take())
    report(
        f"data {' '.join(paths.data_prefixes(job))}: {len(images):,} training and "
        f"{len(held_out):,} held-out images"
    )
    own, digest = newest.take(), codec.take()
    for line in measurable.take():
        report(line)
    chosen = science(job, data_digest=images.digest, codec_digest=digest)
    _check_start(job, chosen, own, report)
    return own


def _check_start(
    job: JobConfig,
    chosen: Mapping[str, Any],
    newest: Manifest | None,
    report: Callable[[str], None],
) -> None:
    """Refuse a start that would mix runs, and say what a resumed run changes."""
    changes = check_start(job, chosen, newest)
    if job.resume not in ("auto", "never"):
        if newest is None:
            _, _, branched = open_checkpoint(job.resume, job.store)
            changes = science_changes(job, chosen, branched, place=job.resume)
        else:
            report(
                f"run {job.run} continues from its own checkpoints; resume=URI only begins a run"
            )
    if changes:
        report(f"warning: resuming with changed settings: {'; '.join(changes)}")


def _check_codec(job: JobConfig) -> str | None:
    """Check the autoencoder, and latents against it; return its digest, None in pixel space."""
    digest = codec_digest(
        job.codec,
        cache=paths.cache(job),
        store=job.store,
        image_channels=picture_shape(job.data, job.codec).channels,
    )
    check_latents(job, codec_digest=digest)
    return digest


def _check_measurable(job: JobConfig) -> list[str]:
    """Check what samples are measured by, and return what there is to say of it."""
    lines: list[str] = []
    check_measurable(job, report=lines.append)
    return lines


def _check_tracker(job: JobConfig) -> str:
    """Say where the run is to be looked at, or why that cannot be."""
    try:
        check_tracker(job.tracking, str(paths.home(job)))
        return f"look at the run: {tracking_ui_hint(job)}"
    except TrackerUnreachable as error:
        if job.tracking.required:
            raise
        return f"warning: {error}"


def _newest(job: JobConfig, store: Store) -> Manifest | None:
    checkpoints = CheckpointReader(store, run=job.run)
    newest = checkpoints.newest_valid()
    if newest is None and not checkpoints.is_empty():
        raise all_damaged_error(job)
    return newest


def _check_home(job: JobConfig) -> None:
    home = paths.home(job)
    try:
        home.mkdir(parents=True, exist_ok=True)
        probe = home / f".probe-{uuid.uuid4().hex}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"home={job.home} cannot be written: {error}; set home=FOLDER, or LAPFLOW_HOME in the "
            "environment, to a folder you may write"
        ) from error


def _check_writable(store: Store, run: str) -> None:
    key = f"{run}/probe-{uuid.uuid4().hex}"
    store.put(key, b"written to see whether this store can be written")
    store.delete(key)


def _write_digits(job: JobConfig) -> None:
    from pipelines.ingest.digits import ensure_digits

    logger.info("writing scikit-learn's digits into shards, unless they are there")
    ensure_digits(paths.data_prefix(job))
