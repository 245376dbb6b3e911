import threading
from functools import partial
from types import SimpleNamespace

import pytest
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

from cluster import ray_nodes
from cluster.assignment import Node, WorkerGroupSpec
from cluster.ray_controller import Abandoned, require_wanted
from cluster.ray_nodes import NodePinning, avoiding, empty_selectors

SPEC = WorkerGroupSpec(workers=4, group_size=2, cpus=1, gpus=0)


def go_on():
    """The run is not given up."""


def node(name, cpus):
    return Node(id=name, address=name, cpus=cpus, gpus=0)


@pytest.fixture
def free(monkeypatch):
    """What is found free at each look, the last of it from then on."""
    looks = []
    monkeypatch.setattr(ray_nodes, "_LOOK_S", 0.01)
    monkeypatch.setattr(
        ray_nodes, "free_nodes", lambda: looks.pop(0) if len(looks) > 1 else looks[0]
    )
    return looks


def pins(pinning):
    context = SimpleNamespace(label_selector=empty_selectors(SPEC.workers))
    pinning.before_worker_group_start(context)
    return [selector["ray.io/node-id"] for selector in context.label_selector]


def test_each_start_waits_for_room_and_decides_anew(free):
    told: list[str] = []
    pinning = NodePinning(SPEC, timeout_s=60, report=told.append, meanwhile=go_on)
    free += [[node("a", 3)], [node("a", 3), node("b", 3)], [node("c", 1)], [node("c", 4)]]
    assert pins(pinning) == ["a", "a", "b", "b"]
    assert pins(pinning) == ["c"] * 4
    first, second = told
    assert first.startswith("waiting up to 60 s for room: ")
    assert "(a has 3 CPUs, room for 1)" in first
    assert "(c has 1 CPUs, room for 0)" in second


def test_groups_keep_off_a_node_that_is_avoided(free):
    free += [[node("a", 4), node("b", 4)]]
    context = SimpleNamespace(label_selector=[avoiding({"a"}) for _ in range(SPEC.workers)])
    NodePinning(SPEC, timeout_s=60, report=print, meanwhile=go_on).before_worker_group_start(
        context
    )
    assert [selector["ray.io/node-id"] for selector in context.label_selector] == ["b"] * 4


def test_a_start_without_room_fails_in_a_way_that_ray_train_tries_again(free):
    free += [[node("a", 3), node("b", 1)]]
    with pytest.raises(WorkerGroupStartupFailedError, match=r"After 0.1 s .* room for 1 \(a has 3"):
        pins(NodePinning(SPEC, timeout_s=0.1, report=print, meanwhile=go_on))


def test_a_run_that_is_given_up_waits_for_room_no_longer(free):
    free += [[node("a", 3)]]
    given_up = threading.Event()
    pinning = NodePinning(
        SPEC,
        timeout_s=60,
        report=lambda _: given_up.set(),
        meanwhile=partial(require_wanted, given_up),
    )
    with pytest.raises(Abandoned):
        pins(pinning)


def test_other_numbers_than_were_decided_are_an_error():
    workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=name)) for name in "abba"]
    group = SimpleNamespace(get_workers=lambda: workers)
    with pytest.raises(RuntimeError, match="Ranks 0 to 1 must share a node, but run on a, b"):
        NodePinning(
            SPEC, timeout_s=1, report=print, meanwhile=lambda: None
        ).after_worker_group_start(group)
