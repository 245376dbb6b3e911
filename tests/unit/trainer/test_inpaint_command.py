"""The commands that draw from a checkpoint: pictures in, pictures out, and clear refusals."""

import resource

import numpy as np
import pytest
from PIL import Image

from tests.support.saved import save_random_model
from trainer.cli import evaluate, inpaint, sample
from trainer.cli.pictures import write_picture
from trainer.config.reading import ConfigError
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig

# 8 pixels are shown as 48, and 4 lie between pictures and around them.
CELL, GAP, FACTOR = 52, 4, 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint of a random model in colour, a picture, and a mask: the left is known."""
    place = tmp_path_factory.mktemp("place")
    store = open_store(f"{place}/runs", StoreConfig())
    save_random_model(store, run="small")
    # What +exp=celeba_hq_256 trains: no label is ever dropped.
    without = {"train": {"label_dropout": 0.0}, "data_set": {"index_sha256": ""}}
    save_random_model(store, run="no_null_label", science=without)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(place / "image.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 255
    Image.fromarray(mask).save(place / "mask.png")
    Image.fromarray(mask[:4]).save(place / "flat.png")
    (place / "text.png").write_text("no picture")
    return place


def settings(place, **changes: object) -> list[str]:
    base = {
        "checkpoint": f"{place}/runs/small/checkpoints/000000000100",
        "image": place / "image.png",
        "mask": place / "mask.png",
        "label": 1,
        "output": place / "out.png",
        "columns": 3,
        "repeats": 2,
        "sampler.steps": 4,
        "device": "cpu",
        "home": place / "home",
    }
    return [f"{key}={value}" for key, value in {**base, **changes}.items()]


def cells(path) -> list[np.ndarray]:
    """The pictures of a row at their own size."""
    row = np.asarray(Image.open(path))
    assert row.shape[0] == CELL + GAP
    lefts = range(GAP, row.shape[1] - GAP, CELL)
    return [row[GAP:CELL:FACTOR, left : left + CELL - GAP : FACTOR] for left in lefts]


def test_a_row_shows_picture_mask_and_results_that_keep_what_is_known(place, capsys):
    assert inpaint.main(settings(place)) == 0
    assert capsys.readouterr().out == f"{place}/out.png\n"
    picture, mask, *results = cells(place / "out.png")
    assert np.array_equal(picture, np.asarray(Image.open(place / "image.png")))
    assert np.array_equal(mask[..., 0], np.asarray(Image.open(place / "mask.png")))
    assert len(results) == 3
    for result in results:
        assert np.array_equal(result[:, :4], picture[:, :4])
        assert not np.array_equal(result[:, 4:], picture[:, 4:])
    assert not np.array_equal(results[0], results[1])


def test_a_result_depends_on_its_place_and_seed_alone(place):
    outputs = {}
    for name, changes in {
        "three": {},
        "two": {"columns": 2},
        "other seed": {"seed": 2},
        "other label": {"label": 0, "sampler.guidance_scale": 3},
    }.items():
        assert inpaint.main(settings(place, output=place / f"{name}.png", **changes)) == 0
        outputs[name] = cells(place / f"{name}.png")
    for three, two in zip(outputs["three"][:4], outputs["two"], strict=True):
        # One step of 255 is what the rounding of another batch size may turn.
        assert np.abs(three.astype(int) - two).max() <= 1
    for other in ("other seed", "other label"):
        assert not np.array_equal(outputs[other][2], outputs["three"][2])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": "missing.png"}, "missing.png: there is no such file"),
        ({"image": "PLACE/text.png"}, "text.png is not a picture"),
        ({"image": "PLACE"}, "cannot be read"),
        ({"image": "PLACE/flat.png"}, "flat.png has 8 x 4 pixels, but the model works on 8 x 8"),
        ({"mask": "PLACE/flat.png"}, "mask=PLACE/flat.png has 8 x 4 pixels"),
        ({"label": 2}, "classes=[2] are not among 0 … 1"),
        ({"label": -1}, "label=-1 must be at least 0"),
        ({"columns": 0}, "columns=0"),
        ({"repeats": 0}, "repeats=0"),
        ({"sampler.solver": "dopri5"}, "dopri5 cannot fill in images"),
        ({"sampler.steps": 1}, "steps=1 is too few"),
        ({"checkpoint": "PLACE/runs/small/checkpoints/000000000200"}, "no valid checkpoint"),
        ({"lable": 1}, "did you mean label?"),
        ({"output": "PLACE/text.png/out.png"}, "cannot be written"),
    ],
)
def test_mistakes_are_named_in_one_line(place, capsys, changes, words):
    changed = {key: str(value).replace("PLACE", str(place)) for key, value in changes.items()}
    assert inpaint.main(settings(place, **changed)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert words.replace("PLACE", str(place)) in error


def test_samples_are_drawn_from_the_same_checkpoint(place, capsys):
    words = [
        word
        for word in settings(place, output=place / "grid.png", columns=2)
        if word.partition("=")[0] not in ("image", "mask", "label", "repeats")
    ]
    assert sample.main([*words, "sampler.solver=ab2", "batch=1"]) == 0
    assert capsys.readouterr().out == f"{place}/grid.png\n"
    assert np.asarray(Image.open(place / "grid.png")).shape == (2 * CELL + GAP, 2 * CELL + GAP, 3)
    for wrong, message in (
        ("batch=0", "batch=0 must be at least 1"),
        ("classes=[5]", "classes=[5]"),
        ("classes=[]", "classes=[] names no class"),
        ("columns=0", "columns=0 must be at least 1"),
        ("columns=-1", "columns=-1 must be at least 1"),
        ("device=banana", "device=banana cannot be used here"),
        ("device=cuda:99", "device=cuda:99 cannot be used here"),
        ("device=meta", "device=meta cannot be used here"),
    ):
        assert sample.main([*words, wrong]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error


def test_a_run_stands_for_its_newest_checkpoint(place):
    for command, extra in ((inpaint, ()), (sample, ("image", "mask", "label", "repeats"))):
        pictures = []
        for name in ("runs/small", "runs/small/checkpoints/000000000100"):
            words = settings(place, checkpoint=f"{place}/{name}", output=place / "run.png")
            kept = [word for word in words if word.partition("=")[0] not in extra]
            assert command.main(kept) == 0
            pictures.append((place / "run.png").read_bytes())
        assert pictures[0] == pictures[1]


@pytest.mark.parametrize(
    ("command", "left_out"),
    [
        (inpaint.main, ("columns",)),
        (sample.main, ("image", "mask", "label", "repeats")),
        (evaluate.main, ("image", "mask", "label", "repeats", "columns", "output")),
    ],
)
def test_guidance_by_a_null_label_that_was_never_trained_is_refused(
    place, capsys, command, left_out
):
    def words(run: str) -> list[str]:
        found = settings(place, checkpoint=f"{place}/runs/{run}")
        return [word for word in found if word.partition("=")[0] not in left_out]

    assert command([*words("no_null_label"), "sampler.guidance_scale=1.5"]) == 2
    error = capsys.readouterr().err
    assert "sampler.guidance_scale=1.5 needs a null label" in error
    assert "sampler.guidance_scale=1" in error
    if command is not evaluate.main:  # which needs a data set
        assert command(words("no_null_label")) == 0
        assert command([*words("small"), "sampler.guidance_scale=1.5"]) == 0


@pytest.mark.parametrize(
    ("command", "words", "named"),
    [
        (sample.main, [], "checkpoint"),
        (sample.main, ["columns=3"], "checkpoint"),
        (evaluate.main, ["samples=3"], "checkpoint"),
        (inpaint.main, ["checkpoint=x", "label=3"], "image and mask"),
    ],
)
def test_a_missing_setting_is_named_with_an_example(command, words, named, capsys):
    assert command(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {named} must be given, for example: python -m trainer.")
    assert " checkpoint=" in error
    assert error.count("\n") == 1


def test_a_value_that_cannot_be_read_is_told_without_internals(capsys):
    assert sample.main(["checkpoint=${nothing}"]) == 2
    error = capsys.readouterr().err
    assert "nothing" in error
    assert "object_type" not in error


def test_a_picture_is_written_whole_or_not_at_all_and_where_its_name_points(tmp_path):
    path = tmp_path / "new" / "picture.png"
    assert write_picture(str(path), b"before") == path
    link = tmp_path / "link.png"
    link.symlink_to(path)
    write_picture(str(link), b"after")
    assert link.is_symlink()
    assert path.read_bytes() == b"after"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"cannot be written: .*File too large"):
            write_picture(str(path), bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"after"
    assert list(path.parent.iterdir()) == [path]
