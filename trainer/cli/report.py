"""The command that writes a page about runs: one HTML file to read, to print and to attach."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.command import REFUSED, Outcome, command_parser
from pipelines.console import visible
from pipelines.domains import Checked
from pipelines.files import write_atomic
from trainer.cli.command import parse_settings, read_settings, run_logged, settings_epilog
from trainer.cli.run_handle import RunHandle, open_run
from trainer.cli.settings_page import ExplainAction
from trainer.config import paths
from trainer.config.reading import ConfigError
from trainer.metrics.mlflow_backend import TrackerUnreachable, run_curves, tracking_uri
from trainer.metrics.tracker import TrackingConfig
from trainer.storage.checkpoint_uri import check_no_credentials
from trainer.storage.open import open_store
from trainer.storage.store import Store, StoreConfig

if TYPE_CHECKING:
    from trainer.page.story import RunStory

logger = logging.getLogger(__name__)

PAGE = "report.html"
"""Name of a run's page, in its folder of the store and among the artifacts of its tracker."""

_MODULE = "trainer.report"
_RUN = "~/lapflow/store/runs/digits"
_DESCRIPTION = f"""\
Write a page about a run, or about several side by side: samples, figures with their protocols,
curves, time and cost, settings. It is one HTML file that loads nothing and runs no scripts.

  python -m {_MODULE} {_RUN}
  python -m {_MODULE} RUNS/digits-0 RUNS/digits-1 RUNS/one-scale-0 output=comparison.html
  python -m {_MODULE} s3://bucket/runs/NAME store.endpoint_url=http://HOST:PORT output=a.html

Runs that differ in their seed alone are drawn as one, with the spread between them. Of one run the
page is {PAGE} in the run's own folder of the store, where the end of training has put it too."""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_FILE = "file://"
_OBJECT = re.compile(r"(s3://[^/]+|file://)/.*[^/]")
_SETTING = re.compile(r"[+~]*[A-Za-z_]\w*(\.\w+)*=.*", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Checked):
    """Where the page goes, and where runs are.

    Attributes:
        output: HTML file to write, `….html`, or one in `s3://…`; None is `report.html` in the run's
            folder of the store, and of several runs in the working folder.
        store: How to reach the stores of the runs.
        tracking_uri: MLflow, which is asked for the curves of runs of older versions, whose stores
            have none; None is the file in home.
        experiment: MLflow's experiment with such runs.
        home: Folder of MLflow's file; None is $LAPFLOW_HOME or ~/lapflow.
    """

    output: str | None = field(default=None, metadata={"place": "uri"})
    store: StoreConfig = field(default_factory=StoreConfig)
    tracking_uri: str | None = field(default=None, metadata={"place": "uri"})
    experiment: str = TrackingConfig.experiment
    home: str | None = field(default=None, metadata={"place": "path"})


def _check_output(output: str) -> None:
    """Refuse what is no file for a page."""
    check_no_credentials(output)
    scheme = _SCHEME.match(output)
    if scheme is not None and not _OBJECT.fullmatch(output):
        raise ConfigError(
            f"output={output} is no place for a page: give the path of a file, or "
            "s3://BUCKET/FOLDER/NAME.html"
        )
    if not output.endswith(".html"):
        raise ConfigError(
            f"output={output} does not end in .html: give the file to write, such as "
            f"{output.rstrip('/')}/{PAGE}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = command_parser(_MODULE, description=_DESCRIPTION, epilog=settings_epilog(ReportConfig))
    parser.add_argument("overrides", nargs="*", metavar="RUN | key=value")
    parser.add_argument("--explain", action=ExplainAction, kind=lambda: ReportConfig)
    example = f"{parser.prog} {_RUN}"

    def make(words: Sequence[str]) -> Outcome:
        runs = [word for word in words if not _SETTING.fullmatch(word)]
        if not runs:
            return Outcome("", exit_code=REFUSED, error=f"name a run, for example: {example}")
        settings = [word for word in words if _SETTING.fullmatch(word)]
        return report(runs, read_settings(ReportConfig, settings, example))

    return run_logged(
        lambda words: parse_settings(parser, words),
        lambda options: make(options.overrides),
        arguments,
    )


def report(runs: Sequence[str], config: ReportConfig) -> Outcome:
    """Write the page, and answer where it is.

    Args:
        runs: URIs of the runs.
        config: Where the page goes.

    Raises:
        ConfigError: A URI names a checkpoint, or no run; the page cannot be written.
        CheckpointError: A URI is no store's, or a store fails.
    """
    if config.output is not None:
        _check_output(config.output)
    # Not for those who ask for help: it needs torch.
    from trainer.page.page import make_page

    found = [(handle.store, _read(handle, config)) for handle in _handles(runs, config.store)]
    html = make_page([story for _, story in found])
    if config.output is not None or len(found) > 1:
        place = _write(config.output or PAGE, html, config.store)
    else:
        ((store, story),) = found
        place = put_page(store, story.name, html)
    names = [story.name for _, story in found]
    return Outcome(visible(place), {"output": place, "runs": names, "bytes": len(html.encode())})


def put_page(store: Store, run: str, html: str) -> str:
    """Write a run's page into its folder of the store, and return where it is.

    Raises:
        StoreError: The store fails.
    """
    key = f"{run}/{PAGE}"
    store.put(key, html.encode())
    return store.uri(key)


def _handles(runs: Sequence[str], config: StoreConfig) -> Iterator[RunHandle]:
    """Open runs, each once, however often and however written it is named."""
    seen = set()
    for uri in runs:
        handle = open_run(uri, config)
        if handle.images is not None:
            raise ConfigError(f"{uri} is one checkpoint; give its run, {handle.uri}")
        place = handle.store.uri(handle.run)
        place = place if "://" in place else os.path.realpath(place)
        if place not in seen:
            seen.add(place)
            yield handle


def _read(handle: RunHandle, config: ReportConfig) -> RunStory:
    from trainer.page.story import read_story

    story = read_story(handle.store, handle.run)
    if story.is_empty:
        handle.listing()  # says what is there instead
    if not story.curves:
        story = replace(story, curves=_tracked_curves(story, config))
    return story


def _tracked_curves(story: RunStory, config: ReportConfig) -> dict[str, dict[int, float]]:
    """Ask MLflow for the curves of a run whose store has none."""
    tracking = TrackingConfig(uri=config.tracking_uri, experiment=config.experiment)
    uri = tracking_uri(tracking, str(paths.home_folder(config.home)))
    try:
        curves = run_curves(uri, experiment=config.experiment, run=story.name)
    except TrackerUnreachable as error:
        logger.warning("the store of %s has no curves, and MLflow neither: %s", story.name, error)
        return {}
    logger.info("the curves of %s are those of MLflow's newest run of that name", story.name)
    return curves


def _write(output: str, html: str, config: StoreConfig) -> str:
    if "://" in output and not output.startswith(_FILE):
        folder, _, name = output.rpartition("/")
        store = open_store(folder, config)
        store.put(name, html.encode())
        return store.uri(name)
    path = Path(output.removeprefix(_FILE)).expanduser()
    try:
        write_atomic(path.resolve(), html.encode())
    except OSError as error:
        raise ConfigError(f"output={output} cannot be written: {error}") from error
    return str(path)
