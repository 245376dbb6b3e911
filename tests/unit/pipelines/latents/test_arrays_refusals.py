"""Arrays and settings that cannot be taken in, and runs that cannot use what was."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.ingest.about import read_about
from pipelines.latent_record import read_latent_record
from pipelines.npy import BadArrayError, parse_npy
from tests.unit.pipelines.latents.arrays import moments, same, save, take_in
from tests.unit.pipelines.latents.encoding import files_in


def spoil(name: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        array = np.load(path)
        if name == "cut off":
            path.write_bytes(path.read_bytes()[:-1])
        elif name == "pickled":
            np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
        elif name == "archived":
            np.savez(path.with_suffix(""), array)
            path.with_suffix("").with_suffix(".npz").replace(path)
        elif name == "empty":
            path.write_bytes(b"")
        elif name == "infinite":
            array[0, 0, 0, 0] = np.inf
            np.save(path, array)
        elif name == "negative":
            array[1, 3, 3, 3] = -1e-9
            np.save(path, array)
        elif name == "whole numbers":
            np.save(path, array.astype(np.int8))

    return write


@pytest.mark.parametrize("shape", ["(True,)", f"({'1, ' * 70})", "(1,) * 2", "(-1,)", "(1, False)"])
def test_shapes_that_no_array_has_are_refused(shape: str) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(4)
    with pytest.raises(BadArrayError, match=r"its shape is|no \.npy file"):
        parse_npy(data)


WORDS = {
    "cut off": "it holds 511 bytes of numbers instead of 512",
    "pickled": "pickled objects",
    "archived": "no .npy file",
    "empty": "no .npy file",
    "infinite": "not finite",
    "negative": "deviations below 0",
    "whole numbers": "int8",
}


def test_damaged_files_are_left_out_and_named(place: Path, tmp_path: Path) -> None:
    wanted = moments(20)
    folder = save(tmp_path / "arrays", list(wanted[:, 0]), classes=2)
    # The first of all is among them, by which the shape is found otherwise.
    bad = {f"class{number % 2}/{number:03d}.npy": name for number, name in enumerate(WORDS)}
    for path, name in bad.items():
        spoil(name)(folder / path)
    assert take_in(place, folder, tmp_path / "out", "--max-skipped-fraction", "0.35") == 0
    assert same(tmp_path / "out" / "train", wanted[len(WORDS) :])
    record = read_latent_record(str(tmp_path / "out" / "train"))
    assert (record.samples, len(record.skipped)) == (20 - len(WORDS), len(WORDS))
    about = read_about(str(tmp_path / "out" / "train"))
    assert about is not None
    skipped = dict(about.skipped)
    assert skipped.keys() == bad.keys()
    for path, reason in skipped.items():
        assert WORDS[bad[path]] in reason
    assert about.images_per_class == (6, 7)


def test_too_many_damaged_files_stop_it_and_may_be_removed(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = moments(6)
    folder = save(tmp_path / "arrays", list(wanted[:, 0]))
    spoil("negative")(folder / "class0" / "003.npy")
    assert take_in(place, folder, tmp_path / "out") == 2
    assert re.search(r"1 of 6 .*class0/003\.npy .*--max-skipped", capfd.readouterr().err)
    assert not (tmp_path / "out" / "train").exists()
    left = np.delete(wanted, 3, axis=0)
    assert take_in(place, folder, tmp_path / "raised", "--max-skipped-fraction", "0.2") == 0
    (folder / "class0" / "003.npy").unlink()
    assert take_in(place, folder, tmp_path / "out") == 0
    for name in ("raised", "out"):
        assert same(tmp_path / name / "train", left)


def refused(error: str, *parts: str) -> None:
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for part in parts:
        assert part in error


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((4, 4, 4), []),
        ((2, 8, 4, 4), []),
        ((8, 4, 4), ["--views", "2"]),
        ((8, 4, 4), ["--arrays", "latents"]),
        ((2, 2, 4, 4, 4), ["--arrays", "latents", "--views", "2"]),
        ((8, 4, 2), []),
        ((16, 4, 4), []),
        ((8,), []),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    place: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    shape: tuple[int, ...],
    options: list[str],
) -> None:
    folder = save(tmp_path / "arrays", [np.ones(shape, np.float32)])
    assert take_in(place, folder, tmp_path / "out", *options) == 2
    error = capfd.readouterr().err
    refused(error, "class0/000.npy", str(list(shape)), ", size, size]", "--views")
    assert not (tmp_path / "out").exists()


def test_several_shapes_are_refused(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arrays = list(moments(3)[:, 0])
    arrays[2] = np.ones((8, 8, 8), np.float32)
    folder = save(tmp_path / "sizes", arrays)
    assert take_in(place, folder, tmp_path / "out") == 2
    refused(capfd.readouterr().err, "class0/002.npy", "[8, 8, 8]", "class0/000.npy", "[2, 4, 4, 4]")
    assert not (tmp_path / "out").exists()
    # As many bytes in another shape are found when they are read.
    arrays[2] = moments(1)[0, 0].reshape(8, 4, 4)
    folder = save(tmp_path / "shapes", arrays)
    assert take_in(place, folder, tmp_path / "out") == 2
    refused(capfd.readouterr().err, "class0/002.npy", "[8, 4, 4]", "class0/000.npy", "[2, 4, 4, 4]")


def test_numbers_too_large_for_float16_are_refused(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "arrays", [1e5 * moments(1)[0, 0]])
    assert take_in(place, folder, tmp_path / "out", "--dtype", "float16") == 2
    refused(capfd.readouterr().err, "class0/000.npy", "not in float16", "--dtype float32")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (["--image-size", "256"], ["--image-size is for images", "--arrays mean-std"]),
        (["--splits", "train"], ["--splits is for images"]),
        (["--no-flips"], ["--no-flips is for images"]),
        (["--hold-out", "0.01"], ["--hold-out 0.01 leaves no arrays for test", "6 arrays"]),
        (["--hold-out", "1"], ["--hold-out 1.0 must lie in [0, 1)"]),
        (["--hold-out", "-1"], ["--hold-out -1.0 must lie"]),
        (["--hold-out", "0.5", "--split", "test"], ["--hold-out 0.5 goes to the split test"]),
        (["--split", "a/b"], ["--split a/b"]),
        (["--workers", "0"], ["workers=0"]),
        (["--seed", "-1"], ["seed=-1"]),
        (["--shard-mib", "0"], ["shard_bytes=0"]),
        (["--max-skipped-fraction", "2"], ["max_skipped_fraction=2.0"]),
        (["--classes", "nowhere"], ["class list nowhere"]),
        (["--autoencoder", "nowhere"], ["--autoencoder nowhere"]),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    place: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    change: list[str],
    parts: list[str],
) -> None:
    folder = save(tmp_path / "arrays", list(moments(6)[:, 0]), classes=2)
    assert take_in(place, folder, tmp_path / "out", *change) == 2
    refused(capfd.readouterr().err, *parts)
    assert not (tmp_path / "out").exists()


def test_folders_that_are_not_understood(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def said(folder: Path, *options: str) -> str:
        assert take_in(place, folder, tmp_path / "out", *options) == 2
        assert not (tmp_path / "out").exists()
        return capfd.readouterr().err

    refused(said(tmp_path / "nowhere"), "cannot be read", "sub-folder of .npy files")
    (tmp_path / "nothing").mkdir()
    refused(said(tmp_path / "nothing"), "holds no arrays")
    folder = save(tmp_path / "arrays", list(moments(2)[:, 0]), classes=2)
    (tmp_path / "names").write_text("class0\n")
    refused(said(folder, "--classes", str(tmp_path / "names")), "'class1'", "class list")
    labels = folder / "dataset.json"
    for content in ("[]", "{", '{"labels": null}', '{"labels": [["a", -1]]}', '{"labels": [[1]]}'):
        labels.write_text(content)
        refused(said(folder), "dataset.json does not hold", "each folder for a class")
    labels.write_text(json.dumps({"labels": [["class0/000.npy", 0]]}))
    refused(said(folder), "does not say of which class 'class1/001.npy' is")
    labels.write_text(json.dumps({"labels": [["class0/000.npy", 0], ["class1/001.npy", 1]]}))
    refused(said(folder, "--classes", str(tmp_path / "names")), "the label 1", "1 classes")
    labels.unlink()
    np.save(folder / "loose.npy", moments(1)[0, 0])
    refused(said(folder), "'loose.npy' beside the class 'class0'")
    bad = save(tmp_path / "bad", [np.ones(3, np.int64)])
    refused(said(bad), "None of the 1 arrays", "numpy.save")


def test_what_is_there_is_left_alone(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "arrays", list(moments(4)[:, 0]))
    assert take_in(place, folder, tmp_path / "out") == 0
    before = files_in(tmp_path / "out" / "train")
    for change in (["--dtype", "float16"], ["--scaled"], ["--seed", "1"]):
        assert take_in(place, folder, tmp_path / "out", *change) == 2
        refused(capfd.readouterr().err, "holds another dataset")
    assert files_in(tmp_path / "out" / "train") == before
    assert take_in(place, folder, tmp_path / "out") == 0
    assert "complete, nothing to do" in capfd.readouterr().out


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000, 1000000)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 4, 4)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': 4}",
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (4,)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (4,)}",
        "{'descr': 5, 'fortran_order': False, 'shape': (4,)}",
        "__import__('os').system('true')",
        "[" * 9000,
        "",
    ],
)
def test_headers_that_lie_cost_nothing(header: str) -> None:
    for version, width in ((1, 2), (2, 4), (3, 4)):
        start = b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(width, "little")
        with pytest.raises(BadArrayError):
            parse_npy(start + header.encode() + bytes(16))
        with pytest.raises(BadArrayError):
            parse_npy(start)


def test_files_that_are_too_long_are_not_read(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = list(moments(4)[:, 0])
    folder = save(tmp_path / "arrays", [*arrays, np.ones((8, 64, 64), np.float32)])
    monkeypatch.setattr("pipelines.ingest.arrays.MAX_BYTES", 10_000)
    assert take_in(place, folder, tmp_path / "out", "--max-skipped-fraction", "0.2") == 0
    about = read_about(str(tmp_path / "out" / "train"))
    assert about is not None
    assert "bytes long, more than 10000" in about.skipped[0][1]
