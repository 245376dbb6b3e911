"""The command for a run's checkpoints: what it shows is so, and it deletes what it said."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.s3_server import S3Server
from tests.unit.trainer.checkpoint.handmade import upload
from tests.unit.trainer.export.runs import IMAGES, save_run
from tests.unit.trainer.export.runs import RUN as SMALL
from tests.unit.trainer.measurements import RUN, measured
from trainer.checkpoint import layout
from trainer.checkpoint.index import CheckpointIndex
from trainer.cli import checkpoints
from trainer.storage.open import open_store
from trainer.storage.store import Store, StoreConfig

TABLE = """\
images  saved at (UTC)       ranks  objects  Fréchet (random_conv)  kept because      state
   100  2026-02-19 12:00:00      2        2                      4  expires           whole
   200  -                        -        1                      -  expires           damaged
   250  -                        -        2                      -  expires           unfinished
   300  2026-02-19 12:00:00      2        2                   3.25  last              whole
   400  2026-02-19 12:00:00      2        2                      -  last              whole
   500  2026-02-19 12:00:00      2        2                    3.5  newest valid      whole
   600  -                        -        2                      -  may be under way  unfinished"""


def make_run(store: Store) -> None:
    """Five checkpoints, one of them damaged, and two saves that did not finish."""
    for images in (100, 200, 300, 400, 500):
        manifest = upload(store, run=RUN, images=images, attempt="good", ranks=2)
        CheckpointIndex(store, run=RUN).commit(manifest)
    store.delete(layout.object_key(RUN, 200, "good", 1))
    for images in (250, 600):
        upload(store, run=RUN, images=images, attempt="dead", ranks=2)
    for images, frechet in ((100, 4.0), (300, 3.25), (500, 3.5)):
        measured(store, images, frechet)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    make_run(open_store(str(tmp_path / "runs"), StoreConfig()))
    return tmp_path / "runs" / RUN


def keys(place: Path) -> set[str]:
    """All objects under a run's checkpoints."""
    store = open_store(str(place.parent), StoreConfig())
    return set(store.list(f"{place.name}/checkpoints/"))


def cells(table: str) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]


@pytest.mark.parametrize("saved_at", ["9999-12-31T23:59:59-23:59", "long ago"])
def test_a_time_that_is_none_is_shown_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], saved_at: str
) -> None:
    store = open_store(str(tmp_path), StoreConfig())
    manifest = upload(store, run=RUN, images=100, attempt="good")
    CheckpointIndex(store, run=RUN).commit(replace(manifest, saved_at=saved_at))
    assert checkpoints.main(["list", str(tmp_path / RUN)]) == 0
    assert saved_at in capsys.readouterr().out


def test_the_table_shows_what_is_there(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoints.main(["list", str(place)]) == 0
    table, notes, end = capsys.readouterr().out.split("\n\n")
    rows = cells(table)
    sizes = [row.pop(2) for row in rows]
    assert rows == cells(TABLE)
    assert sizes[0] == "size"
    assert [sizes[3], sizes[7]] == ["32 B", "32 B"]  # no manifest, two objects
    lines = table.splitlines()
    assert len({line.index("  whole") for line in lines if line.endswith("whole")}) == 1
    assert len({line.index(" B ") for line in lines[1:]}) == 1
    assert "200 is damaged: " in notes
    assert "rank-00001.safetensors is missing; 16 bytes were saved" in notes
    assert "250 is unfinished: it has no manifest; a save that ended early left it" in notes
    assert "600 is unfinished: it has no manifest; it is being written, or was left" in notes
    assert "4 whole, 1 damaged, 2 unfinished, " in end
    assert f"resume from {place}/checkpoints/000000000500" in end


def test_the_table_follows_the_policy(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["keep_last=1", "keep_every_images=200", "keep_best=1"]
    assert checkpoints.main(["list", f"{place}/", *settings]) == 0
    shown = capsys.readouterr().out
    assert "every 200, best (3.25)" in shown  # 200 is damaged, so 300 is the first after it
    assert "newest valid" in shown
    assert "last" not in shown.split("\n\n")[0]


@pytest.mark.parametrize("flag", ["--json", "json=true"])
def test_machines_read_json(place: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert checkpoints.main(["list", str(place), flag, "keep_best=1"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["run"] == str(place)
    assert shown["resume_from"] == f"{place}/checkpoints/000000000500"
    assert shown["features"] == "random_conv"
    assert shown["policy"] == {"keep_last": 3, "keep_every_images": 0, "keep_best": 1}
    by_images = {each["images"]: each for each in shown["checkpoints"]}
    assert by_images[300]["kept"] == ["last", "best (3.25)"]
    assert by_images[100]["kept"] == []
    assert by_images[200]["state"] == "damaged"
    assert [each["frechet"] for each in shown["checkpoints"]] == [
        4.0,
        None,
        None,
        3.25,
        None,
        3.5,
        None,
    ]
    files = [path for path in place.rglob("*") if path.is_file() and "checkpoints" in path.parts]
    assert shown["size_bytes"] == sum(path.stat().st_size for path in files)


def test_distances_of_another_extractor_are_shown_when_asked_for(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoints.main(["list", str(place), "features=inception", "keep_best=2"]) == 0
    shown = capsys.readouterr().out
    assert "Fréchet (inception)" in shown
    assert "keep_best=2 keeps nothing: no checkpoint was measured with features=inception" in shown


def test_verify_reads_every_byte(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(place / "checkpoints" / "000000000200")
    assert checkpoints.main(["verify", str(place)]) == 0
    read = capsys.readouterr()
    assert "4 whole to the last byte, 0 damaged" in read.out
    assert "128 B of 128 B (100%)" in read.err
    changed = place / "checkpoints" / "000000000500" / "good" / "rank-00000.safetensors"
    changed.write_bytes(b"0123456789abcdef")  # of the same size, which only reading shows
    assert checkpoints.main(["list", str(place)]) == 0
    assert "4 whole, 2 unfinished" in capsys.readouterr().out
    assert checkpoints.main(["verify", str(place)]) == 1
    found = capsys.readouterr().out
    assert "500  DAMAGED" in found
    assert f"{changed} changed after it was saved" in found
    assert "3 whole to the last byte, 1 damaged" in found
    assert f"this run resumes from: {place}/checkpoints/000000000400" in found
    assert "restore the damaged objects from a copy" in found


def test_verify_names_every_damaged_object_of_one_checkpoint(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = place / "checkpoints" / "000000000300"
    assert checkpoints.main(["verify", f"{one}/"]) == 0
    assert "1 whole to the last byte, 0 damaged" in capsys.readouterr().out
    for name in ("rank-00000", "rank-00001"):
        (one / "good" / f"{name}.safetensors").write_bytes(b"0123456789abcdef")
    assert checkpoints.main(["verify", str(one)]) == 1
    found = capsys.readouterr()
    assert "rank-00000.safetensors changed" in found.out
    assert "rank-00001.safetensors changed" in found.out
    assert f"look for one that is whole with {place}" in found.out
    assert "32 B of 32 B (100%)" in found.err


def test_damage_that_shows_without_reading_is_damage(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoints.main(["verify", f"{place}/checkpoints/000000000200"]) == 1
    assert "rank-00001.safetensors is missing" in capsys.readouterr().out


def test_prune_shows_and_then_deletes_exactly_that(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = keys(place)
    settings = ["prune", str(place), "keep_last=1", "keep_best=1"]
    assert checkpoints.main(settings) == 0
    shown = capsys.readouterr().out
    assert keys(place) == before
    assert "kept by keep_last=1 keep_every_images=0 keep_best=1" in shown
    # Of the damaged checkpoint one object is left, and two of a save that died.
    assert "would delete 3 checkpoints and 3 objects that no checkpoint uses" in shown
    assert "nothing was deleted; add yes=true to delete it" in shown
    assert checkpoints.main([*settings, "yes=true"]) == 0
    deleted = capsys.readouterr().out
    assert "deleted 3 checkpoints and 3 objects that no checkpoint uses" in deleted
    left = {int(key.split("/")[2]) for key in keys(place)}
    assert left == {300, 500, 600}
    assert keys(place) == {key for key in before if int(key.split("/")[2]) in left}
    assert checkpoints.main([*settings, "--yes"]) == 0
    assert "deleted 0 checkpoints: 0 B of" in capsys.readouterr().out
    assert checkpoints.main(settings) == 0
    assert "there is nothing to delete" in capsys.readouterr().out


def test_prune_without_a_valid_checkpoint_deletes_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in place.rglob("rank-00001.safetensors"):
        path.unlink()
    before = keys(place)
    assert checkpoints.main(["prune", str(place), "keep_last=1", "yes=true"]) == 0
    assert keys(place) == before
    assert checkpoints.main(["list", str(place)]) == 0
    assert "there is nothing to resume from" in capsys.readouterr().out


def test_prune_sweeps_what_dead_uploads_left(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dead, alive = (
        place / "checkpoints" / folder / "x" / ".tmp-4711"
        for folder in ("000000000450", "000000000700")
    )
    for path in (dead, alive):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"half of")
    assert checkpoints.main(["prune", str(place), "yes=true"]) == 0
    assert "and 1 unfinished upload" in capsys.readouterr().out
    assert not dead.exists()
    assert alive.exists()


def test_export_takes_the_newest_valid_one_or_the_one_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = save_run(tmp_path)
    store = open_store(f"{tmp_path}/runs", StoreConfig())
    newer = upload(store, run=SMALL, images=IMAGES + 100, attempt="good")
    CheckpointIndex(store, run=SMALL).commit(newer)
    store.delete(newer.objects[0].key)
    run = f"{tmp_path}/runs/{SMALL}"

    def exported(uri: str, *words: str) -> dict[str, torch.Tensor]:
        output = tmp_path / f"{uuid.uuid4().hex}.safetensors"
        words = (*words, f"output={output}", "file=safetensors")
        assert checkpoints.main(["export", uri, *words]) == 0
        said = capsys.readouterr()
        assert said.out == f"{output}\n"
        passed_over = f"passing over checkpoint {run}/checkpoints/{IMAGES + 100:012d}: " in said.err
        assert passed_over == (words[0] != f"choose={IMAGES}" and uri == run)
        return load_file(output)

    for weights, model in (("ema", saved.ema), ("master", saved.master)):
        for words in ((run,), (run, f"choose={IMAGES}"), (saved.uri,)):
            found = exported(*words, f"weights={weights}")
            assert found.keys() == model.state_dict().keys()
            assert all(torch.equal(found[key], each) for key, each in model.state_dict().items())

    def refused(*words: str) -> str:
        assert checkpoints.main(["export", *words, f"output={tmp_path}/none"]) == 2
        assert not (tmp_path / "none").exists()
        return capsys.readouterr().err

    assert "rank-00000.safetensors is missing" in refused(run, f"choose={IMAGES + 100}")
    assert "has no checkpoint of 7 images; it has those of 200, 300" in refused(run, "choose=7")
    assert f"choose=200 needs the URI of a run, but {saved.uri} is one" in refused(
        saved.uri, "choose=200"
    )


@pytest.mark.parametrize("name", ["list", "verify", "prune", "export"])
def test_a_run_that_is_not_there_is_told(
    place: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    more = ["output=weights"] if name == "export" else []

    def refused(uri: str) -> str:
        assert checkpoints.main([name, uri, *more]) == 2
        return capsys.readouterr().err

    assert f"did you mean {place}?" in refused(f"{place.parent}/nihgt-1")
    assert "there are no runs" in refused(f"{place.parent.parent}/elsewhere/night-1")
    assert f"holds runs ({RUN}): give for example {place}" in refused(str(place.parent))
    shutil.rmtree(place / "checkpoints")
    assert f"the run at {place} has no checkpoint yet" in refused(str(place))


@pytest.mark.parametrize("name", ["verify", "export"])
def test_a_checkpoint_that_is_not_there_is_told(
    place: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    more = ["output=weights"] if name == "export" else []
    assert checkpoints.main([name, f"{place}/checkpoints/000000000123", *more]) == 2
    error = capsys.readouterr().err
    assert "has no checkpoint of 123 images; it has those of 100, 200, 300, 400, 500" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["list", "night-1"], "night-1 is neither a run"),
        (["list", "s3://bucket"], "s3://bucket is neither a run"),
        (["list", "runs/a/checkpoints/newest"], "is neither a run"),
        (["list", "gs://bucket/runs/a"], "gs://"),
        (
            ["list", "runs/a/checkpoints/000000000100"],
            f"is one checkpoint; give its run, {Path.cwd()}/runs/a",
        ),
        (["prune", "runs/a", "keep_last=0"], "keep_last=0 must be at least 1"),
        (["prune", "runs/a", "keep_best=-1"], "keep_best=-1 must be at least 0"),
        (["prune", "runs/a", "keep=1"], "there is no setting keep; did you mean keep_"),
        (["list", "runs/a", "features=fid"], "features='fid' cannot be used"),
        (["export", "runs/a"], "output must be given, for example: python -m trainer.checkpoints"),
    ],
)
def test_what_cannot_be_used_is_told(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert checkpoints.main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["list", "verify", "export", "prune"])
@pytest.mark.parametrize("rest", ["p", "runs/a", "runs/a/checkpoints/000000000100"])
def test_credentials_in_a_uri_are_not_repeated(
    capsys: pytest.CaptureFixture[str], name: str, rest: str
) -> None:
    more = ["output=weights"] if name == "export" else []
    assert checkpoints.main([name, f"s3://AKIDXX:SEKRET@bucket/{rest}", *more]) == 2
    error = capsys.readouterr().err
    assert "no credentials" in error
    assert "AKID" not in error
    assert "SEKRET" not in error


@pytest.mark.parametrize(
    "words", [[], ["lsit", "runs/a"], ["list"], ["list", "json=true"], ["list", "runs/a", "--yes"]]
)
def test_a_command_line_that_makes_no_sense_is_refused(
    capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        checkpoints.main(words)
    assert ended.value.code == 2
    assert "usage: python -m trainer.checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize("name", [None, "list", "verify", "export", "prune"])
def test_help_has_examples(capsys: pytest.CaptureFixture[str], name: str | None) -> None:
    with pytest.raises(SystemExit) as ended:
        checkpoints.main(["--help"] if name is None else [name, "--help"])
    assert ended.value.code == 0
    assert f"python -m trainer.checkpoints {name or 'list'} " in capsys.readouterr().out


@pytest.mark.slow
def test_on_a_real_s3_server(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("S3_ENDPOINT_URL")
    bucket = s3.make_bucket(f"command-{uuid.uuid4().hex[:12]}")
    endpoint = f"store.endpoint_url={s3.endpoint_url}"
    store = open_store(f"{bucket}/lapflow/runs", StoreConfig(endpoint_url=s3.endpoint_url))
    make_run(store)
    run = f"{bucket}/lapflow/runs/{RUN}"

    assert checkpoints.main(["list", run, endpoint]) == 0
    assert f"resume from {run}/checkpoints/000000000500" in capsys.readouterr().out
    assert checkpoints.main(["verify", run, endpoint]) == 1
    assert "4 whole to the last byte, 1 damaged" in capsys.readouterr().out
    assert checkpoints.main(["prune", run, endpoint, "keep_last=2", "yes=true"]) == 0
    assert "deleted 3 checkpoints and 3 objects" in capsys.readouterr().out
    assert checkpoints.main(["verify", run, endpoint]) == 0

    assert checkpoints.main(["list", f"{run}x", endpoint]) == 2
    assert f"did you mean {run}?" in capsys.readouterr().err
    assert checkpoints.main(["list", f"s3://no-such-bucket-4711/runs/{RUN}", endpoint]) == 2
    assert "the bucket does not exist" in capsys.readouterr().err
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nonexistent")
    assert checkpoints.main(["list", run, endpoint]) == 2
    assert "no usable credentials were found" in capsys.readouterr().err
