"""A dataset that is named on the Hub is fetched from it, and looked at before it is unpacked."""

import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub_server import serve
from tests.unit.pipelines import pictures
from tests.unit.pipelines.test_huggingface import IMAGES, LABELS, contents, hub_dataset, parquet
from tests.unit.pipelines.test_huggingface_hostile import readme

pytestmark = pytest.mark.slow


def archive_of(*, unpacked_bytes: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/0.png", pictures.png(9, 7) + bytes(unpacked_bytes))
    return file.getvalue()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("hub")
    table = Path(parquet(hub_dataset(), folder / "train")).read_bytes()
    repositories = {
        "mine/pictures": {"data/train-00000-of-00001.parquet": table},
        "mine/bomb": {"train.zip": archive_of(unpacked_bytes=100 << 20)},
        "mine/packed": {"train.jsonl.gz": b"\x1f\x8b\x08" + bytes(100)},
        "mine/pointer": {"README.md": readme(str(folder / "train.parquet")).encode()},
    }
    with serve(repositories) as address:
        yield address


def ingest(hub: str, name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, for the library reads the address when it is imported."""
    home = {"HF_ENDPOINT": hub, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "pipelines.ingest", "huggingface", name, str(folder / "out")]
    return subprocess.run(
        [*command, "--workers", "1"],
        env={**os.environ, **home},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_name_on_the_hub_is_fetched(hub: str, tmp_path: Path) -> None:
    done = ingest(hub, "mine/pictures", tmp_path)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out" / "train") == sorted(zip(IMAGES, LABELS, strict=True))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("mine/bomb", "train.zip and the other files of its split would become more than"),
        ("mine/packed", "train.jsonl.gz is compressed"),
        ("mine/pointer", "cannot be loaded"),
        ("mine/nothing", "cannot be loaded"),
    ],
)
def test_what_it_holds_is_refused_as_in_a_folder(
    name: str, told: str, hub: str, tmp_path: Path
) -> None:
    done = ingest(hub, name, tmp_path)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    kept = sum(file.stat().st_size for file in (tmp_path / "hf").rglob("*") if file.is_file())
    assert kept < 2 << 20
