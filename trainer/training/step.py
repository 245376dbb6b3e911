"""One training update: micro-batches through the objective, one gradient, one AdamW step.

All randomness of an image (noise, time, label dropout) is a function of the run's seed and the
image's position in the run. So an update is the same on any number of ranks, up to the rounding of
sums, and exactly the same when it is repeated after a crash.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.axes import Bands
from models.codec import Codec
from models.flow.objective import TIME_BINS, LossReport, Objective
from models.pyramid import band_statistics, split
from pipelines.loading.loader import Batch
from trainer import rng
from trainer.config.job import TrainConfig
from trainer.engine.ema import decays_on_device
from trainer.engine.optimizer import OptimConfig, learning_rate
from trainer.engine.protocol import Engine, UpdateOutcome
from trainer.metrics.buffer import MetricBuffer
from trainer.state import TrainState
from trainer.training.hooks import LossWatch
from trainer.training.update_counts import UpdateCounts


@dataclass(kw_only=True, eq=False)
class TrainStep:
    """Turns batches into updates.

    Attributes:
        engine: Holds the model and its optimizer.
        objective: The flow-matching loss.
        config: Run settings.
        optim: Optimizer settings, for the learning rate.
        metrics: Takes losses, gradient norm and counts.
        noise_size: Normal numbers an image needs.
        null_label: Label index that stands for "no class".
        micro_batch: Images per forward pass on this rank.
        device: Device of the model.
        watch: Sees every loss.
        encoder: Makes latents of whole images, which are then split into bands here; None when
            batches come as the flow's bands.
    """

    engine: Engine
    objective: Objective
    config: TrainConfig
    optim: OptimConfig
    metrics: MetricBuffer
    noise_size: int
    null_label: int
    micro_batch: int
    device: torch.device
    watch: LossWatch
    encoder: Codec | None = None
    _counts: UpdateCounts | None = field(default=None, init=False)

    def __call__(self, batch: Batch, state: TrainState, *, first_image: int) -> UpdateOutcome:
        """Queue one update. On a GPU the host does not wait for it.

        Args:
            batch: This rank's images.
            state: The run's counters before the update; how many were applied is written into it by
                `settle`.
            first_image: Position in the run of the batch's first image.

        Returns:
            What the update did.

        Raises:
            Diverged: If too many updates in a row had to be skipped.
            RankDiverged: Likewise, because of this rank.
        """
        count = len(batch.labels)
        stage = self._stage(state.images)
        for start in range(0, count, self.micro_batch):
            stop = start + self.micro_batch
            loss = self._loss(
                batch, slice(start, stop), first_image=first_image + start, stage=stage
            )
            self.engine.backward(loss, last=stop >= count)
        rate = learning_rate(self.optim, images=state.images, total_images=self.config.total_images)
        counts = self._counts_of(state)
        outcome = self.engine.update(
            learning_rate=rate, ema_decays=decays_on_device(self.config.ema, counts.applied)
        )
        counts.note(outcome.applied)
        self.metrics.record("training_data/skipped_images", float(batch.skipped), reduction="sum")
        self._record(outcome, rate)
        if self._is_watched(state.images):
            self.check_applied()
        return outcome

    def settle(self) -> None:
        """Write into the state of the last call how many updates were applied; waits for them."""
        if self._counts is not None:
            self._counts.settle()

    def _counts_of(self, state: TrainState) -> UpdateCounts:
        if self._counts is None or not self._counts.belongs_to(state):
            self._counts = UpdateCounts(state, self.device)
        return self._counts

    def _stage(self, images: int) -> int | None:
        """The stage of the update at a position of the run, alike on all ranks."""
        flow = self.objective.flow
        if flow.config.stage_choice == "stratified":
            return None
        draw = rng.uniforms(self.config.seed, "stage", first=images, count=1)
        return int(draw.item() * flow.stages.scales)

    def _loss(self, batch: Batch, part: slice, *, first_image: int, stage: int | None) -> Tensor:
        labels = batch.labels[part].to(self.device)
        seed, count, device = self.config.seed, len(labels), self.device

        def uniforms(stream: str) -> Tensor:
            return rng.uniforms(seed, stream, first=first_image, count=count, device=device)

        noise = rng.normals(
            seed, "noise", first=first_image, count=count, size=self.noise_size, device=device
        )
        dropped = uniforms("label dropout") < self.config.label_dropout
        bands = self._bands(batch, part, first_image=first_image)
        report = self.objective(
            self.engine,
            bands=bands,
            labels=torch.where(dropped, self.null_label, labels),
            uniforms=uniforms("time"),
            noise=noise,
            stage=stage,
        )
        self._record_loss(report)
        self._record_bands(bands)
        return report.total

    def _bands(self, batch: Batch, part: slice, *, first_image: int) -> Bands:
        bands = tuple(band[part].to(self.device) for band in batch.bands)
        if self.encoder is None:
            return bands
        (images,) = bands
        normals = rng.normals(
            self.config.seed,
            "posterior",
            first=first_image,
            count=len(images),
            size=self.encoder.normals_per_image(images.shape[-1]),
            device=self.device,
        )
        latents = self.encoder.encode(images, normals)
        return split(latents, self.objective.flow.stages.scales)

    def _record_loss(self, report: LossReport) -> None:
        self.watch.record(report.total)
        self.metrics.record("loss/total", report.total)
        scales = reversed(range(len(report.per_scale)))
        for k, loss, images in zip(scales, report.per_scale, report.images_per_scale, strict=True):
            self.metrics.record(f"loss/scale_{k}", loss, weight=images)
        self.metrics.record_each(
            _time_bin_names(len(report.per_scale)),
            (report.time_sums / report.time_counts.clamp(min=1)).flatten(),
            weights=report.time_counts.flatten(),
        )

    def _record_bands(self, bands: Bands) -> None:
        # Means over batches, so a deviation is the one within a batch.
        statistics = band_statistics(bands)
        scales = list(reversed(range(len(bands))))
        ones = torch.ones(len(bands), device=self.device)
        for kind, values in (("mean", statistics.mean), ("std", statistics.std)):
            names = [f"training_data/scale_{k}_{kind}" for k in scales]
            self.metrics.record_each(names, values, weights=ones)

    def _record(self, outcome: UpdateOutcome, rate: float) -> None:
        applied = outcome.applied
        self.metrics.record("optim/learning_rate", rate)
        self.metrics.record("optim/skipped_updates", applied.logical_not(), reduction="max")
        self.metrics.record_each(
            ("optim/gradient_norm",),
            torch.where(applied, outcome.gradient_norm, 0.0).reshape(1),
            weights=applied.reshape(1),
        )
        self.watch.note_update(applied)

    def _is_watched(self, images: int) -> bool:
        """Tell whether the update at a position of the run is one at which the host looks.

        To look is to wait for the device, so it is done as seldom as it need be, and always at the
        same updates: a run that is begun again ends where it has ended before, by which it is known
        that it repeats itself.
        """
        updates = images // self.config.global_batch + 1
        return updates % (self.config.max_skipped_updates + 1) == 0

    def check_applied(self) -> None:
        """End a run of which no update comes through any more; a collective call, which waits.

        Raises:
            Diverged: That is so, on all ranks alike.
        """
        skipped = self.watch.skipped_in_a_row()
        if skipped > self.config.max_skipped_updates:
            what = (
                f"the gradient was not finite in {skipped} updates in a row "
                f"(train.max_skipped_updates={self.config.max_skipped_updates})"
            )
            if not self.watch.is_spoiled(what):
                raise self.watch.divergence_error(what)


def _time_bin_names(scales: int) -> list[str]:
    """Name the loss of each scale, coarse to fine, in each part of [0, 1]."""
    return [
        f"loss_by_time/scale_{k}_{part / TIME_BINS:.1f}-{(part + 1) / TIME_BINS:.1f}"
        for k in reversed(range(scales))
        for part in range(TIME_BINS)
    ]
