"""What a run keeps of itself in its store: bounded, joined over attempts, never in the way."""

import io
import math
import threading

import pytest
from PIL import Image

from tests.unit.trainer.page.told import png
from trainer.metrics import history
from trainer.metrics.history import keep_history, read_history
from trainer.metrics.tracker import Tracker
from trainer.storage.errors import StoreUnreachable
from trainer.storage.local import LocalStore


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path)


def kept(store, *, attempt=0, tracker=None, about=None, identity="one", began_images=0):
    return keep_history(
        tracker or Tracker(),
        store,
        run="a",
        writer=f"000000000001-{attempt:05d}",
        identity=identity,
        about=about or {},
        settings={"train": {"seed": 1}},
        science={"train": {"seed": 1}},
        began_images=began_images,
    )


def test_attempts_are_joined_and_the_newest_counts(store):
    with kept(store) as tracker:
        for images in (10, 20, 30):
            tracker.metrics({"loss/total": float(images)}, images=images)
    with kept(store, attempt=1, began_images=30) as tracker:
        tracker.metrics({"loss/total": 21.0, "new": math.nan}, images=20)  # told late
    found = read_history(store, "a")
    assert len(found.attempts) == 2
    assert found.attempts[0].settings == {"train": {"seed": 1}}
    curves = found.curves()
    assert curves["loss/total"] == {10: 10.0, 20: 21.0, 30: 30.0}
    assert math.isnan(curves["new"][20])


def test_work_that_was_lost_is_in_no_curve(store):
    with kept(store) as tracker:
        for images in (10, 20, 30):
            tracker.metrics({"loss/total": float(images), "eval/x": 1.0}, images=images)
        tracker.metrics({"late": 1.0}, images=30)
    with kept(store, attempt=1, began_images=20):
        pass
    assert read_history(store, "a").curves() == {
        "loss/total": {10: 10.0, 20: 20.0},
        "eval/x": {10: 1.0, 20: 1.0},
    }
    with kept(store, attempt=2, began_images=10) as tracker:
        tracker.metrics({"loss/total": 16.0}, images=16)
    assert read_history(store, "a").curves()["loss/total"] == {10: 10.0, 16: 16.0}


def test_grids_of_another_training_are_not_told(store):
    with kept(store) as tracker:
        tracker.image("samples", png(), images=64)
        tracker.image("samples", png(), images=128)
    with kept(store, attempt=1, identity="two") as tracker:
        tracker.image("samples", png(), images=64)
    assert set(read_history(store, "a").pictures) == {64}


def test_a_curve_is_bounded_and_keeps_its_first_and_last_point(store):
    with kept(store) as tracker:
        for images in range(1, 5002):
            tracker.metrics({"x": images / 3}, images=images)
    points = read_history(store, "a").curves()["x"]
    assert 200 <= len(points) <= 401
    assert (min(points), max(points)) == (1, 5001)
    gaps = {b - a for a, b in zip(list(points)[:-2], list(points)[1:-1], strict=True)}
    assert len(gaps) == 1
    assert points[5001] == pytest.approx(5001 / 3, rel=1e-6)


def test_no_more_curves_are_kept_than_a_page_shows(store, monkeypatch):
    monkeypatch.setattr(history, "_MAX_CURVES", 3)
    with kept(store) as tracker:
        for name in "abcde":
            tracker.metrics({name: 1.0}, images=1)
    assert set(read_history(store, "a").curves()) == {"a", "b", "c"}


def test_of_many_nodes_the_average_is_kept(store):
    values = {f"system/node_{node}/cpu_utilization_percentage": 10.0 * node for node in range(3)}
    with kept(store) as tracker:
        tracker.metrics(values, images=1)
    curves = read_history(store, "a").curves()
    assert curves == {"system/nodes/cpu_utilization_percentage": {1: 10.0}}


def test_grids_are_kept_smaller(store):
    with kept(store) as tracker:
        tracker.image("samples", png(1000), images=64)
        tracker.image("evaluation", png(), images=64)
    found = read_history(store, "a").pictures
    assert found == {64: "a/history/000000000064-samples-one.png"}
    assert Image.open(io.BytesIO(store.get(found[64]))).size == (640, 640)


class Heard(Tracker):
    """Notes what it is told."""

    def __init__(self):
        self.told = []

    def metrics(self, values, *, images):
        self.told.append((dict(values), images))

    def close(self, status, reason=""):
        self.told.append((status, reason))


def test_the_tracker_is_told_all_of_it(store):
    heard = Heard()
    with kept(store, tracker=heard) as tracker:
        tracker.metrics({"system/node_0/x": 1.0}, images=1)
        tracker.close("KILLED", "by hand")
    assert heard.told == [({"system/node_0/x": 1.0}, 1), ("KILLED", "by hand")]


def test_nothing_that_a_tracker_takes_is_kept_from_it(store):
    with kept(store) as tracker:
        own = type(tracker).__dict__
    public = {name for name in vars(Tracker) if not name.startswith("_")}
    assert len(public) > 5
    assert public <= set(own)


class FailingStore(LocalStore):
    """Is away until it is told otherwise."""

    def __init__(self, folder):
        super().__init__(folder)
        self.is_away = True
        self.asked = threading.Event()

    def put(self, key, data):
        if self.is_away:
            self.asked.set()
            raise StoreUnreachable("it is away")
        super().put(key, data)


def test_a_store_that_was_away_gets_everything(tmp_path, caplog):
    store = FailingStore(tmp_path)
    with kept(store) as tracker:
        tracker.metrics({"x": 1.0}, images=1)
        tracker.image("samples", png(), images=1)
        tracker.checkpoint("somewhere", images=1)
        assert store.asked.wait(60)
        store.is_away = False
    found = read_history(store, "a")
    assert found.curves() == {"x": {1: 1.0}}
    assert set(found.pictures) == {1}
    assert caplog.text.count("is not kept for now") == 1


class Peculiar(Exception):
    """What nobody expects of a store."""


def test_whatever_fails_the_history_goes_on(tmp_path, caplog, monkeypatch):
    store, failed = LocalStore(tmp_path), threading.Event()
    put = store.put

    def fail_once(key, data):
        if not failed.is_set():
            failed.set()
            raise Peculiar("of another kind")
        put(key, data)

    monkeypatch.setattr(store, "put", fail_once)
    with kept(store) as tracker:
        tracker.metrics({"x": 1.0}, images=1)
        tracker.image("samples", b"no picture", images=1)
        tracker.image("samples", png(), images=2)
        tracker.checkpoint("somewhere", images=2)
        assert failed.wait(60)
    found = read_history(store, "a")
    assert found.curves() == {"x": {1: 1.0}}
    assert set(found.pictures) == {2}
    assert "is not kept for now: Peculiar: of another kind" in caplog.text
    assert caplog.text.count("000000000001-samples-one.png is not kept in the history") == 1


def test_a_checkpoint_has_it_written_at_once(store):
    with kept(store) as tracker:
        tracker.metrics({"x": 1.0}, images=1)
        tracker.checkpoint("somewhere", images=1)
        for _ in range(600):
            if read_history(store, "a").curves():
                break
            threading.Event().wait(0.1)
        assert read_history(store, "a").curves() == {"x": {1: 1.0}}


def test_credentials_are_not_kept(store):
    with kept(store, about={"command": "x=http://a:hunter2@b"}):
        pass
    assert b"hunter2" not in store.get("a/history/000000000001-00000.json")
