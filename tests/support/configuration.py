"""Configurations for tests that only read them: equal overrides are composed once."""

from functools import cache

from trainer.config.composition import compose_job
from trainer.config.job import JobConfig


@cache
def configuration(*overrides: str) -> JobConfig:
    """Compose overrides as the command does, once; not for tests that change LAPFLOW_HOME."""
    return compose_job(overrides)
