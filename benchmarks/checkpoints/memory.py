"""Host memory of a save, against the bytes that are saved.

One copy of what the rank writes is unavoidable if training is to go on; the table tells how much
the process grew with it, at most, and how much more an upload to an S3 server took on top.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil

from benchmarks import command
from benchmarks.checkpoints.state import MIB, Saves, add_state, rank_state
from benchmarks.checkpoints.transfer import place
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig

_TICK_S = 0.01


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("checkpoints memory", description=__doc__ or "", rounds=3)
    add_state(parser, size="S/2")
    parser.add_argument("--store", help="s3://BUCKET/PREFIX instead of a server started here")
    options = parser.parse_args(arguments)
    setting = command.setting("checkpoints memory", options)
    state = rank_state(options, setting.device)
    with place(options) as uri:
        store = open_store(uri, StoreConfig())
        store.list("")  # boto3's own memory is no part of it
        before = resident_bytes()
        saves = Saves(state, store)
        prepared = resident_bytes()
        with watch_peak() as peak:
            for _ in range(options.rounds):
                state.step()
                saves.begin()
                saves.finish()
    setting.report.add(
        state_mib=state.size_bytes / MIB,
        snapshot_mib=(prepared - before) / MIB,
        upload_mib=(peak[0] - prepared) / MIB,
        snapshot_per_state=(prepared - before) / state.size_bytes,
    )
    setting.deliver()
    return 0


def resident_bytes() -> int:
    """Return the process's memory, in bytes."""
    return int(psutil.Process().memory_info().rss)


@contextmanager
def watch_peak() -> Iterator[list[int]]:
    """Watch the process's resident memory; the list's one number is the highest so far."""
    peak, done = [resident_bytes()], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], resident_bytes())
            time.sleep(_TICK_S)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
