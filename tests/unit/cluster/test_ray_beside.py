"""What a task beside the workers gets of its node."""

from types import SimpleNamespace

import pytest

from cluster import ray_beside
from cluster.contract import ClusterConfig
from cluster.ray_beside import RayBeside


@pytest.fixture
def begun(monkeypatch):
    """Keeps the options of tasks in place of running them."""
    options = []

    def keep(**given):
        options.append(given)
        return SimpleNamespace(remote=lambda *_: iter(()))

    monkeypatch.setattr(
        ray_beside.ray, "remote", lambda **_: lambda _function: SimpleNamespace(options=keep)
    )
    return options


@pytest.mark.parametrize(
    ("gpus", "of_workers", "wanted"), [(0, 1, 0), ("auto", 0, 0), ("auto", 4, 1), (1, 0, 1)]
)
def test_a_task_without_gpus_sees_none_of_the_workers(begun, gpus, of_workers, wanted):
    config = ClusterConfig(beside_cpus=3, beside_gpus=gpus)
    RayBeside(config, gpus_per_worker=of_workers)(dict, {})
    (options,) = begun
    assert (options["num_cpus"], options["num_gpus"]) == (3, wanted)
    environment = options["runtime_env"]["env_vars"]
    assert environment["OMP_NUM_THREADS"] == "3"
    if wanted == 0:
        assert environment["CUDA_VISIBLE_DEVICES"] == ""
    else:
        assert "CUDA_VISIBLE_DEVICES" not in environment  # Ray sets it to the task's own
