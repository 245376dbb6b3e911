"""Ranks that must share a node, on a real Ray cluster of uneven nodes."""

import threading
import time
from collections.abc import Iterator

import pytest

from cluster.contract import ClusterConfig, ClusterTooSmall, Message, Payload, WorkerContext
from cluster.launcher import run
from tests.support.ray_cluster import HOST, RayCluster, ray_cluster

pytestmark = pytest.mark.slow

CPUS = {HOST: 2, "127.0.0.3": 3, "127.0.0.4": 3}
"""By address of the node: room for eight workers, and for three pairs of them."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    head, *more = CPUS.values()
    with (
        pytest.MonkeyPatch.context() as patch,
        ray_cluster(cpus=head, more_cpus=more, dashboard=False) as cluster,
    ):
        patch.setenv("RAY_AUTH_MODE", cluster.environment["RAY_AUTH_MODE"])
        yield cluster


def tell_node(context: WorkerContext, payload: Payload) -> None:
    """Tells where it runs, and goes on in the first attempt until a node is lost."""
    import ray
    import torch.distributed as dist

    context.report(
        {
            "rank": context.rank,
            "attempt": context.attempt,
            "node": ray.get_runtime_context().get_node_id(),
            "address": ray.util.get_node_ip_address(),
        }
    )
    limit = time.monotonic() + 540
    while context.attempt == 0:
        assert time.monotonic() < limit
        dist.barrier()
        time.sleep(0.05)


def seats(messages: list[Message], attempt: int, key: str = "address") -> list[str]:
    """The node of each rank, in the order of ranks."""
    told = {one["rank"]: one[key] for one in messages if one["attempt"] == attempt}
    return [told[rank] for rank in sorted(told)]


def test_pairs_that_do_not_fit_are_refused_though_single_workers_would(
    cluster: RayCluster,
) -> None:
    with pytest.raises(ClusterTooSmall) as caught:
        run(
            ClusterConfig(workers=8, gpus_per_worker=0, address=cluster.address),
            tell_node,
            {},
            on_message=lambda message: None,
            stop=threading.Event(),
            group_size=2,
        )

    text = str(caught.value)
    assert "4 groups of 2 workers do not fit" in text
    assert "each needs 2 CPUs on one node, and there is room for 3" in text
    for node, cpus in CPUS.items():
        assert f"{node} has {cpus} CPUs, room for 1" in text


def test_pairs_share_a_node_also_after_one_was_lost(cluster: RayCluster) -> None:
    messages: list[Message] = []
    lost: list[str] = []

    def take(message: Message) -> None:
        messages.append(message)
        if not lost and len(seats(messages, 0)) == 4:
            lost.append(next(node for node in seats(messages, 0) if node != HOST))
            cluster.lose(lost[0])

    outcome = run(
        ClusterConfig(workers=4, gpus_per_worker=0, address=cluster.address, max_failures=1),
        tell_node,
        {},
        on_message=take,
        stop=threading.Event(),
        group_size=2,
    )

    assert outcome.restarts == 1
    for attempt in (0, 1):
        # By itself Ray would fill a node of three CPUs with three workers.
        first, second, third, fourth = seats(messages, attempt, "node")
        assert first == second != third == fourth
    # Nobody waits for the node that is gone.
    assert set(seats(messages, 1)) == set(CPUS) - set(lost)
