"""The tracker against a real MLflow server that goes away and comes back."""

import time

import mlflow
import pytest

from tests.support.mlflow_server import mlflow_server
from trainer.evaluate.grid import grid_png
from trainer.metrics.tracker import TrackingConfig
from trainer.metrics.tracker_mlflow import MlflowTracker, TrackerUnreachable, check_tracker

pytestmark = pytest.mark.slow


def tracker(config, tmp_path):
    return MlflowTracker(config, home=str(tmp_path), run="r", identity="s3://bucket/runs/r 0123")


def history(client, run_id, name):
    points = client.get_metric_history(run_id, name)
    return sorted((point.step, point.value) for point in points)


def test_an_outage_loses_no_point_and_a_resumed_run_repeats_none(tmp_path, empty_tracker):
    import torch

    with mlflow_server(tmp_path, empty_tracker) as server:
        config = TrackingConfig(uri=server.uri, flush_timeout_s=90)
        check_tracker(config, str(tmp_path))
        first = tracker(config, tmp_path)
        first.config({"train": {"seed": 0}, "run": "r"})
        first.metrics({"loss": 3.0}, images=10)
        server.kill()
        began = time.monotonic()
        for images in (20, 30):
            first.metrics({"loss": 30.0 / images}, images=images)
        first.image("samples", grid_png(torch.zeros(2, 1, 8, 8), columns=2), images=30)
        first.tag("checkpoint", "s3://bucket/x")
        assert time.monotonic() - began < 0.5
        server.start()
        first.close("KILLED")

        # The resumed run replays image 30 and goes on; its configuration differs operationally.
        second = tracker(config, tmp_path)
        second.config({"train": {"seed": 0}, "run": "changed"})
        for images in (30, 40):
            second.metrics({"loss": 30.0 / images}, images=images)
        second.close("FINISHED")

        client = mlflow.MlflowClient(server.uri)
        (experiment,) = client.search_experiments(filter_string="name = 'lapflow'")
        (run,) = client.search_runs([experiment.experiment_id])
        assert history(client, run.info.run_id, "loss") == [
            (10, 3.0),
            (20, 1.5),
            (30, 1.0),
            (40, 0.75),
        ]
        assert run.info.status == "FINISHED"
        assert run.data.tags["checkpoint"] == "s3://bucket/x"
        assert run.data.params == {"train.seed": "0", "run": "r"}
        artifacts = [item.path for item in client.list_artifacts(run.info.run_id, "samples")]
        assert artifacts == ["samples/000000000030.png"]


def test_a_call_that_mlflow_refuses_is_dropped_and_does_not_hold_up_the_rest(tmp_path, caplog):
    config = TrackingConfig(flush_timeout_s=60)
    check_tracker(config, str(tmp_path))
    refused = tracker(config, tmp_path)
    refused.metrics({"x" * 2000: 1.0}, images=1)
    refused.metrics({"loss": 2.0}, images=2)
    refused.close("FINISHED")
    assert "refuses a call, which is dropped" in caplog.text
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("lapflow").experiment_id])
    assert history(client, run.info.run_id, "loss") == [(2, 2.0)]


def test_a_server_that_never_comes_back_costs_the_flush_time_and_a_warning(tmp_path, caplog):
    config = TrackingConfig(uri="http://127.0.0.1:9", flush_timeout_s=1.0)
    away = tracker(config, tmp_path)
    away.metrics({"loss": 1.0}, images=1)
    began = time.monotonic()
    away.close("FINISHED")
    assert time.monotonic() - began < 5
    assert "did not take the last" in caplog.text


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:////proc/no/such.db", "ftp://x"])
def test_an_unusable_tracker_is_refused_with_its_address_and_a_way_out(uri, tmp_path):
    with pytest.raises(TrackerUnreachable) as caught:
        check_tracker(TrackingConfig(uri=uri), str(tmp_path))
    assert uri in str(caught.value)
    assert "tracking.required=false" in str(caught.value)
    assert "\n" not in str(caught.value)
