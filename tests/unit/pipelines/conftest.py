"""A small dataset in several shards."""

import shutil
from pathlib import Path

import pytest

from pipelines.ingest.write import LabelledImage, write_dataset
from tests.unit.pipelines import pictures

SAMPLES = 48


@pytest.fixture(scope="session")
def images() -> list[LabelledImage]:
    return [LabelledImage(pictures.png(8, 8, seed=seed), seed % 5) for seed in range(SAMPLES)]


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory, images: list[LabelledImage]) -> Path:
    """A dataset to be read only."""
    folder = tmp_path_factory.mktemp("data") / "dataset"
    write_dataset(images, str(folder), shard_bytes=2000)
    return folder


@pytest.fixture
def prefix(tmp_path: Path, pristine: Path) -> Path:
    """A dataset of its own for each test, to be damaged at will."""
    return shutil.copytree(pristine, tmp_path / "dataset")
