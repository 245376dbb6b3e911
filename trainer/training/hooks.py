"""Hooks: passive observers of the loop, which get an immutable report and return nothing.

Only `LossWatch` may end the run: one that diverges.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.flow.sampler import SolverError
from pipelines.formats import format_duration
from trainer.engine.optimizer import OptimConfig
from trainer.engine.protocol import Engine
from trainer.evaluation.grid import grid_png
from trainer.metrics.buffer import MetricBuffer
from trainer.metrics.node_use import NodeUse
from trainer.metrics.tracker import Tracker
from trainer.training.speed import Load, Pace, Throughput

logger = logging.getLogger(__name__)


def due(before_images: int, after_images: int, interval_images: int) -> bool:
    """Tell whether a multiple of the interval lies in (before, after].

    Args:
        before_images: Images seen before the update.
        after_images: Images seen after it.
        interval_images: The interval; 0 means never.

    Returns:
        True when something that happens every `interval_images` images happens now.
    """
    if interval_images <= 0:
        return False
    return before_images // interval_images < after_images // interval_images


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """One update as hooks see it.

    Attributes:
        images_before: Images seen before the update.
        images: Images seen after it.
        waited_s: Seconds this rank has waited for data since the loop began.
    """

    images_before: int
    images: int
    waited_s: float


class Hook(Protocol):
    """Something that happens along with training on every rank."""

    def after_update(self, report: UpdateReport) -> None:
        """Observe an update."""
        ...


@dataclass(kw_only=True, eq=False)
class Progress:
    """Every `interval_images`, reduces the metrics over ranks and reports them.

    Attributes:
        metrics: Filled by the step.
        tracker: Takes the values on rank 0.
        report: Takes the progress line on rank 0.
        interval_images: How often; 0 is never.
        total_images: Length of the run.
        throughput: Measures how fast the run is.
        load: Tells what that takes of the devices.
        rank: This rank.
        node: Tells what its node uses.
    """

    metrics: MetricBuffer
    tracker: Tracker
    report: Callable[[dict[str, object]], None]
    interval_images: int
    total_images: int
    throughput: Throughput
    load: Load
    rank: int
    node: NodeUse
    _begun: bool = field(default=False, init=False)

    def after_update(self, report: UpdateReport) -> None:
        """Report when the interval is due or the run is complete."""
        last = report.images >= self.total_images
        if not last and not due(report.images_before, report.images, self.interval_images):
            if not self._begun:
                self.throughput.restart(images=report.images, waited_s=report.waited_s)
            self._begun = True
            return
        self._begun = True
        pace = self.throughput.pace(
            images=report.images, total_images=self.total_images, waited_s=report.waited_s
        )
        self.metrics.record("speed/data_wait_share", pace.data_wait_share)
        self.metrics.record("system/memory_host_gib", _host_gib(), reduction="max")
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 2**30
            self.metrics.record("system/memory_device_gib", peak, reduction="max")
        self.node.record(self.metrics)
        values = self.metrics.flush()
        if self.rank != 0:
            return
        values["speed/images_per_s"] = pace.images_per_s
        values |= self.load.figures(pace.images_per_s)
        self.tracker.metrics(values, images=report.images)
        line = self._line(report.images, values, pace)
        self.report(
            {
                "kind": "progress",
                "images": report.images,
                "total_images": self.total_images,
                "images_per_s": pace.images_per_s,
                "remaining_s": max(0.0, pace.remaining_s),
                "loss": {n: value for n, value in values.items() if n.startswith("loss/")},
                "text": line,
            }
        )

    def _line(self, images: int, values: Mapping[str, float], pace: Pace) -> str:
        losses = ", ".join(
            f"{name.removeprefix('loss/')} {value:{'.4f' if value < 1e4 else '.3e'}}"
            for name, value in sorted(values.items(), reverse=True)
            if name.startswith("loss/")
        )
        return (
            f"{images:,}/{self.total_images:,} images ({images / self.total_images:.0%})  "
            f"{pace.images_per_s:,.0f} images/s{self.load.text(pace.images_per_s)}  "
            f"loss: {losses}  "
            f"ETA {format_duration(max(0.0, pace.remaining_s))}"
        )


def _host_gib() -> float:
    return float(psutil.Process().memory_info().rss) / 2**30


_STRAY_UPDATES = 1
"""One update with such a loss may be a stray batch; a second one in a row is a state."""


class Diverged(ValueError):
    """Training has diverged.

    A ValueError, because the settings are at fault: started again, the run would repeat itself to
    the bit.
    """


class RankDiverged(RuntimeError):
    """The loss of this rank alone is no number.

    No ValueError: with the same weights and settings the others' losses are numbers, so the cause
    is this rank's data, device or memory, and workers that are started again may do without it.
    """


class LossWatch:
    """Counts the updates in a row whose loss was not finite on any rank; ends the run in time.

    Args:
        device: Where losses are.
        interval_images: How often the run may be ended; 0 is at its end alone.
        total_images: Length of the run.
        patience_updates: So many updates in a row may pass, however short the interval is.
        optim: The optimizer's settings, for the advice.
        precision: The engine's precision, for the advice.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        interval_images: int,
        total_images: int,
        patience_updates: int,
        optim: OptimConfig,
        precision: str,
    ) -> None:
        self._interval_images = interval_images
        self._total_images = total_images
        self._patience_updates = patience_updates
        self._optim = optim
        self._precision = precision
        self._finite = torch.zeros((), dtype=torch.bool, device=device)
        self._whole = torch.ones((), dtype=torch.bool, device=device)
        self._own = torch.zeros((), dtype=torch.int64, device=device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._lost = torch.zeros((), dtype=torch.int64, device=device)
        self._interval_updates = 0

    def record(self, loss: Tensor) -> None:
        """Look at the loss of one micro-batch, without waiting for it."""
        is_finite = torch.isfinite(loss.detach())
        self._finite = self._finite | is_finite
        self._whole = self._whole & is_finite

    def note_update(self, applied: Tensor) -> None:
        """Note, before `after_update`, whether the update could be applied, without waiting.

        Args:
            applied: Bool, 0-D, the same on all ranks.
        """
        self._own = torch.where(self._whole, 0, self._own + 1)
        self._whole = torch.ones_like(self._whole)
        self._skipped = torch.where(applied, 0, self._skipped + 1)

    def skipped_in_a_row(self) -> int:
        """Return how many updates, up to now, could not be applied; the same on all ranks."""
        return int(self._skipped)

    def is_skipping(self) -> bool:
        """Tell whether updates are skipped, and no stray one, as all ranks know alike."""
        return self.skipped_in_a_row() > _STRAY_UPDATES

    def is_spoiled(self, what: str) -> bool:
        """Tell whether few other ranks spoil the updates of all; a collective call.

        Args:
            what: What was seen, as a clause.

        Returns:
            False if the updates are spoiled by most ranks, or by none's loss. True on the ranks
            that have to wait for one that does not come, and so end.

        Raises:
            RankDiverged: This rank is one of those that spoil them.
        """
        own = (self._own >= self._skipped).long()
        spoilers = own.clone()
        if dist.is_initialized():
            dist.all_reduce(spoilers, op=dist.ReduceOp.SUM)
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if not 0 < 2 * int(spoilers) <= ranks:
            return False
        if int(own):
            raise RankDiverged(
                f"{what}, and each time the loss of this rank was not, while most ranks' were: its "
                "data or its device is at fault, and not the settings"
            )
        return True

    def after_update(self, report: UpdateReport) -> None:
        """Count the update; a collective call when the interval is due or the run complete.

        Raises:
            Diverged: No loss of the interval was finite.
        """
        self._lost = torch.where(self._finite, 0, self._lost + 1)
        self._finite = torch.zeros_like(self._finite)
        self._interval_updates += 1
        last = report.images >= self._total_images
        if not last and not due(report.images_before, report.images, self._interval_images):
            return
        lost, interval = self.nonfinite_updates(), self._interval_updates
        self._interval_updates = 0
        whole = lost >= interval and lost > self._patience_updates
        if whole or (last and lost > _STRAY_UPDATES):
            raise self.divergence_error(
                f"the loss was not finite in the last {lost} updates, up to {report.images:,} "
                "images"
            )

    def nonfinite_updates(self) -> int:
        """Return how many updates in a row, up to now, had no finite loss; a collective call."""
        if dist.is_initialized():
            dist.all_reduce(self._lost, op=dist.ReduceOp.MIN)
        return int(self._lost.item())

    def is_diverging(self) -> bool:
        """Tell whether this is no state to keep; a collective call."""
        return self.nonfinite_updates() > _STRAY_UPDATES

    def divergence_error(self, what: str) -> Diverged:
        """Return the error for a run that diverged, with the advice that its settings leave open.

        Args:
            what: What was seen, as a clause.
        """
        optim = self._optim
        advice = [f"lower optim.learning_rate={optim.learning_rate:g}"]
        if optim.warmup_images == 0:
            advice.append("set optim.warmup_images")
        if optim.clip_norm > 0:
            advice.append(f"lower optim.clip_norm={optim.clip_norm:g}")
        else:
            advice.append("set optim.clip_norm")
        if self._precision != "fp32":
            advice.append("use engine.precision=fp32")
        return Diverged(
            f"{what}: training has diverged, and would again with these settings; "
            f"{', '.join(advice[:-1])} or {advice[-1]}. Checkpoints of before the loss rose are "
            "good: begin another run=NAME from one of them with resume=URI resume_changed=true"
        )


class AfterSave(Protocol):
    """Does something with a state that is being saved."""

    def __call__(self, images: int, *, is_begun: bool) -> None:
        """Take how many images were seen, and whether the save has begun; a collective call."""
        ...


class PeriodicSave:
    """Saves when an interval is due; a collective call.

    Args:
        save: Writes a checkpoint of the state as it is now; tells whether that has begun.
        intervals_images: How often, for one reason or the other; 0 is never.
        after_save: Called after it.
    """

    def __init__(
        self, save: Callable[[], bool], *, intervals_images: Sequence[int], after_save: AfterSave
    ) -> None:
        self._save = save
        self._intervals_images = intervals_images
        self._after_save = after_save

    def after_update(self, report: UpdateReport) -> None:
        """Save if it is time."""
        if any(due(report.images_before, report.images, each) for each in self._intervals_images):
            self._after_save(report.images, is_begun=self._save())


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleGrids:
    """Draws a grid from the EMA weights.

    Attributes:
        engine: Holds the EMA.
        sample: Samples the grid's images from a model, on all ranks; fixed noise and labels.
        tracker: Takes the picture on rank 0.
        interval_images: How often; 0 is never.
        columns: Images per row.
        rank: This rank.
        pause: Leaves the time of a `with` block out of the run's speed.
    """

    engine: Engine
    sample: Callable[[nn.Module], Tensor]
    tracker: Tracker
    interval_images: int
    columns: int
    rank: int
    pause: Callable[[], AbstractContextManager[None]]

    def begin(self, images: int) -> None:
        """Draw what a new run begins with; a collective call.

        MLflow's slider stands there at first. And if nothing can be drawn, that is told at once.
        """
        if images == 0 and self.interval_images:
            if self.rank == 0:
                logger.info("drawing samples of the untrained model")
            self._draw(images)

    def after_update(self, report: UpdateReport) -> None:
        """Draw when the interval is due; a collective call."""
        if due(report.images_before, report.images, self.interval_images):
            self._draw(report.images)

    def _draw(self, images: int) -> None:
        """Draw; what cannot be drawn is told, and training goes on: later weights may do better."""
        with self.pause():
            try:
                with self.engine.ema_weights() as model:
                    samples = self.sample(model)
            except SolverError as error:  # on all ranks
                if self.rank == 0:
                    logger.warning("no samples are shown of %s images: %s", images, error)
                return
            if self.rank == 0:
                picture = grid_png(samples, columns=self.columns)
                self.tracker.image("samples", picture, images=images)
