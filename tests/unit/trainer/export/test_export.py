"""Exports hold the saved weights to the bit, and appear whole or not at all."""

import dataclasses
import hashlib
import json
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.unit.trainer.export.runs import (
    MODELS,
    RUN,
    build,
    export,
    model_class,
    same_outputs,
    save_run,
)
from trainer.checkpoint.errors import CheckpointMismatch, DamagedCheckpoint
from trainer.checkpoint.snapshot import Snapshot
from trainer.config.reading import ConfigError
from trainer.export.config import ExportSettings
from trainer.export.export import write_whole

WEIGHTS = "diffusion_pytorch_model.safetensors"
MASTER = "diffusion_pytorch_model.master.safetensors"
FOLDER_FILES = {"README.md", "config.json", "model_index.json", WEIGHTS}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("store"))


@pytest.fixture
def exported(run, tmp_path) -> Callable[..., Path]:
    """Exports the run's checkpoint, to another place than `out` on demand."""

    def exported(output=tmp_path / "out", **settings) -> Path:
        return export(run, output, **settings)

    return exported


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_gives_both_models_to_torch_and_to_diffusers(tmp_path, name):
    run = save_run(tmp_path, name)
    folder = export(run, tmp_path / "out", weights="both")
    assert names(folder) == FOLDER_FILES | {MASTER}
    assert not same_outputs(run.ema, run.master, run.job)
    for saved, file, variant in ((run.ema, WEIGHTS, None), (run.master, MASTER, "master")):
        state = load_file(folder / file)
        assert state.keys() == saved.state_dict().keys()
        assert all(torch.equal(state[key], value) for key, value in saved.state_dict().items())
        plain = build(run.job, seed=9)
        plain.load_state_dict(state)
        assert same_outputs(plain, saved, run.job)
        model = model_class().from_pretrained(folder, variant=variant)
        assert same_outputs(model, saved, run.job)


@pytest.mark.parametrize("weights", ["ema", "master"])
def test_one_set_of_weights_is_what_is_loaded_by_default(run, exported, weights):
    folder = exported(weights=weights)
    assert names(folder) == FOLDER_FILES
    model = model_class().from_pretrained(folder)
    assert same_outputs(model, getattr(run, weights), run.job)


@pytest.mark.parametrize("weights", ["ema", "master"])
def test_a_single_file_says_what_it_holds(run, exported, tmp_path, weights):
    output = tmp_path / "new" / "weights.safetensors"
    file = exported(output, file="safetensors", weights=weights)
    saved = getattr(run, weights).state_dict()
    state = load_file(file)
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[key], value) for key, value in saved.items())
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    hashed = metadata.pop("science_hash")
    assert len(hashed) == 16
    assert metadata == {"format": "pt", "run": RUN, "images": "200", "weights": weights}
    assert names(file.parent) == {"weights.safetensors"}


def test_everyone_may_read_what_the_umask_allows(exported):
    folder = exported()
    modes = {stat.S_IMODE(path.stat().st_mode) & 0o044 for path in (folder, *folder.iterdir())}
    assert modes == {0o044}


def test_two_exports_are_the_same_bytes(exported, tmp_path):
    folders = [exported(tmp_path / place / "out") for place in ("one", "other")]
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        for folder in folders
    ]
    assert digests[0] == digests[1]


def test_a_folder_that_is_not_empty_is_replaced_only_on_demand(exported):
    folder = exported(weights="both")
    with pytest.raises(ConfigError, match=r"not empty.*overwrite=true"):
        exported()
    exported(overwrite=True)
    assert names(folder) == FOLDER_FILES
    assert names(folder.parent) == {"out"}


def test_an_empty_folder_is_no_obstacle(exported, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    folder = exported(".")
    assert names(folder) == FOLDER_FILES
    assert folder == tmp_path / "out"


def test_what_no_export_wrote_is_never_removed(exported, tmp_path):
    folder = exported()
    (folder / "thesis.tex").write_text("all of it")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        exported(overwrite=True)
    assert (folder / "thesis.tex").read_text() == "all of it"
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("kept")
    link.symlink_to(folder)
    for place in (file, link):
        with pytest.raises(ConfigError, match="is not a folder"):
            exported(place, overwrite=True)
    assert file.read_text() == "kept"


def test_a_file_is_replaced_only_on_demand(exported, tmp_path):
    output = tmp_path / "out.safetensors"
    output.write_text("kept")
    with pytest.raises(ConfigError, match=r"exists.*overwrite=true"):
        exported(output, file="safetensors")
    assert output.read_text() == "kept"
    exported(output, file="safetensors", overwrite=True)
    assert load_file(output)
    with pytest.raises(ConfigError, match="is a folder"):
        exported(tmp_path, file="safetensors", overwrite=True)


@pytest.mark.parametrize("file", ["folder", "safetensors"])
def test_a_disk_without_room_leaves_what_was_there(exported, tmp_path, file):
    output = exported(file=file)
    before = load_file(output / WEIGHTS if file == "folder" else output)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ConfigError, match="cannot be written, and nothing of it is left"):
            exported(file=file, weights="master", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = load_file(output / WEIGHTS if file == "folder" else output)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert names(tmp_path) == {"out"}


@pytest.fixture
def earlier(tmp_path) -> Path:
    """A folder that is to be replaced."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("worth having")
    return tmp_path / "out"


def replace(folder: Path) -> None:
    with write_whole(folder) as partial:
        partial.mkdir()
        (partial / "new").write_text("better")


def failing_renames(monkeypatch, failures: dict[str, BaseException]) -> None:
    """Lets renames of what ends so fail."""
    rename = Path.rename

    def rename_or_fail(path: Path, target: Path) -> Path:
        if path.suffix in failures:
            raise failures[path.suffix]
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_or_fail)


def test_a_folder_is_replaced(earlier, tmp_path):
    replace(earlier)
    assert names(earlier) == {"new"}
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize(
    ("failure", "told"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError("no more inodes"), ConfigError)],
)
def test_an_end_between_the_renames_leaves_what_was_there(
    earlier, tmp_path, monkeypatch, failure, told
):
    failing_renames(monkeypatch, {".partial": failure})
    with pytest.raises(told):
        replace(earlier)
    assert (earlier / "old").read_text() == "worth having"
    assert names(earlier) == {"old"}
    assert names(tmp_path) == {"out"}


def test_what_cannot_be_put_back_stays_beside_its_place(earlier, tmp_path, monkeypatch):
    gone = OSError("the disk is gone")
    failing_renames(monkeypatch, {".partial": KeyboardInterrupt(), ".replaced": gone})
    with pytest.raises(ConfigError, match=r"what was there is now at .*\.replaced, .* gone"):
        replace(earlier)
    (left,) = tmp_path.iterdir()
    assert (left / "old").read_text() == "worth having"


@pytest.mark.slow
def test_a_process_killed_between_the_renames_leaves_the_earlier_folder_beside(earlier, tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from trainer.export.export import write_whole

rename = Path.rename
def rename_or_die(path, target):
    if path.suffix == ".partial":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(path, target)

Path.rename = rename_or_die
with write_whole(Path({str(earlier)!r})) as partial:
    partial.mkdir()
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert {path.suffix for path in tmp_path.iterdir()} == {".partial", ".replaced"}
    (replaced,) = tmp_path.glob(".out.*.replaced")
    assert (replaced / "old").read_text() == "worth having"


def test_a_place_that_cannot_be_written_is_named(exported, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output=.*cannot be written"):
        exported(tmp_path / "file" / "out")


def test_one_file_holds_one_set_of_weights():
    with pytest.raises(ConfigError, match="weights=both"):
        ExportSettings(output="x", file="safetensors", weights="both")


def test_damaged_weights_are_refused(tmp_path):
    run = save_run(tmp_path)
    (saved,) = Path(run.uri).rglob("*.safetensors")
    data = bytearray(saved.read_bytes())
    data[-1] ^= 1
    saved.write_bytes(data)
    for weights in ("master", "both"):
        with pytest.raises(DamagedCheckpoint):
            export(run, tmp_path / "out", weights=weights)
    assert names(tmp_path) == {"runs"}


def test_weights_that_are_not_finite_are_refused(tmp_path, monkeypatch):
    # Savers refuse them too, so this one is blindfolded.
    monkeypatch.setattr(Snapshot, "_check_finite", lambda self: None)
    monkeypatch.setattr(
        "tests.unit.trainer.export.runs.build", lambda job, seed: with_infinity(build(job, seed))
    )
    run = save_run(tmp_path)
    with pytest.raises(DamagedCheckpoint, match="not finite"):
        export(run, tmp_path / "out")
    assert names(tmp_path) == {"runs"}


def with_infinity(model):
    model.label_embed.table.weight[0, 0] = float("inf")
    return model


def test_weights_of_another_model_than_the_described_are_refused(tmp_path):
    other = {"model": dataclasses.asdict(MODELS["one scale"][0])}
    run = save_run(tmp_path, changed_science=other)
    with pytest.raises(CheckpointMismatch, match=r"blocks\.1"):
        export(run, tmp_path / "out")


def test_the_settings_are_those_of_the_run(run, exported):
    folder = exported()
    settings = json.loads((folder / "config.json").read_text())
    assert settings["_class_name"] == "LapFlowTransformer2DModel"
    assert settings["transformer"]["width"] == run.job.model.width
    assert settings["flow"]["scales"] == 2
    assert settings["latents"] is None
    assert str(run.place) not in "".join(
        path.read_text(errors="replace") for path in folder.iterdir()
    )
