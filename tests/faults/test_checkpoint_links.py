"""What is no file in the folder of a store is no object, and a store deletes nothing outside."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.hostile_files import KEY, NEW, PASSED_OVER, Target, attacked, looked_at
from tests.support.remote_store import save_state
from tests.unit.trainer.checkpoint.worlds import random_state
from trainer.storage.errors import StoreError
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig

pytestmark = pytest.mark.slow


@pytest.fixture
def at_hand(tmp_path: Path) -> Target:
    """Attacked in a folder."""
    return attacked(open_store(str(tmp_path / "store"), StoreConfig()), tmp_path)


NO_FILES: dict[str, Callable[[Path], object]] = {
    "link to a device without end": lambda path: path.symlink_to("/dev/zero"),
    "pipe that nobody writes into": os.mkfifo,
    "folder": os.mkdir,
    "link to nowhere": lambda path: path.symlink_to("nowhere"),
    "link to the password file": lambda path: path.symlink_to("/etc/passwd"),
}


@pytest.mark.parametrize("what", ["manifest", "content"])
@pytest.mark.parametrize("put", NO_FILES.values(), ids=NO_FILES.keys())
def test_what_is_no_file_is_no_object(
    at_hand: Target, tmp_path: Path, put: Callable[[Path], object], what: str
) -> None:
    place = Path(at_hand.store.uri(KEY if what == "manifest" else at_hand.content))
    place.unlink()
    put(place)
    text = looked_at(at_hand, tmp_path)
    assert PASSED_OVER in text
    assert "root" not in text


def test_a_link_out_of_the_folder_is_deleted_and_not_what_it_leads_to(
    at_hand: Target, tmp_path: Path
) -> None:
    """A link to the very content is as good as the content; the hash decides."""
    outside = tmp_path / "outside"
    Path(at_hand.store.uri(at_hand.content)).rename(outside)
    Path(at_hand.store.uri(at_hand.content)).symlink_to(outside)
    data = outside.read_bytes()
    assert f"resumed from {NEW}, as it was saved" in looked_at(at_hand, tmp_path)
    save_state(at_hand.store, random_state(30), images=30, keep_last=1)
    assert len(at_hand.store.list("")) == 2
    assert outside.read_bytes() == data


def test_a_link_to_itself_is_named(at_hand: Target) -> None:
    place = Path(at_hand.store.uri(KEY))
    place.unlink()
    place.symlink_to(place)
    with pytest.raises(StoreError, match=f"Cannot list {place}: the system says: Too many levels"):
        at_hand.store.list("")
