"""What samples are compared with: a split of the run's own images, or a file."""

import dataclasses
import hashlib

import numpy as np
import pytest

from tests.unit.trainer.evaluation.small_run import OWN, config, quiet, report_of
from tests.unit.trainer.evaluation.two_kinds import two_kinds
from trainer.config.reading import ConfigError
from trainer.evaluation.checkpoints import evaluate_checkpoints
from trainer.evaluation.choice import choose_checkpoints
from trainer.evaluation.model_record import own_eval
from trainer.evaluation.npz import BadReference
from trainer.evaluation.reports import evaluation_key
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig


@pytest.mark.slow
def test_distances_are_to_the_reference_that_was_asked_for(place, tmp_path):
    held_out, train = (
        evaluate_checkpoints(config(place, reference=split), report=quiet)[0]
        for split in ("test", "train")
    )
    assert held_out == evaluate_checkpoints(config(place), report=quiet)[0]
    assert (held_out.measurement.reference, held_out.real_images) == ("test", 20)
    assert (train.measurement.reference, train.real_images) == ("train", 32)
    assert train.measurement.held_out_index != held_out.measurement.held_out_index
    one, two = held_out.distances[0], train.distances[0]
    assert one.frechet != two.frechet
    assert (one.diversity, one.nearest) == (two.diversity, two.nearest)
    # What stands in the place of the samples is never the reference itself.
    assert one.real is not None
    assert two.real is not None
    assert (one.real.images, two.real.images) == (20, 20)
    assert one.real.frechet > 0
    assert two.real.frechet > 0


@pytest.mark.slow
def test_samples_that_are_written_are_a_reference_of_themselves(place, tmp_path):
    asked = config(place, write_samples=True, output=str(tmp_path / "a"))
    (first,) = evaluate_checkpoints(asked, report=quiet)
    (file,) = tmp_path.rglob("samples.npz")
    pictures = np.load(file)["arr_0"]
    assert pictures.shape == (20, 8, 8, 1)
    (again,) = evaluate_checkpoints(
        config(place, reference=str(file), output=str(tmp_path / "b")), report=quiet
    )
    assert again.distances[0].frechet == pytest.approx(0, abs=1e-6)
    assert first.distances[0].frechet > 100 * again.distances[0].frechet
    assert (again.measurement.reference, again.real_images) == ("file", 20)
    assert again.measurement.held_out_index == hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(BadReference, match="no such file"):
        evaluate_checkpoints(config(place, reference=str(tmp_path / "c.npz")), report=quiet)
    with pytest.raises(ConfigError, match="reference=tset is neither"):
        config(place, reference="tset")


@pytest.mark.slow
def test_pictures_of_the_held_out_images_in_a_file_are_the_held_out_images(place, tmp_path):
    images, _ = two_kinds(20, 0)
    pixels = (images * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "reference.npz", pixels)
    (split,) = evaluate_checkpoints(config(place), report=quiet)
    (file,) = evaluate_checkpoints(
        config(place, reference=f"file://{tmp_path}/reference.npz", output=str(tmp_path)),
        report=quiet,
    )
    assert file.distances == split.distances


def test_a_runs_own_file_of_statistics_is_not_read_on_the_stores_word(place, caplog):
    (manifest,) = choose_checkpoints(
        f"{place}/runs/small", which="newest", config=StoreConfig()
    ).manifests
    store = open_store(f"{place}/another", StoreConfig())
    for reference, taken in (
        ("/etc/x.npz", "test"),
        ("s3://bucket/x.npz", "s3://bucket/x.npz"),
        ("train", "train"),
    ):
        own = dataclasses.replace(OWN, reference=reference)
        store.put(evaluation_key("small", 200, "report.json"), report_of(own).to_json())
        found = own_eval(store, manifest)
        assert found is not None
        assert found.reference == taken
    assert "unless reference=FILE.npz is given" in caplog.text
