"""Checkpoints measured after their run: the same figures again, none from the wrong images."""

import dataclasses
import hashlib
import json
import logging
import resource
import shutil
import signal

import numpy as np
import pytest
import torch

from cluster.placement import Placement
from models.codec import IdentityCodec
from models.ema import EmaConfig
from models.flow.flow import Flow, FlowConfig
from models.flow.sampler_config import SamplerConfig, SamplerConfigError
from models.transformer.config import TransformerConfig
from models.transformer.lapflow import LapFlowTransformer, OnBuilt
from pipelines.encoded import as_png
from pipelines.ingest.write import LabelledImage, write_dataset
from pipelines.shards import ShardedDataset, ShardsConfig
from tests.support.saved import save_now
from tests.unit.trainer.evaluation.two_kinds import two_kinds
from trainer.checkpoint.reader import CheckpointReader
from trainer.cli.evaluate import main
from trainer.config.job import DataConfig, EvalConfig, FeatureConfig, JobConfig
from trainer.config.reading import ConfigError, to_dict
from trainer.config.shapes import ImageShape
from trainer.engine.build import build_engine
from trainer.engine.optimizer import OptimConfig
from trainer.engine.protocol import EngineConfig
from trainer.evaluation import learned_features
from trainer.evaluation.checkpoints import CheckpointEvaluationConfig, evaluate_checkpoints
from trainer.evaluation.choice import choose_checkpoints
from trainer.evaluation.final import FinalEvaluation, Publisher
from trainer.evaluation.grid import class_grid
from trainer.evaluation.loading import SamplerChoice
from trainer.evaluation.model_record import own_eval
from trainer.evaluation.npz import BadReference
from trainer.evaluation.reference import reference_of_run
from trainer.evaluation.reports import (
    CheckpointReport,
    EvaluationReport,
    Origin,
    evaluation_key,
    read_scores,
)
from trainer.evaluation.samples import ImageSampler
from trainer.metrics.tracker import Tracker
from trainer.state import Fragment
from trainer.storage.errors import InvalidStoreUri
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig

MODEL = TransformerConfig(depth=1, width=16, heads=2)
OWN = EvalConfig(
    samples=20,
    batch=6,
    seed=3,
    sampler=SamplerConfig(solver="midpoint", steps=20, guidance_scale=1.5),
    features=FeatureConfig(name="random_conv"),
)
"""How the run of these tests measures itself."""


def test_a_class_grid_shows_one_class_in_each_row():
    assert class_grid(12, classes=3) == ([0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11], 4)
    assert class_grid(2, classes=3) == ([0, 1], 1)
    chosen, columns = class_grid(5000, classes=20)
    assert (len(chosen), columns) == (100, 10)
    assert [index % 20 for index in chosen[::10]] == list(range(10))


def write_images(prefix, seed: int) -> None:
    for split, count in (("train", 32), ("test", 20)):
        images, labels = two_kinds(count, seed)
        pixels = (images * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        write_dataset(
            [LabelledImage(as_png(p), int(y)) for p, y in zip(pixels, labels, strict=True)],
            f"{prefix}/{split}",
        )


DATA = DataConfig(name="kinds", image_size=8, channels=1, classes=2)
CPU = torch.device("cpu")


def science_of(place) -> dict[str, object]:
    images = ShardedDataset(f"{place}/datasets/kinds/train", config=ShardsConfig())
    return {
        "data": {k: v for k, v in to_dict(DATA).items() if k not in ("prefix", "prepare")},
        "model": to_dict(MODEL),
        "flow": to_dict(FlowConfig()),
        "data_set": {"index_sha256": images.digest},
        "train": {"label_dropout": 0.1},
        "eval": to_dict(OWN),
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A store with a data set and a run of two checkpoints, whose EMA is not its master."""
    place = tmp_path_factory.mktemp("store")
    write_images(place / "datasets" / "kinds", 0)
    science = science_of(place)
    torch.manual_seed(0)
    model = LapFlowTransformer(MODEL, scales=2, channels=1, image_size=8, classes=2)
    store = open_store(f"{place}/runs", StoreConfig())
    for seen in (100, 200):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        fragments = [
            Fragment(
                name=name,
                start=0,
                shape=tuple(p.shape),
                tensors={
                    "master": p.detach().flatten().clone(),
                    "ema": 0.5 * p.detach().flatten(),
                },
            )
            for name, p in model.named_parameters()
        ]
        save_now(store, run="small", images=seen, fragments=fragments, science=science)
    return place


def config(place, **changes) -> CheckpointEvaluationConfig:
    base = CheckpointEvaluationConfig(
        checkpoint=f"{place}/runs/small", home=str(place / "home"), device="cpu"
    )
    return dataclasses.replace(base, **changes)


def quiet(_text: str) -> None:
    """Take a line and show it to nobody."""


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
        inception_weights=None,
        device=CPU,
        samples=OWN.samples,
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
    # The run's own report has no place for what the classifier reads right.
    distances = [dataclasses.replace(each, held_out_accuracy=None) for each in later.distances]
    assert list(own.distances) == distances
    assert own.measurement == later.measurement
    assert own.network_evaluations == later.network_evaluations
    assert (own.real_images, own.unusable_real_images) == (20, 0)
    # The EMA of a run without an update is where it began.
    assert own.frechet_untrained == own.frechet
    found = read_scores(store, run)
    assert found == {features: {300: own.frechet}}


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


def report_of(config: EvalConfig) -> EvaluationReport:
    return EvaluationReport(
        images=200,
        samples=config.samples,
        features="random_conv",
        frechet=1.0,
        frechet_untrained=2.0,
        network_evaluations=1.0,
        segment_evaluations=(1.0,),
        settings=to_dict(config),
        origin=Origin(run="small", attempt="x", held_out_index="y", extractor=""),
    )


def test_a_report_of_the_run_tells_its_own_settings_before_its_checkpoint(place, caplog):
    (manifest,) = choose_checkpoints(
        f"{place}/runs/small", which="newest", config=StoreConfig()
    ).manifests
    store = open_store(f"{place}/elsewhere", StoreConfig())
    assert own_eval(store, manifest) == OWN
    again = dataclasses.replace(OWN, samples=30)
    key = evaluation_key("small", 200, "report.json")
    whole = report_of(again)
    store.put(key, whole.to_json())
    assert own_eval(store, manifest) == again
    # Who can write to the store could have this machine read any of its files.
    elsewhere = FeatureConfig(name="inception", inception_weights="/dev/zero")
    store.put(key, report_of(dataclasses.replace(again, features=elsewhere)).to_json())
    of_machine = own_eval(store, manifest)
    assert of_machine is not None
    assert of_machine.features == FeatureConfig(name="inception")
    damaged = [dataclasses.replace(whole, settings={"samples": "x"}).to_json(), b"[]", b"{"]
    damaged.append(whole.to_json().replace(b'"samples": 30', b'"samples": 31'))
    for data in damaged:
        store.put(key, data)
        caplog.clear()
        assert own_eval(store, manifest) == OWN
        assert store.uri(key) in caplog.text
    older = dataclasses.replace(manifest, science={})
    assert own_eval(store, older) is None


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
def test_what_is_measured_is_read_and_not_measured_again(place, tmp_path):
    said: list[str] = []
    (report,) = evaluate_checkpoints(config(place, output=str(tmp_path)), report=said.append)
    (file,) = tmp_path.rglob("report.json")
    assert str(file) in said[0]
    assert (file.parent / "grid.png").is_file()
    other = dataclasses.replace(report, network_evaluations=-1.0)
    file.write_bytes(other.to_json())
    assert evaluate_checkpoints(config(place, output=str(tmp_path)), report=quiet) == [other]
    other = evaluate_checkpoints(config(place, output=str(tmp_path), seed=2), report=quiet)
    assert other[0].distances != report.distances
    assert CheckpointReport.from_json(report.to_json()) == report


@pytest.mark.slow
def test_a_report_that_cannot_be_believed_is_put_aside_and_measured_again(place, tmp_path, caplog):
    (report,) = evaluate_checkpoints(config(place, output=str(tmp_path)), report=quiet)
    (file,) = tmp_path.rglob("report.json")
    whole = file.read_bytes()
    distance = f'"frechet": {report.distances[0].frechet}'.encode()
    without_checksum = {k: v for k, v in json.loads(whole).items() if k != "sha256"}
    elsewhere = dataclasses.replace(report, images=100)
    damaged = (
        whole.replace(distance, b'"frechet": 0.0001'),
        whole[:-5],
        b"[" * 100_000,
        json.dumps(without_checksum).encode(),
        elsewhere.to_json(),
    )
    for number, data in enumerate(damaged):
        assert data != whole
        file.write_bytes(data)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            again = evaluate_checkpoints(config(place, output=str(tmp_path)), report=quiet)
        assert again == [report]
        assert file.read_bytes() == whole
        # Trackers of other tests may still be trying, in threads of their own.
        own = [record for record in caplog.records if record.threadName == "MainThread"]
        (line,) = (record.getMessage() for record in own)
        assert line.startswith(f"{file} cannot be believed: ")
        aside = file.with_name(f"report.json.damaged-{number}" if number else "report.json.damaged")
        assert aside.read_bytes() == data
        assert line.endswith(f"it is kept as {aside.name} and made again")


@pytest.mark.slow
def test_figures_that_cannot_be_written_are_shown(place, tmp_path, capsys):
    words = [f"checkpoint={place}/runs/small", f"home={place}/home", "device=cpu"]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        code = main([*words, f"output={tmp_path}/full", "seed=77"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    written = capsys.readouterr()
    assert code == 1
    assert "Traceback" not in written.err
    assert f"could not be written: Cannot write {tmp_path}/full/small/evaluation" in written.err
    assert "output=FOLDER writes reports elsewhere" in written.err
    shown = written.out.splitlines()[-1].split()
    (again,) = evaluate_checkpoints(
        config(place, output=str(tmp_path / "results"), seed=77), report=quiet
    )
    assert f"{again.distances[0].frechet:.4f}" in shown


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


def test_a_single_held_out_image_is_no_reference(place, tmp_path):
    prefix = tmp_path / "one"
    shutil.copytree(place / "datasets" / "kinds", prefix)
    shutil.rmtree(prefix / "test")
    images, _ = two_kinds(1, 0)
    pixels = (images * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    write_dataset([LabelledImage(as_png(pixels[0]), 0)], str(prefix / "test"))
    real = dataclasses.replace(config(place).data, prefix=str(prefix))
    with pytest.raises(ConfigError, match=r"has 1 held-out image, .*--hold-out"):
        evaluate_checkpoints(config(place, data=real), report=quiet)


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
        *("run", "images", "weights", "extractor", "sampler", "guidance", "NFE", "n", "reference"),
        *("Fréchet", "real", "diversity", "real", "nearest", "real", "close"),
        *("extractor's", "accuracy"),
    ]
    assert table[-1].split()[:9] == [
        *("small", "200", "ema", "random_conv", "midpoint", "20", "1.5", "80", "20")
    ]
    assert main([*words, "samples=1"]) == 2
    assert "samples=1" in capsys.readouterr().err


@pytest.mark.slow
def test_distances_are_to_the_reference_that_was_asked_for(place, tmp_path):
    held_out, train = (
        evaluate_checkpoints(config(place, reference=split), report=quiet)[0]
        for split in ("test", "train")
    )
    assert held_out == evaluate_checkpoints(config(place), report=quiet)[0]
    assert (held_out.measurement.reference, held_out.real_images) == ("test", 20)
    assert (train.measurement.reference, train.real_images) == ("train", 32)
    assert train.measurement.held_out_index != held_out.measurement.held_out_index
    one, two = held_out.distances[0], train.distances[0]
    assert one.frechet != two.frechet
    assert (one.diversity, one.nearest) == (two.diversity, two.nearest)
    # What stands in the place of the samples is never the reference itself.
    assert one.real is not None
    assert two.real is not None
    assert (one.real.images, two.real.images) == (20, 20)
    assert one.real.frechet > 0
    assert two.real.frechet > 0


@pytest.mark.slow
def test_samples_that_are_written_are_a_reference_of_themselves(place, tmp_path):
    asked = config(place, write_samples=True, output=str(tmp_path / "a"))
    (first,) = evaluate_checkpoints(asked, report=quiet)
    (file,) = tmp_path.rglob("samples.npz")
    pictures = np.load(file)["arr_0"]
    assert pictures.shape == (20, 8, 8, 1)
    (again,) = evaluate_checkpoints(
        config(place, reference=str(file), output=str(tmp_path / "b")), report=quiet
    )
    assert again.distances[0].frechet == pytest.approx(0, abs=1e-6)
    assert first.distances[0].frechet > 100 * again.distances[0].frechet
    assert (again.measurement.reference, again.real_images) == ("file", 20)
    assert again.measurement.held_out_index == hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(BadReference, match="no such file"):
        evaluate_checkpoints(config(place, reference=str(tmp_path / "c.npz")), report=quiet)
    with pytest.raises(ConfigError, match="reference=tset is neither"):
        config(place, reference="tset")


@pytest.mark.slow
def test_pictures_of_the_held_out_images_in_a_file_are_the_held_out_images(place, tmp_path):
    images, _ = two_kinds(20, 0)
    pixels = (images * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "reference.npz", pixels)
    (split,) = evaluate_checkpoints(config(place), report=quiet)
    (file,) = evaluate_checkpoints(
        config(place, reference=f"file://{tmp_path}/reference.npz", output=str(tmp_path)),
        report=quiet,
    )
    assert file.distances == split.distances


def test_a_runs_own_file_of_statistics_is_not_read_on_the_stores_word(place, caplog):
    (manifest,) = choose_checkpoints(
        f"{place}/runs/small", which="newest", config=StoreConfig()
    ).manifests
    store = open_store(f"{place}/another", StoreConfig())
    for reference, taken in (
        ("/etc/x.npz", "test"),
        ("s3://bucket/x.npz", "s3://bucket/x.npz"),
        ("train", "train"),
    ):
        own = dataclasses.replace(OWN, reference=reference)
        store.put(evaluation_key("small", 200, "report.json"), report_of(own).to_json())
        found = own_eval(store, manifest)
        assert found is not None
        assert found.reference == taken
    assert "unless reference=FILE.npz is given" in caplog.text
