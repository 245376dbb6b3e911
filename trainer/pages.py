"""The MLflow page that shows a job's runs, and the command that opens it."""

from __future__ import annotations

import sys

from trainer import places
from trainer.metrics.mlflow_place import TrackerUnreachable, check_tracker, page, tracking_uri
from trainer.schema import JobConfig

PORT = 5000
"""Where the pages of runs in a local file are shown unless told otherwise."""


def where_to_look(job: JobConfig) -> str:
    """Say how the pages of the job's runs are opened; asks MLflow which they are."""
    home = str(places.home(job))
    uri = tracking_uri(job.tracking, home)
    try:
        experiment = check_tracker(job.tracking, home)
    except TrackerUnreachable as error:
        return f"nowhere for now: {error}"
    if uri.startswith("http"):
        return page(uri, experiment)
    words = [sys.executable, "-m", "trainer.ui"]
    words += [f"home={home}"] if job.tracking.uri is None else [f"uri={uri}"]
    if job.tracking.experiment != type(job.tracking).experiment:
        words.append(f"experiment={job.tracking.experiment}")
    return f"{' '.join(words)}   opens {page(f'http://127.0.0.1:{PORT}', experiment)}"
