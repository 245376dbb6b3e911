"""A run that is given up while Ray Train starts its workers."""

import threading
from types import SimpleNamespace

import pytest

from cluster import ray_controller
from cluster.ray_controller import Abandoned, AskingPolicy, Controller, Group


def test_the_room_of_workers_that_are_being_started_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray gives its controller a group only once that has started."""
    given_back = threading.Event()
    killed: list[str] = []
    alive = {"ActorClassName": "RayTrainWorker", "State": "PENDING_CREATION", "ActorID": "a" * 32}
    table = {"1": alive, "2": alive | {"State": "DEAD"}, "3": alive | {"ActorClassName": "Box"}}
    core = SimpleNamespace(kill_actor=lambda actor, _: killed.append(actor.hex()))
    connection = SimpleNamespace(current_job_id=None, core_worker=core)
    monkeypatch.setattr(ray_controller, "actors", lambda **_: table)
    monkeypatch.setattr(ray_controller.ray._private.worker, "global_worker", connection)
    monkeypatch.setattr(ray_controller.WorkerGroup, "__init__", lambda self: None)
    monkeypatch.setattr(ray_controller.TrainController, "__init__", lambda self: None)

    controller = Controller(abandoned=threading.Event())
    controller.release_room()  # before there is any
    group = controller.worker_group_cls()
    group.room = SimpleNamespace(shutdown=given_back.set)
    controller.release_room()
    assert given_back.is_set()
    assert killed == ["a" * 32]

    # Those of another run, and of a start before, are left to themselves.
    other = Controller(abandoned=threading.Event())
    given_back.clear()
    other.release_room()
    controller.worker_group_cls()
    controller.release_room()
    assert not given_back.is_set()
    assert not Group.groups


def test_a_run_that_is_given_up_does_not_ask_what_is_to_follow() -> None:
    abandoned = threading.Event()
    abandoned.set()
    with pytest.raises(Abandoned):
        AskingPolicy(None, abandoned).make_decision(None)  # type: ignore[arg-type]
