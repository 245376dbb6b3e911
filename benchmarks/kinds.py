"""Where the time of a piece of work goes: shares by kind of kernel."""

import re
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

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
