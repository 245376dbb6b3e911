"""Kept files are believed only as they were written."""

import os

import pytest

from trainer.storage.kept import KeptFiles

CONTENT = {"a": b"first", "b": b"second"}


@pytest.fixture
def kept(tmp_path):
    files = KeptFiles(tmp_path)
    files.keep(CONTENT, made_of="these")
    return files


def test_what_was_kept_is_whole(kept):
    folder = kept.whole(made_of="these")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == CONTENT
    assert kept.whole(made_of="others") is None


@pytest.mark.parametrize("length", [0, 4, 1 << 40], ids=["empty", "cut", "a sparse terabyte"])
def test_another_length_is_seen_without_reading(kept, length, caplog):
    os.truncate(kept.whole(made_of="these") / "a", length)
    assert kept.whole(made_of="these") is None
    kept.put_aside(made_of="these")
    assert "it has another length than when it was written" in caplog.text


def test_another_byte_is_seen(kept):
    (kept.whole(made_of="these") / "b").write_bytes(b"secont")
    assert kept.whole(made_of="these") is None
