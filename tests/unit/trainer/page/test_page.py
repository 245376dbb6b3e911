"""The page of runs: valid, whole, without scripts or secrets, and honest in its tables."""

import io
import json
import math
import re
import statistics

import html5lib
import pytest
from PIL import Image

from pipelines.documents import seal
from tests.support.saved import save_random_model
from tests.unit.trainer.page.told import (
    ABOUT,
    SETTINGS,
    png,
    settings_of,
    tell_end,
    tell_figures,
    tell_run,
)
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.reader import CheckpointReader
from trainer.evaluation.figures import Measures
from trainer.page.arms import arms_of
from trainer.page.chart import compact
from trainer.page.markup import Html, join, style_sheet, tag, text
from trainer.page.page import make_page
from trainer.page.story import read_story
from trainer.page.style import STYLE
from trainer.storage.local import LocalStore

HOSTILE = "</style></title><script>alert(1)</script><img src=x onerror='alert(2)'>\"'&\x1b[2J"


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path)


def parsed(page: str):
    """Parses a page as browsers do; any error of the parser is one of the test."""
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(page)


def elements(page: str):
    return [each for each in parsed(page).iter() if isinstance(each.tag, str)]


def words(page: str) -> str:
    return " ".join(" ".join(parsed(page).itertext()).split())


def page_of(store, *runs: str) -> str:
    return make_page([read_story(store, run) for run in runs])


def test_a_page_is_valid_and_loads_nothing(store):
    tell_run(store, "a")
    for images in (3200, 6400):
        tell_figures(store, "a", images, 2.0)
    page = page_of(store, "a")
    found = elements(page)
    names = {each.tag.rpartition("}")[2] for each in found}
    assert {"svg", "img", "table", "figure", "details", "style"} <= names
    assert not names & {"script", "link", "iframe", "object", "embed", "form", "base", "a"}
    assert all(each.get("src").startswith("data:image/png;base64,") for each in found
               if each.tag == "img")  # fmt: skip
    addresses = [name for each in found for name in each.attrib if name.endswith(("href", "src"))]
    assert set(addresses) == {"src"}
    assert re.search(r"url\(|@import|expression", STYLE) is None
    assert "Content-Security-Policy" in page
    assert "default-src &#x27;none&#x27;" in page
    ids = [each.get("id") for each in found if each.get("id")]
    assert len(ids) == len(set(ids))
    assert all(each.get("alt") for each in found if each.tag == "img")


def test_a_page_tells_what_was_trained_and_at_what_cost(store):
    tell_run(store, "a")
    tell_figures(store, "a", 6400, 2.0)
    told = words(page_of(store, "a"))
    for part in (
        "trained on digits",
        "depth 2, width 32",
        "2 scales",
        "wall time 30s",
        "Fréchet distance by random_conv to held-out images, 100 samples",
        "sampler solver=heun, steps=10",
        "python -m trainer.launch +exp=digits",
        "optim.learning_rate 0.001",
        "Loss by scale",
        "In the course of training",
    ):
        assert part in told, part


def test_the_same_runs_give_the_same_bytes(store):
    tell_run(store, "a")
    tell_figures(store, "a", 6400, 2.0)
    assert page_of(store, "a") == page_of(store, "a")


def test_nothing_that_a_run_tells_is_markup(store):
    tell_run(
        store,
        "a",
        settings={**settings_of(data={"name": HOSTILE}), HOSTILE: {HOSTILE: HOSTILE}},
        about={**ABOUT, "command": HOSTILE, HOSTILE: HOSTILE, "device": HOSTILE},
        metrics=("loss/total", f"loss/scale_{HOSTILE}", f"loss_by_time/scale_0_{HOSTILE}"),
    )
    tell_run(store, "b", settings=settings_of(data={"name": HOSTILE}))
    tell_figures(store, "a", 6400, 2.0, features=HOSTILE)
    tell_figures(store, "a", 3200, 2.0, features=HOSTILE)
    for runs in (("a",), ("a", "b")):
        page = page_of(store, *runs)
        found = elements(page)
        assert "script" not in {each.tag.rpartition("}")[2] for each in found}
        attributes = [name for each in found for name in each.attrib]
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        assert "<script" not in page
        assert "\x1b" not in page
        assert "alert(1)" in words(page)  # told, as what it is


def test_no_credentials_are_told(store):
    tell_run(
        store,
        "a",
        settings=settings_of(
            store={"uri": "s3://key:hunter2@bucket/x"}, x={"y": ["?token=hunter2"]}
        ),
        about={"command": "launch tracking.uri=http://me:hunter2@host", "https://a:hunter2@b": "c"},
    )
    assert "hunter2" not in page_of(store, "a")


def tables(page: str) -> list[str]:
    return [" ".join(" ".join(each.itertext()).split()) for each in elements(page)
            if each.tag == "table"]  # fmt: skip


def test_figures_of_different_protocols_share_no_table(store):
    tell_run(store, "a")
    tell_figures(store, "a", 6400, 2.25)
    tell_figures(store, "a", 6400, 3.25, samples=200)
    tell_figures(store, "a", 6400, 4.25, features="learned_conv")
    figures = ("2.2500", "3.2500", "4.2500")
    with_one = [table for table in tables(page_of(store, "a")) if any(f in table for f in figures)]
    assert [sum(figure in table for figure in figures) for table in with_one] == [1, 1, 1]


def test_each_figure_has_one_column_and_real_images_have_their_own(store):
    def measures(value: float) -> Measures:
        return Measures(
            spatial_frechet=value,
            inception_score=value,
            kernel_distance=value,
            precision=value,
            recall=value,
            sliced_wasserstein=value,
        )

    tell_run(store, "a")
    tell_figures(store, "a", 6400, 2.25, more=measures(0.6), more_real=measures(0.99))
    (table,) = (each for each in elements(page_of(store, "a")) if each.tag == "table"
                and "sampling seed" in "".join(each.itertext()))  # fmt: skip
    heads, row = (["".join(cell.itertext()) for cell in line] for line in table.iter("tr"))
    assert dict(zip(heads, row, strict=True)) == {
        "run": "a",
        "seed": "0",
        "images": "6,400",
        "sampling seed": "1",
        "Fréchet": "2.2500",
        "Fréchet of real images": "0.5000",
        "times real": "4.5",
        "spatial Fréchet": "0.6",
        "Inception Score": "0.6",
        "kernel distance": "0.6",
        "precision": "0.600",
        "recall": "0.600",
        "sliced Wasserstein": "0.6",
        "sliced Wasserstein of real images": "0.99",
        "diversity": "1",
        "diversity of real images": "2",
        "nearest to held-out images": "1.5",
    }


def test_seeds_of_one_arm_are_told_with_their_spread(store):
    for seed, frechet in enumerate((2.0, 2.5, 3.0)):
        tell_run(store, f"a-{seed}", settings=settings_of(train={"seed": seed}), offset=seed)
        tell_figures(store, f"a-{seed}", 6400, frechet)
    tell_run(store, "wide", settings=settings_of(model={"width": 64}))
    tell_figures(store, "wide", 6400, 9.0)
    page = page_of(store, "a-0", "a-1", "a-2", "wide")
    told = words(page)
    assert "2.5 ± 0.5" in told
    assert "2 arms" in told
    assert "width=32" in told
    assert "width=64" in told
    assert "(mean of 3)" in told
    assert page.count('class="band ') == page.count("mean of 3)</li>") > 0
    assert "What differs" in told
    assert parsed(page)


def test_sampling_seeds_are_averaged_before_training_seeds(store):
    for seed in (0, 1):
        tell_run(store, f"a-{seed}", settings=settings_of(train={"seed": seed}))
        for sampling, frechet in ((1, 2.0 + seed), (2, 4.0 + seed)):
            tell_figures(store, f"a-{seed}", 6400, frechet, seed=sampling)
    told = words(page_of(store, "a-0", "a-1"))
    for spread in ("3 ± 1.4", "4 ± 1.4", "3.5 ± 0.71"):
        assert spread in told


def test_runs_are_compared_by_the_sampling_seeds_that_all_have(store):
    """As the tables of sweeps and of evaluation do: more sets of one run are no other noise."""
    for seed, sets in ((0, {1: 2.0, 2: 8.0}), (1, {1: 3.0})):
        tell_run(store, f"a-{seed}", settings=settings_of(train={"seed": seed}))
        for sampling, frechet in sets.items():
            tell_figures(store, f"a-{seed}", 6400, frechet, seed=sampling)
    assert "2.5 ± 0.71" in words(page_of(store, "a-0", "a-1"))


def test_a_training_that_was_done_twice_is_one_seed(store):
    for run, frechet in (("a", 2.0), ("a-again", 2.4)):
        tell_run(store, run, settings=settings_of(train={"seed": 0}))
        tell_figures(store, run, 6400, frechet)
    told = words(page_of(store, "a", "a-again"))
    assert "one training, several times" in told
    assert "seeds" not in told
    tell_run(store, "b", settings=settings_of(train={"seed": 1}))
    tell_figures(store, "b", 6400, 3.2)
    told = words(page_of(store, "a", "a-again", "b"))
    assert "one arm, several seeds" in told
    assert re.search(r"2 seeds\s+6,400\s+2\.7 ± 0\.71", told)


def test_a_curve_is_of_the_same_sampling_seeds_all_along(store):
    tell_run(store, "a")
    for images, seed, frechet in ((3200, 7, 9.0), (6400, 1, 2.0)):
        tell_figures(store, "a", images, frechet, seed=seed)
    curve = "over the run, lower is better"
    assert curve not in page_of(store, "a")
    tell_figures(store, "a", 3200, 4.0, seed=1)
    page = page_of(store, "a")
    assert curve in page
    assert "a: 4 at 3,200" in page
    assert "a: 2 at 6,400" in page


def test_what_was_measured_twice_alike_counts_once(store):
    tell_run(store, "a")
    tell_figures(store, "a", 6400, 2.0)
    folder = "a/evaluation/000000006400"
    report = next(key for key in store.list(folder) if key.endswith("report.json"))
    store.put(f"{folder}/again/report.json", store.get(report))
    page = page_of(store, "a")
    assert page.count(">2.0000<") == 1
    assert "±" not in page


def test_arms_are_called_after_what_tells_them_apart(store):
    for scales, times in ((1, "null"), (2, "[0.5]")):
        flow = {"scales": scales, "critical_times": times}
        tell_run(store, f"k{scales}", settings=settings_of(flow=flow))
    stories = [read_story(store, run) for run in ("k1", "k2")]
    assert [arm.label for arm in arms_of(stories)] == ["scales=1", "scales=2"]


def test_what_cannot_be_believed_is_passed_over_and_left_where_it_is(store, caplog):
    tell_run(store, "a")
    tell_figures(store, "a", 6400, 2.0, grid=png()[:40])
    store.put("a/history/000000000002-00000.json", b"{}")
    store.put("a/history/000000003200-samples-one.png", b"GIF89a")
    store.put("a/goodput/000000000002.json", b"{}")
    before = store.list("")
    page = page_of(store, "a")
    assert parsed(page)
    told = caplog.text
    for name in ("2-00000.json", "3200-samples-one.png", "grid.png", "goodput/000000000002.json"):
        assert name in told
    assert store.list("") == before


def test_a_picture_of_too_many_pixels_is_not_decoded(store, caplog):
    tell_run(store, "a")
    bomb = bytearray(png())
    bomb[16:24] = (60_000).to_bytes(4) * 2
    tell_figures(store, "a", 6400, 2.0, grid=bytes(bomb))
    assert parsed(page_of(store, "a"))
    assert "grid.png" in caplog.text


def test_a_profile_of_colours_does_not_come_into_a_page(store):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, format="PNG", icc_profile=b"written by whoever" * 9)
    tell_run(store, "a")
    tell_figures(store, "a", 6400, 2.0, grid=buffer.getvalue())
    grid = read_story(store, "a").pictures.grid
    assert grid is not None
    assert set(Image.open(io.BytesIO(grid.content)).info) == set()


def save_checkpoint(store, run: str, images: int = 6400, **groups) -> Manifest:
    """Saves a small model under a run's name, with settings by group beside those of its shape."""
    save_random_model(store, run=run, images=images, science=groups)
    newest = CheckpointReader(store, run=run).newest_valid()
    assert newest is not None
    assert newest.images == images
    return newest


def test_a_page_tells_what_only_checkpoints_know(store):
    tell_run(store, "a")
    manifest = save_checkpoint(store, "a")
    tell_end(store, "a", 6400, 2.25, attempt=manifest.attempt)
    story = read_story(store, "a")
    count = sum(math.prod(shape) for shape in manifest.parameters.values())
    assert story.parameters == count
    speed = statistics.median(story.curves["speed/images_per_s"].values())
    assert story.flops_per_image is not None
    assert story.flops_per_image > 6 * count  # every weight is used by at least one token
    assert story.mfu == pytest.approx(story.flops_per_image * speed / 989e12)
    assert story.device_hours == pytest.approx(30 / 3600)
    told = words(page_of(store, "a"))
    for part in (
        "complete",
        "Fréchet, random_conv 2.25",
        f"parameters {compact(count)}",
        "device hours 0.00833",
        "untrained",
        "9.0000",
        f"newest checkpoint 6,400 images, {manifest.saved_at}",
    ):
        assert part in told, part


def test_figures_of_a_checkpoint_that_was_replaced_head_no_page(store):
    tell_run(store, "a")
    tell_end(store, "a", 6400, 2.25, attempt="replaced")
    save_checkpoint(store, "a")
    story = read_story(store, "a")
    assert story.final is None
    assert story.pictures.grid is None
    assert "2.25" not in words(page_of(store, "a"))


def test_grids_are_of_what_they_are_called(store):
    tell_run(store, "a")
    tell_figures(store, "a", 640, 3.0)
    assert "EMA weights after 640 images" in words(page_of(store, "a"))
    tell_figures(store, "a", 6400, 2.0, weights="master")
    assert "EMA weights after 640 images" in words(page_of(store, "a"))
    tell_run(store, "b", settings=settings_of(train={"seed": 1}))
    tell_figures(store, "b", 3200, 2.0, weights="master")
    told = words(page_of(store, "a", "b"))
    assert "a, 640 images" in told
    assert "b, 3,200 images, trained weights" in told


def test_a_run_without_a_checkpoint_shares_the_arm_of_its_siblings(store):
    science = settings_of(data_set={"index_sha256": "c0ffee"})
    for seed in range(3):
        extra = {"seed": seed, "max_skipped_updates": 10}
        told = settings_of(data_set=science["data_set"], train={"seed": seed})
        tell_run(store, f"a-{seed}", settings=settings_of(train=extra), science=told)
    save_checkpoint(store, "a-0")
    save_checkpoint(store, "a-1", train={"seed": 1})
    (arm,) = arms_of([read_story(store, f"a-{seed}") for seed in range(3)])
    assert len(arm.stories) == 3


@pytest.mark.parametrize("value", [1.5e308, -1.5e308, 5e-324, 1e100])
def test_figures_of_any_size_are_told(store, value):
    for seed in (0, 1):
        tell_run(store, f"a-{seed}", settings=settings_of(train={"seed": seed}), offset=value)
        for images in (3200, 6400):
            for sampling in (1, 2):
                tell_figures(store, f"a-{seed}", images, value * (0.5 + seed / 2), seed=sampling)
    assert parsed(page_of(store, "a-0", "a-1"))


def test_a_run_that_has_hardly_begun_has_a_page(store):
    tell_run(store, "a", metrics=())
    assert "of its images" in words(page_of(store, "a"))
    assert read_story(store, "none").is_empty


def test_a_peak_that_is_not_known_gives_no_share_of_it(store):
    tell_run(store, "a", about={**ABOUT, "device": "a processor"})
    assert "peak not known" in words(page_of(store, "a"))


def test_history_of_another_training_is_not_told(store):
    tell_run(store, "a")
    told = {
        "identity": "two",
        "began_ms": 1,
        "about": {},
        "settings": dict(SETTINGS),
        "curves": {"loss/total": {"images": [64], "values": [0.25]}},
    }
    store.put("a/history/000000000002-00000.json", json.dumps(seal(told)).encode())
    assert read_story(store, "a").curves == {"loss/total": {64: 0.25}}


def test_markup_is_made_of_elements_alone():
    assert tag("p", "<b>", tag("b", "&"), class_="x") == '<p class="x">&lt;b&gt;<b>&amp;</b></p>'
    assert tag("img", alt='"', hidden=True, width=None) == '<img alt="&quot;" hidden>'
    assert join("<", Html("<br>")) == "&lt;<br>"
    assert text("a\nb") == "a\\nb"
    with pytest.raises(ValueError, match="no name of an attribute"):
        tag("p", **{"x onclick": "1"})
    with pytest.raises(ValueError, match="no name of an element"):
        tag("p onclick=1")
    with pytest.raises(ValueError, match="no '<'"):
        style_sheet("</style>")
