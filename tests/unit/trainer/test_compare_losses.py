"""Comparing loss curves: the arithmetic, the command, and its answers to mistakes."""

import json
import math

import pytest

from tests.support.tracked import open_tracker
from trainer.cli.compare_losses import main
from trainer.metrics.curves import CurvesError, curves_as_json, differences, read_curves
from trainer.metrics.mlflow_backend import check_tracker
from trainer.metrics.tracker import TrackingConfig

CURVE = {16: 4.0, 32: 2.0, 48: 1.0}


def written(tmp_path, name, metrics):
    path = tmp_path / f"{name}.json"
    path.write_text(curves_as_json(metrics, about={}))
    return str(path)


def test_equal_curves_have_no_difference():
    (found,) = differences({"loss": CURVE}, {"loss": dict(CURVE)})
    assert (found.points, found.unmatched, found.largest, found.first_at) == (3, 0, 0.0, None)


def test_the_first_divergence_and_the_largest_difference_are_found():
    (found,) = differences({"loss": CURVE}, {"loss": {16: 4.0, 32: 2.5, 48: 0.5}})
    assert (found.first_at, found.first) == (32, (2.0, 2.5))
    assert (found.largest, found.largest_at) == (0.5, 48)


@pytest.mark.parametrize(("tolerance", "first_at"), [(0.1, 32), (0.2, 48), (0.5, None)])
def test_what_is_within_the_tolerance_does_not_diverge(tolerance, first_at):
    other = {16: 4.0, 32: 2.5, 48: 0.5}
    (found,) = differences({"loss": CURVE}, {"loss": other}, tolerance=tolerance)
    assert found.first_at == first_at


def test_only_common_positions_count():
    (found,) = differences({"loss": CURVE}, {"loss": {32: 2.0, 64: 9.0}})
    assert (found.points, found.unmatched, found.largest) == (1, 3, 0.0)


def test_values_that_are_not_finite():
    def largest(a, b):
        return differences({"loss": {1: a}}, {"loss": {1: b}})[0].largest

    assert largest(math.nan, math.nan) == 0
    assert largest(0.0, -0.0) == 0
    assert largest(math.nan, 1.0) == math.inf
    assert largest(math.inf, 1.0) == math.inf
    assert largest(math.inf, math.inf) == 0


def test_curves_survive_a_file_to_the_last_bit(tmp_path):
    curves = {"loss": {1: 0.1 + 0.2, 2: 1e-300}, "norm": {1: 1 / 3, 2: 7.0}}
    assert read_curves(tmp_path / written(tmp_path, "a", curves)) == curves


def test_the_command_tells_same_from_different(tmp_path, capsys):
    a = written(tmp_path, "a", {"loss/total": CURVE, "optim/gradient_norm": CURVE})
    b = written(tmp_path, "b", {"loss/total": {**CURVE, 32: 2.002}, "optim/gradient_norm": CURVE})
    assert main([a, a]) == 0
    assert "the same, bit for bit" in capsys.readouterr().out
    assert main([a, b]) == 1
    told = capsys.readouterr().out
    assert "first apart at 32 images: 2.0 and 2.002" in told
    assert "DIFFERENT from 32 images on" in told
    assert main([a, b, "--tolerance", "1e-2"]) == 0
    assert main([a, b, "--metrics", "optim/gradient_norm"]) == 0


def test_a_run_that_stopped_early_is_not_the_same(tmp_path, capsys):
    whole = written(tmp_path, "whole", {"loss/total": CURVE})
    begun = written(tmp_path, "begun", {"loss/total": {16: 4.0, 32: 2.0}})
    for sides in ((whole, begun), (begun, whole)):
        assert main([*sides]) == 1
        verdict = capsys.readouterr().out.splitlines()[-1]
        assert verdict.startswith("DIFFERENT: 1 points are on one side only")
        assert main([*sides, "--common-points"]) == 0
        verdict = capsys.readouterr().out.splitlines()[-1]
        assert verdict == "the same, bit for bit, at the points that both have"
    other = written(tmp_path, "other", {"loss/total": {16: 4.5, 32: 2.0}})
    assert main([whole, other, "--common-points"]) == 1
    assert "DIFFERENT from 16 images on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        ("no json", "does not hold curves"),
        ("[1, 2]", "does not hold curves"),
        ('{"images": [1], "metrics": {"loss/total": [1.0, 2.0]}}', "does not hold curves"),
        ('{"images": [1], "metrics": {"loss/total": ["x"]}}', "does not hold curves"),
        ('{"images": [7], "metrics": {"loss/total": [1.0]}}', "no images in common"),
        ('{"images": [16], "metrics": {"loss/scale_0": [1.0]}}', "not hold the same metrics"),
        ('{"images": [16], "metrics": {"norm": [1.0]}}', "no metric that matches"),
        ('{"images": [], "metrics": {"loss/total": []}}', "no point"),
    ],
)
def test_mistakes_are_told_in_one_paragraph(content, words, tmp_path, capsys):
    a = written(tmp_path, "a", {"loss/total": CURVE})
    b = tmp_path / "b.json"
    if content is not None:
        b.write_text(content)
    assert main([a, str(b)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert words in told
    assert told.count("\n") == 1


def test_metrics_of_different_positions_have_no_file():
    with pytest.raises(CurvesError, match="same positions"):
        curves_as_json({"a": {1: 1.0}, "b": {2: 1.0}}, about={})


@pytest.mark.parametrize("tolerance", ["-1", "1", "x"])
def test_a_tolerance_is_a_share(tolerance, capsys):
    with pytest.raises(SystemExit):
        main(["a", "b", f"--tolerance={tolerance}"])
    assert "--tolerance" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A home with three runs; two share a name, and the newest of them has other losses."""
    home = tmp_path_factory.mktemp("home")
    check_tracker(TrackingConfig(), str(home))
    for name, scale in (("one", 1.0), ("again", 3.0), ("again", 1.0)):
        tracker = open_tracker(TrackingConfig(), home, name=name, identity=f"{name}-{scale:g}")
        for images, value in CURVE.items():
            tracker.metrics({"loss/total": scale * value, "speed/images_per_s": 5.0}, images=images)
        tracker.close("FINISHED")
    return home


@pytest.mark.slow
def test_runs_are_read_from_mlflow_by_name(tracked, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LAPFLOW_HOME", str(tracked))
    assert main(["run:one", "run:again"]) == 0
    assert main(["run:one", f"run:again@sqlite:///{tracked}/mlflow.db"]) == 0
    golden = written(tmp_path, "golden", {"loss/total": {**CURVE, 48: 1.25}})
    assert main([golden, "run:one"]) == 1
    assert "first apart at 48 images: 1.25 and 1.0" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("run:nobody", "no run named 'nobody'"),
        ("run:it's", 'no run named "it\'s"'),
        ("run:one@sqlite:////no/such.db", "no tracker file /no/such.db"),
        ("run:one@http://127.0.0.1:9", "http://127.0.0.1:9 cannot be read"),
        ("run:one@http://user:word@host", "MLFLOW_TRACKING_USERNAME"),
    ],
)
def test_runs_that_cannot_be_read(source, words, tracked, monkeypatch, capsys):
    monkeypatch.setenv("LAPFLOW_HOME", str(tracked))
    assert main(["run:one", source]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


@pytest.mark.slow
def test_an_empty_experiment_has_no_run(tracked, monkeypatch, capsys):
    monkeypatch.setenv("LAPFLOW_HOME", str(tracked))
    assert main(["run:one", "run:one", "--experiment", "other"]) == 2
    assert "'other'" in capsys.readouterr().err


def test_the_recorded_golden_file_is_readable():
    from tests.golden.losses.record import FILE

    assert len(json.loads(FILE.read_text())["images"]) == 30
