"""Writing datasets: whole or not at all, never over another one."""

import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import EmptyDatasetError, MissingDatasetError, OccupiedPrefixError
from pipelines.ingest import digits, verify
from pipelines.ingest.__main__ import main as ingest_command
from pipelines.ingest.target import has_dataset
from pipelines.ingest.write import LabelledImage, write_dataset
from pipelines.shards import ShardedDataset
from tests.unit.pipelines.conftest import SAMPLES


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def broken(images: list[LabelledImage], after: int) -> Iterator[LabelledImage]:
    yield from images[:after]
    raise OSError("the source went away")


def test_writing_the_same_again_changes_nothing(prefix: Path, images: list[LabelledImage]) -> None:
    before = files_in(prefix)
    write_dataset(images, str(prefix), shard_bytes=2000)
    assert files_in(prefix) == before
    assert sorted(path.name for path in prefix.parent.iterdir()) == [".dataset.lock", "dataset"]


def test_a_folder_named_by_a_url_is_that_folder(
    tmp_path: Path, images: list[LabelledImage], capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(images, f"file://{tmp_path}/by-url", shard_bytes=2000)
    write_dataset(images, f"{tmp_path}/by-path", shard_bytes=2000)
    assert files_in(tmp_path / "by-url") == files_in(tmp_path / "by-path")
    write_dataset(images, f"{tmp_path}/by-url", shard_bytes=2000)  # the same is there already
    with pytest.raises(OccupiedPrefixError, match="holds another dataset"):
        write_dataset(images[:-8], f"file://{tmp_path}/by-url", shard_bytes=2000)
    (tmp_path / "classes" / "a").mkdir(parents=True)
    (tmp_path / "classes" / "a" / "0.png").write_bytes(images[0].data)
    for root in (f"file://{tmp_path}/built", f"{tmp_path}/built"):
        assert ingest_command(["image-folder", f"{tmp_path}/classes", root]) == 0
    assert "complete, nothing to do" in capsys.readouterr().out
    assert has_dataset(f"{tmp_path}/built/train")


@pytest.mark.parametrize("other", ["fewer", "more", "changed", "regrouped"])
def test_another_dataset_is_not_replaced(
    prefix: Path, images: list[LabelledImage], other: str
) -> None:
    before = files_in(prefix)
    chosen, shard_bytes = {
        "fewer": (images[:-8], 2000),
        "more": (images + images, 2000),
        "changed": ([*images[:-1], LabelledImage(images[-1].data, 99)], 2000),
        "regrouped": (images, 4000),
    }[other]
    with pytest.raises(OccupiedPrefixError, match=r"holds another dataset.*another prefix"):
        write_dataset(chosen, str(prefix), shard_bytes=shard_bytes)
    assert files_in(prefix) == before


def test_other_files_are_not_replaced(tmp_path: Path, images: list[LabelledImage]) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("…")
    (tmp_path / "file").write_text("…")
    for name, words in (("thesis", "holds other files"), ("file", "is a file")):
        with pytest.raises(OccupiedPrefixError, match=words):
            write_dataset(images, str(tmp_path / name))
    (tmp_path / "empty").mkdir()
    write_dataset(images, str(tmp_path / "empty"))
    assert has_dataset(str(tmp_path / "empty"))


def test_an_interrupted_write_is_no_dataset(tmp_path: Path, images: list[LabelledImage]) -> None:
    target = tmp_path / "new" / "train"
    with pytest.raises(OSError, match="went away"):
        write_dataset(broken(images, 30), str(target), shard_bytes=2000)
    assert not has_dataset(str(target))
    with pytest.raises(MissingDatasetError, match="interrupted"):
        ShardedDataset(str(target))
    write_dataset(images, str(target), shard_bytes=2000)
    assert len(ShardedDataset(str(target))) == SAMPLES
    assert sorted(path.name for path in target.parent.iterdir()) == [".train.lock", "train"]


def test_a_killed_write_is_no_dataset(tmp_path: Path, images: list[LabelledImage]) -> None:
    def die() -> Iterator[LabelledImage]:
        yield from images[:30]
        os.kill(os.getpid(), signal.SIGKILL)

    arguments = (die(), str(tmp_path / "train"))
    process = multiprocessing.get_context("fork").Process(
        target=write_dataset, args=arguments, kwargs={"shard_bytes": 2000}
    )
    process.start()
    process.join(540)
    assert process.exitcode == -signal.SIGKILL
    assert list((tmp_path / ".train.building").glob("*.mds"))
    assert not has_dataset(str(tmp_path / "train"))
    write_dataset(images, str(tmp_path / "train"), shard_bytes=2000)
    assert len(ShardedDataset(str(tmp_path / "train"))) == SAMPLES
    assert not (tmp_path / ".train.building").exists()


def test_two_writers_at_once_agree(tmp_path: Path, images: list[LabelledImage]) -> None:
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=write_dataset, args=(images, str(tmp_path / "train")))
        for _ in range(2)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(540)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(ShardedDataset(str(tmp_path / "train"))) == SAMPLES


def test_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(EmptyDatasetError, match="no images to write"):
        write_dataset([], str(tmp_path / "train"))
    assert not has_dataset(str(tmp_path / "train"))


@pytest.fixture(scope="module")
def digits_prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("digits")
    ingest_command(["digits", f"{prefix}/"])
    return prefix


def test_digits_are_split_by_class(digits_prefix: Path) -> None:
    from sklearn.datasets import load_digits

    train, test = (verify.verify(str(digits_prefix / split)) for split in ("train", "test"))
    assert train.samples + test.samples == 1797
    assert not train.faults
    assert train.sizes == {(8, 8): train.samples}
    for label in range(digits.CLASSES):
        members = train.samples_per_class[label] + test.samples_per_class[label]
        assert test.samples_per_class[label] == round(0.2 * members)
    source = load_digits()
    every = {
        (image.tobytes(), label)
        for image, label in zip(
            np.rint(source.images * 255 / 16).astype(np.uint8), source.target.tolist(), strict=True
        )
    }
    dataset = ShardedDataset(str(digits_prefix / "test"))
    for sample_id in range(len(dataset)):
        sample = dataset.read(sample_id)
        with Image.open(io.BytesIO(sample.data)) as image:
            assert image.mode == "L"
            assert (np.asarray(image).tobytes(), sample.label) in every


def test_digits_are_written_once(
    digits_prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(digits_prefix, tmp_path / "digits")
    before = files_in(copy / "test")
    shutil.rmtree(copy / "test")
    digits.ensure_digits(str(copy))
    assert files_in(copy / "test") == before  # the same split again
    monkeypatch.setattr(digits, "_load", lambda: pytest.fail("read the source again"))
    digits.ensure_digits(str(copy))


@pytest.mark.slow
def test_light_modules_do_not_load_heavy_packages() -> None:
    """`streaming` and DALI take seconds to import; settings must not."""
    script = (
        "import sys, pipelines.order, pipelines.loading.loader, pipelines.decode, "
        "pipelines.source, pipelines.shards, pipelines.ingest.digits\n"
        "heavy = {'streaming', 'nvidia.dali', 'torchvision', 'sklearn', 'boto3', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert done.stdout == "[]\n"
