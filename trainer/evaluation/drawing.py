"""The worker that draws parts of a set of samples, on any number of processes."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from cluster.contract import WorkerContext
from models.flow.sampler_config import SamplerConfig
from pipelines.documents import parse_json, validate_as
from trainer.config.reading import ConfigError, from_dict
from trainer.errors import is_user_error
from trainer.evaluation.config import ModelSource
from trainer.evaluation.grid import pixels_of
from trainer.evaluation.loading import load_model
from trainer.evaluation.sample_formats import DrawnPart
from trainer.evaluation.sample_set import SamplePlan, SampleSet
from trainer.evaluation.samples import ImageSampler
from trainer.host_group import HostGroup
from trainer.log_lines import forward_logs
from trainer.storage.errors import StoreError, StoreUnreachable
from trainer.storage.open import open_store

logger = logging.getLogger(__name__)


class SamplesNotKept(ValueError):
    """A store refuses what a worker reads or writes, which starting it again does not change."""


def draw_samples(context: WorkerContext, payload: Mapping[str, Any]) -> None:
    """Draw this rank's share of the parts that are missing.

    Args:
        context: Rank, device and the line to the driver, which gets `{"kind": "drawn"}` with the
            part's number and how many images of it are drawn.
        payload: As plain values the model's place ("source"), the plan ("plan") and where the
            samples go ("output").

    Raises:
        SamplesNotKept: The store is full, or forbids it.
        SolverError: The solver comes to no end.
        ConfigError: The checkpoint is gone.
    """
    try:
        with forward_logs(context.log):
            _draw_share(context, payload)
    except StoreUnreachable:
        raise
    except StoreError as error:
        raise SamplesNotKept(
            f"{error} The parts that are drawn are kept: run the same command again to go on."
        ) from error
    except ValueError as error:
        if is_user_error(error):
            raise
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _draw_share(context: WorkerContext, payload: Mapping[str, Any]) -> None:
    source = replace(from_dict(ModelSource, payload["source"]), device=context.device)
    plan = validate_as(SamplePlan, payload["plan"])
    samples = SampleSet(open_store(payload["output"], source.store), plan)
    ranks = HostGroup()
    kept = ranks.broadcast(
        json.dumps([part.number for part in samples.kept()]).encode() if ranks.rank == 0 else b"",
        source=0,
    )
    there = set(parse_json(kept))
    missing = [number for number in range(plan.parts) if number not in there]
    trained = load_model(source, precision=plan.precision)
    if trained.attempt != plan.attempt:
        raise ConfigError(
            f"the checkpoint {trained.checkpoint} was saved anew since these samples were begun; "
            "choose another output"
        )
    sampler = trained.image_sampler(
        from_dict(SamplerConfig, plan.sampler),
        seed=plan.seed,
        batch=plan.batch,
        share_coarse=plan.share_coarse,
    )
    images = sum(len(plan.indices(number)) for number in there)
    drawer = PartDrawer(context, sampler, trained.model, plan, samples, images)
    drawer.draw(missing[ranks.rank :: ranks.world_size])
    ranks.reduce_min(0)  # whoever leaves first would break the others' connections
    if not context.stop_requested():
        context.complete()


@dataclass
class PartDrawer:
    """Draws parts one after the other, and keeps each while the next is drawn.

    Attributes:
        context: Rank, and the line to the driver.
        sampler: Draws as the plan says.
        model: Velocity model.
        plan: What is to be drawn.
        samples: Where it goes.
        images: How many are known to be kept.
    """

    context: WorkerContext
    sampler: ImageSampler
    model: nn.Module
    plan: SamplePlan
    samples: SampleSet
    images: int = 0

    def draw(self, numbers: Sequence[int]) -> None:
        """Draw parts, until the driver asks to stop.

        Raises:
            StoreError: A part cannot be kept.
            SolverError: The solver comes to no end.
        """
        under_way: Future[None] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="samples") as writer:
            for number in numbers:
                drawn = self._part(number)
                if under_way is not None:
                    under_way.result()
                if drawn is None:
                    return
                under_way = writer.submit(self._keep, *drawn)
            if under_way is not None:
                under_way.result()

    def _part(self, number: int) -> tuple[DrawnPart, tuple[float, ...]] | None:
        """Draw one part, with its network evaluations; None if the driver asks to stop."""
        indices = self.plan.indices(number)
        labels = self.plan.labels(indices)
        pixels = []
        nfe = torch.zeros(self.sampler.flow.stages.scales, dtype=torch.float64)
        for start in range(0, len(indices), self.plan.batch):
            if self.context.stop_requested():
                return None
            # Pixels are made where images are: a quarter of the bytes leaves a GPU.
            drawn = self.sampler.on_device(
                self.model,
                labels[start : start + self.plan.batch],
                first=indices.start + start,
                size=self.plan.batch,
            )
            pixels.append(pixels_of(drawn.images))
            nfe += len(drawn.images) * torch.tensor(drawn.nfe, dtype=torch.float64)
            done = start + len(drawn.images)
            self.context.report({"kind": "drawn", "part": number, "images": done})
        part = DrawnPart(number, indices.start, np.concatenate(pixels), labels.numpy())
        return part, tuple(nfe.tolist())

    def _keep(self, part: DrawnPart, nfe: tuple[float, ...]) -> None:
        self.samples.put(part, nfe=nfe)
        self.images += len(part.pixels)
        # Each part that is kept is a step that no restart takes again.
        self.context.advance(self.images)
        self.context.keep(self.images)
