"""A reader is killed before each single thing that it does to the shared cache."""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pipelines.ingest.write import LabelledImage, write_dataset
from pipelines.shards import ShardedDataset, ShardsConfig
from tests.support.shard_reader import IMAGE_SIZE, Reader, Reading
from tests.unit.pipelines import pictures

pytestmark = pytest.mark.slow

SAMPLES = 16
TOGETHER = 6  # readers at a time, each with a cache of its own


def kill_before(step: int, folder: str) -> None:
    """Have this process killed before it opens, makes, moves or removes files for the n-th time."""
    left = step

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event.startswith(("open", "os.", "shutil.")) and any(
            isinstance(argument, str | os.PathLike) and os.fspath(argument).startswith(folder)
            for argument in arguments
        ):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def test_a_kill_before_any_step_leaves_a_cache_that_serves_the_next_start(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    images = [
        LabelledImage(pictures.png(IMAGE_SIZE, IMAGE_SIZE, seed=seed), 0) for seed in range(SAMPLES)
    ]
    shard_bytes = sum(len(image.data) for image in images) // 2
    write_dataset(images, str(folder), shard_bytes=shard_bytes)
    whole = {path.name: path.read_bytes() for path in folder.glob("*.mds")}
    assert 2 <= len(whole) <= 3

    def start(step: int) -> tuple[Reader, ShardsConfig]:
        cache = str(tmp_path / f"cache{step}")
        # A cache that holds little more than a shard removes one when another comes.
        limit = 1.2 * shard_bytes / 2**30
        config = ShardsConfig(cache_dir=cache, download_threads=1, cache_limit_gib=limit)
        reading = Reading(prefix=f"file://{folder}", shards=config, environment={}, batches=4)
        return Reader(reading, before=partial(kill_before, step, cache)), config

    def check(config: ShardsConfig) -> None:
        cache = Path(str(config.cache_dir))
        kept = {path.name: path.read_bytes() for path in cache.glob("*/*.mds")}
        assert kept.items() <= whole.items()  # nothing under a shard's name that is not the shard
        dataset = ShardedDataset(f"file://{folder}", config=config)
        assert list(cache.glob("*/.partial/*")) == []
        dataset.prepare(np.arange(SAMPLES))
        assert [dataset.read(n).data for n in range(SAMPLES)] == [image.data for image in images]

    codes: list[int | None] = []
    while 0 not in codes:  # until one comes to its end before its step
        for reader, config in [start(len(codes) + more + 1) for more in range(TOGETHER)]:
            reader.process.join(540)
            codes.append(reader.process.exitcode)
            assert codes[-1] in (0, -signal.SIGKILL)
            check(config)
    assert codes.count(-signal.SIGKILL) > 60
