"""What is measured beside training: in which order, and how it ends."""

import re
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from cluster.contract import BesideFailed
from pipelines.documents import DocumentError
from tests.unit.trainer.checkpoint.handmade import upload
from tests.unit.trainer.checkpoint.stores import MemoryStore
from tests.unit.trainer.measurements import RUN, checkpoint_report
from trainer.checkpoint.index import CheckpointIndex
from trainer.checkpoint.upload import SaveReport
from trainer.config.job import EvalConfig
from trainer.evaluation.during import MeasuredCheckpoints
from trainer.host_group import HostGroup
from trainer.metrics.tracker import Tracker
from trainer.storage.errors import MissingObject, StoreUnreachable
from trainer.training.evaluating import EvaluationPlan, InlineEvaluations
from trainer.training.evaluating_beside import BesideEvaluations


class Task:
    """A task that ends, or begins, when it is told to."""

    def __init__(self, images):
        self.images, self.looks = images, 0
        self.begun, self.ended, self.cancelled = (threading.Event() for _ in range(3))
        self.error = None

    def has_begun(self):
        return self.begun.is_set()

    def join(self, timeout_s):
        self.looks += 1
        return self.ended.wait(timeout_s)

    def result(self):
        if self.error:
            raise self.error
        return {"report": checkpoint_report(self.images).to_json().decode(), "unwritten": ""}

    def cancel(self):
        self.cancelled.set()


class Known:
    """What is known of a run's checkpoints, and what is told of them."""

    def __init__(self, left=()):
        self.left = list(left)
        self.told, self.warned, self.deleted = [], {}, set()
        self.run = "a"
        self.store = SimpleNamespace(
            get=lambda key: f"picture of {key}".encode(), uri=lambda key: f"s3://bucket/runs/{key}"
        )

    def catch_up(self, is_due):
        if self.left == ["fails"]:
            raise DocumentError("a report of another world")
        return self.left

    def is_there(self, images):
        return images not in self.deleted

    def key(self, report, name):
        return f"{report.images}/{name}"

    def tell(self, report, grid):
        self.told.append((report.images, grid))

    def warn(self, images, reason):
        self.warned[images] = reason


def wait_until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def started():
    """Begins evaluations every 100 images; ends their thread in any case."""
    running = []

    def start(known, *, patient_s=60.0, last_s=60.0):
        tasks, stop = [], threading.Event()

        def begin(images):
            tasks.append(Task(images))
            return tasks[-1]

        plan = EvaluationPlan(every_images=100, global_batch=50, total_images=1000)
        evaluations = BesideEvaluations(
            plan.is_due,
            known=known,
            begin=begin,
            stop_requested=stop.is_set,
            look_s=0.01,
            patient_s=patient_s,
            last_s=last_s,
        )
        evaluations.catch_up(None)
        running.append(evaluations)
        return evaluations, tasks, stop

    yield start
    for evaluations in running:
        evaluations.close(is_finished=False)


def save(evaluations, *positions, error=None):
    for images in positions:
        evaluations.saved(SaveReport(images=images, uri="u", error=error))


def test_the_end_of_a_run_and_what_lies_between_is_not_due():
    plan = EvaluationPlan(every_images=100, global_batch=64, total_images=384)
    assert [images for images in range(64, 449, 64) if plan.is_due(images)] == [128, 256, 320]
    never = EvaluationPlan(every_images=0, global_batch=64, total_images=384)
    assert not any(never.is_due(images) for images in range(64, 449, 64))


def test_checkpoints_are_measured_one_after_the_other_those_of_before_first(started):
    known = Known(left=[100, 200])
    evaluations, tasks, _ = started(known)
    wait_until(lambda: tasks)
    save(evaluations, 300, 350, 400)
    save(evaluations, 500, error="the disk is full")
    for number in range(4):
        wait_until(lambda number=number: len(tasks) > number)
        assert len(tasks) == number + 1
        assert evaluations.in_use() == (tasks[number].images,)
        if number == 1:
            tasks[1].error = BesideFailed("ConfigError: no images")
        tasks[number].ended.set()
    wait_until(lambda: len(known.told) == 3)
    wait_until(lambda: evaluations.in_use() == ())
    assert [task.images for task in tasks] == [100, 200, 300, 400]
    assert known.told[0] == (100, b"picture of 100/grid.png")
    assert known.warned == {200: "ConfigError: no images"}


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MissingObject("no report"), "no report"),
        (DocumentError("no JSON"), "DocumentError: no JSON"),
        (RuntimeError("Ray is gone"), "RuntimeError: Ray is gone"),
    ],
)
def test_whatever_fails_is_told_and_the_next_one_is_measured(started, error, told):
    known = Known(left=["fails"])
    evaluations, tasks, _ = started(known)
    save(evaluations, 100, 200)
    wait_until(lambda: tasks)
    tasks[0].error = error
    tasks[0].ended.set()
    wait_until(lambda: len(tasks) == 2)
    tasks[1].ended.set()
    wait_until(lambda: known.told)
    assert [images for images, _ in known.told] == [200]
    assert known.warned == {100: told}


@pytest.mark.parametrize("while_read", [False, True])
def test_a_checkpoint_that_is_gone_by_its_turn_is_told_with_the_settings(started, while_read):
    known = Known()
    evaluations, tasks, _ = started(known)
    save(evaluations, 100, 200, 300)
    wait_until(lambda: tasks)
    if while_read:
        known.deleted = {100}
        tasks[0].error = BesideFailed("MissingObject: rank-00000.safetensors")
    else:
        known.deleted = {200}
    tasks[0].ended.set()
    wait_until(lambda: known.warned)
    ((images, reason),) = known.warned.items()
    assert images == (100 if while_read else 200)
    assert re.search("deleted .*checkpoint.keep_last.*checkpoint.keep_every_images", reason)
    wait_until(lambda: len(tasks) == 2)
    assert tasks[1].images == (200 if while_read else 300)


def test_the_end_waits_for_what_has_begun_and_tells_of_the_rest(started):
    known = Known()
    evaluations, tasks, _ = started(known)
    save(evaluations, 100, 200)
    wait_until(lambda: tasks)
    tasks[0].begun.set()
    closing = threading.Thread(target=evaluations.close, kwargs={"is_finished": True})
    closing.start()
    wait_until(lambda: evaluations._end_s is not None)
    tasks[0].ended.set()
    closing.join(60)
    assert [images for images, _ in known.told] == [100]
    assert list(known.warned) == [200]
    assert "trainer.evaluate checkpoint=s3://bucket/runs/a checkpoints=all" in known.warned[200]


@pytest.mark.parametrize("limit", ["patient_s", "last_s"])
def test_the_end_waits_neither_for_room_nor_for_ever(started, limit):
    known = Known()
    evaluations, tasks, _ = started(known, **{limit: 0.0})
    save(evaluations, 100)
    wait_until(lambda: tasks)
    if limit == "last_s":
        tasks[0].begun.set()
    evaluations.close(is_finished=True)
    assert tasks[0].cancelled.is_set()
    assert list(known.warned) == [100]


def test_a_run_that_stops_leaves_it_to_its_next_launch(started):
    known = Known()
    evaluations, tasks, _ = started(known)
    save(evaluations, 100, 200)
    wait_until(lambda: tasks)
    tasks[0].begun.set()
    evaluations.close(is_finished=False)
    assert tasks[0].cancelled.is_set()
    assert (known.told, known.warned) == ([], {})


def test_a_stop_ends_the_wait_at_the_end(started):
    known = Known()
    evaluations, tasks, stop = started(known)
    save(evaluations, 100)
    wait_until(lambda: tasks)
    tasks[0].begun.set()
    stop.set()
    evaluations.close(is_finished=True)
    assert tasks[0].cancelled.is_set()


def test_a_wait_for_room_is_told_once(started, caplog):
    evaluations, tasks, _ = started(Known(), patient_s=0.0)
    save(evaluations, 100)
    wait_until(lambda: tasks and tasks[0].looks > 20)
    tasks[0].begun.set()
    tasks[0].ended.set()
    assert caplog.text.count("cluster.beside_cpus") == 1


class FailingStore(MemoryStore):
    """A store that takes no grid while it is away."""

    is_away = False

    def put(self, key, data):
        if self.is_away and key.endswith("grid.png"):
            raise StoreUnreachable("the store is away")
        super().put(key, data)


@pytest.fixture
def inline(monkeypatch):
    """Measures at once, without a model."""
    monkeypatch.setattr(
        InlineEvaluations, "_measure", lambda _self, images: (checkpoint_report(images), b"grid")
    )
    store, messages = FailingStore(), []
    known = MeasuredCheckpoints(store, RUN, EvalConfig(), Tracker(), messages.append)
    evaluations = InlineEvaluations(
        EvaluationPlan(every_images=100, global_batch=50, total_images=1000),
        config=EvalConfig(),
        engine=None,
        image_sampler=None,
        reference=SimpleNamespace(ranks=HostGroup(alone=True)),
        known=known,
        stop_requested=lambda: False,
        pause=nullcontext,
    )
    evaluations.catch_up(None)
    return evaluations, store, messages


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("fault", ["away", "damaged", "pruned"])
def test_a_store_that_fails_loses_no_figures_and_ends_no_training(inline, is_late, fault):
    evaluations, store, messages = inline
    manifest = upload(store, run=RUN, images=100, attempt="good")
    CheckpointIndex(store, run=RUN).commit(manifest)
    store.is_away = fault == "away"
    if fault == "damaged":
        store.delete(manifest.objects[0].key)
    if fault == "pruned":
        store.delete_all(list(store.list(f"{RUN}/checkpoints/")))
    if not is_late:
        save(evaluations, 100)  # the commit comes before measuring ends
    evaluations.after_save(100, is_begun=True)
    if is_late:
        save(evaluations, 100)
    warning, note = messages
    assert warning["kind"] == "warning"
    assert "checkpoint of 100 images" in warning["text"]
    assert "its report cannot be written" in warning["text"]
    assert "measured after 100 images" in note["text"]


def test_of_a_save_that_fails_it_is_told_at_the_end_and_of_a_late_one_not(inline):
    evaluations, store, messages = inline
    evaluations.after_save(100, is_begun=True)
    evaluations.after_save(200, is_begun=True)
    CheckpointIndex(store, run=RUN).commit(upload(store, run=RUN, images=200, attempt="good"))
    save(evaluations, 200)
    evaluations.close(is_finished=False)
    lost, note = messages
    assert "checkpoint of 100 images is not measured: it could not be saved" in lost["text"]
    assert "measured after 200 images" in note["text"]
