import pytest

from cluster import ray_session
from cluster.contract import ClusterConfig, ClusterConfigError


@pytest.fixture(autouse=True)
def _nothing_runs_here(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_session, "read_ray_address", lambda: None)


def address(configured):
    return ray_session.address_to_join(ClusterConfig(address=configured))


def test_auto_starts_a_cluster_where_there_is_none():
    assert address("auto") is None


def test_auto_joins_what_ray_start_left_running(monkeypatch):
    monkeypatch.setattr(ray_session, "read_ray_address", lambda: "10.0.0.1:6379")
    assert address("auto") == "10.0.0.1:6379"
    assert address("local") is None


def test_the_environment_comes_first(monkeypatch):
    monkeypatch.setattr(ray_session, "read_ray_address", lambda: "10.0.0.1:6379")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert address("auto") == "10.0.0.2:6379"
    assert address("10.0.0.3:6379") == "10.0.0.3:6379"


def test_the_address_of_a_job_server_is_refused(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ClusterConfigError, match="ray job submit"):
        address("auto")
    assert address("local") is None
