"""Test-wide set-up: shape types of `models` are checked at run time, and nothing phones home."""

import faulthandler
import os

import pytest
from jaxtyping import install_import_hook

# Before anything imports `models`.
install_import_hook("models", "beartype.beartype")

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Tests and the ranks they start share the cores among them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray cannot change its mind about tokens within one process, and some tests go without.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

from tests.support.clock import source_clock  # noqa: E402
from tests.support.empty_tracker import empty_tracker  # noqa: E402
from tests.support.finished import finished  # noqa: E402
from tests.support.forked import forked_ranks  # noqa: E402
from tests.support.s3_server import s3  # noqa: E402

# Fixtures for all tests.
__all__ = ["empty_tracker", "finished", "forked_ranks", "s3", "source_clock"]

_STDERR = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Keep the way to the terminal that pytest hides from tests."""
    config.stash[_STDERR] = os.dup(2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file in one process, and files that share a costly fixture too."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Have an abort tell where every thread was: Ray takes that away when it is left."""
    faulthandler.disable()
    faulthandler.enable(item.config.stash[_STDERR])
