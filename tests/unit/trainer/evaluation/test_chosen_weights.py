"""Which of a checkpoint's averages is sampled from, and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.saved import save_random_model
from trainer.config.reading import ConfigError
from trainer.evaluation.choice import choose_checkpoints
from trainer.evaluation.config import ModelSource
from trainer.evaluation.loading import load_model
from trainer.export.config import ExportSettings
from trainer.export.export import export_checkpoint
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig

FACTORS = {"ema": 0.5, "ema_0.999": 0.25, "ema_1e-05": 0.125}
# The weights themselves are none of these.
CHOICES = {
    "master": 1.0,
    "ema": 0.5,
    "ema:0.9": 0.5,
    "ema:0.999": 0.25,
    "ema:.999": 0.25,
    "ema:0.00001": 0.125,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("run")
    store = open_store(f"{place}/runs", StoreConfig())
    ema = {"decay": 0.9, "decays": [0.999, 0.9, 1e-5], "warmup": True}
    science = {"train": {"label_dropout": 0.1, "ema": ema}}
    save_random_model(store, run="several", science=science, averages=FACTORS)
    save_random_model(store, run="one")
    return f"{place}/runs/several"


@pytest.mark.parametrize(("weights", "factor"), CHOICES.items())
def test_the_average_of_a_decay_is_taken(
    run: str, tmp_path: Path, weights: str, factor: float
) -> None:
    trained = load_model(ModelSource(checkpoint=run, device="cpu", weights="master")).model
    chosen = load_model(ModelSource(checkpoint=run, device="cpu", weights=weights)).model
    _, store, (manifest,) = choose_checkpoints(run, which="newest", config=StoreConfig())
    settings = ExportSettings(output=f"{tmp_path}/out", file="safetensors", weights=weights)
    exported = load_file(export_checkpoint(store, manifest, settings))
    for name, value in trained.named_parameters():
        assert torch.equal(chosen.get_parameter(name), factor * value)
        assert torch.equal(exported[name], factor * value)


def test_one_that_is_not_kept_is_refused_with_those_that_are(run: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no average of that decay, but of 0\.9, 0\.999"):
        load_model(ModelSource(checkpoint=run, device="cpu", weights="ema:0.99"))
    _, store, (manifest,) = choose_checkpoints(run, which="newest", config=StoreConfig())
    settings = ExportSettings(output=f"{tmp_path}/out", weights="ema:0.99")
    with pytest.raises(ConfigError, match=r"train\.ema\.decays keeps further ones"):
        export_checkpoint(store, manifest, settings)
    assert list(tmp_path.iterdir()) == []
    before = run.replace("several", "one")  # of before there were several
    with pytest.raises(ConfigError, match=r"but of 0\.9999;"):
        load_model(ModelSource(checkpoint=before, device="cpu", weights="ema:0.999"))
    load_model(ModelSource(checkpoint=before, device="cpu", weights="ema:0.9999"))


@pytest.mark.parametrize("weights", ["", "both", "mean", "ema:", "ema:1.0", "ema:2", "ema:0.9 "])
def test_what_names_no_weights_is_refused_before_anything_is_read(weights: str) -> None:
    with pytest.raises(ConfigError, match=r"names none: give ema, master, or ema:0\.999"):
        ModelSource(checkpoint="/nowhere", weights=weights)


@pytest.mark.slow  # it imports diffusers
def test_a_model_card_says_which_average_it_is(run: str, tmp_path: Path) -> None:
    _, store, (manifest,) = choose_checkpoints(run, which="newest", config=StoreConfig())
    settings = ExportSettings(output=f"{tmp_path}/out", weights="ema:0.999")
    card = (export_checkpoint(store, manifest, settings) / "README.md").read_text()
    assert "moving average of the weights, of decay 0.999" in card
