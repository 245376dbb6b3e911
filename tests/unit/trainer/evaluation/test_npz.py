"""Files of reference statistics: read as ADM's are, and believed in nothing else."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.evaluation.feature_sets import spread_evenly
from trainer.evaluation.layout import Layout
from trainer.evaluation.measures import Target
from trainer.evaluation.npz import BadReference, check_reference, open_reference
from trainer.evaluation.stored import read_stored, stored_digest, stored_target
from trainer.host_group import HostGroup
from trainer.storage.store import StoreConfig

HERE = StoreConfig()
ALONE = HostGroup(alone=True)
CPU = torch.device("cpu")


def adm_file(path: Path, **changes: Any) -> dict[str, np.ndarray]:
    """Write what ADM's evaluation writes, of fewer features."""
    generator = np.random.default_rng(0)
    members: dict[str, Any] = {
        "mu": generator.normal(size=6),
        "sigma": np.eye(6) * 2,
        "mu_s": generator.normal(size=4).astype(np.float32),
        "sigma_s": np.eye(4, dtype=np.float32),
        "arr_0": generator.integers(0, 256, (300, 8, 8, 3), dtype=np.uint8),
    }
    members = {name: each for name, each in {**members, **changes}.items() if each is not None}
    np.savez(path, **members)
    return members


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_statistics_and_pictures_are_read_as_they_are(tmp_path, scheme):
    file = tmp_path / "reference.npz"
    members = adm_file(file)
    with open_reference(f"{scheme}{file}", HERE) as stored:
        assert stored.digest == hashlib.sha256(file.read_bytes()).hexdigest()
        pool, spatial = stored.statistics(features=6), stored.statistics(features=4, spatial=True)
        batches = list(stored.pictures())
    assert pool is not None
    assert spatial is not None
    assert np.array_equal(pool.mean, members["mu"])
    assert np.array_equal(pool.covariance, members["sigma"])
    assert np.array_equal(spatial.mean, members["mu_s"])
    assert spatial.covariance.dtype == np.float64
    images = torch.cat(batches)
    assert max(map(len, batches)) == 256
    pixels = (images * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(pixels, members["arr_0"])
    check_reference(f"{scheme}{file}", HERE)


class Columns:
    """Six features, four spatial ones and two logits: the first pixels of a picture."""

    digest = ""
    layout = Layout(spatial=4, logits=2)
    seen = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return images.flatten(1)[:, :12]


def targets(file: Path) -> tuple[Target, Target]:
    """What is measured against, in the features of Inception and of another extractor."""
    extractors = {"inception": Columns(), "random_conv": Columns()}
    with open_reference(str(file), HERE) as stored:
        data = read_stored(stored, extractors, channels=3, compared=50, device=CPU)
    assert stored_digest(data) == hashlib.sha256(file.read_bytes()).hexdigest()
    one, two = (stored_target(data, name, ranks=ALONE, device=CPU) for name in extractors)
    return one, two


def test_statistics_are_taken_as_stored_and_what_is_missing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.evaluation.stored.INCEPTION_FEATURES", 6)
    file = tmp_path / "reference.npz"
    members = adm_file(file)
    inception, other = targets(file)
    assert np.array_equal(inception.statistics.mean, members["mu"])
    assert inception.spatial is not None
    assert np.array_equal(inception.spatial.mean, members["mu_s"])
    pixels = (members["arr_0"].transpose(0, 3, 1, 2).reshape(300, -1) - 127.5) / 127.5
    assert other.spatial is not None
    np.testing.assert_allclose(other.statistics.mean, pixels[:, :6].mean(0), atol=1e-6)
    np.testing.assert_allclose(
        other.spatial.covariance, np.cov(pixels[:, 6:10], rowvar=False), atol=1e-6
    )
    for each in (inception, other):
        assert each.images == 300
        assert each.compared is not None
        assert (each.compared.count, each.compared.width) == (50, 6)
    adm_file(file, mu_s=None)
    assert targets(file)[0].spatial is not None
    adm_file(file, arr_0=None, mu_s=None)
    with pytest.raises(BadReference, match="no pictures"):
        targets(file)
    with open_reference(str(file), HERE) as stored:
        alone = read_stored(stored, {"inception": Columns()}, channels=3, compared=9, device=CPU)
    found = stored_target(alone, "inception", ranks=ALONE, device=CPU)
    assert (found.images, found.spatial, found.compared) == (0, None, None)


@pytest.mark.parametrize("missing", [{}, {"mu": None}, {"mu_s": None}])
def test_only_what_is_compared_is_measured_where_statistics_are_stored(
    missing, tmp_path, monkeypatch
):
    monkeypatch.setattr("trainer.evaluation.stored.INCEPTION_FEATURES", 6)
    file = tmp_path / "reference.npz"
    members = adm_file(file, **missing)
    extractor = Columns()
    with open_reference(str(file), HERE) as stored:
        data = read_stored(stored, {"inception": extractor}, channels=3, compared=50, device=CPU)
    chosen = spread_evenly(300, 50)
    wanted = members["arr_0"].transpose(0, 3, 1, 2)[chosen].reshape(50, -1)[:, :6]
    compared = stored_target(data, "inception", ranks=ALONE, device=CPU).compared
    assert compared is not None
    assert np.array_equal((compared.part.numpy() * 127.5 + 127.5).round(), wanted)
    # In calls of as many pictures as there are in a unit, the last of which is padded.
    assert extractor.seen == (320 if missing else 64)


def test_what_is_not_there_is_none_or_said(tmp_path):
    adm_file(tmp_path / "a.npz", mu=None, arr_0=None)
    with open_reference(str(tmp_path / "a.npz"), HERE) as stored:
        assert stored.statistics(features=6) is None
        with pytest.raises(BadReference, match=r"no pictures \(arr_0\)"):
            next(stored.pictures())


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self):
        return os.mkdir, (str(self._path),)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mu": np.zeros(5)}, r"shapes \[5\] and \[6, 6\]"),
        ({"sigma": np.eye(6)[:5]}, r"shapes \[6\] and \[5, 6\]"),
        ({"mu": np.full(6, np.nan)}, "mu holds values that are not finite"),
        ({"sigma": -np.eye(6)}, "sigma is no covariance, as a variance in it is negative"),
        ({"sigma": np.eye(6) + 5 * np.eye(6, k=1)}, "sigma is no covariance, .* not symmetric"),
        ({"mu": np.zeros(6, np.int64)}, "mu: it holds int64"),
        ({"mu": np.array([Canary(Path("sung"))] * 6, object)}, "mu: it holds pickled objects"),
    ],
)
def test_statistics_that_are_none_are_refused(tmp_path, changes, reason, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adm_file(tmp_path / "a.npz", **changes)
    with (
        open_reference(str(tmp_path / "a.npz"), HERE) as stored,
        pytest.raises(BadReference, match=reason),
    ):
        stored.statistics(features=6)
    assert not (tmp_path / "sung").exists()


@pytest.mark.parametrize(
    ("pictures", "reason"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "not of the shape"),
        (np.zeros((2, 8, 8), np.uint8), "not of the shape"),
        (np.zeros((2, 3, 8, 8), np.uint8), "not of the shape"),
        (np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8)), "not of the shape"),
        (np.array([Canary(Path("sung"))], object), "not of the shape"),
        (np.zeros((0, 8, 8, 3), np.uint8), "arr_0 has the shape"),
    ],
)
def test_pictures_that_are_none_are_refused(tmp_path, pictures, reason, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adm_file(tmp_path / "a.npz", arr_0=pictures)
    with (
        open_reference(str(tmp_path / "a.npz"), HERE) as stored,
        pytest.raises(BadReference, match=reason),
    ):
        list(stored.pictures())
    assert not (tmp_path / "sung").exists()


def promised(shape: tuple[int, ...]) -> bytes:
    """Return the head of an array that is not there."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    return head.getvalue()


def test_no_memory_is_taken_for_what_a_header_promises(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", promised((1 << 20, 64, 64, 3)))
    with (
        open_reference(str(tmp_path / "a.npz"), HERE) as stored,
        pytest.raises(BadReference, match="cut short"),
    ):
        list(stored.pictures())
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mu.npy", bytes(2**28 + 1))
        archive.writestr("sigma.npy", b"")
    assert (tmp_path / "a.npz").stat().st_size < 2**20
    with (
        open_reference(str(tmp_path / "a.npz"), HERE) as stored,
        pytest.raises(BadReference, match="mu is larger"),
    ):
        stored.statistics(features=6)


@pytest.mark.parametrize("damage", ["absent", "folder", "text", "half"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_file_that_is_no_archive_is_named(tmp_path, damage, scheme):
    file = tmp_path / "a.npz"
    adm_file(file)
    whole = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage != "absent":
        file.write_bytes(b"text" if damage == "text" else whole[: len(whole) // 2])
    with (
        pytest.raises(BadReference, match=r"reference=.*a\.npz cannot be used"),
        open_reference(f"{scheme}{file}", HERE),
    ):
        pass


@pytest.mark.parametrize("byte", range(0, 4000, 97))
def test_no_changed_byte_is_taken_for_statistics(tmp_path, byte):
    file = tmp_path / "a.npz"
    members = adm_file(file, arr_0=None)
    changed = bytearray(file.read_bytes())
    changed[byte % len(changed)] ^= 16
    file.write_bytes(changed)
    try:
        with open_reference(str(file), HERE) as stored:
            found = stored.statistics(features=6)
    except BadReference:
        return
    if found is not None:
        assert np.array_equal(found.mean, members["mu"])
        assert np.array_equal(found.covariance, members["sigma"])
