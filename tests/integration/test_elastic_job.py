"""A whole job that goes on with fewer workers once a node is lost, and ends where it would have."""

import re
import shutil

import pytest
import torch

from tests.support.job import SMALL, final_state, job
from tests.support.ray_cluster import ray_cluster
from tests.support.worker_runs import distance
from trainer.checkpoint.reader import CheckpointReader
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig

pytestmark = pytest.mark.slow

OTHER = "127.0.0.3"


def test_a_job_that_loses_a_node_for_good_ends_with_the_same_weights(
    finished, empty_tracker, tmp_path
):
    shutil.copy(empty_tracker, tmp_path)
    with ray_cluster(cpus=1, more_cpus=[1], dashboard=False) as cluster:
        words = (f"cluster.address={cluster.address}", "cluster.workers=1..2")
        more = ("cluster.shrink_after_s=1", "cluster.max_failures=1")
        with job(
            *SMALL, *words, *more, home=tmp_path, environment=cluster.environment
        ) as shrinking:
            shrinking.wait_for(r"checkpoint: \S+/000000001280")
            cluster.lose(OTHER)
            assert shrinking.wait() == 0, shrinking.output
    told = shrinking.output
    assert "workers: as many as there is room for, of 1, 2" in told
    loss = re.search(rf"attempt 0: worker \d on {OTHER} \(the node does not answer\) .*", told)
    assert loss is not None, told
    assert re.search(r"[\d,]+ images were trained, [\d,]+ images are saved; .* at once", loss[0])
    assert re.search(r"attempt 1: 1 workers on 127\.0\.0\.2", told)
    checkpoints = CheckpointReader(
        open_store(f"{tmp_path}/store/runs", StoreConfig()), run="digits"
    )
    worlds = [
        manifest.world_size
        for images in range(1280, 6401, 1280)
        if (manifest := checkpoints.manifest(images)) is not None
    ]
    assert worlds[0] == 2
    assert worlds[-1] == 1
    state = final_state(f"{tmp_path}/store", "digits")
    assert state.keys() == finished.state.keys()
    flat, wanted = (
        {name: tensor.numpy().ravel() for name, tensor in each.items()}
        for each in (state, finished.state)
    )
    # Other ranks add up in another order. Were each weight rounded independently in both runs, at
    # each of 100 updates, they would be 3.6e-7 apart (docs/checkpoints.md).
    for kind in ("master", "ema"):
        assert distance(flat, wanted, kind) < 1e-6, kind
    # One parameter may be all rounding: where gradients are nearly zero, Adam steps by their sign.
    for name, tensor in finished.state.items():
        apart = torch.linalg.vector_norm((state[name] - tensor).double())
        assert apart <= 1e-4 * torch.linalg.vector_norm(tensor.double()), name
