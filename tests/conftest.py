"""Test-wide set-up: shape types of `models` are checked at run time, and nothing phones home."""

import faulthandler
import gc
import os
from collections.abc import Generator

import hypothesis
import pytest
from jaxtyping import install_import_hook

# Before anything imports `models`.
install_import_hook("models", "beartype.beartype")

# Every variable that the set-up of tests (this file and tests/support) sets, for a test or for what
# it starts. Users have only those that a page tells them to set, so each of the rest has a reason.
#
# Told to users:
#   OMP_NUM_THREADS            tests and the ranks they start share the cores, as under `make`
#   LAPFLOW_HOME               each job has a home of its own
#   AWS_ACCESS_KEY_ID          credentials of the tests' S3 server
#   AWS_SECRET_ACCESS_KEY      likewise
#   RAY_AUTH_MODE              `disabled` for a cluster that only one test can reach, else `token`
#   RAY_AUTH_TOKEN_PATH        the token of a cluster that asks for one
#   RAY_JOB_STOP_WAIT_TIME_S   the time for a last checkpoint
# Not told to users:
#   HOME, LANG, PATH, TERM, USER   what a login sets, and activating `.venv`
#   DS_ACCELERATOR             set by the product on each CPU rank; the server that ranks are forked
#                              from imports DeepSpeed before that
#   MLFLOW_SERVER_ENABLE_JOB_EXECUTION   set by the product where it serves the pages
#   _MLFLOW_SERVER_SERVE_ARTIFACTS       set by `mlflow server`, which runs in a fork of a process
#                              that has imported what it needs as one that serves does
#   AWS_DEFAULT_REGION, AWS_EC2_METADATA_DISABLED, S3_ENDPOINT_URL, MLFLOW_S3_ENDPOINT_URL,
#   NO_PROXY                   keep the tests of stores from whatever this machine is configured to
#                              reach; whole jobs get the credentials alone, and settings
#   PIP_DISABLE_PIP_VERSION_CHECK, PIP_NO_BUILD_ISOLATION, PIP_NO_INDEX
#                              what a card says to install is looked for in what is installed, and
#                              not fetched
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.support.clock import source_clock  # noqa: E402
from tests.support.empty_tracker import empty_tracker  # noqa: E402
from tests.support.finished import finished  # noqa: E402
from tests.support.forked import forked_ranks  # noqa: E402
from tests.support.s3_server import s3  # noqa: E402

# Fixtures for all tests.
__all__ = ["empty_tracker", "finished", "forked_ranks", "s3", "source_clock"]

# A busy machine may take long for any example.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

_STDERR = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Keep the way to the terminal that pytest hides from tests."""
    config.stash[_STDERR] = os.dup(2)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Have an abort tell where every thread was: Ray takes that away when it is left."""
    faulthandler.disable()
    faulthandler.enable(item.config.stash[_STDERR])


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Have Python not look for garbage among what tests import, neither now nor later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
