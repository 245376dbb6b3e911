"""The evaluation of a checkpoint by a task beside the workers, which are training meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from trainer.config.job import JobConfig
from trainer.config.reading import from_dict, to_dict
from trainer.errors import is_user_error
from trainer.evaluation.checkpoints import UnwrittenReport, evaluate_checkpoints
from trainer.evaluation.config import CheckpointEvaluationConfig, RealImagesConfig, SamplerChoice
from trainer.evaluation.during import asked_during
from trainer.evaluation.reports import CheckpointReport


def evaluation_payload(job: JobConfig, *, checkpoint: str) -> dict[str, Any]:
    """Return as plain values what a task is to measure: the checkpoint as the run would.

    Args:
        job: The run.
        checkpoint: URI of the checkpoint.
    """
    asked = asked_during(job.eval)
    config = CheckpointEvaluationConfig(
        checkpoint=checkpoint,
        samples=asked.samples,
        batch=asked.batch,
        seed=asked.seed,
        sampler=SamplerChoice(**asdict(asked.sampler)),
        reference=asked.reference,
        features=(asked.features.name,),
        compared=asked.compared,
        **{name: value for name, value in asdict(asked.features).items() if name != "name"},
        data=RealImagesConfig(
            prefix=job.data.prefix,
            streams=job.data.streams,
            images_prefix=job.data.images_prefix,
        ),
        codec_source=job.codec.source if job.codec.kind != "identity" else None,
        home=job.home,
        store=job.store,
    )
    return {"evaluation": to_dict(config), "threads": job.cluster.beside_cpus}


def measure_beside(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Measure a checkpoint and keep its report; the task's own function.

    Args:
        payload: See `evaluation_payload`.

    Returns:
        The report as JSON ("report"), and why it could not be written ("unwritten").

    Raises:
        ValueError: What a user has to mend.
        RuntimeError: Anything else.
    """
    torch.set_num_threads(payload["threads"])
    config = from_dict(CheckpointEvaluationConfig, payload["evaluation"])
    try:
        (report,) = evaluate_checkpoints(config, report=lambda _line: None)
    except UnwrittenReport as error:
        return _told(error.reports[-1], unwritten=str(error))
    except ValueError as error:
        if is_user_error(error):
            raise
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    return _told(report)


def _told(report: CheckpointReport, *, unwritten: str = "") -> dict[str, Any]:
    return {"report": report.to_json().decode(), "unwritten": unwritten}
