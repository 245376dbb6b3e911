"""The command that shows the runs of a home folder as MLflow's pages."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipelines.command import Outcome
from pipelines.console import say
from pipelines.domains import Checked
from trainer.cli.command import run_command
from trainer.config import paths
from trainer.config.reading import ConfigError
from trainer.metrics.mlflow_backend import (
    PORT,
    ExperimentDeleted,
    check_tracker,
    page,
    tracking_uri,
)
from trainer.metrics.tracker import TrackingConfig

_HOST = "127.0.0.1"
_DESCRIPTION = """\
Show runs as MLflow's pages, and say at which address.

  python -m trainer.ui                             the runs of ~/lapflow, or $LAPFLOW_HOME
  python -m trainer.ui home=/data/lapflow port=5001
  python -m trainer.ui uri=http://HOST:5000        only says the address on that server

The pages are served to this machine alone, until Ctrl-C."""


@dataclass(frozen=True, kw_only=True)
class UiConfig(Checked):
    """What to show.

    Attributes:
        home: Folder of the runs; None is $LAPFLOW_HOME, or ~/lapflow.
        uri: MLflow tracking URI in place of the home's file.
        experiment: Experiment that holds the runs.
        port: Where the pages are served.
    """

    home: str | None = field(default=None, metadata={"place": "path"})
    uri: str | None = field(default=None, metadata={"place": "uri"})
    experiment: str = TrackingConfig.experiment
    port: Annotated[int, Field(ge=1, le=65535)] = PORT


def show(config: UiConfig) -> Outcome:
    """Say the address, and serve the pages in place of this process unless a server does.

    Raises:
        ConfigError: There are no runs, or the port is taken.
        TrackerUnreachable: The server cannot be used.
    """
    home = str(paths.home_folder(config.home))
    tracking = TrackingConfig(uri=config.uri, experiment=config.experiment)
    uri = tracking_uri(tracking, home)
    if uri.startswith("http"):
        address = page(uri, check_tracker(tracking, home))
        return Outcome(address, {"address": address, "served_here": False})
    file = Path(uri.removeprefix("sqlite:///"))
    if not file.exists():
        raise ConfigError(
            f"home={home} has no runs yet: there is no {file}; train, or name the folder of the "
            "runs with home=FOLDER"
        )
    _check_free(config.port)
    server = f"http://{_HOST}:{config.port}"
    try:
        address = page(server, check_tracker(tracking, home))
    except ExperimentDeleted as error:
        say(f"warning: {error}", to=sys.stderr)
        address = server
    # It starts processes that judge language models unless it is told not to.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    words = ["mlflow", "ui", "--host", _HOST, "--port", str(config.port)]
    words = [sys.executable, "-m", *words, "--backend-store-uri", uri]
    return Outcome(
        f"open {address} once it says that it runs",
        {"address": address, "served_here": True},
        then=lambda: os.execv(sys.executable, words),
    )


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"port={port} cannot be listened on: {error}; is it open already? Or set another, "
                f"as in port={PORT + 1}"
            ) from error


main = partial(
    run_command,
    UiConfig,
    show,
    module="trainer.ui",
    description=_DESCRIPTION,
    example="home=~/lapflow",
)
"""Runs the command, given its words or none for the process's own, and returns its exit code."""
