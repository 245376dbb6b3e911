"""Training objective: every image at one stage, stages dealt out or one for the whole batch."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from models.axes import Bands, VelocityModel
from models.flow.flow import Flow

TIME_BINS = 5
"""Equal parts of [0, 1] over which the losses are told apart."""


class BatchError(ValueError):
    """A batch whose size, bands or stage do not fit the stages."""


@dataclass(frozen=True, kw_only=True)
class LossReport:
    """Loss of one batch; everything but the total is detached.

    Attributes:
        total: What to differentiate: the mean over the images of the weighted sum of the losses of
            the scales that each image carries.
        per_scale: Mean squared error of each scale, coarse to fine, over the images that carry it,
            unweighted; 0 for a scale that no image carries.
        images_per_scale: Images that carry each scale, coarse to fine.
        time_sums: For each scale, and each of ``TIME_BINS`` equal parts of [0, 1], the sum of the
            mean squared errors of the images that carry the scale and whose time lies there.
        time_counts: Number of those images.
    """

    total: Float[Tensor, ""]
    per_scale: Float[Tensor, "K"]
    images_per_scale: tuple[int, ...]
    time_sums: Float[Tensor, "K bins"]
    time_counts: Float[Tensor, "K bins"]


class Objective:
    """Flow matching on every scale, each image at one stage.

    At stage s, in the paper's numbering, an image carries the scales k >= s and its time lies in
    [T_{s+1}, 1].

    With stratified stages image ``i`` of the batch has stage ``i mod K``. Dealing the stages out
    gives every stage its exact share, and sorting by stage makes the images that carry a scale one
    slice from the start of the batch, so neither padding nor a mask is needed. With one stage per
    step the caller names the stage of the whole batch; over uniformly drawn stages the expected
    loss is the same.

    Attributes:
        flow: What is trained.
    """

    def __init__(self, flow: Flow) -> None:
        self.flow = flow

    def __call__(
        self,
        velocity_model: VelocityModel,
        *,
        bands: Bands,
        labels: Int[Tensor, "b"],
        uniforms: Float[Tensor, "b"],
        noise: Float[Tensor, "b n"],
        stage: int | None = None,
    ) -> LossReport:
        """Compute the loss of one batch.

        Args:
            velocity_model: The network.
            bands: All K bands of the images, coarse to fine.
            labels: Class of each image, or the null label.
            uniforms: One number in [0, 1) for each image; decides its time.
            noise: ``Flow.noise_size`` standard normal numbers for each image.
            stage: Stage of the whole batch, for a flow with one stage per step; else None.

        Raises:
            BatchError: The batch does not divide into its stages, bands are missing, or the stage
                does not suit the flow.
            FlowConfigError: ``noise`` holds another count of numbers.
        """
        flow = self.flow
        scales, taus = flow.stages.scales, flow.stages.activation_times
        self._check(bands, batch=labels.shape[0], stage=stage)
        # How many scales each of the batch's stages carries, most first.
        active = tuple(range(scales, 0, -1)) if stage is None else (scales - stage,)
        noise_bands = flow.noise_bands(
            noise, channels=bands[-1].shape[1], image_size=bands[-1].shape[-1]
        )
        by_stage = _sort_by_stage(uniforms, len(active), kept=len(active)).chunk(len(active))
        time = torch.cat(
            [
                flow.time_sampler(u, taus[count - 1])
                for u, count in zip(by_stage, active, strict=True)
            ]
        )

        states, targets = [], []
        for position, tau in enumerate(taus[: active[0]]):
            carrying = sum(count > position for count in active)
            data = _sort_by_stage(bands[position], len(active), kept=carrying)
            eps = _sort_by_stage(noise_bands[position], len(active), kept=carrying)
            own_time = time[: data.shape[0]]
            states.append(flow.path.state(data, eps, own_time, tau))
            targets.append(flow.path.velocity(data, eps, own_time, tau))
        sorted_labels = _sort_by_stage(labels, len(active), kept=len(active))
        velocities = velocity_model(tuple(states), time, sorted_labels)
        return self._report(velocities, targets, time)

    def _report(self, velocities: Bands, targets: list[Tensor], time: Tensor) -> LossReport:
        absent = self.flow.stages.scales - len(targets)
        # Not by `one_hot`, which looks at what it is given and so waits for it.
        places = torch.arange(TIME_BINS, device=time.device)
        bins = (time * TIME_BINS).long().clamp(max=TIME_BINS - 1)[:, None] == places
        losses, shares, sums, counts = [], [], [], []
        for velocity, target, weight in zip(
            velocities, targets, self.flow.scale_weights, strict=False
        ):
            predicted, carrying = velocity.to(target.dtype), target.shape[0]
            losses.append(F.mse_loss(predicted, target))
            counted = target[0].numel() if self.flow.config.loss_norm == "sum" else 1
            # A scale weighs by the share of the images that carry it.
            shares.append(weight * counted * carrying / time.shape[0] * losses[-1])
            errors = (predicted.detach() - target).square().mean(dim=(1, 2, 3))
            own_bins = bins[:carrying].to(errors.dtype)
            sums.append(errors @ own_bins)
            counts.append(own_bins.sum(0))
        return LossReport(
            total=torch.stack(shares).sum(),
            per_scale=F.pad(torch.stack(losses).detach(), (0, absent)),
            images_per_scale=(*(target.shape[0] for target in targets), *[0] * absent),
            time_sums=F.pad(torch.stack(sums), (0, 0, 0, absent)),
            time_counts=F.pad(torch.stack(counts), (0, 0, 0, absent)),
        )

    def _check(self, bands: Bands, *, batch: int, stage: int | None) -> None:
        scales, choice = self.flow.stages.scales, self.flow.config.stage_choice
        if len(bands) != scales:
            raise BatchError(f"the flow has {scales} scales, but the batch has {len(bands)} bands.")
        if (stage is None) != (choice == "stratified"):
            raise BatchError(
                f"stage={stage} does not suit stage_choice={choice}: with one_per_step name the "
                "stage of the batch, with stratified none."
            )
        if stage is not None and not 0 <= stage < scales:
            raise BatchError(f"stage={stage} is not among 0 ... {scales - 1}.")
        if batch < 1 or (stage is None and batch % scales):
            raise BatchError(
                f"a batch of {batch} images cannot be dealt out to {scales} stages in equal "
                f"shares: make the batch of every rank a positive multiple of {scales}."
            )


def _sort_by_stage(images: Tensor, stages: int, *, kept: int) -> Tensor:
    """Order a batch, dealt out to the stages in turn, by stage; keep the first ``kept`` stages."""
    dealt = rearrange(images, "(n s) ... -> s n ...", s=stages)
    return dealt[:kept].flatten(0, 1)
