"""What MLflow takes no more of while it answers, and what is told again later: nothing is lost."""

import base64
import io
import queue
import shutil
import sqlite3
import time
from contextlib import closing, contextmanager
from pathlib import Path

import mlflow
import pytest
from PIL import Image

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
from trainer.metrics.entry import Entry
from trainer.metrics.journal import Journal
from trainer.metrics.mlflow_backend import cause, check_tracker
from trainer.metrics.mlflow_run import MlflowRun
from trainer.metrics.tracker import TrackingConfig

pytestmark = pytest.mark.slow


def png(grey=0):
    file = io.BytesIO()
    Image.new("L", (8, 8), grey).save(file, "PNG")
    return file.getvalue()


@contextmanager
def read_only(home, *, changes=("INSERT", "UPDATE")):
    """A database that refuses each write, as a standby of PostgreSQL does, and answers reads."""
    tables = ["metrics", "latest_metrics", "tags", "params", "runs"]
    triggers = [(table, change) for table in tables for change in changes]
    with closing(sqlite3.connect(home / "mlflow.db")) as database:
        for table, change in triggers:
            database.execute(
                f"CREATE TRIGGER {table}_{change} BEFORE {change} ON {table} "
                "BEGIN SELECT RAISE(ABORT, 'in a read-only transaction'); END"
            )
        database.commit()
        yield
        for table, change in triggers:
            database.execute(f"DROP TRIGGER {table}_{change}")
        database.commit()


@contextmanager
def without_artifacts(home):
    """A place of artifacts that cannot be written, beside a database that can."""
    (home / "mlartifacts").rename(home / "away")
    (home / "mlartifacts").write_text("in the way")
    yield
    (home / "mlartifacts").unlink()
    (home / "away").rename(home / "mlartifacts")


@pytest.mark.parametrize("outage", [read_only, without_artifacts])
def test_an_outage_in_which_mlflow_answers_reads_loses_nothing(
    outage, tmp_path, empty_tracker, caplog
):
    launch = local_tracker(tmp_path, empty_tracker)
    launch.config({"a": 1}, lasting={}, present={})
    launch.metrics({"loss": 2.0}, images=1)
    wait_until(lambda: not launch.unsent())
    with outage(tmp_path):
        launch.image("samples", png(), images=2)
        launch.metrics({"loss": 1.0}, images=2)
        wait_until(lambda: "tried again" in caplog.text)
        time.sleep(4)  # tries that often
        assert [point.images for point in launch.unsent()] == [2]
    launch.close("FINISHED")
    assert "dropped" not in caplog.text
    client = local_client(tmp_path)
    run = only_run(client)
    assert run.info.status == "FINISHED"
    assert history(client, run.info.run_id, "loss") == [(1, 2.0), (2, 1.0)]
    assert pictures(client, run.info.run_id) == ["images/samples+step+2"]


def test_what_a_killed_process_has_left_on_its_node_replaces_nothing_that_is_newer(
    tmp_path, empty_tracker
):
    client = finished_elsewhere(tmp_path, empty_tracker)
    before = shown(client, tmp_path)
    assert (before["status"], before["tags"]["checkpoint"]) == ("FINISHED", "s3://bucket/20")
    assert "0.5" in before["tags"]["mlflow.note.content"]
    assert track(["ship", str(tmp_path / "store/runs/r"), f"home={tmp_path / 'node'}"]) == 0
    after = shown(client, tmp_path)
    # What had not arrived arrives.
    assert after.pop("points") == [*before.pop("points"), (15, 1.0)]
    assert (before.pop("models"), after.pop("models")) == ({"20"}, {"10", "20"})
    assert after["tags"].pop("late") == "kept"
    assert after == before
    assert not list((tmp_path / "node").rglob("*.jsonl"))


def test_a_run_that_is_trained_anew_in_its_deleted_place_is_running_again(tmp_path, empty_tracker):
    client = finished_elsewhere(tmp_path, empty_tracker)
    # Its launches are counted anew.
    again = open_tracker(TrackingConfig(flush_timeout_s=60), tmp_path)
    again.tags({"user": "bob"})
    wait_until(lambda: only_run(client).data.tags["user"] == "bob")
    assert only_run(client).info.status == "RUNNING"
    again.close("KILLED")


@pytest.mark.parametrize("by", ["ship", "launch"])
def test_what_was_left_before_the_run_was_deleted_is_sent_and_replaces_nothing(
    by, tmp_path, empty_tracker, capsys
):
    client = finished_elsewhere(tmp_path, empty_tracker)
    shutil.rmtree(tmp_path / "store/runs/r", ignore_errors=True)  # with what counts launches
    before = shown(client, tmp_path)
    place = tracked_run(tmp_path).journal
    place.folder.mkdir(parents=True)
    left = next((tmp_path / "node").rglob("*.jsonl"))
    shutil.copy(left, place.folder / "000000000007-00002-000001.jsonl")
    if by == "ship":
        assert track(["ship", str(tmp_path / "store/runs/r"), f"home={tmp_path}"]) == 0
    else:
        open_tracker(TrackingConfig(flush_timeout_s=60), tmp_path).close("FINISHED")
    assert not place.names()
    after = shown(client, tmp_path)
    assert after.pop("points") == [*before.pop("points"), (15, 1.0)]
    assert (before.pop("models"), after.pop("models")) == ({"20"}, {"10", "20"})
    assert after["tags"].pop("late") == "kept"
    assert after == before


def test_what_nobody_may_send_yet_is_not_told_to_be_whole(tmp_path, empty_tracker, capsys):
    local_tracker(tmp_path, empty_tracker).close("FINISHED")
    place = tracked_run(tmp_path).journal
    journal = Journal(
        place,
        writer="000000000007-00002",
        address=Entry(kind="address", time_ms=1, values={"uri": f"sqlite:///{tmp_path}/mlflow.db"}),
    )
    # A process that has not gone writes it on.
    journal.append(Entry(kind="points", time_ms=1, images=10, values={"late": (1.0).hex()}))
    words = ["ship", str(tmp_path / "store/runs/r"), f"home={tmp_path}"]
    assert track(words) == 1
    assert "the rest waits" in capsys.readouterr().out
    journal.rotate()
    assert track(words) == 0
    assert not place.names()
    client = local_client(tmp_path)
    assert history(client, only_run(client).info.run_id, "late") == [(10, 1.0)]


def test_entries_before_one_that_is_refused_are_each_sent_once(
    tmp_path, empty_tracker, monkeypatch
):
    shutil.copy(empty_tracker, tmp_path / "mlflow.db")
    left = Journal(
        tracked_run(tmp_path).journal,
        writer="000000000001-00000",
        address=Entry(kind="address", time_ms=1),
    )
    for images in range(1, 31):
        name = "x" * 2000 if images == 20 else "loss"
        values = {name: (1.0).hex()}
        left.append(Entry(kind="points", time_ms=images, images=images, values=values))
    left.rotate()
    failed = []
    send = MlflowRun.send

    def counted(self, entries, *, position):
        try:
            send(self, entries, position=position)
        except Exception:
            failed.append(len(entries))
            raise

    monkeypatch.setattr(MlflowRun, "send", counted)
    tracker = open_tracker(TrackingConfig(flush_timeout_s=60), tmp_path, launch=2)
    tracker.close("FINISHED")
    client = local_client(tmp_path)
    told = history(client, only_run(client).info.run_id, "loss")
    assert told == [(images, 1.0) for images in range(1, 31) if images != 20]
    assert failed == [30, 30, 30, 1, 1, 1]


def test_a_slow_mlflow_leaves_no_more_on_the_disk_alone_than_a_checkpoint_takes_along(
    tmp_path, empty_tracker, monkeypatch
):
    began, go_on = queue.Queue(), queue.Queue()
    send = MlflowRun.send

    def slowly(self, entries, *, position):
        began.put(True)
        go_on.get(timeout=60)
        send(self, entries, position=position)

    monkeypatch.setattr(MlflowRun, "send", slowly)
    tracker = local_tracker(tmp_path, empty_tracker)
    began.get(timeout=60)
    for images in range(1, 2001):
        tracker.metrics({"loss": 1.0}, images=images)
    assert min(point.images for point in tracker.unsent()) > 1
    go_on.put(True)
    began.get(timeout=60)  # it has looked how much waits before it sends once more
    store = tracked_run(tmp_path).journal
    assert [*store.names().values()].count(True) >= 4
    assert len(tracker.unsent()) < 500  # the others are safe
    for _ in range(10_000):
        go_on.put(True)
    tracker.close("FINISHED")
    client = local_client(tmp_path)
    points = history(client, only_run(client).info.run_id, "loss")
    assert [step for step, _ in points] == list(range(1, 2001))


def finished_elsewhere(home, empty_tracker):
    """A run whose first process was killed, together with its node, and which another finished."""
    for launch in (1, 2):
        tracker = local_tracker(home, empty_tracker, launch=launch)
        tracker.config({"launch": launch}, lasting={}, present={"launch": launch})
        tracker.tags({"user": f"user {launch}"})
        tracker.page(f"launch {launch}")
        tracker.image("samples", png(launch), images=10 * launch)
        tracker.metrics({"late": 1.0}, images=10)
        if launch == 1:
            wait_until(lambda told=tracker: told.arrived == 6)
            leave(home)
    tracker.checkpoint("s3://bucket/20", images=20)
    tracker.measured({"eval/x": 0.5}, images=20, lowest="eval/x", protocol="p")
    tracker.close("FINISHED")
    return local_client(home)


def leave(home):
    """Take the node away with what is on it, the last of which has not been sent."""
    (home / "node").mkdir()
    (home / "tracking").rename(home / "node/tracking")
    (file,) = (home / "node").rglob("*.jsonl")
    now = int(time.time() * 1000)
    values = {"late": (1.0).hex()}
    picture = base64.b64encode(png(3)).decode()
    late = [
        Entry(kind="checkpoint", time_ms=now, images=10, text="s3://bucket/10"),
        Entry(kind="picture", time_ms=now, images=15, name="samples", text=picture),
        Entry(kind="tags", time_ms=now, values={"late": "kept", "user": "user 1"}),
        Entry(kind="points", time_ms=now, images=15, values=values),
    ]
    with file.open("ab") as journal:
        journal.writelines(entry.to_line() for entry in late)


def shown(client, folder):
    run = only_run(client)
    files = {}
    for name in ("config.yaml", "samples.png"):
        file = Path(client.download_artifacts(run.info.run_id, name, str(folder)))
        files[name] = file.read_bytes()
    return {
        "status": run.info.status,
        "tags": {name: value for name, value in run.data.tags.items() if "told" not in name},
        "points": history(client, run.info.run_id, "late"),
        "files": files,
        "models": {
            model.params["images"]
            for model in client.search_logged_models([run.info.experiment_id])
        },
    }


def test_totals_are_the_last_word_where_the_curve_has_come_as_far(tmp_path, empty_tracker):
    launch = local_tracker(tmp_path, empty_tracker)
    for images in (10, 20):
        launch.metrics({"time/lost_s": 1.0}, images=images)
    time.sleep(0.01)  # another millisecond
    launch.totals({"time/lost_s": 2.0}, images=20)
    time.sleep(0.01)
    launch.totals({"time/lost_s": 3.0}, images=10)  # to which the run has gone back
    launch.close("FINISHED")
    client = local_client(tmp_path)
    run = only_run(client)
    assert run.data.metrics == {"time/lost_s": 3.0}
    curve = history(client, run.info.run_id, "time/lost_s")
    assert curve == [(10, 1.0), (20, 1.0), (20, 2.0), (20, 3.0)]


def test_figures_that_are_measured_anew_are_shown(tmp_path, empty_tracker):
    figure = "eval/frechet_x"
    for launch, value in ((1, 3.0), (2, 3.0), (3, 1.0)):
        tracker = local_tracker(tmp_path, empty_tracker, launch=launch)
        tracker.checkpoint("s3://bucket/10", images=10)
        tracker.measured({figure: value}, images=10, lowest=figure, protocol="p")
        tracker.close("FINISHED")
    client = local_client(tmp_path)
    run = only_run(client)
    assert run.data.metrics == {figure: 1.0}
    assert history(client, run.info.run_id, figure) == [(10, 1.0), (10, 3.0)]


def test_the_best_checkpoint_is_chosen_among_those_that_were_measured_as_most(
    tmp_path, empty_tracker
):
    figure = "eval/frechet_x"
    tracker = local_tracker(tmp_path, empty_tracker)
    for images, value, protocol in (
        *((10, 1.0, "few"), (20, 3.0, "many"), (30, 4.0, "many")),
        # The last of two figures that do not compare.
        (40, 0.5, "all"),
    ):
        tracker.checkpoint(f"s3://bucket/{images}", images=images)
        tracker.measured({figure: value}, images=images, lowest=figure, protocol=protocol)
    tracker.close("FINISHED")
    best = local_client(tmp_path).get_model_version_by_alias("r", "best")
    assert best.tags["checkpoint"] == "s3://bucket/20"


def test_figures_that_come_late_take_their_place_in_the_curve(tmp_path, empty_tracker):
    figure = "eval/frechet_x"
    tracker = local_tracker(tmp_path, empty_tracker)
    for images in (10, 20, 30):
        tracker.checkpoint(f"s3://bucket/{images}", images=images)
    for images, value in ((10, 3.0), (30, 1.0), (20, 2.0), (20, 2.0)):
        tracker.measured({figure: value}, images=images, lowest=figure, protocol="p")
    tracker.close("FINISHED")
    client = local_client(tmp_path)
    run = only_run(client)
    assert history(client, run.info.run_id, figure) == [(10, 3.0), (20, 2.0), (30, 1.0)]
    assert run.data.metrics == {figure: 1.0}


def test_what_else_counted_as_running_is_ended_after_an_outage_too(tmp_path, empty_tracker, caplog):
    died = local_tracker(tmp_path, empty_tracker)
    wait_until(lambda: died.arrived == 1)
    with read_only(tmp_path, changes=["UPDATE"]):
        other = open_tracker(
            TrackingConfig(flush_timeout_s=60), tmp_path, launch=2, identity="4567"
        )
        wait_until(lambda: "tried again" in caplog.text)
    other.close("FINISHED")
    client = local_client(tmp_path)
    runs = client.search_runs([client.get_experiment_by_name("lapflow").experiment_id])
    assert {run.info.status for run in runs} == {"KILLED", "FINISHED"}


@pytest.mark.parametrize("status", ["KILLED", "FAILED"])
def test_a_process_that_others_follow_does_not_wait_for_mlflow_to_come_back(
    status, tmp_path, caplog
):
    # Whoever waits that long is seen.
    config = TrackingConfig(uri="http://127.0.0.1:9", flush_timeout_s=100_000)
    away = open_tracker(config, tmp_path)
    wait_until(lambda: "tried again" in caplog.text)
    away.close(status)
    assert "they are in the store, and the next launch" in caplog.text
    assert len(list((tmp_path / "store").rglob("*.jsonl"))) == 1


def test_credentials_that_an_error_quotes_are_written_nowhere(tmp_path):
    address = "https://ada:swordfish@host/x?X-Amz-Signature=swordfish&part=1"
    config = TrackingConfig(uri="http://127.0.0.1:9", flush_timeout_s=0)
    away = open_tracker(config, tmp_path)
    away.tags({"checkpoint_failed.000000000010": f"no answer from {address}"})
    away.close("FAILED", f"StoreError: {address}\nis away")
    cut = cause(ValueError("x " * 140 + address))
    assert "swordf" not in cut
    (file,) = (tmp_path / "store").rglob("*.jsonl")
    told = file.read_text()
    assert told.count("https://***@host/x?X-Amz-Signature=***&part=1") == 2
    assert "swordfish" not in told


def test_a_server_whose_disk_is_full_loses_nothing(tmp_path, empty_tracker, caplog):
    with mlflow_server(tmp_path, empty_tracker) as server:
        config = TrackingConfig(uri=server.uri, flush_timeout_s=90)
        check_tracker(config, str(tmp_path))
        launch = open_tracker(config, tmp_path)
        launch.metrics({"loss": 2.0}, images=1)
        wait_until(lambda: not launch.unsent())
        with server.full_disk():
            launch.metrics({"loss": 1.0}, images=2)
            wait_until(lambda: "tried again" in caplog.text)
            time.sleep(4)  # tries that often
            assert [point.images for point in launch.unsent()] == [2]
        launch.close("FINISHED")
        assert "dropped" not in caplog.text
        client = mlflow.MlflowClient(server.uri)
        assert history(client, only_run(client).info.run_id, "loss") == [(1, 2.0), (2, 1.0)]
