"""A manifest that was edited and sealed again is refused in a line, before anything is built."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.trainer.export.runs import RUN, SavedRun, export, save_run
from trainer.checkpoint.errors import CheckpointMismatch, InvalidManifest
from trainer.checkpoint.layout import manifest_key
from trainer.evaluation.choice import open_checkpoint
from trainer.evaluation.config import ModelSource
from trainer.evaluation.loading import load_model
from trainer.storage.store import StoreConfig

GROUPS = ("model", "flow", "data", "codec", "autoencoder", "train", "engine", "loader", "data_set")
NEEDED = GROUPS[:3]
INVALID: list[tuple[str, dict[str, Any]]] = [
    ("model", {"depth": 0}),
    ("model", {"depth": "deep"}),
    ("model", {"depth": 10**9}),
    ("model", {"mlp_ratio": 1e308}),
    ("model", {"ties": {"scales": [0, 9]}}),
    ("model", {"x" * 300: 1}),
    ("flow", {"scales": 10**9}),
    ("flow", {"critical_times": [2]}),
    ("data", {"image_size": 10**9 // 4 * 4}),
    ("data", {"image_size": 7}),
    ("data", {"classes": 0}),
    ("data", {"prefix": "s3://me:h1dden@bucket/a"}),
    ("codec", {"kind": "autoencoder_kl"}),
    ("train", {"label_dropout": "x"}),
    ("engine", {"precision": "fp4"}),
    ("loader", {"decoder": 5}),
]
# Without a look at the parameters, each of these would be built.
MISMATCHES: list[tuple[str, dict[str, Any]]] = [
    ("model", {"depth": 10**4}),
    ("model", {"width": 2**30}),
    ("model", {"heads": 1, "qk_norm": True}),
    ("model", {"class_tokens": 10**6}),
    ("data", {"classes": 10**12}),
    ("data", {"channels": 10**12}),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    return save_run(tmp_path_factory.mktemp("store"))


def refusals(run: SavedRun, output: Path, science: dict[str, Any]) -> list[str]:
    """What sampling and exporting say of the run with another science in its manifest."""
    store, _, manifest = open_checkpoint(run.uri, StoreConfig())
    key = manifest_key(RUN, manifest.images)
    store.put(key, replace(manifest, science=science).to_json())
    said = []
    try:
        for use in (
            lambda: load_model(ModelSource(checkpoint=run.uri, device="cpu"), precision="run"),
            lambda: export(run, output),
        ):
            with pytest.raises((InvalidManifest, CheckpointMismatch)) as caught:
                use()
            said.append(str(caught.value))
    finally:
        store.put(key, manifest.to_json())
    assert not output.exists()
    return said


def science_of(run: SavedRun) -> dict[str, Any]:
    _, _, manifest = open_checkpoint(run.uri, StoreConfig())
    return copy.deepcopy(dict(manifest.science))


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_that_is_none_is_refused(run, tmp_path, group):
    science = science_of(run)
    for value in (None, [], [[1]], "x", 5, True):
        for said in refusals(run, tmp_path / "out", {**science, group: value}):
            assert f"{group}=" in said
            assert "was edited" in said
    if group in NEEDED:
        del science[group]
        assert all("lacks" in said for said in refusals(run, tmp_path / "out", science))


@pytest.mark.parametrize(("group", "changes"), INVALID)
def test_settings_that_no_run_has_are_refused(run, tmp_path, group, changes):
    science = science_of(run)
    science.setdefault(group, {}).update(changes)
    for said in refusals(run, tmp_path / "out", science):
        assert "was edited" in said
        assert "h1dden" not in said


@pytest.mark.parametrize(("group", "changes"), MISMATCHES)
def test_a_model_that_the_checkpoint_does_not_hold_is_not_built(run, tmp_path, group, changes):
    science = science_of(run)
    science[group].update(changes)
    for said in refusals(run, tmp_path / "out", science):
        assert "does not hold the parameters" in said


def test_the_untouched_manifest_is_used(run):
    trained = load_model(ModelSource(checkpoint=run.uri, device="cpu"))
    assert trained.record.index_sha256 == "d1" * 32
