"""With how many workers an elastic run goes on: those to which its work can be dealt."""

import pytest

from cluster.contract import ClusterConfig, ClusterConfigError
from tests.support.configuration import configuration
from trainer.config.job import with_workers
from trainer.planning.placing import resolve_placement
from trainer.training.validate import fewer_workers, validate


def test_a_range_of_workers_gives_the_fewest_and_all_of_them():
    job = configuration("+exp=digits", "cluster.workers=1..4")
    assert (job.cluster.min_workers, job.cluster.workers) == (1, 4)
    assert configuration("+exp=digits", "cluster.workers=4").cluster.min_workers is None
    validate(job)


def test_what_the_batch_and_its_stages_cannot_be_dealt_to_is_left_out():
    """The batch of 128 with two stages goes to 1, 2, 4, 8 and 16 ranks, and so on."""
    job = configuration("+exp=digits", "cluster.workers=1..16")
    assert fewer_workers(job) == {1: 1, 2: 1, 4: 1, 8: 1}
    assert fewer_workers(configuration("+exp=digits", "cluster.workers=3..16")) == {4: 1, 8: 1}
    assert fewer_workers(configuration("+exp=digits", "cluster.workers=16")) == {}
    alone = configuration("+exp=digits", "cluster.workers=1..16", "cluster.backend=local")
    assert fewer_workers(alone) == {}
    small = configuration("+exp=digits", "cluster.workers=1..16", "engine.micro_batch=8")
    assert fewer_workers(small) == {1: 1, 2: 1, 4: 1, 8: 1}


def test_groups_of_expert_shards_stay_whole():
    job = configuration("+exp=digits", "cluster.workers=1..16", "engine.placement={1:4}")
    assert fewer_workers(job) == {4: 4, 8: 4}
    for workers, unit in fewer_workers(job).items():
        validate(with_workers(job, workers))
        assert resolve_placement(with_workers(job, workers)).unit == unit


@pytest.mark.parametrize("least", [0, 5, 1.5])
def test_no_fewest_number_above_all_of_them(least):
    with pytest.raises(ClusterConfigError, match=f"min_workers is {least}.*cluster.workers=4"):
        ClusterConfig(workers=4, min_workers=least)
