"""Places are the same to every process: made absolute once, and free of credentials."""

from functools import reduce
from typing import Any

import pytest

from pipelines.ingest.digits import ensure_digits
from tests.support.commands import GIVEN, leaves, refusal
from tests.support.configuration import configuration
from trainer.config import paths
from trainer.config.composition import compose_job, parse_words
from trainer.config.job import JobConfig
from trainer.config.reading import from_dict, to_dict
from trainer.config.settings import leaf_types
from trainer.config.written_paths import resolve_places
from trainer.evaluation.config import CheckpointEvaluationConfig
from trainer.storage.open import open_store

DIGITS = "+exp=digits"

NO_PLACES = {
    "run", "data.name", "cluster.address", "tracking.experiment", "tracking.sweep", "experiment",
    "device",
    "store.region", "store.profile", "interpolate", "weights",
    "eval.features.module", "module", "runtime.profile",
}  # fmt: skip


def test_every_text_is_a_place_a_choice_or_a_name():
    texts = {
        setting.key
        for kind in GIVEN
        for setting in leaves(kind)
        if setting.is_text and setting.place is None and str in leaf_types(setting.wanted)
    }
    assert texts == NO_PLACES


def read(kind: type[Any], text: str) -> dict[str, Any]:
    """Every place of a configuration, all of them given as the same text."""
    keys = [
        each.key
        for each in leaves(kind)
        if each.place not in (None, "url") and each.is_single and not each.key.endswith("reference")
    ]
    words = [f"{name}={value}" for name, value in GIVEN[kind].items() if name not in keys]
    words += [f"{key}={text}" for key in keys]
    if kind is JobConfig:
        config: Any = compose_job([DIGITS, "codec.kind=autoencoder_kl", *words])
    else:
        config = parse_words(kind, words)
    return {key: reduce(getattr, key.split("."), config) for key in keys}


@pytest.mark.parametrize("kind", GIVEN)
def test_a_place_is_made_absolute_in_the_process_that_reads_it(tmp_path, monkeypatch, kind):
    home, here = tmp_path / "home", tmp_path / "here"
    (here / "a" / "b").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    for text, meant in (
        ("~/a/b", f"{home}/a/b"),
        ('"~/a/b"', f"{home}/a/b"),
        ("a/b", f"{here}/a/b"),
        ("../a b/ü,(x)=#~", f"{tmp_path}/a b/ü,(x)=#~"),
        ("/a/b/", "/a/b"),
    ):
        assert set(read(kind, text).values()) == {meant}


@pytest.mark.parametrize(
    ("kind", "key", "place"),
    [
        (kind, each.key if each.is_single else f"{each.key}[]", each.place)
        for kind in GIVEN
        for each in leaves(kind)
        if each.place
    ],
)
def test_a_place_is_an_address_without_secrets_or_a_path(kind, key, place):
    def given(text: str) -> Any:
        values: dict[str, Any] = to_dict(configuration(DIGITS)) if kind is JobConfig else {}
        values |= GIVEN[kind]
        if key == "codec.source":
            values["codec"]["kind"] = "autoencoder_kl"
        *groups, name = key.split(".")
        group = reduce(lambda group, name: group.setdefault(name, {}), groups, values)
        text += ".npz" if name == "reference" and text.strip() else ""
        group[name.removesuffix("[]")] = [text] if name.endswith("[]") else text
        return resolve_places(from_dict(kind, values))

    for wrong in (
        "s3:/bucket/a",
        "http://me:secret@host/a",
        "http://host/a?token=secret",
        "http://host/a#access_token=secret",
        "file://me:secret@host/a",
        " ",
        "/a\0b",
        "s3://bucket/a\nb",
        "/a\ud800b",
    ):
        error = refusal(lambda wrong=wrong: given(wrong))
        assert error is not None
        assert "secret" not in error
        shown = key.removesuffix("[]").rpartition(".")[2]
        assert "secret" not in wrong or shown in error or "endpoint" in error
    for mistyped in (
        "s3:/me:secret@bucket/a",
        "S3:me:secret@bucket/a",
        "s3:///me:secret@bucket/a",
        "http:/host/a?token=secret",
    ):
        error = refusal(lambda mistyped=mistyped: given(mistyped))
        assert error is not None
        assert "secret" not in error
    if place in ("uri", "hub"):
        assert refusal(lambda: given("s3://bucket/a#b=(c)")) is None
        assert "secret" not in (refusal(lambda: given("s3://me:secret@bucket/a")) or "secret")


def test_places_in_a_list_are_made_absolute_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    words = ["checkpoint=a/b", 'runs=["~/runs/c", "runs/d", "s3://bucket/runs/e"]']
    config = parse_words(CheckpointEvaluationConfig, words)
    assert config.runs == (f"{tmp_path}/home/runs/c", f"{tmp_path}/runs/d", "s3://bucket/runs/e")


@pytest.mark.parametrize("kind", [JobConfig, CheckpointEvaluationConfig])
def test_a_file_of_statistics_is_a_place_and_a_split_is_none(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for text, meant in (
        ("~/a.npz", f"{tmp_path}/home/a.npz"),
        ("a/b.npz", f"{tmp_path}/a/b.npz"),
        ("s3://bucket/a.npz", "s3://bucket/a.npz"),
        ("train", "train"),
        ("test", "test"),
    ):
        if kind is JobConfig:
            assert compose_job([DIGITS, f"eval.reference={text}"]).eval.reference == meant
        else:
            config = parse_words(kind, ["checkpoint=a", f"reference={text}"])
            assert config.reference == meant


@pytest.mark.parametrize(
    "word",
    [
        "data.streams=[{prefix:s3://me:secret@bucket/a",
        "data.streams=[{prefix:s3:/me:secret@bucket/a}],",
        "data.streams=s3://me:secret@bucket/a",
        "data.streams=[s3:/me:secret@bucket/a]",
        "data.streams=[{prefix: s3:///me:secret@bucket/a}]",
        "+data.streams=[{prefix:'http://host/a?token=secret'}]",
        "data.streams=[{prefix:'s3:/me:secret@bucket/a'}]",
        "s3://me:secret@bucket/a",
        "s3://bucket/a?token=secret",
        "~http://me:secret@host",
        "cluster.address=ray://me:secret@host:1",
        "cluster.address=me:secret@host:1",
        "train.seed=s3:/me:secret@bucket/a",
        "data.name=http://me:secret@host",
        "store.uri=s3://me:secret@bucket/\udcff",
    ],
)
def test_what_may_be_credentials_is_quoted_nowhere(word):
    error = refusal(lambda: compose_job([DIGITS, word]))
    assert error is not None
    assert "secret" not in error


def test_what_is_no_path_stays():
    job = compose_job([DIGITS, "codec.kind=autoencoder_kl", "codec.source=zelaki/eq-vae"])
    assert (job.codec.source, job.resume) == ("zelaki/eq-vae", "auto")
    assert (
        compose_job([DIGITS, "tracking.uri=http://host:5000/a"]).tracking.uri
        == "http://host:5000/a"
    )


def test_the_file_of_a_tracker_is_a_place_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for path, meant in (
        ("a.db", f"{tmp_path}/a.db"),
        ("/a.db", "/a.db"),
        ("~/a.db", f"{tmp_path}/home/a.db"),
    ):
        assert compose_job([DIGITS, f"tracking.uri=sqlite:///{path}"]).tracking.uri == (
            f"sqlite:///{meant}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("uri", ["~/st", "{home}/st", "file://{home}/st", "../home/st"])
def test_data_and_checkpoints_go_to_one_store(tmp_path, monkeypatch, uri):
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    job = compose_job([DIGITS, f'store.uri="{uri.format(home=home)}"'])
    ensure_digits(paths.data_prefix(job))
    open_store(paths.runs_uri(job), job.store).put("digits/a", b"b")
    assert (home / "st" / "datasets" / "digits" / "train" / "index.json").is_file()
    assert (home / "st" / "runs" / "digits" / "a").is_file()
    assert list(here.iterdir()) == []


def test_workers_elsewhere_mean_the_same_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = compose_job([DIGITS, "store.uri=st", "home=h", "data.prefix=d", "shards.cache_dir=~/c"])
    payload = to_dict(job)
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", "/elsewhere")
    there = from_dict(JobConfig, payload)
    assert there == job
    assert paths.run_uri(there) == f"{tmp_path}/st/runs/digits"
    assert paths.home(there) == tmp_path / "h"
    assert paths.data_prefixes(there) == (f"{tmp_path}/d",)


def test_the_home_that_is_given_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/somebody")
    monkeypatch.setenv("LAPFLOW_HOME", "/from/environment")
    assert compose_job([DIGITS]).home == "/from/environment"
    assert compose_job([DIGITS, "home=~/lapflow"]).home == "/somebody/lapflow"
    monkeypatch.setenv("LAPFLOW_HOME", "")
    assert compose_job([DIGITS]).home == "/somebody/lapflow"
