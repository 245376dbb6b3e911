"""What cannot be measured at the end of a run is told in words; the run is trained all the same."""

import json
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.encoded import as_png
from pipelines.ingest.write import LabelledImage, write_dataset
from trainer.cli.launch import main
from trainer.evaluation.reports import EvaluationReport

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_ranks")]

TINY = (
    "+exp=digits",
    "cluster.backend=local",
    "cluster.workers=1",
    "engine=plain",
    "model.depth=1",
    "model.width=16",
    "train.global_batch=64",
    "train.total_images=128",
    "checkpoint.interval_images=128",
    "eval.samples=20",
    "eval.sampler.steps=2",
    "eval.classifier=false",
    "eval.grid_interval_images=0",
    "data.prepare=none",
)
GOOD = as_png(np.arange(64, dtype=np.uint8).reshape(8, 8, 1))
BAD = b"<html>not found</html>"


@pytest.fixture
def launch(empty_tracker, tmp_path, capfd):
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(empty_tracker, home)

    def run(held_out: list[bytes], *overrides: str) -> tuple[int, str]:
        data = tmp_path / "data"
        if not data.exists():
            for split, images in (("train", [GOOD] * 30), ("test", held_out)):
                labelled = [LabelledImage(image, n % 10) for n, image in enumerate(images)]
                write_dataset(labelled, f"{data}/{split}")
        code = main([*TINY, f"home={home}", f"data.prefix={data}", *overrides])
        written = capfd.readouterr()
        assert "Traceback" not in written.out + written.err
        return code, written.out + written.err

    return run


def report(tmp_path: Path) -> dict:
    (file,) = tmp_path.glob("home/store/runs/digits/evaluation/*/report.json")
    return json.loads(file.read_text())


def measured(tmp_path: Path) -> dict:
    """All of the report but what the run's time was spent on, which grows with each launch."""
    return {name: each for name, each in report(tmp_path).items() if name not in ("time", "sha256")}


def status(tmp_path: Path) -> list[str]:
    with sqlite3.connect(tmp_path / "home" / "mlflow.db") as database:
        return [row[0] for row in database.execute("SELECT status FROM runs")]


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_held_out_images_skip_the_figures_and_lines_say_so(launch, tmp_path, count):
    code, output = launch([GOOD] * count)
    assert code == 0
    assert f"warning: data.name=digits has {count} held-out image" in output
    assert "no figure is measured at the end" in output
    assert "not measured: there are too few held-out images" in output
    figures = report(tmp_path)
    assert (figures["real_images"], figures["frechet"]) == (0, None)
    assert list(tmp_path.glob("home/store/runs/digits/evaluation/*/samples.npz"))
    assert status(tmp_path) == ["FINISHED"]
    code, output = launch([])
    assert code == 0
    assert "this run is complete" in output


def test_held_out_images_that_cannot_be_decoded_are_passed_over(launch, tmp_path):
    code, output = launch([GOOD, BAD, GOOD, GOOD, GOOD[: len(GOOD) // 2], GOOD])
    assert code == 0
    figures = report(tmp_path)
    assert (figures["real_images"], figures["unusable_real_images"]) == (4, 2)
    assert "4 held-out images (2 more cannot be used)" in output
    assert "skipping sample 1 in shard" in output


@pytest.mark.parametrize(
    ("held_out", "overrides", "reason"),
    [
        ([GOOD] * 8, ["eval.sampler.guidance_scale=1e38"], "the samples have diverged"),
        (
            [GOOD] * 8,
            ["eval.sampler.guidance_scale=1e38", "eval.sampler.solver=dopri5"],
            "solver=dopri5 with absolute_tolerance=1e-05",
        ),
        ([GOOD, *[BAD] * 12], [], "samples read cannot be used"),
        ([GOOD, BAD, BAD, BAD], [], "Of 4 images of the split test only 1 can be used"),
    ],
)
def test_what_cannot_be_measured_is_told_once_and_the_run_is_trained(
    launch, tmp_path, held_out, overrides, reason
):
    code, output = launch(held_out, *overrides)
    assert code == 1
    assert output.count(reason) == 1
    assert output.count("evaluating the EMA weights") == 1
    assert "the run is trained to its end" in output
    assert status(tmp_path) == ["FINISHED"]
    code, output = launch(held_out, *overrides)
    assert code == 1
    assert "images/s" not in output  # nothing is trained again
    assert output.count(reason) == 1


def test_a_picture_that_cannot_be_drawn_on_the_way_is_told_and_training_goes_on(launch, tmp_path):
    code, output = launch(
        [GOOD] * 8,
        "eval.sampler.guidance_scale=1e38",
        "eval.sampler.solver=dopri5",
        "eval.grid_interval_images=128",
        "train.total_images=192",
    )
    assert code == 1
    assert "no samples are shown of 128 images: solver=dopri5 with" in output
    assert "192/192 images" in output
    assert "the run is trained to its end" in output
    assert status(tmp_path) == ["FINISHED"]


def test_figures_that_cannot_be_written_are_shown_and_the_run_is_trained(launch, tmp_path):
    folder = tmp_path / "home/store/runs/digits"
    folder.mkdir(parents=True)
    (folder / "evaluation").write_bytes(b"in the place of the folder")
    code, output = launch([GOOD] * 8)
    assert code == 1
    (line,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert f"trained to its end ({folder}/checkpoints/000000000128)" in line
    assert f"Cannot write {folder}/evaluation/000000000128/samples.npz: a part of the path" in line
    assert "its figures stand above and nowhere else" in line
    (shown,) = (line for line in output.splitlines() if line.startswith("Fréchet distance"))
    assert "samples.npz" not in output.replace(line, "")
    assert status(tmp_path) == ["FINISHED"]

    (folder / "evaluation").unlink()
    code, output = launch([GOOD] * 8)
    assert code == 0
    assert "images/s" not in output  # nothing is trained again
    assert shown in output.splitlines()
    report(tmp_path)


def test_a_damaged_report_is_put_aside_and_the_run_is_measured_again(launch, tmp_path):
    code, output = launch([GOOD] * 8)
    assert code == 0
    (shown,) = (line for line in output.splitlines() if line.startswith("Fréchet distance"))
    (file,) = tmp_path.glob("home/store/runs/digits/evaluation/*/report.json")
    whole = file.read_bytes()
    figures, measured_before = report(tmp_path), measured(tmp_path)
    changed = whole.replace(f'"frechet": {figures["frechet"]}'.encode(), b'"frechet": 0.0001')
    older = json.dumps({name: each for name, each in figures.items() if name != "sha256"}).encode()
    for number, data in enumerate((changed, whole[:100], b"[" * 100_000, b"\xff" * 10, older)):
        assert data != whole
        file.write_bytes(data)
        code, output = launch([])
        assert code == 0
        aside = file.with_name(f"report.json.damaged{f'-{number}' if number else ''}")
        assert aside.read_bytes() == data
        assert output.count(f"{file} cannot be believed: ") == 1
        assert f"it is kept as {aside.name} and made again" in output
        assert shown in output.splitlines()
        assert "images/s" not in output  # nothing is trained again
        assert measured(tmp_path) == measured_before
    stale = EvaluationReport.from_json(whole)
    stale = replace(stale, frechet=0.0001, origin=replace(stale.origin, attempt="another"))
    file.write_bytes(stale.to_json())
    code, output = launch([])
    assert code == 0
    assert f"{file} tells of another checkpoint" in output
    assert shown in output.splitlines()
    assert measured(tmp_path) == measured_before
    code, output = launch([])
    assert code == 0
    assert "this run is complete" in output
    assert "cannot be believed" not in output
