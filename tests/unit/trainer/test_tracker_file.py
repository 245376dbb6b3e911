"""A file that MLflow cannot use is refused before MLflow is asked, which tries it for minutes."""

import os
import shutil
import sqlite3

import pytest

from trainer.metrics import mlflow_backend
from trainer.metrics.mlflow_backend import TrackerUnreachable, check_tracker, make_file
from trainer.metrics.tracker import TrackingConfig


def spoil_by_folder(file):
    file.unlink()
    file.mkdir()


def spoil_by_text(file):
    file.write_bytes(b"this is no database at all, and it is long enough to be taken for one")


@pytest.mark.parametrize("spoil", [spoil_by_folder, spoil_by_text])
def test_what_is_no_database_is_refused_by_name_and_mlflow_never_asked(
    tmp_path, monkeypatch, empty_tracker, spoil
):
    asked = []
    monkeypatch.setattr(mlflow_backend, "connect", asked.append)
    file = tmp_path / "mlflow.db"
    file.write_bytes(empty_tracker.read_bytes())
    spoil(file)
    with pytest.raises(TrackerUnreachable) as caught:
        check_tracker(TrackingConfig(), str(tmp_path))
    assert f"MLflow's file of tracking.uri=sqlite:///{file} cannot be used" in str(caught.value)
    assert "tracking.uri=sqlite:////FOLDER/mlflow.db" in str(caught.value)
    assert asked == []


def test_a_file_of_another_mlflow_is_told_as_that(tmp_path, empty_tracker):
    file = tmp_path / "mlflow.db"
    file.write_bytes(empty_tracker.read_bytes())
    with sqlite3.connect(file) as database:
        database.execute("update alembic_version set version_num = 'f00000000000'")
    with pytest.raises(TrackerUnreachable, match=r"another version of MLflow.*f00000000000"):
        check_tracker(TrackingConfig(), str(tmp_path))


def test_looking_at_a_file_leaves_it_as_it_is(tmp_path, empty_tracker):
    file = tmp_path / "mlflow.db"
    file.write_bytes(empty_tracker.read_bytes())
    with sqlite3.connect(file) as database:
        before = list(database.iterdump())
    mlflow_backend._check_file(f"sqlite:///{file}")
    with sqlite3.connect(file) as database:
        assert list(database.iterdump()) == before


@pytest.mark.slow
def test_a_new_file_is_whole_when_it_appears_and_is_as_mlflow_makes_it(tmp_path, monkeypatch):
    home, mlflows_own = tmp_path / "home", tmp_path / "own.db"
    home.mkdir()
    seen = []

    def link(source, place):
        seen.append(sorted(path.name for path in home.iterdir() if path != source))
        os.rename(source, place)

    monkeypatch.setattr(mlflow_backend.os, "link", link)
    check_tracker(TrackingConfig(), str(home))
    assert seen == [[]]
    assert os.listdir(home) == ["mlflow.db"]
    mlflow_backend.connect(f"sqlite:///{mlflows_own}").search_experiments()
    assert schema(home / "mlflow.db") == schema(mlflows_own)


def schema(file):
    """Its version and its tables; the order of a table's parts is by chance."""
    with sqlite3.connect(file) as database:
        version = database.execute("select version_num from alembic_version").fetchall()
        tables = database.execute("select name, sql from sqlite_master where sql is not null")
        return version, {
            name: sorted(line.strip(" \t,") for line in sql.splitlines()) for name, sql in tables
        }


def test_a_file_that_another_launch_has_begun_stays(tmp_path, monkeypatch, empty_tracker):
    file = tmp_path / "mlflow.db"
    connect = mlflow_backend.connect

    def begin(uri):
        file.write_bytes(b"the other's")
        shutil.copy(empty_tracker, uri.removeprefix("sqlite:///"))
        return connect(uri)

    monkeypatch.setattr(mlflow_backend, "connect", begin)
    make_file(file)
    assert file.read_bytes() == b"the other's"
    assert os.listdir(tmp_path) == ["mlflow.db"]
