import subprocess
import sys

import pytest


@pytest.mark.slow
def test_who_drives_a_cluster_imports_no_torch():
    """It takes seconds, of the driver's start and of the start of Ray Train's controller."""
    found = subprocess.run(
        [sys.executable, "-c", "import sys, cluster.ray_train; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    modules = found.stdout.split()
    assert "cluster.process_group" in modules
    assert "torch" not in modules
