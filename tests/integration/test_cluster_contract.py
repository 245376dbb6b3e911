"""What a worker and its caller rely on, held against both backends (Ray: by joining a cluster)."""

import os
import threading
import time
from collections.abc import Iterator

import pytest

from cluster.contract import (
    ClusterConfig,
    ClusterTooSmall,
    Message,
    Outcome,
    Payload,
    WorkerContext,
)
from cluster.failure import WorkerFailed, WorkerRefused
from cluster.launcher import run
from tests.support.ray_cluster import RayCluster, ray_cluster

WORKERS = 2


@pytest.fixture(scope="module")
def joined() -> Iterator[RayCluster]:
    with pytest.MonkeyPatch.context() as patch, ray_cluster(cpus=WORKERS) as cluster:
        patch.setenv("RAY_AUTH_MODE", cluster.environment["RAY_AUTH_MODE"])
        yield cluster


pytestmark = pytest.mark.slow


@pytest.fixture(params=["local", "ray"])
def config(request: pytest.FixtureRequest) -> ClusterConfig:
    if request.param == "local":
        return ClusterConfig(backend="local", workers=WORKERS, gpus_per_worker=0)
    cluster: RayCluster = request.getfixturevalue("joined")
    return ClusterConfig(
        workers=WORKERS, gpus_per_worker=0, address=cluster.address, max_failures=0
    )


def launch(
    config: ClusterConfig, worker: object, payload: Payload | None = None
) -> tuple[Outcome, list[Message]]:
    """Runs a worker; the message `{"stop": True}` of a worker sets the stop request."""
    messages: list[Message] = []
    stop = threading.Event()

    def take(message: Message) -> None:
        if message == {"stop": True}:
            stop.set()
        messages.append(message)

    return run(config, worker, payload or {}, on_message=take, stop=stop), messages  # type: ignore[arg-type]


def sum_ranks(context: WorkerContext, payload: Payload) -> None:
    import torch
    import torch.distributed as dist

    total = torch.tensor([float(context.rank + 1)])
    dist.all_reduce(total)
    for number in range(payload["messages"]):
        context.report({"rank": context.rank, "number": number})
    context.report(
        {
            "rank": context.rank,
            "world_size": (context.world_size, dist.get_world_size()),
            "local": (context.local_rank, context.local_world_size),
            "attempt": context.attempt,
            "device": context.device,
            "total": total.item(),
            "threads": torch.get_num_threads(),
            "variables": [
                os.environ[n] for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DS_ACCELERATOR")
            ],
            "stop": context.stop_requested(),
        }
    )


def test_workers_know_their_place_and_reach_one_another(config: ClusterConfig) -> None:
    outcome, messages = launch(config, sum_ranks, {"messages": 20})

    assert outcome == Outcome(status="finished", restarts=0)
    for rank in range(WORKERS):
        *numbered, last = [m for m in messages if m["rank"] == rank]
        assert [m["number"] for m in numbered] == list(range(20))
        assert last == {
            "rank": rank,
            "world_size": (WORKERS, WORKERS),
            "local": (rank, WORKERS),
            "attempt": 0,
            "device": "cpu",
            "total": 3.0,
            "threads": 1,
            "variables": [str(rank), str(rank), str(WORKERS), "cpu"],
            "stop": False,
        }


def work_until_stopped(context: WorkerContext, payload: Payload) -> None:
    if context.rank == 0:
        context.report({"stop": True})
    limit = time.monotonic() + 540
    while not context.stop_requested():
        assert time.monotonic() < limit
        time.sleep(0.01)
    context.report({"stopped": context.rank})


def test_a_stop_request_reaches_every_worker(config: ClusterConfig) -> None:
    outcome, messages = launch(config, work_until_stopped)

    assert outcome.status == "stopped"
    assert {m["stopped"] for m in messages if "stopped" in m} == set(range(WORKERS))


def refuse(context: WorkerContext, payload: Payload) -> None:
    if context.rank == 1:
        raise ValueError("The colour is red; it must be blue.")
    wait_for_the_other()


def test_a_value_error_fails_at_once_with_its_message(config: ClusterConfig) -> None:
    with pytest.raises(WorkerRefused) as caught:
        launch(config, refuse)

    assert str(caught.value) == "The colour is red; it must be blue."
    assert isinstance(caught.value, ValueError)
    assert "in refuse" in caught.value.traceback_tail
    # Its peer is blocked in a collective by then, for half an hour if nobody ended it: longer
    # than a test may take.


def fail(context: WorkerContext, payload: Payload) -> None:
    if context.rank == 1:
        raise KeyError("no such colour")
    wait_for_the_other()


def wait_for_the_other() -> None:
    import torch.distributed as dist

    dist.barrier()


def test_an_exception_surfaces_with_its_traceback(config: ClusterConfig) -> None:
    with pytest.raises(
        WorkerFailed, match="Worker 1 failed with KeyError: 'no such colour'"
    ) as caught:
        launch(config, fail)

    assert not isinstance(caught.value, ValueError)
    assert "in fail" in caught.value.traceback_tail
    assert str(caught.value).endswith(caught.value.traceback_tail)


def die(context: WorkerContext, payload: Payload) -> None:
    if context.rank == 1:
        os.kill(os.getpid(), 9)
    wait_for_the_other()


def test_a_killed_worker_is_named(config: ClusterConfig) -> None:
    with pytest.raises(WorkerFailed, match=r"Worker 1 .*memory ran out"):
        launch(config, die)


def test_a_cluster_that_is_too_small_is_refused_with_numbers(joined: RayCluster) -> None:
    config = ClusterConfig(workers=3, cpus_per_worker=2, gpus_per_worker=0, address=joined.address)
    with pytest.raises(ClusterTooSmall, match=r"need 6 CPUs .* has 2 CPUs .* room for 1"):
        launch(config, sum_ranks)


def test_a_joined_cluster_runs_on_when_it_is_left(joined: RayCluster) -> None:
    listing = joined.job("list")
    assert listing.returncode == 0, listing.stderr
