"""Training objective with stratified stages."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from models.axes import Bands, VelocityModel
from models.flow.flow import Flow


class BatchError(ValueError):
    """A batch whose size or bands do not fit the stages."""


@dataclass(frozen=True, kw_only=True)
class LossReport:
    """Loss of one batch.

    Attributes:
        total: What to differentiate: the mean over the images of the weighted sum of the losses of
            the scales that each image carries.
        per_scale: Mean squared error of each scale, coarse to fine, over the images that carry it;
            unweighted and detached.
    """

    total: Float[Tensor, ""]
    per_scale: Float[Tensor, "K"]


class Objective:
    """Flow matching on every scale, each image at one stage.

    Image ``i`` of the batch has stage ``i mod K`` in the paper's numbering: at stage s it carries
    the scales k >= s and its time lies in [T_{s+1}, 1]. Dealing the stages out gives every stage
    its exact share, and sorting by stage makes the images that carry a scale one slice from the
    start of the batch, so neither padding nor a mask is needed.
    """

    def __init__(self, flow: Flow) -> None:
        self._flow = flow

    def __call__(
        self,
        velocity_model: VelocityModel,
        *,
        bands: Bands,
        labels: Int[Tensor, "b"],
        uniforms: Float[Tensor, "b"],
        noise: Float[Tensor, "b n"],
    ) -> LossReport:
        """Compute the loss of one batch.

        Args:
            velocity_model: The network.
            bands: All K bands of the images, coarse to fine.
            labels: Class of each image, or the null label.
            uniforms: One number in [0, 1) for each image; decides its time.
            noise: ``Flow.noise_size`` standard normal numbers for each image.

        Raises:
            BatchError: The batch does not divide into K stages, or bands are missing.
            FlowConfigError: ``noise`` holds another count of numbers.
        """
        flow = self._flow
        stages = flow.stages.scales
        taus = flow.stages.activation_times
        self._check(bands, batch=labels.shape[0])
        noise_bands = flow.noise_bands(
            noise, channels=bands[-1].shape[1], image_size=bands[-1].shape[-1]
        )
        by_stage = _sort_by_stage(uniforms, stages, kept=stages).chunk(stages)
        time = torch.cat(
            [flow.time_sampler(u, tau) for u, tau in zip(by_stage, reversed(taus), strict=True)]
        )

        states, targets = [], []
        for position, tau in enumerate(taus):
            data = _sort_by_stage(bands[position], stages, kept=stages - position)
            eps = _sort_by_stage(noise_bands[position], stages, kept=stages - position)
            own_time = time[: data.shape[0]]
            states.append(flow.path.state(data, eps, own_time, tau))
            targets.append(flow.path.velocity(data, eps, own_time, tau))
        sorted_labels = _sort_by_stage(labels, stages, kept=stages)
        velocities = velocity_model(tuple(states), time, sorted_labels)

        losses = [
            F.mse_loss(velocity.to(target.dtype), target)
            for velocity, target in zip(velocities, targets, strict=True)
        ]
        # The scale at position p is carried by K - p of the K stages, and weighs by that share.
        shares = [
            weight * (stages - position) / stages * loss
            for position, (weight, loss) in enumerate(zip(flow.scale_weights, losses, strict=True))
        ]
        return LossReport(total=torch.stack(shares).sum(), per_scale=torch.stack(losses).detach())

    def _check(self, bands: Bands, *, batch: int) -> None:
        scales = self._flow.stages.scales
        if len(bands) != scales:
            raise BatchError(f"the flow has {scales} scales, but the batch has {len(bands)} bands.")
        if batch < 1 or batch % scales:
            raise BatchError(
                f"a batch of {batch} images cannot be dealt out to {scales} stages in equal "
                f"shares: make the batch of every rank a positive multiple of {scales}."
            )


def _sort_by_stage(images: Tensor, stages: int, *, kept: int) -> Tensor:
    """Order a batch, dealt out to the stages in turn, by stage; keep the first ``kept`` stages."""
    dealt = rearrange(images, "(n s) ... -> s n ...", s=stages)
    return dealt[:kept].flatten(0, 1)
