"""What the planner says of a training step beside every step that was measured on a GPU."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import command
from cluster.hardware import HardwareConfig, peak_tflops
from models.transformer.cost import parameters
from trainer.config.composition import compose_job
from trainer.planning.placing import model_shape, resolve_placement, workload, zero_stage
from trainer.planning.step_time import step_time

_DESCRIPTION = """\
Steps on one GPU, as docs/log.md has them, beside the planner's time for them. The planner counts
matrix products alone, at 40 % of the peak. What it leaves out stands beside it, as far as it is
arithmetic: an update that reads and writes each byte once, at the memory's full rate, and the
encoder's products at 40 % of the peak. `factor` is what was measured over the sum. Kernels that are
waited for, which few images have most of, are in no column.

  python -m benchmarks.planner"""

_ASSUMED_SHARE = 0.4
_MEMORY_GB_PER_S = {"NVIDIA H200": 4800.0}
_UPDATE_BYTES = 28
"""For each weight: its gradient read, itself and both moments read and written, in fp32."""
_EMA_BYTES = 12
"""For each weight: itself and its average read, and the average written."""
_ENCODER_TFLOP = 0.273
"""Of an image of 256 pixels, by the autoencoder of Stable Diffusion."""

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
        encodes: Whether images were encoded in it.
        precision: Of the products.
        device: Where.
    """

    what: str
    settings: tuple[str, ...]
    images: int
    ms: float
    averages: bool = False
    encodes: bool = False
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
        settings=(*_LATENTS, "model=xl_2"),
        images=64,
        ms=282,
        encodes=True,
    ),
    Measured(
        what="B/2, K = 2, encoding online",
        settings=(*_LATENTS, "model=b_2"),
        images=256,
        ms=581,
        encodes=True,
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
        planned, update, encoder = predicted_ms(each)
        setting.report.add(
            step=each.what,
            images=each.images,
            planned_ms=planned,
            update_ms=update,
            encoder_ms=encoder,
            measured_ms=float(each.ms),
            factor=each.ms / (planned + update + encoder),
        )
    setting.deliver()
    return 0


def predicted_ms(step: Measured) -> tuple[float, float, float]:
    """Predict a step: its products as the planner does, and what the planner leaves out.

    Returns:
        Milliseconds of the products, of the update, and of the encoder.
    """
    peak = peak_tflops(step.device)
    assert peak is not None
    rate = _ASSUMED_SHARE * peak
    job = compose_job(
        [
            *step.settings,
            f"train.global_batch={step.images}",
            "engine.micro_batch=null",
            "cluster.workers=1",
            f"engine.precision={step.precision}",
        ]
    )
    seconds = step_time(
        workload(job),
        resolve_placement(job),
        zero_stage=zero_stage(job),
        hardware=HardwareConfig(matmul_tflops=rate),
    ).total
    per_weight = _UPDATE_BYTES + (_EMA_BYTES if step.averages else 0)
    moved = parameters(model_shape(job)).total * per_weight
    update_s = moved / (1e9 * _MEMORY_GB_PER_S[step.device])
    encoder_s = step.images * _ENCODER_TFLOP / rate if step.encodes else 0.0
    return 1e3 * seconds, 1e3 * update_s, 1e3 * encoder_s


if __name__ == "__main__":
    sys.exit(command.run_guarded(main))
