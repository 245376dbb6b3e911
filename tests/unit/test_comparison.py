"""The comparison of runs: means, costs, and what it refuses to put side by side."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from benchmarks import comparison, convergence
from benchmarks.comparison import Arm, UnlikeRuns, as_json, as_markdown, check_alike, measure_arm
from benchmarks.comparison_picture import draw_picture
from models.transformer.cost import training_flops
from tests.support.saved import manifest_of
from tests.unit.trainer.measurements import real_figures
from trainer.config.composition import compose_job
from trainer.evaluation.config import CheckpointEvaluationConfig
from trainer.evaluation.figures import Distance
from trainer.evaluation.reports import CheckpointReport, Measurement
from trainer.planning.placing import model_shape
from trainer.training.validate import validate

SCIENCE = {
    "data": {"name": "d", "image_size": 16, "channels": 3, "classes": 10},
    "model": {"depth": 1, "width": 16, "heads": 2},
    "flow": {"scales": 1},
    "train": {"seed": 0},
    "data_set": {"index_sha256": "a"},
}


def report(run: str, images: int, frechet: float) -> CheckpointReport:
    return CheckpointReport(
        checkpoint=f"runs/{run}/checkpoints/{images:012d}",
        run=run,
        images=images,
        real_images=50,
        network_evaluations=20.0,
        distances=(Distance(features="random_conv", frechet=frechet, real=real_figures(0.1)),),
        measurement=Measurement(
            attempt="x",
            weights="ema",
            samples=10,
            seed=1,
            sampler={"solver": "heun"},
            extractors={"random_conv": ""},
            held_out_index="b",
        ),
    )


def arm(name: str, flops: float, *runs: list[tuple[int, float]], science=SCIENCE) -> Arm:
    return Arm(
        name=name,
        runs={
            f"{name}-{seed}": [report(f"{name}-{seed}", *point) for point in run]
            for seed, run in enumerate(runs)
        },
        science=science,
        training_flops_per_image=flops,
    )


ONE = arm("one", 4e9, [(1000, 3.0), (2000, 2.0)], [(1000, 5.0), (2000, 2.5), (3000, 1.0)])
TWO = arm("two", 3e9, [(1000, 2.0), (2000, 1.0)], science={**SCIENCE, "flow": {"scales": 2}})


def test_the_mean_is_taken_where_every_seed_has_a_checkpoint():
    assert ONE.mean("random_conv") == [(1000, 4.0), (2000, 2.25)]
    assert ONE.teraflops(2000) == 8.0


def test_the_table_shows_means_seeds_costs_and_what_differs():
    text = as_markdown([ONE, TWO])
    assert "two differs from one in flow.scales: 1 -> 2." in text
    assert "| 1,000 | 4.0000 (3.0000, 5.0000) | 4.0 | 2.0000 (2.0000) | 3.0 |" in text
    assert "3,000" not in text
    everything = json.loads(as_json([ONE, TWO]))
    assert [each["arm"] for each in everything] == ["one", "two"]
    assert everything[0]["runs"]["one-1"][2]["distances"][0]["frechet"] == 1.0


def test_the_picture_has_both_panels_for_each_extractor(tmp_path):
    draw_picture([ONE, TWO], ["random_conv"], tmp_path / "picture.png")
    width, height = Image.open(tmp_path / "picture.png").size
    assert width > 2 * height


def test_arms_of_other_images_are_refused():
    other = replace(TWO, science={**TWO.science, "data_set": {"index_sha256": "z"}})
    check_alike([ONE, TWO])
    with pytest.raises(UnlikeRuns, match="different images"):
        check_alike([ONE, other])


def test_runs_of_an_arm_may_differ_in_their_seed_alone(monkeypatch):
    sciences = {
        "same": {**SCIENCE, "train": {"seed": 1}},
        "first": SCIENCE,
        "deeper": {**SCIENCE, "model": {"depth": 2, "width": 16, "heads": 2}},
    }

    monkeypatch.setattr(
        comparison,
        "evaluate_checkpoints",
        lambda config, **_: [report(config.checkpoint, 1, 1.0)],
    )
    monkeypatch.setattr(
        comparison,
        "open_checkpoint",
        lambda uri, _: (None, None, manifest_of(sciences[uri.split("/")[1]])),
    )
    config = CheckpointEvaluationConfig(checkpoint="")
    joined = measure_arm("arm", ["first", "same"], config)
    assert set(joined.runs) == {"first", "same"}
    # 6 FLOPs for each multiply-add of a one-scale forward pass: 64 tokens of width 16.
    assert joined.training_flops_per_image == 6 * (
        64 * (12 * 16 * 16 + 2 * 64 * 16 + 2 * 12 * 16) + (6 + 2) * 16 * 16 + 256 * 16 + 16 * 16
    )
    with pytest.raises(UnlikeRuns, match=r"model\.depth: 1 -> 2"):
        measure_arm("arm", ["first", "deeper"], config)


def test_arms_that_were_measured_otherwise_are_refused():
    reports = [report("two-0", 1000, 2.0)]
    reports[0] = replace(
        reports[0], measurement=replace(reports[0].measurement, held_out_index="another")
    )
    other = replace(TWO, runs={"two-0": reports})
    with pytest.raises(UnlikeRuns, match="two-0/checkpoints/000000001000 was measured with random"):
        check_alike([ONE, other])
    check_alike([ONE, TWO])


@pytest.mark.parametrize("images", [64, 64_000, 1_000_000])
def test_trainings_of_one_cost_differ_by_less_than_an_update(images):
    words = ["+exp=cifar10", "data.image_size=32"]
    one, two = [*words, "flow=one_scale"], [*words, "flow=two_scales"]
    jobs = compose_job(one), compose_job(two)
    per_image, of_two = (training_flops(model_shape(job)) for job in jobs)
    batch = jobs[0].train.global_batch
    found = convergence.images_of_cost(one, two, images)
    assert found % batch == 0
    assert found >= batch
    assert found == batch or abs(found * per_image - images * of_two) <= batch * per_image / 2
    assert convergence.images_of_cost(two, two, images) == images


@pytest.mark.parametrize("folder", ["missing", "flat", "file"])
def test_pictures_without_classes_are_refused_before_they_are_trained_on(folder, tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat/one.png")
    (tmp_path / "file").write_text("no folder")
    images, output = tmp_path / folder, tmp_path / "output"
    # As the help has it: settings come last.
    with pytest.raises(SystemExit) as told:
        convergence.main([str(images), "--minutes", "4", "--output", str(output), "model.depth=4"])
    assert told.value.code == 2
    assert f"{images} holds no folder of pictures" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("flow", ["one_scale", "two_scales"])
def test_what_a_gpu_trains_can_be_trained(flow):
    words = ["+exp=cifar10", "data.image_size=32", "cluster.backend=local", "cluster.workers=1"]
    job = compose_job([*words, f"flow={flow}", *convergence._ON_GPU])
    validate(job)
    assert job.engine.precision == "bf16"
