"""Where a job keeps things: pure functions from the configuration to paths and URIs.

The places that a configuration names are absolute; `trainer.config.written_paths` has made them so.
"""

from __future__ import annotations

import os
from pathlib import Path

from trainer.config.job import JobConfig


def home(job: JobConfig) -> Path:
    """Return the folder for what stays on this machine."""
    return Path(job.home)


def store_uri(job: JobConfig) -> str:
    """Return the store that holds data sets and runs: configured, or a folder in the home."""
    return (job.store.uri or str(home(job) / "store")).rstrip("/")


def runs_uri(job: JobConfig) -> str:
    """Return the place of all runs."""
    return f"{store_uri(job)}/runs"


def sweep_uri(job: JobConfig, sweep: str) -> str:
    """Return the place of what is kept of a sweep beside its runs."""
    return f"{sweeps_uri(job)}/{sweep}"


def sweeps_uri(job: JobConfig) -> str:
    """Return the place of all sweeps."""
    return f"{store_uri(job)}/sweeps"


def run_uri(job: JobConfig) -> str:
    """Return the place of this run's checkpoints, samples and reports."""
    return f"{runs_uri(job)}/{job.run}"


def data_prefix(job: JobConfig) -> str:
    """Return the prefix of the data set's shards, where there is only one."""
    return (job.data.prefix or f"{store_uri(job)}/datasets/{job.data.name}").rstrip("/")


def data_prefixes(job: JobConfig) -> tuple[str, ...]:
    """Return the prefixes of all streams of the data set."""
    streams = tuple(stream.prefix.rstrip("/") for stream in job.data.streams)
    return streams or (data_prefix(job),)


def home_folder(home: str | None) -> Path:
    """Return the home of commands without a job: `home`, $LAPFLOW_HOME, or ~/lapflow."""
    chosen = home or os.environ.get("LAPFLOW_HOME") or JobConfig.home
    return Path(chosen).expanduser().absolute()


def cache_folder(home: str | None) -> Path:
    """Return the cache of commands without a job, in their home."""
    return home_folder(home) / "cache"


def cache(job: JobConfig) -> Path:
    """Return the folder where shards are cached on this node."""
    return home(job) / "cache"
