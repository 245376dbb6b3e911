"""Exports hold the saved weights to the bit, and appear whole or not at all."""

import dataclasses
import hashlib
import json
import resource
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.unit.trainer.export.runs import MODELS, RUN, build, same_outputs, save_run
from trainer.checkpoint.errors import CheckpointMismatch, DamagedCheckpoint
from trainer.checkpoint.snapshot import Snapshot
from trainer.export.diffusers_model import LapFlowTransformer2DModel
from trainer.export.export import ExportConfig, export_checkpoint
from trainer.schema import ConfigError

WEIGHTS = "diffusion_pytorch_model.safetensors"
MASTER = "diffusion_pytorch_model.master.safetensors"
FOLDER_FILES = {"README.md", "config.json", "model_index.json", WEIGHTS}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("store"))


@pytest.fixture
def config(run, tmp_path) -> ExportConfig:
    return ExportConfig(checkpoint=run.uri, output=str(tmp_path / "out"))


def changed(config: ExportConfig, **values) -> ExportConfig:
    return dataclasses.replace(config, **values)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_gives_both_models_to_torch_and_to_diffusers(tmp_path, name):
    run = save_run(tmp_path, name)
    folder = export_checkpoint(
        ExportConfig(checkpoint=run.uri, output=str(tmp_path / "out"), weights="both")
    )
    assert names(folder) == FOLDER_FILES | {MASTER}
    assert not same_outputs(run.ema, run.master, run.job)
    for saved, file, variant in ((run.ema, WEIGHTS, None), (run.master, MASTER, "master")):
        state = load_file(folder / file)
        assert state.keys() == saved.state_dict().keys()
        assert all(torch.equal(state[key], value) for key, value in saved.state_dict().items())
        plain = build(run.job, seed=9)
        plain.load_state_dict(state)
        assert same_outputs(plain, saved, run.job)
        model = LapFlowTransformer2DModel.from_pretrained(folder, variant=variant)
        assert same_outputs(model, saved, run.job)


@pytest.mark.parametrize("weights", ["ema", "master"])
def test_one_set_of_weights_is_what_is_loaded_by_default(run, config, weights):
    folder = export_checkpoint(changed(config, weights=weights))
    assert names(folder) == FOLDER_FILES
    model = LapFlowTransformer2DModel.from_pretrained(folder)
    assert same_outputs(model, getattr(run, weights), run.job)


@pytest.mark.parametrize("weights", ["ema", "master"])
def test_a_single_file_says_what_it_holds(run, config, tmp_path, weights):
    output = str(tmp_path / "new" / "weights.safetensors")
    file = export_checkpoint(changed(config, output=output, file="safetensors", weights=weights))
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


def test_everyone_may_read_what_the_umask_allows(config):
    folder = export_checkpoint(config)
    modes = {stat.S_IMODE(path.stat().st_mode) & 0o044 for path in (folder, *folder.iterdir())}
    assert modes == {0o044}


def test_two_exports_are_the_same_bytes(config, tmp_path):
    folders = [
        export_checkpoint(changed(config, output=str(tmp_path / place / "out")))
        for place in ("one", "other")
    ]
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        for folder in folders
    ]
    assert digests[0] == digests[1]


def test_a_folder_that_is_not_empty_is_replaced_only_on_demand(config):
    folder = export_checkpoint(changed(config, weights="both"))
    with pytest.raises(ConfigError, match=r"not empty.*overwrite=true"):
        export_checkpoint(config)
    export_checkpoint(changed(config, overwrite=True))
    assert names(folder) == FOLDER_FILES
    assert names(folder.parent) == {"out"}


def test_an_empty_folder_is_no_obstacle(config, monkeypatch):
    Path(config.output).mkdir()
    monkeypatch.chdir(config.output)
    folder = export_checkpoint(changed(config, output="."))
    assert names(folder) == FOLDER_FILES
    assert folder == Path(config.output)


def test_what_no_export_wrote_is_never_removed(config, tmp_path):
    folder = export_checkpoint(config)
    (folder / "thesis.tex").write_text("all of it")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        export_checkpoint(changed(config, overwrite=True))
    assert (folder / "thesis.tex").read_text() == "all of it"
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("kept")
    link.symlink_to(folder)
    for place in (file, link):
        with pytest.raises(ConfigError, match="is not a folder"):
            export_checkpoint(changed(config, output=str(place), overwrite=True))
    assert file.read_text() == "kept"


def test_a_file_is_replaced_only_on_demand(config, tmp_path):
    output = tmp_path / "out.safetensors"
    single = changed(config, output=str(output), file="safetensors")
    output.write_text("kept")
    with pytest.raises(ConfigError, match=r"exists.*overwrite=true"):
        export_checkpoint(single)
    assert output.read_text() == "kept"
    export_checkpoint(changed(single, overwrite=True))
    assert load_file(output)
    with pytest.raises(ConfigError, match="is a folder"):
        export_checkpoint(changed(single, output=str(tmp_path), overwrite=True))


@pytest.mark.parametrize("file", ["folder", "safetensors"])
def test_a_disk_without_room_leaves_what_was_there(config, tmp_path, file):
    output = export_checkpoint(changed(config, file=file))
    before = load_file(output / WEIGHTS if file == "folder" else output)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ConfigError, match="cannot be written, and nothing of it is left"):
            export_checkpoint(changed(config, file=file, weights="master", overwrite=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = load_file(output / WEIGHTS if file == "folder" else output)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert names(tmp_path) == {"out"}


def test_a_place_that_cannot_be_written_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output=.*cannot be written"):
        export_checkpoint(changed(config, output=str(tmp_path / "file" / "out")))


def test_one_file_holds_one_set_of_weights():
    with pytest.raises(ConfigError, match="weights=both"):
        ExportConfig(checkpoint="x", output="y", file="safetensors", weights="both")


def test_a_checkpoint_that_is_not_there_is_named(config):
    missing = config.checkpoint.replace("200", "300")
    with pytest.raises(ConfigError, match="no valid checkpoint"):
        export_checkpoint(changed(config, checkpoint=missing))
    assert not Path(config.output).exists()


def test_damaged_weights_are_refused(tmp_path):
    run = save_run(tmp_path)
    (saved,) = Path(run.uri).rglob("*.safetensors")
    data = bytearray(saved.read_bytes())
    data[-1] ^= 1
    saved.write_bytes(data)
    for weights in ("master", "both"):
        config = ExportConfig(checkpoint=run.uri, output=str(tmp_path / "out"), weights=weights)
        with pytest.raises(DamagedCheckpoint):
            export_checkpoint(config)
    assert names(tmp_path) == {"runs"}


def test_weights_that_are_not_finite_are_refused(tmp_path, monkeypatch):
    # Savers refuse them too, so this one is blindfolded.
    monkeypatch.setattr(Snapshot, "_check_finite", lambda self: None)
    monkeypatch.setattr(
        "tests.unit.trainer.export.runs.build", lambda job, seed: with_infinity(build(job, seed))
    )
    run = save_run(tmp_path)
    with pytest.raises(DamagedCheckpoint, match="not finite"):
        export_checkpoint(ExportConfig(checkpoint=run.uri, output=str(tmp_path / "out")))
    assert names(tmp_path) == {"runs"}


def with_infinity(model):
    model.label_embed.table.weight[0, 0] = float("inf")
    return model


def test_weights_of_another_model_than_the_described_are_refused(tmp_path):
    other = {"model": dataclasses.asdict(MODELS["one scale"][0])}
    run = save_run(tmp_path, changed_science=other)
    with pytest.raises(CheckpointMismatch, match=r"blocks\.1"):
        export_checkpoint(ExportConfig(checkpoint=run.uri, output=str(tmp_path / "out")))


def test_the_settings_are_those_of_the_run(run, config):
    folder = export_checkpoint(config)
    settings = json.loads((folder / "config.json").read_text())
    assert settings["_class_name"] == "LapFlowTransformer2DModel"
    assert settings["transformer"]["width"] == run.job.model.width
    assert settings["flow"]["scales"] == 2
    assert settings["latents"] is None
    assert str(run.place) not in "".join(
        path.read_text(errors="replace") for path in folder.iterdir()
    )
