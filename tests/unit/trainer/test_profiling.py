"""Which updates are profiled, and where their traces go."""

import gzip
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.job import ROOT
from trainer.config.job import RuntimeConfig
from trainer.config.reading import ConfigError
from trainer.host_group import HostGroup
from trainer.metrics.tracker import Tracker
from trainer.storage.errors import StoreError
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig
from trainer.training.hooks import UpdateReport
from trainer.training.profiling import Profile, profile_folder


class Files(Tracker):
    """Keeps the files that it is told."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}

    def file(self, name: str, data: bytes) -> None:
        self.kept[name] = data


class Profiled:
    """A loop of updates of 10 images, each of which multiplies matrices of its own size."""

    def __init__(self, folder: Path, updates: range) -> None:
        self.store = open_store(str(folder), StoreConfig())
        self.files, self.told = Files(), list[dict[str, Any]]()
        self.profile = Profile(
            updates,
            store=self.store,
            folder=lambda images: profile_folder("run", images=images, attempt=0),
            ranks=HostGroup(alone=True),
            tracker=self.files,
            report=self.told.append,
            pause=nullcontext,
        )

    def train(self, updates: int) -> None:
        self.profile.begin()
        for update in range(1, updates + 1):
            with torch.profiler.record_function(f"update {update}"):
                torch.zeros(2, 2) @ torch.zeros(2, 2)
            self.profile.after_update(
                UpdateReport(images_before=10 * update - 10, images=10 * update, waited_s=0)
            )
        self.profile.end(10 * updates)


def updates_of(trace: bytes) -> set[str]:
    events = json.loads(gzip.decompress(trace))["traceEvents"]
    return {each["name"] for each in events if str(each.get("name")).startswith("update ")}


@pytest.mark.parametrize(
    ("updates", "profiled", "images"),
    [
        (range(2, 4), {"update 3", "update 4"}, 40),
        (range(1), {"update 1"}, 10),
        (range(3, 100), {"update 4", "update 5"}, 50),  # the run ends before
    ],
)
def test_whole_updates_are_in_the_trace_and_no_other(updates, profiled, images, tmp_path):
    run = Profiled(tmp_path, updates)
    run.train(5)
    (key,) = run.store.list("run/")
    assert key == f"run/profile/{images:012d}-attempt-00000/rank-00000.json.gz"
    trace = run.store.get(key)
    assert updates_of(trace) == profiled
    assert run.files.kept == {f"profile/{images:012d}/rank-00000.json.gz": trace}
    assert f"were profiled: {len(profiled)}; their" in run.told[0]["text"]


SILENT = """
import sys
from pathlib import Path
from tests.unit.trainer.test_profiling import Profiled
run = Profiled(Path(sys.argv[1]), range(1, 2))
run.train(3)
print(run.told[0]["text"])
"""


@pytest.mark.slow
def test_the_profiler_itself_says_nothing_on_standard_error(tmp_path):
    """In a process of its own, as a rank has one: it asks once what it may say."""
    ended = subprocess.run(
        [sys.executable, "-c", SILENT, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "were profiled: 1; their" in ended.stdout
    assert ended.stderr == ""


@pytest.mark.parametrize("updates", [range(0), range(5, 6), range(9, 10)])
def test_without_an_update_there_is_no_trace(updates, tmp_path):
    run = Profiled(tmp_path, updates)
    run.train(5)
    assert not run.store.list("run/")
    assert not run.files.kept
    assert not run.told


def test_a_store_that_is_away_and_a_large_trace_are_told(tmp_path, monkeypatch, caplog):
    def put(*_: object) -> None:
        raise StoreError("the disk is full")

    run = Profiled(tmp_path, range(1))
    monkeypatch.setattr(run.store, "put", put)
    monkeypatch.setattr("trainer.training.profiling._TRACKED_BYTES", 10)
    run.train(1)
    assert "rank 0 is not kept: the disk is full" in caplog.text
    assert not run.files.kept
    assert "too large for MLflow" in run.told[0]["text"]


@pytest.mark.parametrize("fails", ["start", "stop", "export_chrome_trace"])
def test_a_profile_that_fails_is_told_and_training_goes_on(fails, tmp_path, monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise PermissionError("nothing can be written")

    run = Profiled(tmp_path, range(1, 2))
    monkeypatch.setattr(torch.profiler.profile, fails, fail)
    run.train(3)
    assert "rank 0 is not kept: nothing can be written" in caplog.text
    assert not run.store.list("run/")
    assert not run.files.kept
    assert "could not be written" in run.told[0]["text"]


def test_of_a_run_that_is_stopped_nothing_is_kept(tmp_path):
    run = Profiled(tmp_path, range(9))
    run.profile.begin()
    run.profile.drop()
    assert [note["text"] for note in run.told] == ["no profile is kept, as the run was stopped"]
    run.profile.drop()
    run.profile.end(0)
    assert not run.store.list("run/")
    assert len(run.told) == 1
    again = Profiled(tmp_path, range(1))  # torch has one profiler, and it is free again
    again.train(2)
    assert again.store.list("run/")


@pytest.mark.parametrize("words", ["3", "3:0", "3:101", "-1:2", "a:b", "1:2:3", ":"])
def test_what_is_no_range_of_updates_is_refused(words):
    with pytest.raises(ConfigError, match=rf"runtime\.profile='{words}' is not START:COUNT"):
        RuntimeConfig(profile=words)
    assert RuntimeConfig(profile="20:3").profiled_updates == range(20, 23)
    assert not RuntimeConfig().profiled_updates
