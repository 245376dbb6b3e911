"""What the planner says of a training step beside every step that was measured on a GPU."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks import command
from cluster.hardware import HardwareConfig, memory_gb_per_s, peak_tflops
from trainer.config.composition import compose_job
from trainer.planning.placing import resolve_placement, workload, zero_stage
from trainer.planning.step_time import StepTime, step_time

_DESCRIPTION = """\
Steps on one GPU, as docs/log.md has them, beside the planner's time for them: matrix products at
40 % of the peak in bf16 and 70 % in float32, an update at 80 % of the memory's rate, an encoder at
40 % of the peak in bf16, and 10 us of the host for each kernel of a pass, of which the column has
what they take beyond the products. `factor` is what was measured over the planner's sum.

The steps were taken in November 2026 with the engine of then, whose update launched several kernels
for each parameter and read and wrote more. What the planner tells of an update is today's.

  python -m benchmarks.planner"""

_ASSUMED_SHARE = 0.4
_ASSUMED_FP32_SHARE = 0.7
_ASSUMED_MEMORY_SHARE = 0.8
_FP32_TFLOPS = {"NVIDIA H200": 67.0}

_ONLINE = ("+exp=imagenet_xl", "data.classes=1000", "flow=two_scales")
_LATENTS = ("+exp=imagenet_xl_latents", "data.classes=1000", "flow=two_scales")
_THREE_SCALES = (*_LATENTS, "model=xl_2", "flow=three_scales")
_PIXELS = (*_LATENTS, "data=imagenet_256", "data.classes=1000", "codec=identity")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A step that was timed.

    Attributes:
        what: The step, in words.
        settings: Of a job of that step, without batch and precision.
        images: Images of the step.
        ms: What it took.
        averages: Whether an average of the weights followed.
        precision: Of the products.
        device: Where.
    """

    what: str
    settings: tuple[str, ...]
    images: int
    ms: float
    averages: bool = False
    precision: str = "bf16"
    device: str = "NVIDIA H200"


MEASURED: tuple[Measured, ...] = (
    Measured(
        what="XL/2, K = 3, plain engine in fp32, no TF32",
        settings=(*_THREE_SCALES, "engine=plain"),
        images=6,
        ms=257,
        averages=True,
        precision="fp32",
    ),
    Measured(
        what="XL/2, K = 3, ZeRO-1 of one rank",
        settings=(*_THREE_SCALES, "engine=zero1"),
        images=6,
        ms=520,
        averages=True,
    ),
    Measured(
        what="XL/2, K = 3, ZeRO-2 of one rank",
        settings=(*_THREE_SCALES, "engine=zero2"),
        images=6,
        ms=457,
        averages=True,
    ),
    Measured(
        what="XL/2, K = 2, encoding online",
        settings=(*_ONLINE, "model=xl_2"),
        images=64,
        ms=282,
    ),
    Measured(
        what="B/2, K = 2, encoding online",
        settings=(*_ONLINE, "model=b_2"),
        images=256,
        ms=581,
    ),
    Measured(
        what="S/2 with patches of 16, K = 2, 256 pixels",
        settings=(*_PIXELS, "model=s_2", "model.patch_size=16"),
        images=256,
        ms=110,
    ),
    Measured(
        what="S/2 of depth 4, K = 2, digits",
        settings=("+exp=digits", "model=s_2", "model.depth=4", "model.patch_size=2"),
        images=128,
        ms=49.8,
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = command.parser("planner", description=_DESCRIPTION, rounds=1)
    options = parser.parse_args(arguments)
    setting = command.setting("planner", options)
    for each in MEASURED:
        planned = predict(each)
        setting.report.add(
            step=each.what,
            images=each.images,
            products_ms=1e3 * planned.compute,
            update_ms=1e3 * planned.update,
            encoder_ms=1e3 * planned.encoding,
            launching_ms=1e3 * planned.launching,
            planned_ms=1e3 * planned.total,
            measured_ms=float(each.ms),
            factor=each.ms / (1e3 * planned.total),
        )
    setting.deliver()
    return 0


def predict(step: Measured) -> StepTime:
    """Predict a step as the planner does, with the rates of the device that took it."""
    peak, memory = peak_tflops(step.device), memory_gb_per_s(step.device)
    assert peak is not None
    assert memory is not None
    in_fp32 = _ASSUMED_FP32_SHARE * _FP32_TFLOPS[step.device]
    job = compose_job(
        [
            *step.settings,
            f"train.global_batch={step.images}",
            "engine.micro_batch=null",
            "cluster.workers=1",
            f"engine.precision={step.precision}",
        ]
    )
    asked = workload(job)
    if not step.averages:
        asked = replace(asked, averages=0)
    return step_time(
        asked,
        resolve_placement(job),
        zero_stage=zero_stage(job),
        hardware=HardwareConfig(
            matmul_tflops=in_fp32 if step.precision == "fp32" else _ASSUMED_SHARE * peak,
            memory_gb_per_s=_ASSUMED_MEMORY_SHARE * memory,
        ),
    )


if __name__ == "__main__":
    sys.exit(command.run_guarded(main))
