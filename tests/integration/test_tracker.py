"""The tracker against a real MLflow: away and back, what was deleted there, what has changed."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
import torch
import yaml

from pipelines.ingest.digits import ensure_digits
from tests.support.job import SMALL, job
from tests.support.mlflow_server import mlflow_server
from tests.support.tracked import (
    history,
    local_client,
    local_tracker,
    only_run,
    open_tracker,
    pictures,
    tracked_run,
    wait_until,
)
from trainer.cli.track import main as track
from trainer.config import paths
from trainer.config.composition import compose_job
from trainer.config.job import config_fingerprint, science
from trainer.data.splits import open_split
from trainer.evaluation.grid import grid_png
from trainer.metrics.mlflow_backend import TrackerUnreachable, check_tracker
from trainer.metrics.mlflow_tracker import MlflowTracker
from trainer.metrics.tracker import TrackingConfig
from trainer.state import TrainState
from trainer.storage.errors import LeaseLost, SupersededAttempt
from trainer.storage.local import LocalStore
from trainer.training.resume import Restored
from trainer.training.tracking import track_run

pytestmark = pytest.mark.slow


def waiting(home):
    """What is left of the journal, on this machine and in the store."""
    return sorted(home.rglob("*.jsonl"))


def test_an_outage_loses_no_point_and_a_resumed_run_repeats_none(tmp_path, empty_tracker):
    import torch

    with mlflow_server(tmp_path, empty_tracker) as server:
        config = TrackingConfig(uri=server.uri, flush_timeout_s=90)
        check_tracker(config, str(tmp_path))
        first = open_tracker(config, tmp_path)
        first.config({}, lasting={"train": {"seed": 0}}, present={})
        first.metrics({"loss": 3.0}, images=10)
        server.kill()
        for images in (20, 30):
            first.metrics({"loss": 30.0 / images}, images=images)
        first.image("samples", grid_png(torch.zeros(2, 1, 8, 8), columns=2), images=30)
        first.checkpoint("s3://bucket/x", images=30)
        # None of these calls has waited for a server: they are taken down and sent later.
        assert [point.images for point in first.unsent()][-2:] == [20, 30]
        server.start()
        first.close("KILLED")

        # The resumed run replays image 30 and goes on.
        second = open_tracker(config, tmp_path, launch=2)
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
        assert pictures(client, run.info.run_id) == ["images/samples+step+30"]
        assert waiting(tmp_path) == []


TOLD = f"""
import sys
from pathlib import Path
from tests.support.tracked import open_tracker
from trainer.metrics.tracker import TrackingConfig
tracker = open_tracker(TrackingConfig(uri=sys.argv[1]), Path(sys.argv[2]))
for images in range(10, {10 * 1201}, 10):
    tracker.metrics({{"loss": 1 / images, "nan": float("nan")}}, images=images)
    if images == 6000:
        tracker.checkpoint("s3://bucket/x", images=images)
print("told", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_process_told_a_dead_server_is_there_at_last(tmp_path, empty_tracker, capsys):
    with mlflow_server(tmp_path, empty_tracker) as server:
        check_tracker(TrackingConfig(uri=server.uri), str(tmp_path))
        server.kill()
        command = [sys.executable, "-c", TOLD, server.uri, str(tmp_path)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
            assert process.stdout.readline() == "told\n"
            # What is whole goes into the store while the server is away.
            wait_until(lambda: len(list((tmp_path / "store").rglob("*.jsonl"))) >= 2)
            process.kill()
        run = str(tmp_path / "store/runs/r")
        words = ["ship", run, f"home={tmp_path}"]
        assert track([*words, "patience_s=1"]) == 1
        assert "the rest waits" in capsys.readouterr().out
        server.start()
        assert track(words) == 0
        client = mlflow.MlflowClient(server.uri)
        ended = only_run(client)
        assert ended.info.status == "KILLED"
        points = history(client, ended.info.run_id, "loss")
        assert points == [(images, 1 / images) for images in range(10, 12010, 10)]
        assert len(client.get_metric_history(ended.info.run_id, "nan")) == 1200
        assert waiting(tmp_path) == []
        capsys.readouterr()
        assert track(words) == 2  # there is no checkpoint either
        assert "is no run, and nothing of one waits" in capsys.readouterr().err


# Of checkpoints and grids, so that a job that trains while it waits for a server makes few.
SELDOM = 6400


def test_a_job_tells_all_through_two_outages_a_deletion_and_its_own_death(
    tmp_path, empty_tracker, capsys
):
    """The server is away for a while, and again until after the end; the run is deleted there."""
    home = tmp_path / "home"
    home.mkdir()
    with mlflow_server(tmp_path, empty_tracker) as server:
        words = [*SMALL, "cluster.backend=local", "cluster.workers=1", "engine=plain"]
        words += [f"checkpoint.interval_images={SELDOM}", f"eval.grid_interval_images={SELDOM}"]
        words += [f"tracking.uri={server.uri}", "tracking.flush_timeout_s=1"]
        with job(*words, "train.total_images=64000000", home=home) as killed:
            killed.wait_for(rf"checkpoint: \S+/{SELDOM:012d}")
            server.kill()
            killed.wait_for("tried again")
            missed = saves(killed)[-1] + SELDOM
            wait_until(lambda: saves(killed)[-1] > missed)
            server.start()
            client = mlflow.MlflowClient(server.uri)
            # It is told while training goes on.
            wait_until(lambda: "checkpoint" in tags(client))
            run_id = only_run(client).info.run_id
            wait_until(lambda: history(client, run_id, "loss/total")[-1][0] > missed)
            client.delete_run(run_id)
            killed.wait_for("was deleted in MLflow")
            client.restore_run(run_id)
            server.kill()
            last = saves(killed)[-1]
            wait_until(lambda: saves(killed)[-1] > last)  # so none is being saved, and untold
            killed.kill_everything()
        end = saves(killed)[-1] + 2 * SELDOM
        words += [f"train.total_images={end}"]
        with job(*words, "tracking.required=false", home=home) as finished:
            assert finished.wait() == 0, finished.output
            assert "resumed after" in finished.output
            assert "trainer.track ship" in finished.output
        server.start()
        assert track(["ship", f"{home}/store/runs/digits", f"home={home}"]) == 0
        client = mlflow.MlflowClient(server.uri)
        run = only_run(client)
        assert run.info.status == "FINISHED"
        assert waiting(home) == []
        for name in ("loss/total", "speed/images_per_s"):
            told = [images for images, _ in history(client, run.info.run_id, name)]
            assert told == list(range(640, end + 1, 640))
        saved = [
            images for images, _ in history(client, run.info.run_id, "speed/checkpoint_failed")
        ]
        assert saved == list(range(SELDOM, end + 1, SELDOM))
        assert len(run.outputs.model_outputs) == len(saved)
        # The grid of the checkpoint from which it went on may not have been drawn yet.
        (resumed,) = re.findall(r"resumed after ([\d,]+) images", finished.output)
        grids = {each: f"images/samples+step+{each}" for each in saved}
        drawn = set(pictures(client, run.info.run_id)) | {grids[int(resumed.replace(",", ""))]}
        ends = {"images/samples+step+0", f"images/evaluation+step+{end}"}
        assert drawn == {*ends, *grids.values()}
        assert run.data.metrics["time/goodput"] > 0
        best = client.get_model_version_by_alias("digits", "best")
        assert best.tags["checkpoint"].endswith(f"/{end:012d}")


def tags(client):
    """What the one run has, once it is there."""
    experiment = client.get_experiment_by_name("lapflow")
    runs = client.search_runs([experiment.experiment_id])
    return runs[0].data.tags if runs else {}


def saves(running):
    """The checkpoints that a job has told so far."""
    return [int(images) for images in re.findall(r"checkpoint: \S+/(\d{12})", running.output)]


def test_a_lost_disk_leaves_what_the_store_has(tmp_path, empty_tracker, capsys):
    config = TrackingConfig(uri="http://127.0.0.1:9", flush_timeout_s=0)
    away = open_tracker(config, tmp_path / "node")
    away.metrics({"loss": 1.0}, images=1)
    away.close("KILLED")
    shutil.rmtree(tmp_path / "node/tracking")
    assert len(waiting(tmp_path / "node")) == 1
    shutil.copy(empty_tracker, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run = str(tmp_path / "node/store/runs/r")
    assert track(["ship", run, f"home={tmp_path}", f"tracking_uri={uri}"]) == 0
    ended = only_run(local_client(tmp_path))
    assert ended.info.status == "KILLED"
    assert ended.data.metrics == {"loss": 1.0}
    assert waiting(tmp_path / "node") == []


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
    died = local_tracker(tmp_path, empty_tracker)
    died.metrics({"loss": 1.0}, images=1)
    wait_until(lambda: not died.unsent())
    client = local_client(tmp_path)
    assert only_run(client).info.status == "RUNNING"
    for status in ("FAILED", "KILLED"):
        # What the driver tells counts where the workers have told nothing.
        driver = MlflowTracker(
            TrackingConfig(), tracked_run(tmp_path), writer="000000000001-driver"
        )
        driver.end(status, f"it was {status}", if_running=True)
        assert driver.flush()
        run = only_run(client)
        assert (run.info.status, run.data.tags["reason"]) == ("FAILED", "it was FAILED")
    other = MlflowTracker(TrackingConfig(), tracked_run(tmp_path), writer="000000000001-driver")
    other.close("FINISHED")
    assert "reason" not in only_run(client).data.tags
    other = MlflowTracker(TrackingConfig(), tracked_run(tmp_path), writer="000000000001-driver")
    other.close("FAILED", "once more")
    assert only_run(client).data.tags["reason"] == "once more"
    again = open_tracker(TrackingConfig(), tmp_path, launch=2)
    again.close("KILLED")
    assert "reason" not in only_run(client).data.tags


def test_a_run_that_died_and_goes_on_as_another_training_is_not_left_running(
    tmp_path, empty_tracker
):
    died = local_tracker(tmp_path, empty_tracker)
    died.metrics({"loss": 1.0}, images=1)
    wait_until(lambda: not died.unsent())
    open_tracker(TrackingConfig(), tmp_path, launch=2, identity="4567").close("FINISHED")
    client = local_client(tmp_path)
    runs = client.search_runs([client.get_experiment_by_name("lapflow").experiment_id])
    assert {run.info.status for run in runs} == {"KILLED", "FINISHED"}


def test_checkpoints_are_models_and_the_best_has_an_alias(tmp_path, empty_tracker):
    figure = "eval/frechet_x"
    launch = local_tracker(tmp_path, empty_tracker)
    launch.page("What it is")
    for images, distance in ((10, 3.0), (20, 1.0), (30, 2.0)):
        launch.checkpoint(f"s3://bucket/{images}", images=images)
        launch.measured(
            {figure: distance, "eval/other": 0.5}, images=images, lowest=figure, protocol="p"
        )
    launch.measured(
        {figure: 0.1}, images=40, lowest=figure, protocol="p"
    )  # of which there is no checkpoint
    launch.close("KILLED")
    # A process that cannot know what has arrived tells all of it again, and goes on.
    again = open_tracker(TrackingConfig(flush_timeout_s=60), tmp_path, launch=2)
    again.page("What it is")
    for images, distance in ((20, 1.0), (30, 2.0), (50, 1.5)):
        again.checkpoint(f"s3://bucket/{images}", images=images)
        again.measured({figure: distance}, images=images, lowest=figure, protocol="p")
    again.measured({figure: 2.0}, images=30, lowest=figure, protocol="p")  # which comes late
    again.close("FINISHED")
    client = local_client(tmp_path)
    run = only_run(client)
    models = client.search_logged_models([run.info.experiment_id])
    assert {(each.name, each.params["checkpoint"], each.status) for each in models} == {
        (f"r-{images:012d}", f"s3://bucket/{images}", "READY") for images in (10, 20, 30, 50)
    }
    outputs = {each.model_id: each.step for each in run.outputs.model_outputs}
    assert outputs == {each.model_id: int(each.params["images"]) for each in models}
    assert len(run.outputs.model_outputs) == 4
    by_images = {each.params["images"]: each for each in models}
    figures = {metric.key: metric.value for metric in by_images["20"].metrics}
    assert figures == {figure: 1.0, "eval/other": 0.5}
    best = client.get_model_version_by_alias("r", "best")
    assert best.tags["model_id"] == by_images["20"].model_id
    assert best.tags["checkpoint"] == "s3://bucket/20"
    assert len(client.search_model_versions("name = 'r'")) == 4
    assert history(client, run.info.run_id, figure) == [
        *((10, 3.0), (20, 1.0), (30, 2.0), (40, 0.1), (50, 1.5))
    ]
    assert run.data.tags["checkpoint"] == "s3://bucket/50"
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith(f"After 50 images **{figure} = 1.5**\n\nWhat it is")
    assert f"| `{figure}` | 1.5 |" in note


def test_what_somebody_has_written_of_a_run_stays(tmp_path, empty_tracker):
    launch = local_tracker(tmp_path, empty_tracker)
    launch.page("ours")
    launch.page("ours, later")
    launch.close("KILLED")
    client = local_client(tmp_path)
    run = only_run(client)
    assert run.data.tags["mlflow.note.content"] == "ours, later"
    client.set_tag(run.info.run_id, "mlflow.note.content", "theirs")
    again = open_tracker(TrackingConfig(flush_timeout_s=60), tmp_path, launch=2)
    again.page("ours")
    again.close("KILLED")
    assert only_run(client).data.tags["mlflow.note.content"] == "theirs"


def fail_tracked(home, empty_tracker, error):
    """Fail while a run is tracked; gives the job, its science and what the driver was told."""
    shutil.copy(empty_tracker, home / "mlflow.db")
    job = compose_job(["+exp=digits", f"home={home}"])
    chosen = science(job, data_digest="x")
    ensure_digits(paths.data_prefix(job))
    told = []
    with (
        pytest.raises(type(error)),
        track_run(
            job,
            chosen,
            restored=Restored(TrainState(), [], None, config_fingerprint(chosen)),
            store=LocalStore(home / "store/runs"),
            writer="000000000001-00000",
            images=open_split(job, "train"),
            origin={"command": "python -m trainer.launch run=`x`", "user": "ada", "commit": "0a1b"},
            device=torch.device("cpu"),
            report=told.append,
        ),
    ):
        raise error
    return job, chosen, told


@pytest.mark.parametrize("error", [LeaseLost("it is taken"), SupersededAttempt("it is old")])
def test_a_process_whose_run_is_anothers_does_not_say_how_it_is(error, tmp_path, empty_tracker):
    fail_tracked(tmp_path, empty_tracker, error)
    run = only_run(local_client(tmp_path))
    assert run.info.status == "RUNNING"
    assert "reason" not in run.data.tags
    assert run.data.params["train.seed"] == "0"
    assert waiting(tmp_path) == []


def test_a_failure_before_training_ends_the_run_too(tmp_path, empty_tracker):
    job, chosen, told = fail_tracked(tmp_path, empty_tracker, MemoryError("no room"))
    run = only_run(local_client(tmp_path))
    assert run.info.status == "FAILED"
    assert run.data.tags["reason"] == "MemoryError: no room"
    assert run.data.params["train.seed"] == "0"
    tags = run.data.tags
    assert tags["setting.train.total_images"] == "128000"
    assert tags["mlflow.source.name"] == "python -m trainer.launch run=`x`"
    assert (tags["mlflow.user"], tags["mlflow.source.git.commit"]) == ("ada", "0a1b")
    assert tags["fingerprint"] == config_fingerprint(chosen)
    assert tags["version.mlflow"] == mlflow.__version__
    note = tags["mlflow.note.content"]
    assert "```\npython -m trainer.launch run='x'\n```" in note
    assert f"path=samples.png&run_uuid={run.info.run_id})" in note
    (trained_on,) = run.inputs.dataset_inputs
    images = open_split(job, "train")
    assert trained_on.dataset.name == "digits"
    assert images.digest.startswith(trained_on.dataset.digest)
    assert json.loads(trained_on.dataset.profile) == {"images": len(images)}
    assert told[0] == {"kind": "tracked", "identity": told[0]["identity"]}
    assert told[1] == {**told[0], "run_id": run.info.run_id}


def test_a_call_that_mlflow_refuses_is_dropped_and_does_not_hold_up_the_rest(tmp_path, caplog):
    config = TrackingConfig(flush_timeout_s=60)
    check_tracker(config, str(tmp_path))
    refused = open_tracker(config, tmp_path)
    refused.metrics({"x" * 2000: 1.0}, images=1)
    refused.metrics({"loss": 2.0}, images=2)
    refused.close("FINISHED")
    assert "refuses a call, which is dropped" in caplog.text
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("lapflow").experiment_id])
    assert history(client, run.info.run_id, "loss") == [(2, 2.0)]


def test_a_server_that_never_comes_back_costs_the_flush_time_and_a_warning(tmp_path, caplog):
    config = TrackingConfig(uri="http://127.0.0.1:9", flush_timeout_s=1.0)
    away = open_tracker(config, tmp_path)
    away.metrics({"loss": 1.0}, images=1)
    away.close("FINISHED")
    assert "did not take the last" in caplog.text
    assert "trainer.track ship" in caplog.text


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:////proc/no/such.db", "ftp://x"])
def test_an_unusable_tracker_is_refused_with_its_address_and_a_way_out(uri, tmp_path):
    with pytest.raises(TrackerUnreachable) as caught:
        check_tracker(TrackingConfig(uri=uri), str(tmp_path))
    assert uri in str(caught.value)
    assert "tracking.required=false" in str(caught.value)
    assert "\n" not in str(caught.value)
