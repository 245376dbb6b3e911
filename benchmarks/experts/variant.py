"""One way to hold and train a model: a placement and an engine, as overrides of an experiment."""

from dataclasses import dataclass

from trainer.config.composition import compose_job
from trainer.config.job import JobConfig


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What one row of a table is measured of.

    Attributes:
        scales: Number of scales, K.
        zero_stage: 1 to 3; 0 is the plain engine, which holds everything in fp32.
        placement: As `engine.placement` takes it.
        grad_accum_steps: Forward passes of an update.
        keeps_tokens: Whether gathered tokens are kept instead of gathered again.
    """

    scales: int
    zero_stage: int
    placement: str = "replicated"
    grad_accum_steps: int = 1
    keeps_tokens: bool = False

    @property
    def name(self) -> str:
        """The row's name."""
        stage = f"ZeRO-{self.zero_stage}" if self.zero_stage else "no ZeRO"
        steps = self.grad_accum_steps
        passes = f", {steps} passes" if steps > 1 else ""
        kept = ", tokens kept" if self.keeps_tokens else ""
        return f"K={self.scales}, {self.placement}, {stage}{passes}{kept}"

    def job(self, *, model: str, ranks: int, images: int, precision: str = "bf16") -> JobConfig:
        """Compose the job.

        Args:
            model: Member of the model group of the configuration, such as "s_2".
            ranks: Number of ranks.
            images: Images of each rank in one pass; a multiple of the number of scales.
            precision: "bf16" or "fp32"; the plain engine always has fp32.
        """
        engine = (
            ["engine=plain", "engine.precision=fp32"]
            if self.zero_stage == 0
            else [f"engine.zero_stage={self.zero_stage}", f"engine.precision={precision}"]
        )
        return compose_job(
            [
                "+exp=imagenet_xl",
                f"model={model}",
                f"flow.scales={self.scales}",
                "flow.critical_times=null",
                "data.classes=1000",
                f"cluster.workers={ranks}",
                f"train.global_batch={ranks * images * self.grad_accum_steps}",
                f"engine.micro_batch={images}",
                f"engine.placement={self.placement}",
                f"engine.regather_tokens={str(not self.keeps_tokens).lower()}",
                *engine,
            ]
        )


def variants(
    scales: int, *, ranks: int, stages: tuple[int, ...], grad_accum_steps: int = 1
) -> list[Variant]:
    """The placements that are compared: replicated, the coarsest or all coarse scales sharded.

    Args:
        scales: Number of scales, K.
        ranks: Number of ranks; the size of the expert groups.
        stages: ZeRO stages.
        grad_accum_steps: Forward passes of an update.
    """
    coarse = range(scales - 1, 0, -1)
    placements = ["replicated"]
    if ranks > 1 and scales > 1:
        placements.append(f"{{{scales - 1}:{ranks}}}")
    if ranks > 1 and scales > 2:
        placements.append("{" + ",".join(f"{k}:{ranks}" for k in coarse) + "}")
    return [
        Variant(
            scales=scales, zero_stage=stage, placement=placement, grad_accum_steps=grad_accum_steps
        )
        for stage in stages
        for placement in placements
    ]
