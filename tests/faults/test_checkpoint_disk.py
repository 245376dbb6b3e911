"""A full disk fails a save and nothing else."""

from __future__ import annotations

import ctypes
import resource
import subprocess
from functools import partial
from pathlib import Path

import pytest

from tests.support.remote_store import in_forks, load_state
from tests.support.save_loop import Training
from tests.unit.trainer.checkpoint.worlds import RUN, random_state, same_bits
from trainer.checkpoint import layout
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig

pytestmark = pytest.mark.slow

LARGE = {"weight": (100_000,), "gain": (5,)}
DISK_BYTES = 4 * 1024**2  # for two checkpoints of 1.6 MB each, and not for a third
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000


def mounted(folder: Path) -> bool:
    """Mount a small disk that only this process sees; tell whether that is possible here."""
    unshare = ctypes.CDLL(None).unshare
    if unshare(CLONE_NEWNS) != 0 and unshare(CLONE_NEWNS | CLONE_NEWUSER) != 0:
        return False
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(folder)]
    private = ["mount", "--make-rprivate", "/"]
    done = [subprocess.run(each, check=False, capture_output=True) for each in (private, mount)]
    return all(each.returncode == 0 for each in done)


def fill_the_disk(folder: Path, outcome: Path) -> None:
    """Save until no more fits; then make room, and save again."""
    cause = "the disk is full; free space or choose another folder"
    with_disk = mounted(folder)
    store = open_store(str(folder / "store"), StoreConfig())
    training = Training(store, keep_last=5, patience_s=0)
    for number, images in enumerate((10, 20), start=1):
        training.save(images, shapes=LARGE)
        assert training.until_reported(number).error is None
    whole = {key: store.get(key) for key in store.list("")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not with_disk:  # the next best thing: no file may become so large
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
        cause = "the system says: File too large"
    training.save(30, shapes=LARGE)
    report = training.until_reported(3)
    place = f"{folder}/store/{layout.checkpoint_key(RUN, 30)}/"
    assert str(report.error).startswith(f"Cannot write {place}")
    assert str(report.error).endswith(f": {cause}.")
    # Of what did not fit nothing takes up room, and what was there is whole.
    assert {key: store.get(key) for key in store.list("")} == whole
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == len(whole)
    found = load_state(store, shapes=LARGE)
    assert found
    assert found[0] == 20
    assert same_bits(found[1], random_state(20, LARGE))
    # With room the run saves again.
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for key in store.list(layout.checkpoint_key(RUN, 10)):
        store.delete(key)
    training.save(40, shapes=LARGE)
    assert training.until_reported(4).error is None
    outcome.write_text("disk" if with_disk else "limit")


def test_a_full_disk_costs_a_save_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    outcome = tmp_path / "outcome"
    assert in_forks(partial(fill_the_disk, tmp_path / "disk", outcome)) == [0]
    assert outcome.read_text() in ("disk", "limit")
