"""How many spare processes each node keeps, and what they do at their start."""

import gc
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from ray import cloudpickle
from ray.core.generated.common_pb2 import WORKER, CoreWorkerStats
from ray.core.generated.node_manager_pb2 import GetNodeStatsReply, PrestartWorkersReply
from ray.core.generated.node_manager_pb2_grpc import (
    NodeManagerServiceServicer,
    add_NodeManagerServiceServicer_to_server,
)

from cluster import ray_spares
from cluster.assignment import Node, WorkerGroupSpec
from cluster.contract import ClusterConfig, has_spares
from cluster.ray_controller import Packed

JOB = b"\1\0\0\0"


@pytest.fixture(autouse=True)
def collecting() -> Iterator[None]:
    yield
    gc.enable()


def node(name: str, cpus: float, gpus: float = 0) -> Node:
    return Node(id=name, address=f"10.0.0.{name}", cpus=cpus, gpus=gpus)


@pytest.mark.parametrize(
    ("spec", "nodes", "spares"),
    [
        # One node of three is a reserve: it is to run what another one loses.
        ((4, 1, 2, 0), [node("1", 4), node("2", 4), node("3", 4)], {"1": 2, "2": 2, "3": 2}),
        # Never more than there are workers, and none where none can run.
        ((4, 1, 1, 0), [node("1", 64), node("2", 0)], {"1": 4}),
        # Whole groups alone.
        ((8, 4, 1, 1), [node("1", 64, 6), node("2", 64, 8)], {"1": 4, "2": 8}),
    ],
)
def test_a_node_keeps_as_many_spares_as_workers_may_come_to_run_there(
    spec: tuple[int, int, int, int], nodes: list[Node], spares: dict[str, int]
) -> None:
    workers, group_size, cpus, gpus = spec
    wanted = WorkerGroupSpec(workers=workers, group_size=group_size, cpus=cpus, gpus=gpus)
    assert ray_spares.spares_of(nodes, wanted) == spares


class Raylet(NodeManagerServiceServicer):
    """A node's, played: how many spares it has, and whether it answers."""

    def __init__(self) -> None:
        self.idle = 0
        self.answers = True

    def GetNodeStats(self, request: Any, context: Any) -> GetNodeStatsReply:  # noqa: N802
        if not self.answers:
            context.abort(grpc.StatusCode.UNAVAILABLE, "it stands still")
        spare = CoreWorkerStats(job_id=JOB, worker_type=WORKER)
        return GetNodeStatsReply(core_workers_stats=[spare] * self.idle)

    def PrestartWorkers(self, request: Any, context: Any) -> PrestartWorkersReply:  # noqa: N802
        self.idle += request.num_workers
        return PrestartWorkersReply()


@pytest.fixture
def raylets(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Raylet]]:
    """Two nodes, which listen."""
    found = {"1": Raylet(), "2": Raylet()}
    with ExitStack() as at_last:
        doors = {}
        for name, raylet in found.items():
            server = grpc.server(ThreadPoolExecutor(4))
            add_NodeManagerServiceServicer_to_server(raylet, server)
            doors[name] = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            server.start()
            at_last.callback(server.stop, None)
        monkeypatch.setattr(ray_spares, "free_nodes", lambda: [node("1", 4), node("2", 4)])
        monkeypatch.setattr(ray_spares, "node_doors", lambda: doors)
        context = SimpleNamespace(get_job_id=JOB.hex)
        monkeypatch.setattr(ray_spares.ray, "get_runtime_context", lambda: context)
        yield found


def test_a_node_that_does_not_answer_costs_the_others_no_processes(
    raylets: dict[str, Raylet], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    wanted = WorkerGroupSpec(workers=4, group_size=1, cpus=1, gpus=0)
    keeper = ray_spares.SpareKeeper(wanted, said.append)
    raylets["1"].answers = False
    for _ in range(3):
        keeper._fill()
        assert (raylets["1"].idle, raylets["2"].idle) == (0, 4)
    assert len(said) == 3
    assert said[0].startswith("some spare workers are lacking (1 of 2 nodes, first 127.0.0.1:")
    assert "it stands still" in said[0]
    raylets["1"].answers = True
    keeper._fill()
    assert (raylets["1"].idle, raylets["2"].idle) == (4, 4)
    # One that is out of reach for a while has its spares still when it is back.
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(ray_spares, "free_nodes", lambda: [node("2", 4)])
        keeper._fill()
    keeper._fill()
    assert (raylets["1"].idle, raylets["2"].idle) == (4, 4)
    assert len(said) == 3


@pytest.mark.parametrize(
    ("setting", "private", "kept"),
    [("auto", True, False), ("auto", False, True), (True, True, True), (False, False, False)],
)
def test_a_private_cluster_keeps_no_spares_unless_asked(
    setting: bool, private: bool, kept: bool
) -> None:
    assert has_spares(ClusterConfig(spares=setting), private=private) is kept


def test_a_spare_finds_the_code_by_the_drivers_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "far_away.py").write_text("calls = []\ndef warm_up():\n    calls.append(1)\n")
    travelled = cloudpickle.dumps(ray_spares._hook([str(tmp_path)], "far_away", "warm_up"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    cloudpickle.loads(travelled)()
    assert sys.modules.pop("far_away").calls == [1]


def test_a_spare_that_cannot_import_says_so_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    ray_spares.call("no_such_module", "warm_up")
    assert "No module named 'no_such_module'" in capsys.readouterr().err


def test_the_workers_function_travels_unopened() -> None:
    word = "open"
    packed = cloudpickle.loads(cloudpickle.dumps(Packed(cloudpickle.dumps(lambda: word))))
    assert packed.get()() == "open"  # type: ignore[func-returns-value]
