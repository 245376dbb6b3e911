"""The local store: writes that die half-way, full disks, folders that refuse."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.storage.errors import InvalidStoreUri, StoreError
from trainer.storage.local import LocalStore
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig

# Writes "old" under a key, then dies at the named system call of a second write.
DYING_WRITER = """
import os, sys
from pathlib import Path
from trainer.storage.local import LocalStore

root, call, method, moment = sys.argv[1:]
store = LocalStore(Path(root))
store.put("kept/object", b"old")
original = getattr(os, call)

def dying(*arguments, **named):
    if moment == "after":
        original(*arguments, **named)
    os._exit(9)

setattr(os, call, dying)
target = "kept/object" if method == "put" else "kept/created"
getattr(store, method)(target, b"new and longer")
"""


@pytest.mark.parametrize(
    ("method", "call", "moment", "expected"),
    [
        ("put", "open", "after", {"kept/object": b"old"}),
        ("put", "fsync", "before", {"kept/object": b"old"}),
        ("put", "replace", "before", {"kept/object": b"old"}),
        ("put", "replace", "after", {"kept/object": b"new and longer"}),
        ("create", "fsync", "before", {"kept/object": b"old"}),
        ("create", "link", "before", {"kept/object": b"old"}),
        (
            "create",
            "link",
            "after",
            {"kept/created": b"new and longer", "kept/object": b"old"},
        ),
    ],
)
def test_a_killed_writer_leaves_the_old_object_or_the_new(
    tmp_path: Path, method: str, call: str, moment: str, expected: dict[str, bytes]
) -> None:
    command = [sys.executable, "-c", DYING_WRITER, str(tmp_path), call, method, moment]
    assert subprocess.run(command, check=False, timeout=60).returncode == 9
    store = LocalStore(tmp_path)
    assert {key: store.get(key) for key in store.list("")} == expected
    assert any(path.name.startswith(".tmp-") for path in tmp_path.rglob("*")) == (
        (call, moment) != ("replace", "after")
    )


def test_a_leftover_temporary_file_is_invisible(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a/b", b"1")
    (tmp_path / "a" / ".tmp-0123").write_bytes(b"half")
    assert store.list("") == {"a/b": 1}
    assert store.list("a/") == {"a/b": 1}
    store.delete("a/b")
    assert store.list("") == {}


def test_what_a_dead_writer_left_is_swept_with_its_folder(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("run/1/a", b"1")
    for folder in ("run/1", "run/2", "other/1"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / ".tmp-0123").write_bytes(b"half")
    seen: list[str] = []

    def dead(key: str) -> bool:
        seen.append(key.rpartition("/")[0])
        return key.startswith("run/2/")

    assert store.abort_unfinished("run/", dead) == 1
    assert sorted(seen) == ["run/1", "run/2"]
    assert not (tmp_path / "run/2").exists()
    assert (tmp_path / "other/1/.tmp-0123").exists()
    assert store.abort_unfinished("run/1/", lambda _key: True) == 1
    assert store.list("") == {"run/1/a": 1}


def test_writing_leaves_no_temporary_files(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a", b"1")
    store.create("a", b"2")
    store.create("b", b"2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_delete_prunes_empty_folders_but_keeps_the_root(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "root")
    store.put("a/b/c", b"1")
    store.put("a/d", b"1")
    store.delete("a/b/c")
    assert [path.name for path in (tmp_path / "root" / "a").iterdir()] == ["d"]
    store.delete("a/d")
    assert list((tmp_path / "root").iterdir()) == []


def test_a_store_that_does_not_exist_yet_is_empty(tmp_path: Path) -> None:
    assert LocalStore(tmp_path / "not" / "yet").list("run/checkpoints/") == {}


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "disk is full; free space"), (errno.EDQUOT, "quota"), (errno.EIO, "says: ")],
)
def test_a_failing_disk_is_explained_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    store = LocalStore(tmp_path)
    store.put("a", b"old")

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError, match=words) as caught:
        store.put("a", b"new")
    assert str(tmp_path / "a") in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert store.get("a") == b"old"


@pytest.fixture
def unprivileged(tmp_path: Path) -> Iterator[None]:
    """Root may write anywhere, so the test goes on as nobody."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_without_permission_is_explained(tmp_path: Path, unprivileged: None) -> None:
    root = tmp_path / "locked"
    with_permission = os.geteuid() != 65534
    if with_permission:
        root.mkdir(mode=0o500)
    store = LocalStore(root)
    with pytest.raises(StoreError, match="may not access it; change its permissions") as caught:
        store.put("a", b"1")
    assert str(root) in str(caught.value)


def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(
    tmp_path: Path, unprivileged: None
) -> None:
    # pytest's folders are closed to other users; an own run gets one closed to itself.
    root = tmp_path / "store"
    if os.geteuid() != 65534:
        root.mkdir(mode=0o000)
    with pytest.raises(StoreError, match="may not access it"):
        LocalStore(root).list("run/checkpoints/")


def test_a_file_in_the_place_of_a_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="a part of the path is a file"):
        LocalStore(tmp_path / "file").put("a", b"1")
    with pytest.raises(StoreError, match="a part of the path is a file"):
        LocalStore(tmp_path).put("file/a", b"1")


def test_a_relative_folder_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("here", StoreConfig())
    monkeypatch.chdir("/")
    store.put("a", b"1")
    assert (tmp_path / "here" / "a").read_bytes() == b"1"


def test_file_uris_are_folders(tmp_path: Path) -> None:
    open_store(f"file://{tmp_path}/x", StoreConfig()).put("a", b"1")
    assert (tmp_path / "x" / "a").exists()


@pytest.mark.parametrize("uri", ["", "gs://bucket/x", "file://host/x", "file://", "http://x/y"])
def test_places_that_cannot_be_opened_are_refused(uri: str) -> None:
    with pytest.raises(InvalidStoreUri):
        open_store(uri, StoreConfig())
