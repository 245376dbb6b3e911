"""The command that writes a page about runs: each once, and into a place that can hold it."""

import pytest

from tests.unit.trainer.page.told import tell_figures, tell_run
from trainer.cli.report import ReportConfig, report
from trainer.config.reading import ConfigError
from trainer.storage.errors import InvalidStoreUri
from trainer.storage.local import LocalStore


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder with a run `a`, which is the working folder."""
    store = LocalStore(tmp_path)
    tell_run(store, "a")
    tell_figures(store, "a", 6400, 2.0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_that_is_named_twice_is_one_run(runs):
    (runs / "link").symlink_to(runs / "a")
    names = [f"{runs}/a", f"{runs}/a/", "./a", f"{runs}/b/../a", f"{runs}/link"]
    told = report(names, ReportConfig()).values
    assert told["runs"] == ["a"]
    assert told["output"] == f"{runs}/a/report.html"
    assert "several seeds" not in (runs / "a/report.html").read_text()


@pytest.mark.parametrize("folder", ["", "{runs}/", "file://{runs}/"])
def test_a_page_goes_where_output_says(runs, folder):
    told = report(["./a"], ReportConfig(output=f"{folder.format(runs=runs)}x.html")).values
    assert told["output"] == f"{folder.format(runs=runs).removeprefix('file://')}x.html"
    assert (runs / "x.html").stat().st_size == told["bytes"]
    assert not (runs / "a/report.html").exists()


@pytest.mark.parametrize(
    "output",
    [
        *("s3://bucket", "s3://bucket/", "s3://bucket/x/", "s3:/bucket/x.html", "s3:///x.html"),
        *("http://host/x.html", "gs://bucket/x.html", "S3://bucket/x.html"),
        *("a/checkpoints", "folder/", "page", "s3://bucket/page"),
    ],
)
def test_what_is_no_place_for_a_page_is_refused_before_runs_are_read(output):
    with pytest.raises(ConfigError, match=r"^output=.*html") as refused:
        report(["./nothing"], ReportConfig(output=output))
    assert output in str(refused.value)


def test_credentials_of_a_place_are_not_quoted():
    with pytest.raises(InvalidStoreUri) as refused:
        report(["./nothing"], ReportConfig(output="s3://key:hunter2@bucket/x.html"))
    assert "hunter2" not in str(refused.value)
