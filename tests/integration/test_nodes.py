"""A launch looks at the nodes before workers start: unfit ones are left out, or it is refused.

Three hosts of a lab, each with its own /tmp, home and network. What ails a node is real: a mount of
that host alone.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.support.hosts import Host, lab, why_not
from tests.support.job import ROOT, SMALL
from tests.support.ray_hosts import RayHosts, ray_environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]

HOME = "/tmp/home/lapflow"
SETTINGS = (
    *(word for word in SMALL if not word.startswith("cluster.")),
    "train.global_batch=60",
    "train.total_images=600",
    "eval.grid_interval_images=0",
)


@dataclass(frozen=True, kw_only=True)
class Stand:
    """The cluster, and a folder that its hosts share."""

    cluster: RayHosts
    shared: Path

    def launch(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Launch a run on the head, which has room for one worker, as each of the others has."""
        command = (sys.executable, "-m", "trainer.launch", *SETTINGS, *words)
        return self.cluster.head.run(
            *command,
            f"cluster.address={self.cluster.address}",
            folder=ROOT,
            environment={"LAPFLOW_HOME": HOME},
        )

    @property
    def sharing(self) -> tuple[str, str]:
        """The settings of a store and a tracker that all hosts reach."""
        tracker = f"tracking.uri=sqlite:///{self.shared / 'mlflow.db'}"
        return f"store.uri={self.shared / 'store'}", tracker


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    shared = tmp_path_factory.mktemp("shared")
    with lab(kept=[shared], environment=ray_environment()) as made:
        cpus = {"head": 1, "left": 1, "right": 1}
        yield Stand(cluster=RayHosts(made, cpus=cpus, logs=shared), shared=shared)


def mount(host: Host, *words: str) -> None:
    """Mount something, for the processes of that host alone."""
    done = host.run("mount", *words)
    assert done.returncode == 0, done.stderr


def change(host: Host, file: Path, old: str, new: str) -> None:
    """Have a file of the project, or of Python, be another on that host."""
    text = file.read_text()
    assert old in text
    other = host.disk / "tmp" / file.name
    other.write_text(text.replace(old, new, 1))
    mount(host, "--bind", f"/tmp/{file.name}", str(file))


def test_nodes_that_see_no_common_store_are_refused_at_once(stand: Stand) -> None:
    done = stand.launch("cluster.workers=3")
    assert done.returncode == 2, done.stdout + done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    assert "3 nodes cannot train together: " in said
    assert "head: " not in said
    for host in ("left", "right"):
        assert f"{host}: {HOME}/store/runs/digits holds no trace of this launch" in said
        assert f"{host}: MLflow's file sqlite:///{HOME}/mlflow.db is one of the machine" in said
    assert "The others have room for 1 of 3 workers." in said
    assert "workers: waiting" not in said  # none was started


def test_a_run_that_fits_on_the_nodes_that_are_fit_leaves_the_others_out(stand: Stand) -> None:
    """With the default store it trains where the launch is."""
    done = stand.launch("cluster.workers=1", "run=alone")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"warning: no worker goes to left: .*holds no trace", done.stdout)
    assert re.search(r"1 workers on \S+ \(head\)", done.stdout)


def test_every_ailment_is_named_with_its_node(stand: Stand) -> None:
    _, left, right = stand.cluster.hosts
    numpy = importlib.metadata.version("numpy")
    metadata = Path(np.__file__).parents[1] / f"numpy-{numpy}.dist-info/METADATA"
    change(left, ROOT / "trainer/rng.py", '"""', '"""Other: ')
    change(left, metadata, f"Version: {numpy}", "Version: 1.0.1")
    (right.disk / f"tmp{HOME.removeprefix('/tmp')}").mkdir(parents=True, exist_ok=True)
    mount(right, "-t", "tmpfs", "-o", "ro", "none", HOME)
    done = stand.launch("cluster.workers=3", *stand.sharing)
    assert done.returncode == 2, done.stdout + done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    assert (
        "left: its code is another than that of the launch; bring both to the same commit" in said
    )
    assert f"left: it has numpy 1.0.1 (not {numpy}) as the launch has; install" in said
    assert f"right: the cache folder {HOME}/cache cannot be made: " in said
    assert "head: " not in said


def test_what_is_scarce_is_a_line_and_the_nodes_are_a_table(stand: Stand) -> None:
    _, left, right = stand.cluster.hosts
    for host, *places in ((left, ROOT / "trainer/rng.py"), (right, HOME)):
        assert host.run("umount", *map(str, places)).returncode == 0
    numpy = importlib.metadata.version("numpy")
    metadata = Path(np.__file__).parents[1] / f"numpy-{numpy}.dist-info/METADATA"
    assert left.run("umount", str(metadata)).returncode == 0
    mount(right, "-t", "tmpfs", "-o", "size=32m", "none", HOME)
    done = stand.launch("cluster.workers=3", *stand.sharing)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(
        r"warning: right has only 3\d\.\d MiB left of its disk of the cache", done.stdout
    )
    table = re.findall(r"^ *(head|left|right)  +1  cpu .* eth0 +[+-]0\.0 s$", done.stdout, re.M)
    assert table == ["head", "left", "right"]
    assert re.search(r"all-reduce of 16\.0 MiB over 3 ranks: \d+ ms", done.stdout)
