import pytest

from cluster.assignment import (
    Node,
    gpus_per_worker,
    oversubscription_warning,
    require_room,
    workers_that_fit,
)
from cluster.contract import ClusterConfig, ClusterTooSmall

SMALL, LARGE, GPU = (
    Node(id=name, address=name, cpus=cpus, gpus=gpus)
    for name, cpus, gpus in (("small", 3, 0), ("large", 8, 0), ("gpu", 8, 4))
)


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "room"),
    [
        ([], 1, 0, 0),
        ([SMALL], 1, 0, 3),
        ([SMALL, SMALL], 2, 0, 2),  # 6 CPUs in all, but no worker spans two nodes
        ([LARGE, GPU], 2, 1, 4),
        ([GPU], 4, 1, 2),
    ],
)
def test_no_worker_spans_two_nodes(nodes, cpus, gpus, room):
    assert workers_that_fit(nodes, cpus=cpus, gpus=gpus) == room


def test_auto_means_a_gpu_where_there_is_one():
    config = ClusterConfig(gpus_per_worker="auto")
    assert gpus_per_worker(config, [LARGE]) == 0
    assert gpus_per_worker(config, [LARGE, GPU]) == 1
    assert gpus_per_worker(ClusterConfig(gpus_per_worker=0), [GPU]) == 0


def test_more_workers_than_cores_get_a_word_with_the_number_that_fits():
    crowd = ClusterConfig(workers=8, cpus_per_worker=2)
    assert oversubscription_warning(crowd, cores=16) is None
    word = oversubscription_warning(crowd, cores=5) or ""
    assert "cluster.workers=8 with cluster.cpus_per_worker=2 want 16 cores" in word
    assert "this machine has 5" in word
    assert "cluster.workers=2 is faster" in word


def test_a_cluster_without_room_is_refused_with_numbers():
    config = ClusterConfig(workers=5, cpus_per_worker=2)
    require_room(config, [LARGE, SMALL], workers=5, gpus=0)
    with pytest.raises(ClusterTooSmall, match=r"need 10 CPUs and 5 GPUs .* 16 CPUs and 4 GPUs"):
        require_room(config, [LARGE, GPU], workers=5, gpus=1)
