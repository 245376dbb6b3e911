"""The choices that define a flow; what is made of them is in `models.flow.flow`.

Nothing here computes, so whoever only reads settings waits for no torch.
"""

from dataclasses import dataclass
from typing import Literal

from models.flow.stages import Stages, default_critical_times

_PATHS = ("linear", "gvp")
_TIME_SAMPLERS = ("uniform", "logit_normal")
_NOISES = ("banded", "independent")
_STAGE_CHOICES = ("stratified", "one_per_step")
_LOSS_NORMS = ("mean", "sum")


class FlowConfigError(ValueError):
    """A flow configuration that contradicts itself."""


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Choices that define a flow.

    Attributes:
        scales: Number of scales, K.
        critical_times: T_1 > ... > T_{K-1}; None takes the paper's for K scales.
        path: "linear" (paper) or "gvp" (its ablation).
        noise: "banded" splits one full-resolution draw by the pyramid; "independent" draws unit
            noise for every scale.
        time_sampler: "uniform" (paper) or "logit_normal".
        stage_choice: "stratified" deals the images of a batch out to the stages in equal shares;
            "one_per_step" (paper) trains each update at one stage, drawn uniformly.
        loss_norm: "mean" takes the mean of a band's squared errors, "sum" their sum, which weighs
            each scale 4 times as much as the next coarser one.
        scale_weights: Weight of each scale's loss, coarse to fine; None weighs all by 1.

    Raises:
        FlowConfigError: A name is unknown, or a tuple does not fit the number of scales.
        StagesError: The critical times do not decrease strictly inside (0, 1).
    """

    scales: int = 2
    critical_times: tuple[float, ...] | None = None
    path: Literal["linear", "gvp"] = "linear"
    noise: Literal["banded", "independent"] = "banded"
    time_sampler: Literal["uniform", "logit_normal"] = "uniform"
    stage_choice: Literal["stratified", "one_per_step"] = "stratified"
    loss_norm: Literal["mean", "sum"] = "mean"
    scale_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("path", _PATHS),
            ("noise", _NOISES),
            ("time_sampler", _TIME_SAMPLERS),
            ("stage_choice", _STAGE_CHOICES),
            ("loss_norm", _LOSS_NORMS),
        ):
            value = getattr(self, name)
            if value not in known:
                raise FlowConfigError(f"{name}={value!r} is unknown; use one of {sorted(known)}.")
        stages = self.stages
        if stages.scales != self.scales:
            raise FlowConfigError(
                f"critical_times={self.critical_times} cut the time axis for {stages.scales} "
                f"scales, but scales={self.scales}: give {self.scales - 1} times, or none at all "
                "for the defaults."
            )
        weights = self.scale_weights
        if weights is not None and (len(weights) != self.scales or min(weights) <= 0):
            raise FlowConfigError(
                f"scale_weights={weights} must hold one positive weight for each of the "
                f"{self.scales} scales, coarse to fine."
            )

    @property
    def stages(self) -> Stages:
        """The stages these choices describe."""
        times = self.critical_times
        return Stages(default_critical_times(self.scales) if times is None else times)
