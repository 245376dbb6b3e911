"""What chaos befalls: three hosts with a Ray cluster, and a run on it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from pipelines.ingest.digits import ensure_digits
from tests.chaos.watch import Watch
from tests.support.hosts import Host, LabError, lab
from tests.support.job import ROOT, SMALL, Job, job
from tests.support.ray_hosts import RayHosts, ray_environment
from trainer.config.composition import compose_job
from trainer.training.assembly import initial_model

BATCH = 64
INTERVAL = 512
"""Images between two checkpoints."""
RUN = "digits"
PACE = "40mbit"
"""What the workers' hosts send and receive in a second. So the exchange of gradients sets the pace
of the run, on fast machines and slow ones alike: it is not at its end when a fault is over that it
trains through."""
PATIENCE_S = 900.0
"""A run that makes no progress for this long, with all hosts there, is stuck."""
_DRIVER = "trainer.launch"
_HOME = "/tmp/home/lapflow"
"""Of its own, as every host has it."""
_CACHE = f"{_HOME}/cache"
_CACHE_BYTES = 16 * 2**20


class StuckRun(AssertionError):
    """The run makes no progress any more."""


def settings(folder: Path, *, images: int) -> list[str]:
    """The run of which both the disturbed and the undisturbed one are, but for `cluster`."""
    return [
        *(word for word in SMALL if not word.startswith("cluster.")),
        f"train.global_batch={BATCH}",
        f"train.total_images={images}",
        f"checkpoint.interval_images={INTERVAL}",
        # Each update is told, so that what is lost is counted and not estimated.
        f"runtime.log_interval_images={BATCH}",
        "eval.grid_interval_images=0",
        "eval.classifier=false",
        # A URL, so that each node has a cache.
        f"data.prefix=file://{folder}/digits",
        "data.prepare=none",
        # An update that is skipped is missing in the end, so the run goes back instead.
        "train.max_skipped_updates=0",
        "cluster.workers=2",
        f"store.uri={folder / 'store'}",
        f"tracking.uri=sqlite:///{folder / 'mlflow.db'}",
    ]


@dataclass(eq=False)
class Stand:
    """The cluster, and the driver of the run, on its head.

    Attributes:
        cluster: A head without CPUs and two hosts with one each.
        folder: What all hosts share: the store and the tracker.
        words: The run's settings.
        watch: Sees how far it is.
        launches: How often its command was given.
    """

    cluster: RayHosts
    folder: Path
    words: Sequence[str]
    watch: Watch
    launches: int = 0
    _driver: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def launch(self) -> None:
        """Give the run's command on the head, once it does not run there any more."""
        self.launches += 1
        if self._driver is not None:
            self._driver.wait(PATIENCE_S)
        self._driver = self.cluster.head.start(
            *(sys.executable, "-u", "-m", _DRIVER, *self.words),
            f"cluster.address={self.cluster.address}",
            log=self.log,
            folder=ROOT,
            environment={"LAPFLOW_HOME": _HOME},
        )

    @property
    def log(self) -> Path:
        """What all drivers have printed."""
        return self.folder / "driver.log"

    def exit_code(self) -> int | None:
        """Of the driver; None while it runs."""
        assert self._driver is not None
        return self._driver.poll()

    def power_on(self, host: Host) -> None:
        """Switch a host on again and have it run its node; it may not be up yet."""
        host.power_on()
        self.prepare(host)
        self.cluster.begin(host)

    def prepare(self, host: Host) -> None:
        """Make what a host that was just switched on has here: its pace, and a small disk."""
        self.hold_back(host)
        disk = f"mkdir -p {_CACHE} && mount -t tmpfs -o size={_CACHE_BYTES} cache {_CACHE}"
        if (done := host.run("sh", "-c", disk)).returncode:
            raise LabError(f"{host.name} gets no disk: {done.stderr}")

    def hold_back(self, host: Host) -> None:
        """Have a host send and receive at the pace that is usual here."""
        if host is not self.cluster.head:
            host.slow(PACE)

    def kill_driver(self) -> None:
        """End the driver with SIGKILL."""
        self.cluster.head.signal(_DRIVER, signal.SIGKILL)
        assert self._driver is not None
        self._driver.wait()

    def terminate_driver(self) -> None:
        """Ask the driver to end by SIGTERM, and wait until it has."""
        self.cluster.head.signal(_DRIVER, signal.SIGTERM)
        self.wait_for_end()

    def wait_for_end(self) -> int:
        """Wait until the driver ends, and give its exit code."""
        assert self._driver is not None
        return self._driver.wait(PATIENCE_S)

    @contextmanager
    def full_cache(self, host: Host) -> Iterator[None]:
        """Have nothing in a host's cache, and no room, for the length of a `with` block."""
        fill = f"rm -r {_CACHE}/*; ! head -c {2 * _CACHE_BYTES} /dev/zero > {_CACHE}/other"
        if (done := host.run("sh", "-c", fill)).returncode:
            raise LabError(f"The disk of {host.name} is not full: {done.stderr}")
        try:
            yield
        finally:
            host.run("rm", f"{_CACHE}/other")

    def constants(self) -> list[bytes]:
        """What a rank's model holds and no update changes, each as it lies in memory."""
        buffers = dict(initial_model(compose_job(list(self.words))).named_buffers())
        return [buffer.numpy().tobytes() for buffer in buffers.values()]

    def newest_saved(self) -> int:
        """Images of the newest checkpoint that is committed; 0 if there is none."""
        manifests = (self.folder / "store/runs" / RUN / "checkpoints").glob("*/MANIFEST.json")
        return max((int(path.parent.name) for path in manifests), default=0)

    def wait_for_images(self, images: int, *, after: float) -> bool:
        """Wait until the run tells that it is beyond some images.

        Args:
            images: How many.
            after: What it told before this time does not count.

        Returns:
            Whether it is; False if its driver ended first.

        Raises:
            StuckRun: It did not come that far.
        """
        deadline = time.monotonic() + PATIENCE_S
        while not self.watch.progress_since(after, beyond=images):
            if self.exit_code() is not None:
                time.sleep(0.2)  # the last lines are read
                return self.watch.progress_since(after, beyond=images)
            if time.monotonic() > deadline:
                self.stuck()
            time.sleep(0.05)
        return True

    def wait_for_words(self, words: str) -> None:
        """Wait until the driver says some words again.

        Raises:
            StuckRun: It did not.
        """
        deadline, seen = time.monotonic() + PATIENCE_S, self.log.stat().st_size
        while words.encode() not in self.log.read_bytes()[seen:]:
            if time.monotonic() > deadline:
                self.stuck()
            time.sleep(0.1)

    def stuck(self) -> NoReturn:
        """Raise `StuckRun`, with what the driver said at last."""
        said = self.log.read_text(errors="replace").splitlines()[-30:]
        raise StuckRun(
            f"The run made no progress for {PATIENCE_S:g} s after {self.watch.images:,} images. "
            "Its driver said at last:\n" + "\n".join(said)
        )


@contextmanager
def stand(folder: Path, *, images: int) -> Iterator[Stand]:
    """Have a cluster, on which nothing runs yet, for the length of a `with` block."""
    ensure_digits(f"{folder}/digits")
    with lab(kept=[folder], environment=ray_environment()) as made:
        cluster = RayHosts(made, cpus={"head": 0, "left": 1, "right": 1}, logs=folder)
        watch = Watch(folder / "driver.log")
        try:
            words = settings(folder, images=images)
            there = Stand(cluster=cluster, folder=folder, words=words, watch=watch)
            for host in cluster.others:
                there.prepare(host)
            yield there
        finally:
            watch.close()


def run_undisturbed(folder: Path, *, images: int) -> Job:
    """Do the same run, on plain processes of this machine."""
    words = [*settings(folder, images=images), "cluster.backend=local"]
    ensure_digits(f"{folder}/digits")
    with job(*words, home=folder / "home") as running:
        if (code := running.wait()) != 0:
            raise RuntimeError(f"The undisturbed run ended with {code}:\n{running.output}")
    return running
