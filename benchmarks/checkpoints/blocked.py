"""Time for which a save keeps training waiting, against a copy of the same bytes.

The baseline copies the same flat tensors into host memory that was written before (and, from a GPU,
page-locked): the least a save that takes a snapshot can do. Between rounds every value changes, and
the upload, to a folder, is waited for outside the clock.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import command
from benchmarks.checkpoints.state import MIB, Saves, add_state, rank_state
from benchmarks.interleaved import interleave
from trainer.host_memory import host_buffer
from trainer.storage.local import LocalStore


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("checkpoints blocked", description=__doc__ or "", rounds=8)
    add_state(parser, size="S/2")
    options = parser.parse_args(arguments)
    setting = command.setting("checkpoints blocked", options)
    state = rank_state(options, setting.device)
    buffers = {
        kind: host_buffer(flat.nbytes, page_locked=flat.is_cuda)
        for kind, flat in state.flats.items()
    }

    def copy() -> None:
        for kind, flat in state.flats.items():
            buffers[kind].view(torch.float32).copy_(flat, non_blocking=True)
        if setting.device.type == "cuda":
            torch.cuda.synchronize()

    with tempfile.TemporaryDirectory() as folder:
        saves = Saves(state, LocalStore(Path(folder)))
        timings = interleave(
            {"copy": copy, "save": saves.begin},
            rounds=options.rounds,
            stopwatch=_between_updates(state.step, saves, setting.device),
        )
    for timing in timings:
        setting.report.add(
            what=timing.name,
            mib=state.size_bytes / MIB,
            minimum_s=timing.minimum,
            spread=timing.spread,
            gib_per_s=state.size_bytes / 2**30 / timing.minimum,
            ratio=timing.ratio,
        )
    setting.deliver()
    return 0


def _between_updates(
    update: Callable[[], None], saves: Saves, device: torch.device
) -> Callable[[Callable[[], object]], float]:
    """A stopwatch that changes the state before, and waits for the upload after."""

    def seconds(work: Callable[[], object]) -> float:
        update()
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        taken = time.perf_counter() - began
        saves.saver.finish()
        return taken

    return seconds
