"""Which checkpoints of a run are still to be measured, and how often that is tried."""

import dataclasses

import pytest
import torch

from models.codec import IdentityCodec
from models.flow.config import FlowConfig
from models.flow.flow import Flow
from models.flow.sampler import SolverError
from models.flow.sampler_config import SamplerConfig
from tests.unit.trainer.checkpoint.handmade import upload
from tests.unit.trainer.checkpoint.stores import MemoryStore
from tests.unit.trainer.measurements import RUN, checkpoint_report, finished, measured, real_figures
from trainer.checkpoint.index import CheckpointIndex
from trainer.checkpoint.layout import manifest_key, object_key
from trainer.config.job import DuringConfig, EvalConfig
from trainer.config.reading import to_dict
from trainer.config.shapes import ImageShape
from trainer.evaluation.during import MeasuredCheckpoints
from trainer.evaluation.reports import evaluation_key
from trainer.evaluation.samples import ImageSampler
from trainer.host_group import HostGroup
from trainer.metrics.tracker import Tracker
from trainer.storage.errors import StoreUnreachable

SAMPLER = SamplerConfig()


class KeepingTracker(Tracker):
    """Keeps what it is told."""

    def __init__(self):
        self.curves, self.lowest, self.pictures = {}, set(), []

    def measured(self, values, *, images, lowest, protocol):
        for name, value in values.items():
            self.curves.setdefault(name, {})[images] = value
        self.lowest.add(lowest)

    def image(self, name, png, *, images):
        self.pictures.append((name, images, png))


@pytest.fixture
def store():
    store = MemoryStore()
    for images in (10, 20, 30, 40):
        manifest = upload(store, run=RUN, images=images, attempt="good")
        CheckpointIndex(store, run=RUN).commit(manifest)
    return store


@pytest.fixture
def known(store):
    def make(**changes):
        config = EvalConfig(**{"samples": 100, "sampler": SAMPLER, **changes})
        return MeasuredCheckpoints(store, RUN, config, KeepingTracker(), told.append)

    told = []
    make.told = told
    return make


def test_what_is_measured_alike_is_not_measured_again(store, known, monkeypatch):
    monkeypatch.setattr("tests.unit.trainer.measurements.SAMPLER", to_dict(SAMPLER))
    measured(store, 10, 1.0)
    measured(store, 20, 1.0, samples=50)
    measured(store, 20, 1.0, name="b", weights="master")
    measured(store, 20, 1.0, name="c", features=("inception",))
    finished(store, 30, 1.0)
    assert known().catch_up(lambda images: True) == [20, 40]
    assert known().catch_up(lambda images: images < 40) == [20]
    assert known(seed=7).catch_up(lambda images: images < 20) == [10]
    few = known(during=DuringConfig(samples=50))
    assert few.catch_up(lambda images: True) == [10, 30, 40]


def test_the_tracker_is_told_again_of_the_newest(store, known, monkeypatch):
    monkeypatch.setattr("tests.unit.trainer.measurements.SAMPLER", to_dict(SAMPLER))
    for images in (10, 20, 40):
        measured(store, images, float(images))
    finished(store, 30, 30.0)
    made = known()
    assert made.catch_up(lambda images: True) == []
    assert made.tracker.curves["eval/frechet_random_conv"] == {20: 20.0, 40: 40.0}
    assert store.get(evaluation_key(RUN, 30, "report.json"))
    assert made.tracker.pictures == []
    assert known.told == []


@pytest.mark.parametrize("damage", ["manifest", "object"])
def test_a_damaged_checkpoint_is_left_alone(store, known, damage):
    if damage == "manifest":
        store.put(manifest_key(RUN, 40), b"{}")
    else:
        store.delete(object_key(RUN, 40, "good", 0))
    assert known().catch_up(lambda images: images > 20) == [30]


def test_a_checkpoint_is_there_until_the_store_says_it_is_not(store, known, monkeypatch):
    assert known().is_there(40)
    store.delete(manifest_key(RUN, 40))
    assert not known().is_there(40)

    def fail(*_):
        raise StoreUnreachable("away")

    monkeypatch.setattr(CheckpointIndex, "is_committed", fail)
    assert known().is_there(40)


def test_measuring_that_ends_the_process_is_tried_twice(known):
    first = known()
    later, last = (dataclasses.replace(first, launch=number) for number in (1, 2))
    assert first.begin(10, again=False)
    assert later.begin(10, again=True)
    assert not later.begin(10, again=True)
    assert last.begin(10, again=False)  # it was trained again by another launch
    last.end(10)
    assert last.begin(10, again=True)


def test_a_launch_does_not_try_for_ever_what_ends_it_before_the_checkpoint_is_saved(known):
    for is_tried in (True, True, False, False):  # attempts that begin before the checkpoint
        assert known().begin(10, again=False) == is_tried


@pytest.mark.parametrize(("samples", "apart"), [(None, ""), (100, ""), (50, "_during")])
def test_figures_that_do_not_compare_with_the_end_have_their_own_curve(known, samples, apart):
    made = known(during=DuringConfig(samples=samples))
    report = checkpoint_report(10, 3.0, samples=samples or 100)
    (distance,) = report.distances
    beside_real = dataclasses.replace(distance, real=real_figures(0.5))
    made.tell(dataclasses.replace(report, distances=(beside_real,)), b"picture")
    tracker = made.tracker
    assert tracker.curves == {
        f"eval{apart}/frechet_random_conv": {10: 3.0},
        f"eval{apart}/network_evaluations": {10: 16.0},
        f"reference{apart}/frechet_random_conv": {10: 0.5},
        f"reference{apart}/random_conv_diversity": {10: 2.0},
        f"reference{apart}/random_conv_nearest_train": {10: 1.5},
    }
    assert tracker.lowest == {f"eval{apart}/frechet_random_conv"}
    assert tracker.pictures == [("samples", 10, b"picture")]
    ((kind, text),) = [each.values() for each in known.told]
    assert kind == "note"
    assert "measured after 10 images: Fréchet distance (random_conv) 3.0000" in text


def test_grids_on_the_way_keep_their_series_to_themselves(known):
    made = known(grid_interval_images=10)
    made.tell(checkpoint_report(10), b"picture")
    assert made.tracker.pictures == []


def test_a_block_that_does_not_fit_is_told_with_the_setting(monkeypatch):
    sampler = ImageSampler(
        flow=Flow(FlowConfig()),
        sampler=SAMPLER,
        shape=ImageShape(channels=1, size=8, classes=2),
        codec=IdentityCodec(),
        seed=0,
        batch=4,
        device=torch.device("cpu"),
    )

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nmore")

    monkeypatch.setattr(ImageSampler, "block", full)
    turns = sampler.turns(torch.nn.Identity(), torch.zeros(6).long(), ranks=HostGroup(alone=True))
    with pytest.raises(SolverError, match=r"3 images at once .* lower eval\.batch, .*3 GiB\)$"):
        next(turns)
    # Where others wait in the midst of the network there is no agreement.
    monkeypatch.setattr("trainer.evaluation.samples.shards_of", lambda _model: {"experts": None})
    turns = sampler.turns(torch.nn.Identity(), torch.zeros(6).long(), ranks=HostGroup(alone=True))
    with pytest.raises(torch.OutOfMemoryError):
        next(turns)
