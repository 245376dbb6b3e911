"""What is measured beside training: in which order, and how it ends."""

import threading
import time
from types import SimpleNamespace

import pytest

from cluster.contract import BesideFailed
from tests.unit.trainer.measurements import checkpoint_report
from trainer.checkpoint.upload import SaveReport
from trainer.training.evaluating import EvaluationPlan
from trainer.training.evaluating_beside import BesideEvaluations


class Task:
    """A task that ends, or begins, when it is told to."""

    def __init__(self, images):
        self.images = images
        self.begun, self.ended, self.cancelled = (threading.Event() for _ in range(3))
        self.error = None

    def has_begun(self):
        return self.begun.is_set()

    def join(self, timeout_s):
        return self.ended.wait(timeout_s)

    def result(self):
        if self.error:
            raise BesideFailed(self.error)
        return {"report": checkpoint_report(self.images).to_json().decode(), "unwritten": ""}

    def cancel(self):
        self.cancelled.set()


class Known:
    """What is known of a run's checkpoints, and what is told of them."""

    def __init__(self, left=()):
        self.left = list(left)
        self.told, self.warned = [], {}
        self.store = SimpleNamespace(get=lambda key: f"picture of {key}".encode())

    def catch_up(self, is_due):
        return self.left

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
        if number == 1:
            tasks[1].error = "ConfigError: no images"
        tasks[number].ended.set()
    wait_until(lambda: len(known.told) == 3)
    assert [task.images for task in tasks] == [100, 200, 300, 400]
    assert known.told[0] == (100, b"picture of 100/grid.png")
    assert known.warned == {200: "ConfigError: no images"}


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
    assert "trainer.evaluate" in known.warned[200]


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
    wait_until(lambda: "cluster.beside_cpus" in caplog.text)
    tasks[0].begun.set()
    tasks[0].ended.set()
    assert caplog.text.count("cluster.beside_cpus") == 1
