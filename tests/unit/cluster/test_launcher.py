"""What the door to the cluster sees to before Ray is there."""

import os
import subprocess
import sys

import pytest

from tests.support.job import ROOT

ASK = """
from threading import Event
from cluster.contract import ClusterConfig, ClusterUnavailable
from cluster.launcher import run
try:
    run(ClusterConfig(address="127.0.0.1:1"), print, {}, on_message=print, stop=Event())
except ClusterUnavailable:
    from ray._private.ray_constants import RAY_ENABLE_UV_RUN_RUNTIME_ENV as wanted
    print(wanted)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("given", "wanted"), [(None, "False"), ("1", "True")])
def test_ray_does_not_have_uv_build_an_environment_for_each_worker(given, wanted):
    """Unless somebody asks for it; Ray looks once, when it is imported."""
    variables = {} if given is None else {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": given}
    ended = subprocess.run(
        [sys.executable, "-c", ASK],
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.strip() == wanted
