"""The command that runs all benchmarks of a GPU: what it keeps, whatever becomes of a part."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, planner
from benchmarks.gpu import PARTS, Part, run_parts

WRITES = "import json, sys; json.dump({'rows': [1]}, open(sys.argv[2], 'w')); print('measured')"


def part(name: str, script: str, **more: object) -> Part:
    settings = {"limit_s": 100.0, "has_rows": False} | more
    return Part(name=name, words=("-c", script), **settings)


def test_what_fails_or_takes_too_long_is_kept_and_the_next_one_begins(tmp_path):
    output = tmp_path / "below" / "gpu.json"
    run_parts(
        [
            part("fails", "raise SystemExit(3)"),
            part("hangs", "import time; print('begun', flush=True); time.sleep(600)", limit_s=3.0),
            part("measures", WRITES, has_rows=True),
        ],
        output=output,
        budget_s=1000,
    )
    fails, hangs, measures = json.loads(output.read_text())["parts"]
    assert fails["end"] == "exit code 3"
    assert hangs["end"] == "ended after 3 s"
    assert measures["end"] == "done"
    assert measures["report"] == {"rows": [1]}
    assert "measured" in measures["output"]


def test_no_part_begins_when_the_time_is_spent(tmp_path):
    found = run_parts([part("late", WRITES)], output=tmp_path / "gpu.json", budget_s=0)
    assert found[0]["end"].startswith("not begun")


def test_all_parts_fit_into_25_minutes():
    assert sum(each.limit_s for each in PARTS) <= 25 * 60
    assert len({each.name for each in PARTS}) == len(PARTS)


@pytest.mark.parametrize("each", PARTS[1:], ids=lambda each: each.name)
def test_each_benchmark_takes_its_options_and_measures_on_no_processor(each, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _, name, *words = each.words
    module = importlib.import_module(name)
    # Of a package one module is named, as `__main__` does.
    main = getattr(module, "main", None) or importlib.import_module(f"{name}.{words.pop(0)}").main
    with pytest.raises(SystemExit, match="nothing was measured"):
        main(words)


def test_without_a_gpu_nothing_is_measured_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="finds no CUDA device here; run make bench-gpu"):
        gpu.main(["--output", str(tmp_path / "gpu.json")])
    assert not list(tmp_path.iterdir())


def test_a_part_that_does_not_exist_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--output", str(tmp_path / "gpu.json"), "--only", "training,tea"])
    assert "--only tea is no part" in capsys.readouterr().err


@pytest.mark.parametrize("step", planner.MEASURED, ids=lambda step: step.what)
def test_the_planner_promises_less_than_was_measured_as_the_page_says(step):
    planned = planner.predict(step)
    factor = step.ms / (1e3 * planned.total)
    # Nothing runs faster than what it is made of, and where products are many they are most of it.
    assert factor > 1
    if planned.compute + planned.encoding > 0.1:
        assert factor < 2.5
    page = (Path(planner.__file__).parents[1] / "docs" / "benchmarks.md").read_text()
    products_ms = 1e3 * planned.compute
    assert f"{products_ms:.0f} ms" in page or f"{products_ms:.1f} ms" in page
