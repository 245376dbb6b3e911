"""Reading shards through the cache, alone and with other processes."""

import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from pipelines.errors import (
    CacheUnusableError,
    CorruptShardError,
    MissingShardError,
)
from pipelines.index import Shard
from pipelines.ingest.write import LabelledImage, write_dataset
from pipelines.shards import ShardedDataset, file_problem
from tests.unit.pipelines.stored import cached, expected, flip, read_all, shards_in


def test_the_cache_holds_only_what_was_read(
    prefix: Path, tmp_path: Path, images: list[LabelledImage]
) -> None:
    dataset = cached(prefix, tmp_path / "cache")
    dataset.read(0)
    assert [path.name for path in shards_in(tmp_path / "cache")] == ["shard.00000.mds"]
    assert read_all(dataset) == expected(images)
    for shard in shards_in(prefix):
        shard.unlink()
    assert read_all(cached(prefix, tmp_path / "cache")) == expected(images)  # all from the cache


def test_a_cached_file_that_went_bad_is_fetched_again(
    prefix: Path, tmp_path: Path, images: list[LabelledImage], caplog: pytest.LogCaptureFixture
) -> None:
    read_all(cached(prefix, tmp_path / "cache"))
    bad = shards_in(tmp_path / "cache")
    flip(bad[0])
    bad[1].write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="pipelines"):
        assert read_all(cached(prefix, tmp_path / "cache")) == expected(images)
    assert [record.getMessage().count("fetching it again") for record in caplog.records] == [1, 1]


def test_a_bad_transfer_is_fetched_again(
    prefix: Path, tmp_path: Path, images: list[LabelledImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = cached(prefix, tmp_path / "cache")
    fetch = dataset._source.fetch
    damaged = []

    def damage_first(name: str, path: Path) -> None:
        fetch(name, path)
        if name not in damaged:
            damaged.append(name)
            flip(path)

    monkeypatch.setattr(dataset._source, "fetch", damage_first)
    assert read_all(dataset) == expected(images)
    assert len(damaged) == len(dataset.shard_sizes)


def test_a_cache_cleaned_during_the_run(
    prefix: Path, tmp_path: Path, images: list[LabelledImage]
) -> None:
    dataset = cached(prefix, tmp_path / "cache")
    read_all(dataset)
    for shard in shards_in(tmp_path / "cache"):
        shard.unlink()
    assert read_all(dataset) == expected(images)


def test_each_shard_is_hashed_once(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipelines.shards

    checked = []
    problem = pipelines.shards.file_problem
    monkeypatch.setattr(
        pipelines.shards,
        "file_problem",
        lambda path, shard: (checked.append(shard.name), problem(path, shard))[1],
    )
    dataset = ShardedDataset(str(prefix))
    read_all(dataset)
    read_all(dataset)
    assert len(checked) == len(set(checked)) == len(dataset.shard_sizes)


def test_a_limited_cache_drops_what_was_used_least_recently(
    prefix: Path, tmp_path: Path, images: list[LabelledImage]
) -> None:
    folder = tmp_path / "cache"
    read_all(cached(prefix, folder))
    sizes = {path.name: path.stat().st_size for path in shards_in(folder)}
    assert len(sizes) > 5
    shutil.rmtree(folder)
    limit = 3 * max(sizes.values())
    (folder / "autoencoder").mkdir(parents=True)
    (folder / "autoencoder" / "weights").write_bytes(bytes(limit))
    dataset = cached(prefix, folder, cache_limit_gib=limit / 2**30, download_threads=1)
    # Every sample, although never more than three shards are kept.
    for sample in expected(images):
        got = dataset.read(sample[2])
        assert (got.data, got.label, got.sample_id) == sample
        assert sum(path.stat().st_size for path in shards_in(folder)) <= limit
    assert shards_in(folder)[-1].name == max(sizes)
    assert (folder / "autoencoder" / "weights").is_file()

    shutil.rmtree(folder)
    dataset = cached(prefix, folder, cache_limit_gib=limit / 2**30, download_threads=1)
    first_of = [sum(dataset.shard_sizes[:number]) for number in range(len(sizes))]
    for number in range(3):
        dataset.prepare(np.array([first_of[number]]))
    dataset.prepare(np.array([first_of[0]]))  # asked for again, so no longer the oldest
    dataset.prepare(np.array([first_of[4]]))
    kept = {path.name for path in shards_in(folder)}
    assert "shard.00000.mds" in kept
    assert "shard.00001.mds" not in kept
    # Another dataset in the same folder counts too.
    other = shutil.copytree(prefix, tmp_path / "other")
    twin = cached(other, folder, cache_limit_gib=limit / 2**30)
    assert read_all(twin) == expected(images)
    assert sum(path.stat().st_size for path in shards_in(folder)) <= limit


def test_a_dataset_written_anew_has_a_new_cache(
    prefix: Path, tmp_path: Path, images: list[LabelledImage]
) -> None:
    old = cached(prefix, tmp_path / "cache")
    read_all(old)
    shutil.rmtree(prefix)
    fewer = images[:20]
    write_dataset(fewer, str(prefix), shard_bytes=2000)
    new = cached(prefix, tmp_path / "cache")
    assert read_all(new) == expected(fewer)
    assert new.digest != old.digest


def test_a_cache_that_cannot_be_written(prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheUnusableError, match=r"file.*cannot be written.*cache_dir"):
        cached(prefix, tmp_path / "file" / "cache")


def test_the_default_cache_must_be_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.cache import default_cache_dir

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = default_cache_dir()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheUnusableError, match="belongs to another user"):
        default_cache_dir()


def read_in_process(prefix: Path, cache: Path, *, slow: bool) -> tuple[Any, Any]:
    """Start a process that reads everything once it is told to; returns it and a pipe to it."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def work() -> None:
        dataset = cached(prefix, cache)
        fetch = dataset._source.fetch

        def tell(name: str, path: Path) -> None:
            if slow:
                path.write_bytes(b"half a shard")
            theirs.send(name)
            time.sleep(3600 if slow else 0.02)
            fetch(name, path)

        dataset._source.fetch = tell  # type: ignore[method-assign]
        theirs.send("ready")
        theirs.recv()
        theirs.send(read_all(dataset))

    process = context.Process(target=work)
    process.start()
    assert ours.recv() == "ready"
    return process, ours


def test_shards_are_prepared_together(prefix: Path, tmp_path: Path) -> None:
    dataset = cached(prefix, tmp_path / "cache", download_threads=3)
    fetch = dataset._source.fetch
    together = threading.Barrier(3)

    def meet(name: str, path: Path) -> None:
        together.wait()
        fetch(name, path)

    dataset._source.fetch = meet  # type: ignore[method-assign]
    first, second, third, *_ = np.cumsum([0, *dataset.shard_sizes])
    dataset.prepare(np.array([third, first, second, first + 1]))
    names = ["shard.00000.mds", "shard.00001.mds", "shard.00002.mds"]
    assert [path.name for path in shards_in(tmp_path / "cache")] == names


def test_a_lost_shard_is_raised_when_it_is_read_and_not_asked_for_again(
    prefix: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards_in(prefix)[2].unlink()
    dataset = cached(prefix, tmp_path / "cache")
    for _ in range(2):
        dataset.prepare(np.arange(len(dataset)))
    assert caplog.text.count("shard.00002.mds is listed in the index") == 1
    for sample_id in (12, 13, 12):
        with pytest.raises(MissingShardError, match=r"shard\.00002\.mds"):
            dataset.read(sample_id)
    assert dataset.read(11).sample_id == 11


def test_processes_share_a_cache(
    prefix: Path,
    tmp_path: Path,
    images: list[LabelledImage],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):  # a launcher's word must not matter
        monkeypatch.setenv(name, "8")
    readers = [read_in_process(prefix, tmp_path / "cache", slow=False) for _ in range(2)]
    for _, pipe in readers:
        pipe.send("go")
    fetched = []
    for process, pipe in readers:
        while isinstance(message := pipe.recv(), str):
            fetched.append(message)
        assert message == expected(images)
        process.join(540)
    assert sorted(fetched) == [path.name for path in shards_in(prefix)]  # each one once


def test_a_reader_killed_amid_a_download_blocks_nobody(
    prefix: Path, tmp_path: Path, images: list[LabelledImage]
) -> None:
    process, pipe = read_in_process(prefix, tmp_path / "cache", slow=True)
    pipe.send("go")
    assert pipe.recv() == "shard.00000.mds"
    os.kill(process.pid, signal.SIGKILL)
    process.join(540)
    assert list((tmp_path / "cache").rglob(".partial/*/*"))  # the half shard is there
    assert read_all(cached(prefix, tmp_path / "cache")) == expected(images)
    assert not list((tmp_path / "cache").rglob(".partial/*"))


def test_what_the_cache_has_dropped_is_fetched_ahead_again(prefix: Path, tmp_path: Path) -> None:
    """And not by the thread that reads, one shard after the other."""
    dataset = cached(prefix, tmp_path / "cache")
    everything = np.arange(len(dataset))
    dataset.prepare(everything)
    dropped = shards_in(tmp_path / "cache")[1:]
    for shard in dropped:
        shard.unlink()
    dataset.prepare(everything)
    assert all(shard.exists() for shard in dropped)


def test_a_shard_that_is_found_in_the_cache_counts_as_used(prefix: Path, tmp_path: Path) -> None:
    """So that a run which goes on does not lose first what it is about to read."""
    cached(prefix, tmp_path / "cache").prepare(np.arange(48))
    for shard in shards_in(tmp_path / "cache"):
        os.utime(shard, (1000, 1000))
    again = cached(prefix, tmp_path / "cache")
    again.prepare(np.arange(2))
    used, *others = shards_in(tmp_path / "cache")
    assert used.stat().st_mtime > 1000
    assert all(shard.stat().st_mtime == 1000 for shard in others)


def test_a_shard_cut_short_while_it_is_hashed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapped file would kill the process at the first byte that is not there any more."""
    path, content = tmp_path / "shard.mds", bytes(2**20)
    path.write_bytes(content)
    shard = Shard(
        name="shard.mds",
        size_bytes=len(content),
        samples=1,
        hash_name="xxh64",
        hash_value=xxhash.xxh64(content).hexdigest(),
        columns=(),
    )
    made = xxhash.xxh64

    def cut_short(*content: Any) -> Any:
        os.truncate(path, 0)
        return made(*content)

    monkeypatch.setattr(xxhash, "xxh64", cut_short)
    assert file_problem(path, shard) == "does not have the xxh64 hash in the index"


@pytest.mark.parametrize("kept", [0, 2, 6, 400])
def test_a_shard_cut_short_after_it_was_checked(prefix: Path, tmp_path: Path, kept: int) -> None:
    """Each sample is given as it was written, or not at all."""
    whole = read_all(ShardedDataset(str(prefix)))
    dataset = cached(prefix, tmp_path / "cache", open_files=1)
    dataset.prepare(np.arange(len(dataset)))
    shard = shards_in(tmp_path / "cache")[0]
    os.truncate(shard, kept)
    refused = 0
    for sample_id in range(dataset.shard_sizes[0]):
        try:
            sample = dataset.read(sample_id)
        except CorruptShardError:
            refused += 1
        else:
            assert (sample.data, sample.label, sample_id) == whole[sample_id]
    assert refused == 1  # then it was fetched again
    assert read_all(dataset) == whole


def test_a_cache_in_which_nothing_stays(
    prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = cached(prefix, tmp_path / "cache")
    keep = dataset._cache.keep

    def keep_and_lose(name: str, *, fetched: Path) -> None:
        keep(name, fetched=fetched)
        (tmp_path / "cache").joinpath(dataset._cache.folder, name).unlink()

    monkeypatch.setattr(dataset._cache, "keep", keep_and_lose)
    with pytest.raises(CacheUnusableError, match=r"vanishes from the cache.*cache_limit_gib"):
        dataset.read(0)
