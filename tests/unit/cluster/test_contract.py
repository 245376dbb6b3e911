import pytest

from cluster.contract import ClusterConfig, ClusterConfigError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("backend", "slurm"),
        ("workers", 0),
        ("workers", 1.5),
        ("cpus_per_worker", 0),
        ("gpus_per_worker", 2),
        ("gpus_per_worker", "all"),
        ("max_failures", -1),
        ("start_timeout_s", 0.0),
        ("address", "http://127.0.0.1:8265"),
    ],
)
def test_a_value_that_cannot_work_is_named(field, value):
    with pytest.raises(ClusterConfigError, match=field) as caught:
        ClusterConfig(**{field: value})
    assert repr(value) in str(caught.value)
