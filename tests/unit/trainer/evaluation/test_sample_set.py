"""A set of samples: the same images in every format, however it is cut and interrupted."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.contract import Level, Message, WorkerContext
from models.flow.sampler_config import SamplerConfig
from pipelines.shards import ShardedDataset
from tests.support.saved import save_random_model
from trainer.config.reading import ConfigError, to_dict
from trainer.evaluation.config import ModelSource
from trainer.evaluation.drawing import SamplesNotKept, draw_samples
from trainer.evaluation.loading import choose_model
from trainer.evaluation.sample_set import SamplePlan, SampleSet, WholeSet, part_size
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig

SAMPLES = 11


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    place = tmp_path_factory.mktemp("run")
    save_random_model(open_store(f"{place}/runs", StoreConfig()), run="small")
    return ModelSource(checkpoint=f"{place}/runs/small", home=f"{place}/home")


@pytest.fixture(scope="module")
def plan(source: ModelSource) -> SamplePlan:
    return SamplePlan(
        run="small",
        images=100,
        attempt=choose_model(source).manifest.attempt,
        weights="ema",
        sampler=to_dict(SamplerConfig(solver="euler", steps=2, guidance_scale=2.0)),
        seed=3,
        batch=2,
        classes=(1, 0),
        samples=SAMPLES,
        part_samples=4,
        format="npz",
    )


def test_a_plan_of_before_there_were_precisions_is_the_same(plan: SamplePlan) -> None:
    of_before = {
        name: value
        for name, value in asdict(plan).items()
        if name not in ("precision", "share_coarse")
    }
    text = json.dumps(of_before, sort_keys=True)
    assert plan.digest == hashlib.sha256(text.encode()).hexdigest()
    others = {replace(plan, precision="bf16").digest, replace(plan, share_coarse=2).digest}
    assert len(others | {plan.digest}) == 3


def put_down(folder: Path, plan: SamplePlan) -> SampleSet:
    return SampleSet(open_store(str(folder), StoreConfig()), plan)


def drawn(
    source: ModelSource,
    plan: SamplePlan,
    folder: Path,
    *,
    stop: Callable[[list[Message]], bool] = lambda _told: False,
    log: Callable[[Level, str], None] = lambda _level, _line: None,
) -> list[Message]:
    """Draws as a worker by itself does, until it is asked to stop; gives what it tells."""
    told: list[Message] = []
    context = WorkerContext(
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        attempt=0,
        device="cpu",
        stop_requested=lambda: stop(told),
        report=told.append,
        log=log,
    )
    put_down(folder, plan).claim()
    payload = {"source": to_dict(source), "plan": to_dict(plan), "output": str(folder)}
    draw_samples(context, payload)
    return told


def finished(source: ModelSource, plan: SamplePlan, folder: Path) -> WholeSet:
    drawn(source, plan, folder)
    samples = put_down(folder, plan)
    return samples.finish(samples.kept())


def pixels(folder: Path) -> np.ndarray:
    return np.load(folder / "samples.npz")["arr_0"]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_every_format_holds_the_same_images_with_classes_in_equal_parts(
    source: ModelSource, plan: SamplePlan, tmp_path: Path
) -> None:
    whole = finished(source, plan, tmp_path / "npz")
    # Euler makes one evaluation a step, and guidance two of it.
    assert whole.segment_evaluations == (2.0, 2.0)
    stored = np.load(tmp_path / "npz" / "samples.npz")
    images, labels = stored["arr_0"], stored["arr_1"]
    assert images.dtype == np.uint8
    assert images.shape == (SAMPLES, 8, 8, 3)
    assert len({image.tobytes() for image in images}) == SAMPLES
    assert labels.tolist() == [1, 0] * 5 + [1]
    assert set(files(tmp_path / "npz")) == {"plan.json", "samples.json", "samples.npz"}

    finished(source, replace(plan, format="png"), tmp_path / "png")
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        picture = Image.open(tmp_path / "png" / f"{label:04d}" / f"{index:06d}.png")
        assert np.array_equal(np.asarray(picture), image)
    assert Counter(path.parent.name for path in (tmp_path / "png").rglob("*.png")) == {
        "0000": 5,
        "0001": 6,
    }

    finished(source, replace(plan, format="mds"), tmp_path / "mds")
    dataset = ShardedDataset(str(tmp_path / "mds"))
    assert len(dataset) == SAMPLES
    for index in range(SAMPLES):
        sample = dataset.read(index)
        assert sample.label == labels[index]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample.data))), images[index])


def test_an_image_depends_on_seed_index_and_class_and_not_on_the_cut(
    source: ModelSource, plan: SamplePlan, tmp_path: Path
) -> None:
    finished(source, plan, tmp_path / "plan")
    expected = pixels(tmp_path / "plan")
    for name, changed in {
        "parts": replace(plan, part_samples=6),
        "more": replace(plan, samples=2 * SAMPLES),
    }.items():
        finished(source, changed, tmp_path / name)
        assert np.array_equal(pixels(tmp_path / name)[:SAMPLES], expected)
    # Another batch is another order of sums: one step of 255 is what rounding may turn.
    for batch in (1, 64):
        finished(source, replace(plan, batch=batch), tmp_path / f"batch {batch}")
        apart = np.abs(pixels(tmp_path / f"batch {batch}").astype(int) - expected)
        assert apart.max() <= 1
        assert (apart > 0).mean() < 0.01
    finished(source, replace(plan, seed=4), tmp_path / "seed")
    finished(source, replace(plan, classes=(0, 1)), tmp_path / "classes")
    for name in ("seed", "classes"):
        other = pixels(tmp_path / name)
        assert not any(np.array_equal(a, b) for a, b in zip(other, expected, strict=True))


@pytest.mark.parametrize("form", ["png", "npz", "mds"])
def test_a_set_goes_on_where_it_was_interrupted_to_the_same_bytes(
    source: ModelSource, plan: SamplePlan, tmp_path: Path, form: str
) -> None:
    plan = replace(plan, format=form)
    finished(source, plan, tmp_path / "whole")
    folder = tmp_path / "interrupted"
    # In the middle of the second of three parts.
    drawn(source, plan, folder, stop=lambda told: len(told) == 3)
    assert [part.number for part in put_down(folder, plan).kept()] == [0]
    assert put_down(folder, plan).whole() is None
    assert "index.json" not in files(folder)
    again = drawn(source, plan, folder)
    assert {each["part"] for each in again} == {1, 2}
    samples = put_down(folder, plan)
    whole = samples.finish(samples.kept())
    assert samples.whole() == whole
    assert files(folder) == files(tmp_path / "whole")


def test_a_part_is_drawn_again_that_is_gone_cut_or_has_a_damaged_record(
    source: ModelSource, plan: SamplePlan, tmp_path: Path
) -> None:
    plan = replace(plan, format="png")
    finished(source, plan, tmp_path / "whole")
    folder = tmp_path / "damaged"
    drawn(source, plan, folder)
    (folder / "0001" / "000000.png").unlink()
    record = folder / "parts" / "00001.json"
    record.write_bytes(record.read_bytes().replace(b'"samples": 4', b'"samples": 5'))
    lines: list[str] = []
    again = drawn(source, plan, folder, log=lambda _level, line: lines.append(line))
    assert {each["part"] for each in again} == {0, 1}
    assert any("000000.png is gone or was cut" in line for line in lines)
    assert any("00001.json cannot be believed" in line for line in lines)
    samples = put_down(folder, plan)
    samples.finish(samples.kept())
    assert files(folder) == files(tmp_path / "whole")


def test_a_kill_between_the_last_words_and_the_tidying_leaves_nothing(
    source: ModelSource, plan: SamplePlan, tmp_path: Path
) -> None:
    whole = finished(source, plan, tmp_path / "set")
    expected = files(tmp_path / "set")
    drawn(source, plan, tmp_path / "set")  # brings the parts back
    (tmp_path / "set" / ".tmp-0123").write_bytes(b"half")
    assert put_down(tmp_path / "set", plan).whole() == whole
    assert files(tmp_path / "set") == expected


def test_another_plan_or_foreign_files_are_refused_and_left_alone(
    source: ModelSource, plan: SamplePlan, tmp_path: Path
) -> None:
    finished(source, plan, tmp_path / "set")
    before = files(tmp_path / "set")
    sampler = {**plan.sampler, "steps": 3}
    for changed, words in (
        (replace(plan, seed=4), "seed is 3 there and 4 here"),
        (replace(plan, attempt="other"), f"attempt is {plan.attempt} there and other here"),
        (replace(plan, sampler=sampler), "sampler.steps is 2 there and 3 here"),
    ):
        with pytest.raises(ConfigError, match=words):
            put_down(tmp_path / "set", changed).claim()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match=r"other files, such as .*letter\.txt"):
        put_down(tmp_path / "other", plan).claim()
    plan_file = tmp_path / "set" / "plan.json"
    plan_file.write_bytes(plan_file.read_bytes().replace(b'"seed": 3', b'"seed": 4'))
    with pytest.raises(ConfigError, match=r"plan\.json cannot be believed"):
        put_down(tmp_path / "set", replace(plan, seed=4)).claim()
    plan_file.write_bytes(before["plan.json"])
    assert files(tmp_path / "set") == before


def test_a_place_that_takes_nothing_more_ends_the_drawing_with_a_word(
    source: ModelSource, plan: SamplePlan, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    put_down(folder, plan).claim()
    (folder / "parts" / "00001.npy").mkdir(parents=True)  # a folder in the place of a file
    with pytest.raises(SamplesNotKept, match=r"Cannot write .*00001\.npy.* run the same command"):
        drawn(source, plan, folder)
    (folder / "parts" / "00001.npy").rmdir()
    assert [part.number for part in put_down(folder, plan).kept()] == [0]
    finished(source, plan, folder)
    finished(source, plan, tmp_path / "whole")
    assert files(folder) == files(tmp_path / "whole")


def test_a_checkpoint_that_was_saved_anew_is_not_mixed_in(
    source: ModelSource, plan: SamplePlan, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="saved anew"):
        drawn(source, replace(plan, attempt="before"), tmp_path / "set")


def test_parts_are_whole_batches_many_enough_for_workers_and_small_enough_for_memory() -> None:
    assert part_size(50_000, batch=64, sample_bytes=256 * 256 * 3) == 256
    assert part_size(100, batch=64, sample_bytes=192) == 64
    assert part_size(10**7, batch=64, sample_bytes=256 * 256 * 3) == 64 * 21
    assert part_size(10**6, batch=4096, sample_bytes=2**20) == 4096
