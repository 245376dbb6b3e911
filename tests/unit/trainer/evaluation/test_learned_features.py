"""Features of a small classifier: learned the same again, kept, and believed only if unchanged."""

import logging

import numpy as np
import pytest
import torch

from tests.unit.trainer.evaluation.two_kinds import two_kinds
from trainer.evaluation.learned_features import KeptFeatures, learned_features
from trainer.storage.kept import KeptFiles


def kept(folder, **made_of) -> KeptFeatures:
    return KeptFeatures(files=KeptFiles(folder), made_of={"train_index": "x", **made_of})


def learn(**options):
    train, held_out = two_kinds(512, 0), two_kinds(64, 1)
    return learned_features(train=[train], held_out=[held_out], **options)


def test_learned_features_know_the_classes_and_are_the_same_again(tmp_path):
    torch.manual_seed(1)
    first = learn()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = learn(kept=kept(tmp_path))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.held_out_accuracy > 0.95
    assert first.digest == second.digest
    images, labels = two_kinds(64, 2)
    features = first(images)
    assert features.shape == (64, 128)
    means = torch.stack([features[labels == label].mean(0) for label in (0, 1)])
    spread = features[labels == 0].std(0).norm()
    assert (means[0] - means[1]).norm() > 2 * spread


def never():
    raise AssertionError("trained again")
    yield


def test_learned_features_are_read_back_without_training(tmp_path):
    learned = learn(kept=kept(tmp_path))
    read = learned_features(train=never(), held_out=never(), kept=kept(tmp_path))
    images, _ = two_kinds(8, 3)
    assert torch.equal(read(images), learned(images))
    assert (read.digest, read.held_out_accuracy) == (learned.digest, learned.held_out_accuracy)
    with pytest.raises(AssertionError, match="trained again"):
        learned_features(
            train=never(), held_out=never(), kept=kept(tmp_path, held_out_index="other")
        )


@pytest.mark.slow
def test_no_changed_byte_of_kept_features_moves_a_distance(tmp_path, caplog):
    learned = learn(kept=kept(tmp_path))
    (weights,), (record,) = tmp_path.glob("*/*.safetensors"), tmp_path.glob("*.json")
    generator = np.random.default_rng(0)
    for file in (weights, record):
        whole = file.read_bytes()
        for place in generator.choice(len(whole), 40, replace=False):
            changed = bytearray(whole)
            changed[place] ^= 1 << generator.integers(8)
            file.write_bytes(changed)
            found = kept(tmp_path).read()
            assert found is None or found.digest == learned.digest
            for aside in file.parent.glob("*.damaged*"):
                aside.unlink()
        file.write_bytes(whole[: len(whole) // 2])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            again = learn(kept=kept(tmp_path))
        assert again.digest == learned.digest
        (line,) = (each.getMessage() for each in caplog.records)
        assert line.startswith(f"{file} cannot be believed: ")
        assert file.with_name(f"{file.name}.damaged").read_bytes() == whole[: len(whole) // 2]
        assert learned_features(train=never(), held_out=never(), kept=kept(tmp_path)).digest


def test_features_that_cannot_be_kept_are_used_all_the_same(tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        learned = learn(kept=kept(tmp_path / "file" / "features"))
    assert learned.held_out_accuracy > 0.95
    assert "what was learned is not kept" in caplog.text
