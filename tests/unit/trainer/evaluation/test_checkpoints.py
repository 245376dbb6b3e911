"""Checkpoints measured after their run: the same figures again, none from the wrong images."""

import dataclasses
import shutil

import pytest
import torch

from cluster.placement import Placement
from models.codec import IdentityCodec
from models.ema import EmaConfig
from models.flow.config import FlowConfig
from models.flow.flow import Flow
from models.flow.sampler_config import SamplerConfig, SamplerConfigError
from models.transformer.lapflow import LapFlowTransformer, OnBuilt
from pipelines.encoded import as_png
from pipelines.ingest.write import LabelledImage, write_dataset
from pipelines.shards import ShardedDataset, ShardsConfig
from tests.support.saved import save_now
from tests.unit.trainer.evaluation.small_run import (
    CPU,
    DATA,
    MODEL,
    OWN,
    config,
    quiet,
    science_of,
    write_images,
)
from tests.unit.trainer.evaluation.two_kinds import two_kinds
from trainer.checkpoint.reader import CheckpointReader
from trainer.cli.evaluate import main
from trainer.config.job import FeatureConfig, JobConfig
from trainer.config.reading import ConfigError, to_dict
from trainer.config.shapes import ImageShape
from trainer.engine.build import build_engine
from trainer.engine.optimizer import OptimConfig
from trainer.engine.protocol import EngineConfig
from trainer.evaluation import learned_features
from trainer.evaluation.checkpoints import evaluate_checkpoints, measure_model
from trainer.evaluation.config import SamplerChoice
from trainer.evaluation.final import FinalEvaluation, Publisher
from trainer.evaluation.grid import class_grid
from trainer.evaluation.reference import MeasuringStopped, reference_of_run
from trainer.evaluation.reports import (
    EvaluationReport,
    evaluation_key,
    read_scores,
)
from trainer.evaluation.samples import ImageSampler
from trainer.metrics.tracker import Tracker
from trainer.storage.errors import InvalidStoreUri
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig


def test_a_class_grid_shows_one_class_in_each_row():
    assert class_grid(12, classes=3) == ([0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11], 4)
    assert class_grid(2, classes=3) == ([0, 1], 1)
    chosen, columns = class_grid(5000, classes=20)
    assert (len(chosen), columns) == (100, 10)
    assert [index % 20 for index in chosen[::10]] == list(range(10))


@pytest.mark.slow
def test_a_run_is_measured_at_its_newest_checkpoint_or_at_all(place):
    (newest,) = evaluate_checkpoints(config(place), report=quiet)
    assert newest.images == 200
    assert newest.real_images == 20
    both = evaluate_checkpoints(config(place, checkpoints="all"), report=quiet)
    assert [report.images for report in both] == [100, 200]
    assert both[1] == newest
    named = config(place, checkpoint=f"{place}/runs/small/checkpoints/000000000100")
    assert evaluate_checkpoints(named, report=quiet) == both[:1]


def randomised(on_built: OnBuilt) -> LapFlowTransformer:
    torch.manual_seed(5)

    def redraw(part: torch.nn.Module) -> None:
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        on_built(part)

    return LapFlowTransformer(MODEL, scales=2, channels=1, image_size=8, classes=2, on_built=redraw)


@pytest.mark.slow
@pytest.mark.parametrize("features", ["random_conv", "learned_conv"])
def test_the_end_of_a_run_is_measured_as_its_checkpoint_is_later(place, monkeypatch, features):
    """To the bit, by the code that a worker runs, with an engine of one rank."""
    run = f"ended-{features}"
    eval_config = dataclasses.replace(OWN, features=FeatureConfig(name=features))
    job = JobConfig(
        run=run, data=DATA, model=MODEL, eval=eval_config,
        store=StoreConfig(uri=str(place)), home=str(place / "home"),
    )  # fmt: skip
    reference = reference_of_run(
        job,
        trained_on=ShardedDataset(f"{place}/datasets/kinds/train", config=ShardsConfig()).digest,
        features=(features,),
        weights=FeatureConfig(),
        device=CPU,
        samples=OWN.samples,
        compared=OWN.compared,
    )
    engine = build_engine(
        randomised, config=EngineConfig(kind="plain"), placement=Placement((1, 1)),
        optim=OptimConfig(), ema=EmaConfig(), micro_batch=4, rank_batch=8, world_size=1,
        device=CPU,
    )  # fmt: skip
    store = open_store(f"{place}/runs", StoreConfig())
    science = {**science_of(place), "eval": to_dict(eval_config)}
    save_now(store, run=run, images=300, fragments=engine.fragments(), science=science)
    told: list[dict[str, object]] = []
    image_sampler = ImageSampler(
        flow=Flow(FlowConfig()), sampler=OWN.sampler, codec=IdentityCodec(), seed=OWN.seed,
        shape=ImageShape(channels=1, size=8, classes=2), batch=OWN.batch, device=CPU,
    )  # fmt: skip
    final = FinalEvaluation(
        config=eval_config, image_sampler=image_sampler, reference=reference,
    )  # fmt: skip
    manifest = CheckpointReader(store, run=run).manifest(300)
    assert manifest is not None
    final.run(
        engine,
        Publisher(
            store=store, run=run, images=300, attempt=lambda: manifest.attempt,
            tracker=Tracker(), report=told.append,
        ),
    )  # fmt: skip
    assert told == []
    own = EvaluationReport.from_json(store.get(evaluation_key(run, 300, "report.json")))
    # What it has learned is kept, and not learned again.
    monkeypatch.setattr(learned_features, "_train", None)
    (later,) = evaluate_checkpoints(config(place, checkpoint=f"{place}/runs/{run}"), report=quiet)
    assert own.distances == later.distances
    assert own.measurement == later.measurement
    assert own.network_evaluations == later.network_evaluations
    assert (own.real_images, own.unusable_real_images) == (20, 0)
    # The EMA of a run without an update is where it began.
    assert own.frechet_untrained == own.frechet
    found = read_scores(store, run)
    assert found == {features: {300: own.frechet}}
    # Whoever is asked to stop does so after the block that is being drawn.
    asked = iter([False, True])
    with engine.ema_weights() as model, pytest.raises(MeasuringStopped):
        measure_model(
            image_sampler, model, reference, samples=20, stop_requested=lambda: next(asked)
        )


@pytest.mark.slow
def test_the_runs_own_settings_hold_unless_changed(place, tmp_path):
    (report,) = evaluate_checkpoints(config(place, output=str(tmp_path)), report=quiet)
    assert [each.features for each in report.distances] == ["random_conv"]
    asked = report.measurement
    assert (asked.samples, asked.seed, asked.sampler) == (20, 3, to_dict(OWN.sampler))
    changed = config(place, samples=22, sampler=SamplerChoice(steps=3, guidance_scale=1.0))
    (other,) = evaluate_checkpoints(changed, report=quiet)
    assert other.measurement.samples == 22
    assert other.measurement.seed == 3
    assert other.measurement.sampler == {
        **to_dict(OWN.sampler),
        "steps": 3,
        "guidance_scale": 1.0,
    }


def test_a_choice_has_every_setting_of_a_sampler():
    fields = [field.name for field in dataclasses.fields(SamplerConfig)]
    assert [field.name for field in dataclasses.fields(SamplerChoice)] == fields
    everything = SamplerConfig(
        solver="dopri5",
        steps=7,
        absolute_tolerance=1e-3,
        relative_tolerance=1e-4,
        adaptive_group=5,
        guidance_scale=3.0,
        guidance_interval=(0.25, 0.75),
    )
    assert SamplerChoice(**dataclasses.asdict(everything)).over(SamplerConfig()) == everything
    assert SamplerChoice().over(everything) == everything
    with pytest.raises(SamplerConfigError, match="steps=0"):
        SamplerChoice(steps=0)


@pytest.mark.slow
def test_the_figures_do_not_depend_on_the_batch(place, tmp_path):
    places = [tmp_path / name for name in ("whole", "parts")]
    whole, parts = (
        evaluate_checkpoints(config(place, batch=batch, output=str(folder)), report=quiet)[0]
        for batch, folder in zip((20, 2), places, strict=True)
    )
    assert parts.measurement == whole.measurement
    assert parts.network_evaluations == whole.network_evaluations == 80.0  # 20 · 2 · 2
    assert parts.distances[0].frechet == pytest.approx(whole.distances[0].frechet, rel=1e-4)
    grids = [next(folder.rglob("grid.png")).read_bytes() for folder in places]
    assert grids[0] == grids[1]


def test_average_and_master_weights_are_told_apart(place):
    ema, master = (
        evaluate_checkpoints(config(place, weights=weights), report=quiet)[0]
        for weights in ("ema", "master")
    )
    assert ema.distances != master.distances


def test_several_extractors_measure_the_same_samples(place):
    both = config(place, features=("random_conv", "learned_conv"))
    (report,) = evaluate_checkpoints(both, report=quiet)
    alone = evaluate_checkpoints(config(place), report=quiet)[0]
    assert report.distance("random_conv") == alone.distance("random_conv")
    assert report.distance("learned_conv").held_out_accuracy is not None
    assert list((place / "home" / "cache" / "features").iterdir())


def test_other_images_than_the_runs_own_are_refused(place, tmp_path):
    write_images(tmp_path / "other", 7)
    elsewhere = tmp_path / "copy"
    shutil.copytree(place / "datasets" / "kinds", elsewhere)
    real = dataclasses.replace(config(place).data, prefix=str(elsewhere))
    assert evaluate_checkpoints(config(place, data=real), report=quiet)
    wrong = dataclasses.replace(real, prefix=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="other images"):
        evaluate_checkpoints(config(place, data=wrong), report=quiet)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_with_fewer_than_four_held_out_images_no_figure_is_measured(place, tmp_path, count):
    prefix = tmp_path / "few"
    shutil.copytree(place / "datasets" / "kinds", prefix)
    shutil.rmtree(prefix / "test")
    images, _ = two_kinds(count, 0)
    pixels = (images * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    held_out = [LabelledImage(as_png(each), 0) for each in pixels]
    write_dataset(held_out, str(prefix / "test"))
    real = dataclasses.replace(config(place).data, prefix=str(prefix))
    lines: list[str] = []
    few = config(place, data=real, output=str(tmp_path / "out"))
    (report,) = evaluate_checkpoints(few, report=lines.append)
    assert report.distances == ()
    assert (report.real_images, report.unusable_real_images) == (0, 0)
    assert "warning: no figure is measured: " in lines[0]
    assert f"{count} held-out image" in lines[0]
    assert "figures need 4" in lines[0]
    assert list((tmp_path / "out").rglob("grid.png"))
    # The training images are enough to compare with; only what real images reach is left out.
    (report,) = evaluate_checkpoints(dataclasses.replace(few, reference="train"), report=quiet)
    (distance,) = report.distances
    assert distance.frechet > 0
    assert distance.more is not None
    assert distance.more.precision is not None
    assert (distance.real, distance.nearest) == (None, None)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"checkpoint": "{place}/runs/absent"}, "no valid checkpoint"),
        ({"checkpoint": "small"}, "neither a run"),
        (
            {"checkpoint": "{place}/runs/small/checkpoints/000000000100", "checkpoints": "all"},
            "URI of a run",
        ),
        ({"checkpoint": "{place}/runs/small", "device": "banana"}, "device=banana cannot be used"),
    ],
)
def test_checkpoints_and_devices_that_cannot_be_used_are_named(place, changes, part):
    changes["checkpoint"] = changes["checkpoint"].format(place=place)
    with pytest.raises((ConfigError, InvalidStoreUri), match=part):
        evaluate_checkpoints(config(place, **changes), report=quiet)


def test_the_command_prints_a_table_or_one_paragraph(place, capsys):
    words = [f"checkpoint={place}/runs/small", "samples=20", f"home={place}/home", "device=cpu"]
    assert main([*words, "features=[random_conv]"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[-2].split() == [
        *("run", "images", "weights", "drawn", "in"),
        *("extractor", "sampler", "guidance", "NFE", "n", "reference"),
        *("Fréchet", "real", "kernel", "precision", "recall", "sliced", "real"),
        *("diversity", "real", "nearest", "real", "close", "extractor's", "accuracy"),
    ]
    assert table[-1].split()[:10] == [
        *("small", "200", "ema", "fp32", "random_conv", "midpoint", "20", "1.5", "80", "20")
    ]
    assert main([*words, "samples=1"]) == 2
    assert "samples=1" in capsys.readouterr().err
