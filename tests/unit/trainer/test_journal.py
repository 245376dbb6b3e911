"""A journal gives back what was told, in order, whoever told it and wherever it is kept."""

import errno
import os
import resource
from contextlib import contextmanager

import pytest

from pipelines.documents import DocumentError
from trainer.metrics import journal as journals
from trainer.metrics.entry import Entry
from trainer.metrics.journal import Journal, JournalPlace, identities
from trainer.metrics.tracker import MAX_POINTS, Point
from trainer.storage.errors import StoreError
from trainer.storage.local import LocalStore

ADDRESS = Entry(kind="address", time_ms=1, values={"uri": "http://host", "place": "p"})


@pytest.fixture
def place(tmp_path):
    return JournalPlace.of(tmp_path, LocalStore(tmp_path / "runs"), run="r", identity="abc")


def begin(place, launch, *, attempt=0):
    return Journal(place, writer=f"{launch:012d}-{attempt:05d}", address=ADDRESS)


def point(images):
    values = {"loss": (1 / images).hex(), "norm": float("inf").hex()}
    return Entry(kind="points", time_ms=1700000000000, images=images, values=values)


def taken(journal, most=7):
    """All that waits, what others have left too, as MLflow would take it."""
    journal.find_earlier()
    return sent(journal, most)


def sent(journal, most=7):
    found = []
    while part := journal.waiting(most):
        found += part
        journal.arrived(len(part))
    return [entry.images for entry in found if entry.kind == "points"]


def unsafe(journal):
    return [each.images for each in journal.unsafe_points()]


def files(place):
    return [path.name for path in place.folder.parent.rglob("*.jsonl")]


def stored(place):
    return [key.removeprefix(place.prefix) for key in place.store.list(place.prefix)]


def test_an_entry_keeps_every_bit_and_a_damaged_one_is_no_entry():
    entry = point(3)
    line = entry.to_line().rstrip(b"\n")
    assert Entry.from_line(line) == entry
    assert entry.point() == Point(3, {"loss": 1 / 3, "norm": float("inf")})
    for position in range(len(line)):
        damaged = bytearray(line)
        damaged[position] ^= 1
        with pytest.raises(DocumentError):
            Entry.from_line(bytes(damaged))
    for values in ({"loss": "x"}, {"loss": "0x1p+99999"}):
        told = Entry(kind="points", time_ms=1, values=values).to_line().rstrip(b"\n")
        with pytest.raises(DocumentError, match="no numbers"):
            Entry.from_line(told)


def test_what_has_arrived_leaves_nothing_behind(place):
    journal = begin(place, 1)
    for images in range(1, 1200):
        journal.append(point(images))
    assert len(files(place)) == 3
    journal.rotate()
    assert taken(journal) == list(range(1, 1200))
    assert journal.unsafe_points() == []
    assert not place.folder.parent.exists()


def test_what_dead_processes_left_comes_first_and_in_their_order(place):
    for launch, attempt, images in ((2, 0, 30), (10, 1, 50), (10, 0, 40), (1, 0, 10)):
        died = begin(place, launch, attempt=attempt)
        died.append(point(images))
        died.append(point(images + 1))
        if launch == 2:
            died.rotate()
            died.store_closed()
            os.unlink(place.folder / files_of(place, launch)[0])
    torn = place.folder / files_of(place, 1)[0]
    torn.write_bytes(torn.read_bytes()[:-9])
    later = begin(place, 11)
    later.append(point(60))
    mine = begin(place, 10, attempt=2)
    mine.append(point(52))
    mine.rotate()
    assert taken(mine) == [10, 30, 31, 40, 41, 50, 51, 52]
    assert files(place) == files_of(place, 11)
    assert stored(place) == []


def test_what_was_left_before_launches_were_counted_anew_comes_first(place):
    """Somebody has deleted the run's folder, whose leases count launches."""
    for launch, images in ((7, 7), (8, 8), (1, 20)):
        died = begin(place, launch)
        died.append(point(images))
        died.rotate()
    mine = begin(place, 2)
    mine.append(point(30))
    mine.rotate()
    mine.find_earlier()
    assert mine.position().startswith("0-000000000007-")
    positions, told = [], []
    while part := mine.waiting(1):
        positions.append(mine.position())
        told += [entry.images for entry in part if entry.kind == "points"]
        mine.arrived(1)
    assert told == [7, 8, 20, 30]
    assert positions == sorted(positions)
    assert not place.names()


def files_of(place, launch):
    return [name for name in files(place) if name.startswith(f"{launch:012d}")]


def test_the_store_takes_what_is_whole_and_then_a_checkpoint_need_not(place):
    journal = begin(place, 1)
    for images in range(1, 2 * MAX_POINTS):
        journal.append(point(images))
    assert unsafe(journal) == list(range(MAX_POINTS, 2 * MAX_POINTS))
    journal.store_closed()
    safe = max(each.images for key in stored(place) for each in points_of(place, key))
    assert unsafe(journal) == list(range(safe + 1, 2 * MAX_POINTS))
    journal.rotate()
    journal.store_closed()
    assert journal.unsafe_points() == []
    # Another machine knows as much.
    elsewhere = JournalPlace.of(place.folder / "other", place.store, run="r", identity="abc")
    assert taken(begin(elsewhere, 2)) == list(range(1, 2 * MAX_POINTS))
    assert stored(place) == []


def points_of(place, name):
    lines = place.store.get(place.prefix + name).splitlines()
    return [each for each in map(Entry.from_line, lines) if each.kind == "points"]


def test_a_full_disk_is_told_once_and_costs_nothing(place, monkeypatch, caplog):
    journal = begin(place, 1)
    journal.append(point(1))

    def full(_descriptor, _data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(journals.os, "write", full)
        for images in range(2, 600):
            journal.append(point(images))
    journal.append(point(600))
    journal.rotate()
    assert caplog.text.count("No space left") == 1
    assert taken(journal) == list(range(1, 601))


def test_what_cannot_be_read_for_a_while_is_kept(place, caplog):
    for launch in (1, 2):
        died = begin(place, launch)
        died.append(point(launch))
    journal = begin(place, 3)
    journal.find_earlier()
    with no_more_files():
        with pytest.raises(StoreError, match=r"000001\.jsonl cannot be read.*move it away"):
            journal.waiting(7)
        assert unsafe(journal) == []
        assert "cannot be read" in caplog.text
    assert len(files(place)) == 2
    assert sent(journal) == [1, 2]
    assert files(place) == []


@contextmanager
def no_more_files():
    """A process that has as many files open as it may."""
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)


def test_what_cannot_be_read_at_all_keeps_nothing_else_from_the_store(place):
    begin(place, 1).append(point(1))
    begin(place, 2).append(point(2))
    (broken,) = files_of(place, 1)
    (place.folder / broken).unlink()
    (place.folder / broken).mkdir()
    journal = begin(place, 3)
    journal.find_earlier()
    with pytest.raises(StoreError, match="cannot be read"):
        journal.store_closed()
    assert stored(place) == files_of(place, 2)
    assert unsafe(journal) == []
    (place.folder / broken).rename(place.folder / "away")
    assert sent(journal) == [2]


def test_a_store_that_fails_is_asked_again(place, monkeypatch):
    journal = begin(place, 1)
    journal.append(point(1))
    journal.rotate()

    def fail(*_arguments):
        raise StoreError("it is away")

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "put", fail)
        with pytest.raises(StoreError):
            journal.store_closed()
    assert unsafe(journal) == [1]
    journal.store_closed()
    assert journal.unsafe_points() == []


def test_trainings_under_one_name_are_found_in_the_order_of_their_launches(tmp_path):
    store = LocalStore(tmp_path / "runs")
    assert identities(tmp_path, store, run="r") == []
    for identity, launch in (("b", 1), ("a", 3), ("c", 2)):
        place = JournalPlace.of(tmp_path, store, run="r", identity=identity)
        journal = begin(place, launch)
        journal.append(point(1))
        if identity != "b":
            journal.rotate()
            journal.store_closed()
    assert identities(tmp_path, store, run="r") == ["b", "c", "a"]
    assert identities(tmp_path / "other", store, run="r") == ["c", "a"]
    assert journals.recorded_address(place) == ADDRESS.values
