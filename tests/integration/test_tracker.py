"""The tracker against a real MLflow: away and back, what was deleted there, what has changed."""

import shutil
import time
from pathlib import Path

import mlflow
import pytest
import yaml

from tests.support.mlflow_server import mlflow_server
from trainer.config.composition import compose_job
from trainer.config.job import science
from trainer.evaluation.grid import grid_png
from trainer.metrics.mlflow_backend import TrackerUnreachable, check_tracker, end_run
from trainer.metrics.mlflow_tracker import MlflowTracker
from trainer.metrics.tracker import TrackingConfig
from trainer.training.tracking import track_run

pytestmark = pytest.mark.slow


def tracker(config, tmp_path):
    return MlflowTracker(config, home=str(tmp_path), run="r", identity="s3://bucket/runs/r 0123")


def local_tracker(tmp_path, empty_tracker, **changes):
    config = TrackingConfig(flush_timeout_s=60, **changes)
    if not (tmp_path / "mlflow.db").exists():
        shutil.copy(empty_tracker, tmp_path / "mlflow.db")
    check_tracker(config, str(tmp_path))
    return tracker(config, tmp_path)


def local_client(tmp_path):
    return mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")


def only_run(client):
    experiment = client.get_experiment_by_name("lapflow")
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def wait_until(holds):
    while not holds():
        time.sleep(0.02)


def history(client, run_id, name):
    points = client.get_metric_history(run_id, name)
    return sorted((point.step, point.value) for point in points)


def test_an_outage_loses_no_point_and_a_resumed_run_repeats_none(tmp_path, empty_tracker):
    import torch

    with mlflow_server(tmp_path, empty_tracker) as server:
        config = TrackingConfig(uri=server.uri, flush_timeout_s=90)
        check_tracker(config, str(tmp_path))
        first = tracker(config, tmp_path)
        first.config({}, lasting={"train": {"seed": 0}}, present={})
        first.metrics({"loss": 3.0}, images=10)
        server.kill()
        for images in (20, 30):
            first.metrics({"loss": 30.0 / images}, images=images)
        first.image("samples", grid_png(torch.zeros(2, 1, 8, 8), columns=2), images=30)
        first.tag("checkpoint", "s3://bucket/x")
        # None of these calls has waited for a server: they are taken down and sent later.
        assert [point.images for point in first.unsent()][-2:] == [20, 30]
        server.start()
        first.close("KILLED")

        # The resumed run replays image 30 and goes on.
        second = tracker(config, tmp_path)
        second.config({}, lasting={"train": {"seed": 0}}, present={})
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
        assert run.data.params == {"train.seed": "0"}
        artifacts = [item.path for item in client.list_artifacts(run.info.run_id, "samples")]
        assert artifacts == ["samples/000000000030.png"]


def test_a_resumed_run_shows_its_present_settings(tmp_path, empty_tracker):
    lasting = {"train": {"seed": 0}}
    for present in (
        {"cluster": {"workers": 2}, "runtime": {"log_interval_images": 64}},
        {"cluster": {"workers": 4}, "train": {"total_images": 512}},
    ):
        launch = local_tracker(tmp_path, empty_tracker)
        launch.config({**lasting, **present}, lasting=lasting, present=present)
        launch.close("FINISHED")
    client = local_client(tmp_path)
    run = only_run(client)
    assert run.data.params == {"train.seed": "0"}
    shown = {name: value for name, value in run.data.tags.items() if name.startswith("setting.")}
    assert shown == {"setting.cluster.workers": "4", "setting.train.total_images": "512"}
    file = client.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path))
    assert yaml.safe_load(Path(file).read_text()) == {**lasting, **present}


@pytest.mark.parametrize("what", ["run", "experiment"])
def test_what_was_deleted_in_mlflow_is_told_at_once_and_keeps_its_points(
    what, tmp_path, empty_tracker, caplog
):
    launch = local_tracker(tmp_path, empty_tracker)
    launch.metrics({"loss": 2.0}, images=1)
    wait_until(lambda: not launch.unsent())
    client = local_client(tmp_path)
    info = only_run(client).info
    if what == "run":
        client.delete_run(info.run_id)
    else:
        client.delete_experiment(info.experiment_id)
    launch.metrics({"loss": 1.0}, images=2)
    launch.metrics({"loss": 0.5}, images=3)
    wait_until(lambda: "deleted in MLflow" in caplog.text)
    assert [point.images for point in launch.unsent()] == [2, 3]
    time.sleep(2)  # tries again, without saying it again
    assert caplog.text.count("deleted in MLflow") == 1
    if what == "run":
        client.restore_run(info.run_id)
    else:
        client.restore_experiment(info.experiment_id)
    launch.close("FINISHED")
    assert launch.unsent() == []
    assert history(client, info.run_id, "loss") == [(1, 2.0), (2, 1.0), (3, 0.5)]


def test_a_deleted_experiment_is_refused_before_training(tmp_path, empty_tracker):
    local_tracker(tmp_path, empty_tracker).close("FINISHED")
    client = local_client(tmp_path)
    client.delete_experiment(only_run(client).info.experiment_id)
    with pytest.raises(TrackerUnreachable) as caught:
        check_tracker(TrackingConfig(), str(tmp_path))
    for part in ("tracking.experiment=lapflow", "mlflow experiments restore", "another"):
        assert part in str(caught.value)
    assert check_tracker(TrackingConfig(experiment="other"), str(tmp_path))


def test_a_run_whose_process_died_does_not_count_as_running(tmp_path, empty_tracker):
    opened = []
    config = TrackingConfig(flush_timeout_s=60)
    local_tracker(tmp_path, empty_tracker).close("FINISHED")
    MlflowTracker(config, home=str(tmp_path), run="r", identity="x", opened=opened.append).metrics(
        {"loss": 1.0}, images=1
    )
    wait_until(lambda: opened)
    client = local_client(tmp_path)
    assert client.get_run(opened[0]).info.status == "RUNNING"
    end_run(config, str(tmp_path), opened[0], "FAILED")
    assert client.get_run(opened[0]).info.status == "FAILED"
    end_run(config, str(tmp_path), opened[0], "KILLED")
    assert client.get_run(opened[0]).info.status == "FAILED"


def test_a_failure_before_training_ends_the_run_too(tmp_path, empty_tracker):
    shutil.copy(empty_tracker, tmp_path / "mlflow.db")
    job = compose_job(["+exp=digits", f"home={tmp_path}"])
    chosen = science(job, data_digest="x")
    with (
        pytest.raises(MemoryError),
        track_run(job, chosen, unsent=[], report=lambda _: None),
    ):
        raise MemoryError
    run = only_run(local_client(tmp_path))
    assert run.info.status == "FAILED"
    assert run.data.params["train.seed"] == "0"
    assert run.data.tags["setting.train.total_images"] == "128000"


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
    away.close("FINISHED")
    # Said while MLflow's own tries, which take four minutes, go on.
    assert "did not take the last" in caplog.text


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:////proc/no/such.db", "ftp://x"])
def test_an_unusable_tracker_is_refused_with_its_address_and_a_way_out(uri, tmp_path):
    with pytest.raises(TrackerUnreachable) as caught:
        check_tracker(TrackingConfig(uri=uri), str(tmp_path))
    assert uri in str(caught.value)
    assert "tracking.required=false" in str(caught.value)
    assert "\n" not in str(caught.value)
