import pytest

from cluster import ray_session
from cluster.contract import ClusterConfig, ClusterConfigError, ClusterUnavailable
from cluster.process_group import listen


@pytest.fixture(autouse=True)
def _nothing_runs_here(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_session, "read_ray_address", lambda: None)


def address(configured):
    return ray_session.address_to_join(ClusterConfig(address=configured))


def test_auto_starts_a_cluster_where_there_is_none():
    assert address("auto") is None


@pytest.fixture
def left(monkeypatch):
    """The address of a cluster that `ray start` left running here."""
    with listen("127.0.0.1") as listener:
        left = f"127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr(ray_session, "read_ray_address", lambda: left)
        yield left


def test_auto_joins_what_ray_start_left_running(left):
    assert address("auto") == left
    assert address("local") is None


def test_auto_ignores_what_does_not_run_any_more(monkeypatch, caplog):
    monkeypatch.setattr(ray_session, "read_ray_address", unused_address)
    assert address("auto") is None
    assert "does not answer" in caplog.text


def test_joining_what_does_not_run_is_refused_at_once():
    config = ClusterConfig(address=unused_address())
    with (
        pytest.raises(ClusterUnavailable, match="nothing answers"),
        ray_session.session(config, print),
    ):
        pass


def unused_address():
    with listen("127.0.0.1") as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.usefixtures("left")
def test_the_environment_comes_first(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert address("auto") == "10.0.0.2:6379"
    assert address("10.0.0.3:6379") == "10.0.0.3:6379"


def test_the_address_of_a_job_server_is_refused(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ClusterConfigError, match="ray job submit"):
        address("auto")
    assert address("local") is None
