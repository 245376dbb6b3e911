"""The folder of fetched shards: what is left of killed processes, and who waits for whom."""

import fcntl
import logging
import multiprocessing
import os
import resource
import signal
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from pipelines.cache import ShardCache, default_cache_dir, scratch_folder
from pipelines.errors import CacheUnusableError


def leave_half_a_shard(root: Path, *, dataset: str, shard: str) -> Path:
    """Be killed amid a download."""

    def work() -> None:
        with ShardCache(root, prefix=dataset, index=b"").fetching(shard) as folder:
            (folder / "1").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(540)
    return next(root.rglob(f".partial/{shard}"))


def test_a_start_removes_what_the_killed_left_and_nothing_else(tmp_path: Path) -> None:
    dead = [
        leave_half_a_shard(tmp_path, dataset=dataset, shard=shard)
        for dataset, shard in (("one", "a"), ("one", "b"), ("other", "a"))
    ]
    (tmp_path / "autoencoder" / "weights").mkdir(parents=True)
    living = ShardCache(tmp_path, prefix="one", index=b"")
    assert not any(folder.exists() for folder in dead)
    with living.fetching("c") as folder:
        (folder / "1").write_bytes(b"half")
        ShardCache(tmp_path, prefix="one", index=b"")
        ShardCache(tmp_path, prefix="third", index=b"")
        assert (folder / "1").read_bytes() == b"half"
    assert (tmp_path / "autoencoder" / "weights").is_dir()


def test_a_shard_that_another_one_fetches_is_waited_for_and_told_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipelines.cache._SLOW_S", 0.05)
    cache = ShardCache(tmp_path, prefix="one", index=b"")
    order = []

    def second() -> None:
        with cache.fetching("shard"):
            order.append("second")

    thread = threading.Thread(target=second)
    with caplog.at_level(logging.WARNING), cache.fetching("shard"), cache.fetching("free"):
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join(540)
    assert order == ["first", "second"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "waiting for another process to fetch" in line
    assert "/shard" in line


def test_the_index_lies_beside_the_shards(tmp_path: Path) -> None:
    for _ in range(2):
        cache = ShardCache(tmp_path, prefix="one", index=b"{}")
    assert (cache.folder / "index.json").read_bytes() == b"{}"
    assert not list((cache.folder / ".partial").iterdir())


def test_a_full_disk_is_no_hindrance_where_nothing_is_missing(tmp_path: Path) -> None:
    def open_again(prefix: str) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        try:
            ShardCache(tmp_path, prefix=prefix, index=b"{}")
        except CacheUnusableError:
            os._exit(3)

    codes = {}
    ShardCache(tmp_path, prefix="one", index=b"{}")
    for prefix in ("one", "other"):
        process = multiprocessing.get_context("fork").Process(target=open_again, args=(prefix,))
        process.start()
        process.join(540)
        codes[prefix] = process.exitcode
    assert codes == {"one": 0, "other": 3}


def test_scratch_folders_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with ExitStack() as stack:
        folders = [stack.enter_context(scratch_folder()) for _ in range(3)]
        assert len(set(folders)) == 3
        (folders[1] / "file").write_text("of a process that is killed now")
        left = folders[1].with_name("left")
        folders[1].rename(left)  # out of the way of the orderly end
    left.rename(folders[1])
    with scratch_folder() as first, scratch_folder() as second:
        assert [first, second] == folders[:2]
        assert not list(second.iterdir())
        with (default_cache_dir() / "scratch" / "2.lock").open() as free:
            fcntl.flock(free, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not any(folder.exists() for folder in folders)
