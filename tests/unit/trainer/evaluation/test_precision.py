"""What samples are drawn in: part of a set, of a figure's protocol, and of what a command tells."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from models.flow.sampler_config import SamplerConfig
from tests.support.saved import save_random_model
from tests.unit.trainer.evaluation.small_run import CPU, config, quiet, science_of
from trainer.cli import evaluate, sample
from trainer.config.reading import ConfigError
from trainer.engine.protocol import EngineConfig
from trainer.evaluation.checkpoints import evaluate_checkpoints
from trainer.evaluation.config import ModelSource
from trainer.evaluation.loading import load_model
from trainer.evaluation.precision import (
    auto_precision,
    drawing_precision,
    is_of_training,
    precision_of_training,
)
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig

GPU = torch.device("cuda", 0)


def test_a_processor_draws_in_fp32_and_a_gpu_in_bf16_unless_it_is_told() -> None:
    assert drawing_precision("auto", CPU) == "fp32"
    assert drawing_precision("auto", GPU) == auto_precision(is_on_gpu=True)
    if not torch.cuda.is_available():
        assert auto_precision(is_on_gpu=True) == "bf16"  # workers elsewhere may have one
    assert drawing_precision("bf16", CPU) == "bf16"
    assert drawing_precision("tf32", GPU) == "tf32"
    with pytest.raises(ConfigError, match=r"precision=tf32 is for NVIDIA's GPUs.*device=cpu"):
        drawing_precision("tf32", CPU)


def test_a_run_draws_its_own_samples_as_it_trains() -> None:
    full, half = EngineConfig(), EngineConfig(precision="bf16")
    exact = EngineConfig(tf32=False)
    found = {
        device: [precision_of_training(e, device) for e in (full, half, exact)]
        for device in (CPU, GPU)
    }
    assert found == {CPU: ["fp32", "bf16", "fp32"], GPU: ["tf32", "bf16", "fp32"]}
    every = ("", "fp32", "tf32", "bf16")
    for engine, own in ((full, {"", "fp32", "tf32"}), (half, {"", "bf16"}), (exact, {"", "fp32"})):
        assert {each for each in every if is_of_training(each, engine)} == own


def test_a_model_is_loaded_in_the_precision_that_is_asked_for(tmp_path: Path) -> None:
    store = open_store(f"{tmp_path}/runs", StoreConfig())
    save_random_model(store, run="small", science={"engine": {"precision": "bf16"}})
    source = ModelSource(checkpoint=f"{tmp_path}/runs/small", device="cpu")
    labels, drawn = torch.tensor([0, 1]), {}
    for asked, precision in (("auto", "fp32"), ("bf16", "bf16"), ("run", "bf16")):
        trained = load_model(source, precision=asked)
        wanted = torch.bfloat16 if precision == "bf16" else torch.float32
        assert trained.precision == precision
        assert {each.dtype for each in trained.model.parameters()} == {wanted}
        assert {each.dtype for each in trained.model.buffers()} == {torch.float32}
        sampler = trained.image_sampler(SamplerConfig(steps=8), seed=1, batch=2)
        assert sampler.precision == precision
        drawn[asked] = sampler.all(trained.model, labels).images
        assert drawn[asked].dtype == torch.float32
    assert torch.equal(drawn["bf16"], drawn["run"])
    assert 0 < (drawn["bf16"] - drawn["auto"]).abs().max() < 0.1
    with pytest.raises(ConfigError, match="precision=tf32"):
        load_model(source, precision="tf32")


@pytest.mark.slow
def test_a_checkpoint_is_measured_in_several_and_what_differs_is_told(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"checkpoint={place}/runs/small", f"home={place}/home", "device=cpu"]
    words += [f"output={tmp_path}/out", "precision=[fp32,bf16]", "seeds=2"]
    assert evaluate.main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    drawn_in = [each["measurement"]["precision"] for each in told["reports"]]
    assert drawn_in == ["fp32", "fp32", "bf16", "bf16"]
    frechet = [each["distances"][0]["frechet"] for each in told["reports"]]
    assert [(each["of"], each["to"], each["seed"]) for each in told["precisions"]] == [
        ("fp32", "bf16", 3),
        ("fp32", "bf16", 4),
    ]
    assert [(each["frechet"], each["other"]) for each in told["precisions"]] == [
        (frechet[0], frechet[2]),
        (frechet[1], frechet[3]),
    ]
    assert 0 < abs(frechet[2] / frechet[0] - 1) < 0.05
    # Figures of one precision are spread over seeds by themselves.
    assert [each["seeds"] for each in told["spreads"]] == [[3, 4], [3, 4]]
    # What is there is read again, and not measured in another precision's place.
    (own, _) = evaluate_checkpoints(config(place, output=f"{tmp_path}/out", seeds=2), report=quiet)
    assert own.measurement.precision == "fp32"
    assert own.distances[0].frechet == frechet[0]
    assert len(list((tmp_path / "out").rglob("report.json"))) == 4
    assert evaluate.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    change = f"{frechet[2] / frechet[0] - 1:+.2%}"
    told_row = [*("small", "200", "3", "random_conv", "fp32", f"{frechet[0]:.4f}")]
    assert [*told_row, "bf16", f"{frechet[2]:.4f}", change] in [line.split() for line in lines]


def test_a_precision_that_cannot_be_measured_in_is_refused(place: Path) -> None:
    for asked in ((), ("fp32", "fp32")):
        with pytest.raises(ConfigError, match="must name different ones"):
            config(place, precision=asked)
    assert config(place).precisions == ("run",)
    assert config(place, precision="bf16").precisions == ("bf16",)
    with pytest.raises(ConfigError, match="precision=tf32"):
        evaluate_checkpoints(config(place, precision="tf32"), report=quiet)


@pytest.mark.slow
def test_a_set_is_of_one_precision(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "engine" not in science_of(place)
    words = [f"checkpoint={place}/runs/small", "n=4", "sampler.steps=2", f"output={tmp_path}/set"]
    words += ["cluster.gpus_per_worker=0", f"home={tmp_path}/home"]
    # What is refused leaves no plan behind, which would refuse the corrected command.
    assert sample.main([*words, "precision=tf32"]) == 2
    assert "precision=tf32 is for NVIDIA's GPUs" in capsys.readouterr().err
    assert sample.main([*words, "precision=bf16"]) == 0
    assert "network evaluations each, in bf16" in capsys.readouterr().out
    for other in (["precision=fp32"], []):
        assert sample.main([*words, *other]) == 2
        assert "precision is bf16 there and fp32 here" in capsys.readouterr().err
    plan = json.loads((tmp_path / "set" / "plan.json").read_text())
    assert plan["precision"] == "bf16"
    assert sample.main([*words, "precision=bf16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["precision"] == "bf16"


def test_protocols_of_precisions_are_apart() -> None:
    from tests.unit.trainer.measurements import SAMPLER
    from trainer.evaluation.reports import Measurement

    one = Measurement(
        attempt="a",
        weights="ema",
        samples=10,
        seed=1,
        sampler=SAMPLER,
        extractors={"random_conv": ""},
        held_out_index="x",
        precision="fp32",
    )
    other = dataclasses.replace(one, precision="bf16")
    assert one.protocol("random_conv") != other.protocol("random_conv")
    assert one.name != other.name
