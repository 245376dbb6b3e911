"""Training step of LapFlow against the single-scale model of equal size, beside the MAC ratio."""

import sys
from collections.abc import Sequence

from benchmarks import command
from benchmarks.interleaved import interleave, stopwatch_of
from benchmarks.workload import Latents, TrainingWork

_DESCRIPTION = """\
Forward and backward pass of K = 1, 2, 3 on the same batch of latents, through the training
objective. The ratio of times should be that of the multiply-adds: `off` is how much it exceeds it.

  python -m benchmarks.training_step
  python -m benchmarks.training_step --size XL/2 --depth 28 --batch 96 --precision bf16"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("training_step", description=_DESCRIPTION, rounds=7)
    command.add_size(parser, size="B/2", depth=2, batch=48)
    parser.add_argument("--scales", type=command.whole_numbers, default=(1, 2, 3), metavar="K,K")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--optimizer", action="store_true", help="with AdamW after each step")
    parser.add_argument("--compile", action="store_true", help="torch.compile, static shapes")
    options = parser.parse_args(arguments)
    if any(options.batch % scales for scales in options.scales):
        parser.error(f"--batch {options.batch} must be a multiple of every K in {options.scales}")
    setting = command.setting("training_step", options)
    works = {
        f"K={scales}": TrainingWork(
            command.sizes(options),
            scales=scales,
            latents=Latents(
                batch=options.batch, channels=options.channels, size=options.image_size
            ),
            device=setting.device,
            precision=options.precision,
            optimizer=options.optimizer,
            compiled=options.compile,
        )
        for scales in options.scales
    }
    timings = interleave(works, rounds=options.rounds, stopwatch=stopwatch_of(setting.device))
    baseline = works[timings[0].name].multiply_adds
    for timing in timings:
        work = works[timing.name]
        mac_ratio = work.multiply_adds / baseline
        setting.report.add(
            model=timing.name,
            minimum_s=timing.minimum,
            spread=timing.spread,
            images_per_s=options.batch / timing.minimum,
            flops=6 * work.multiply_adds * options.batch / timing.minimum,
            ratio=timing.ratio,
            mac_ratio=mac_ratio,
            off=timing.ratio / mac_ratio - 1,
        )
    setting.deliver()
    return 0


if __name__ == "__main__":
    sys.exit(command.run_guarded(main))
