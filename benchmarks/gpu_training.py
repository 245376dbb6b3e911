"""Training step of XL/2 on a GPU: images/s, share of the peak, memory, and where the time goes."""

import gc
import re
import sys
from collections.abc import Callable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import command
from benchmarks.interleaved import interleave, stopwatch_of
from benchmarks.workload import Latents, TrainingWork
from cluster.hardware import peak_tflops

KINDS: tuple[tuple[str, str], ...] = (
    ("optimizer", r"adam|foreach|multi_tensor"),
    # Before the others, because a fused kernel is named after all that went into it.
    ("fused", r"triton_(poi|per|red)_fused|cpp_fused"),
    ("attention", r"flash|fmha|scaled_dot_product|attention|cudnn_generated_fort_native_sdpa"),
    ("matmul", r"gemm|addmm|\bmm\b|aten::mm|bmm|matmul|nvjet|cutlass|mkldnn|linear"),
    ("norm", r"layer_?norm|rms_?norm"),
    ("copy", r"copy|memcpy|memset|cat|stack|clone|fill|zero|contiguous"),
)
"""Kinds with the names of their kernels, tried in order; all else is "elementwise and other"."""

_OTHER = "elementwise and other"
_DESCRIPTION = """\
Forward, backward and AdamW of K = 1, 2, 3 in bfloat16 (autocast; weights and optimizer in float32)
on synthetic latents. MFU is 6 x multiply-adds x images / time / peak, with the multiply-adds of one
forward pass averaged over the stages. Models are built one after the other, as each fills the
memory. Without a CUDA device it says so and exits with 1; --device cpu --size tiny tries it out.

  python -m benchmarks.gpu_training
  python -m benchmarks.gpu_training --scales 3 --batch 192 --compile on --output xl.json"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("gpu_training", description=_DESCRIPTION, rounds=20)
    parser.set_defaults(device="cuda")
    command.add_size(parser, size="XL/2", depth=None, batch=96)
    parser.add_argument("--scales", type=command.whole_numbers, default=(1, 2, 3), metavar="K,K")
    parser.add_argument("--compile", choices=["both", "on", "off"], default="both")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument(
        "--peak-tflops",
        type=float,
        help="of the device; known for most of NVIDIA's of data centres",
    )
    options = parser.parse_args(arguments)
    if any(options.batch % scales for scales in options.scales):
        parser.error(f"--batch {options.batch} must be a multiple of every K in {options.scales}")
    setting = command.setting("gpu_training", options)
    device = setting.device
    peak = options.peak_tflops or _known_peak(device)
    for scales in options.scales:
        for compiled in {"both": (False, True), "on": (True,), "off": (False,)}[options.compile]:
            work = TrainingWork(
                command.sizes(options),
                scales=scales,
                latents=Latents(
                    batch=options.batch, channels=options.channels, size=options.image_size
                ),
                device=device,
                precision=options.precision,
                optimizer=True,
                compiled=compiled,
            )
            (timing,) = interleave(
                {"step": work}, rounds=options.rounds, stopwatch=stopwatch_of(device), warmup=3
            )
            flops = 6 * work.multiply_adds * options.batch / timing.minimum
            setting.report.add(
                scales=scales,
                compiled="yes" if compiled else "no",
                parameters_m=sum(p.numel() for p in work.model.parameters()) / 1e6,
                step_ms=1000 * timing.minimum,
                spread=timing.spread,
                images_per_s=options.batch / timing.minimum,
                tflops=flops / 1e12,
                mfu=flops / (peak * 1e12) if peak else None,
                peak_gib=_peak_gib(work, device),
                **shares_by_kind(work, device=device),
            )
            del work, timing
            gc.collect()
            if compiled:
                torch.compiler.reset()
    setting.deliver()
    return 0


def _known_peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    return peak_tflops(torch.cuda.get_device_name(device))


def _peak_gib(work: TrainingWork, device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**30


def kind_of(kernel: str) -> str:
    """Tell the kind of a kernel or operator from its name."""
    name = kernel.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), _OTHER)


def shares_by_kind(
    work: Callable[[], object], *, device: torch.device, repeats: int = 3
) -> dict[str, float]:
    """Profile a piece of work.

    Args:
        work: What to run.
        device: Where it runs; on CUDA the device's time counts, else the processor's.
        repeats: How often it is run.

    Returns:
        Share of the time by kind, largest first.
    """
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiled:
        for _ in range(repeats):
            work()
        if on_cuda:
            torch.cuda.synchronize()
    spent: dict[str, float] = {}
    for event in profiled.key_averages():
        if on_cuda and event.device_type.name != "CUDA":
            continue
        own = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        kind = kind_of(event.key)
        spent[kind] = spent.get(kind, 0.0) + own
    total = sum(spent.values())
    ranked = sorted(spent.items(), key=lambda item: -item[1])
    return {kind: own / total for kind, own in ranked}


if __name__ == "__main__":
    sys.exit(command.run_guarded(main))
