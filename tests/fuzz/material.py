"""What is attacked: a small finished run with everything that it leaves, made once."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from pipelines.ingest.__main__ import main as ingest
from tests.fuzz.unfinished import make_unfinished
from tests.support.autoencoder import saved_autoencoder
from tests.support.forked import ranks_by_fork
from tests.unit.pipelines import pictures
from trainer.cli.evaluate import main as evaluate
from trainer.cli.launch import main as launch

CLASSES, PER_CLASS, SIZE = 3, 16, 8
RUN, DATA = "fuzz", "pictures"
INTERVAL, LAST = 64, 192
"""Images between checkpoints, and those of the last one."""
SETTINGS = (
    "+exp=digits",
    f"run={RUN}",
    f"data.name={DATA}",
    "data.prepare=none",
    "data.classes=0",
    "cluster.backend=local",
    "engine=plain",
    "model.depth=1",
    "model.width=16",
    "train.global_batch=16",
    f"train.total_images={LAST}",
    f"checkpoint.interval_images={INTERVAL}",
    "checkpoint.keep_last=10",
    "checkpoint.patience_s=5",  # a store that fails for good is told soon
    "runtime.log_interval_images=32",
    "eval.samples=12",
    "eval.batch=8",
    "eval.sampler.steps=2",
    "eval.grid_interval_images=96",
    "eval.classifier=false",
)
"""A run of seconds, whose every part has something to do."""


@dataclass(frozen=True)
class Material:
    """Files to attack copies of.

    Attributes:
        folder: Where all of it is.
    """

    folder: Path

    @property
    def home(self) -> Path:
        """The home of the finished run."""
        return self.folder / "home"

    @property
    def images(self) -> Path:
        """The pictures that its data set was made of, in class folders."""
        return self.folder / "images"

    @property
    def unfinished(self) -> Path:
        """An ingest that was broken off: its source, and what it left."""
        return self.folder / "unfinished"

    @property
    def autoencoder(self) -> Path:
        """A small autoencoder in diffusers' layout."""
        return self.folder / "autoencoder"


def data_of(home: Path) -> Path:
    """Return the data set in a home."""
    return home / "store" / "datasets" / DATA


def run_of(home: Path) -> Path:
    """Return the run's folder in a home."""
    return home / "store" / "runs" / RUN


def ingest_arguments(images: Path, target: Path) -> list[str]:
    """Return the words that make the data set."""
    return [
        *("image-folder", str(images), str(target)),
        *("--image-size", str(SIZE), "--encoding", "png", "--hold-out", "0.25", "--workers", "1"),
        *("--shard-mib", "1"),
    ]


def launch_arguments(home: Path, *, workers: int = 2) -> list[str]:
    """Return the words that train the run, and show it once it is complete."""
    return [*SETTINGS, f"cluster.workers={workers}", f"home={home}"]


def evaluate_arguments(home: Path) -> list[str]:
    """Return the words that measure the last checkpoint with features that are learned and kept."""
    return [
        f"checkpoint={run_of(home)}",
        "features=[random_conv,learned_conv]",
        f"data.prefix={data_of(home)}",
        f"home={home}",
    ]


def make_material(folder: Path, *, report: Callable[[str], None]) -> Material:
    """Ingest pictures, train on them to the end, and measure: all by the commands, on real ranks.

    Raises:
        RuntimeError: A command failed, undamaged as all was.
    """
    material = Material(folder)
    for label in range(CLASSES):
        (material.images / f"class{label}").mkdir(parents=True)
        for number in range(PER_CLASS):
            picture = pictures.png(SIZE, SIZE, mode="L", seed=100 * label + number)
            (material.images / f"class{label}" / f"{number:02d}.png").write_bytes(picture)
    saved_autoencoder(material.autoencoder)
    home = material.home
    with ranks_by_fork(), (folder / "made").open("w") as log:
        for what, main, arguments in (
            ("ingesting", ingest, ingest_arguments(material.images, data_of(home))),
            ("training", launch, launch_arguments(home)),
            ("measuring", evaluate, evaluate_arguments(home)),
        ):
            report(f"{what} what is to be attacked")
            with redirect_stdout(log), redirect_stderr(log):
                code = main(arguments)
            if code == 128 + signal.SIGINT:
                raise KeyboardInterrupt
            if code != 0:
                log.flush()
                said = (folder / "made").read_text()
                raise RuntimeError(f"{what} ended with exit code {code}:\n{said}")
    make_unfinished(material.unfinished)
    _without_locks(home)
    return material


def copied_home(material: Material, target: Path) -> Path:
    """Copy the home, to be damaged at will; its MLflow writes into the copy."""
    home = Path(shutil.copytree(material.home, target))
    with closing(sqlite3.connect(home / "mlflow.db")) as database, database:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            change = f"UPDATE {table} SET {column} = replace({column}, ?, ?)"
            database.execute(change, (str(material.home), str(home)))
    return home


def _without_locks(home: Path) -> None:
    """Leave out files that hold nothing."""
    for path in home.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_size == 0:
            os.unlink(path)
