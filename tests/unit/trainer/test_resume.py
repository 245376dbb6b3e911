"""Which checkpoints a configuration may continue, and what is believed of those."""

import copy
import json
from typing import Any

import pytest

from tests.support.configuration import configuration
from tests.support.saved import manifest_of
from trainer.checkpoint.errors import InvalidManifest
from trainer.config.job import science
from trainer.config.reading import ConfigError
from trainer.evaluation.model_record import ModelRecord
from trainer.metrics.tracker import MAX_POINTS, Point
from trainer.state import TrainState
from trainer.training.resume import SavedCounters, check_start


def start(trained: dict, *overrides: str) -> list[str]:
    job = configuration("+exp=digits", *overrides)
    return check_start(job, science(job, data_digest="digest"), manifest_of(trained))


@pytest.fixture
def trained() -> dict:
    return copy.deepcopy(science(configuration("+exp=digits"), data_digest="digest"))


def test_the_same_settings_continue(trained):
    start(trained)


def test_a_setting_that_came_later_continues_at_its_default_only(trained):
    del trained["model"]["attention"]
    del trained["model"]["ties"]["parts"]
    start(trained)
    with pytest.raises(ConfigError, match=r"model\.attention: causal -> full"):
        start(trained, "model.attention=full")
    with pytest.raises(ConfigError, match=r"model\.ties\.parts: .*embedding.* -> .*mlp"):
        start(trained, "model.ties.parts=[mlp]")


def test_whether_products_are_in_tf32_is_recorded_and_free_to_change(trained):
    assert trained["engine"]["tf32"] is True
    start(trained, "engine.tf32=false")
    del trained["engine"]["tf32"]  # before there was a choice a GPU multiplied in full
    start(trained, "engine.tf32=false")
    job = configuration("+exp=digits", "engine.tf32=false")
    record = ModelRecord.of(manifest_of(science(job, data_digest="digest")))
    assert record.engine.tf32 is False
    assert ModelRecord.of(manifest_of(trained)).engine.tf32 is False


def test_a_changed_and_a_removed_setting_are_refused(trained):
    with pytest.raises(ConfigError, match=r"optim\.learning_rate: 0\.001 -> 0\.002"):
        start(trained, "optim.learning_rate=0.002")
    with pytest.raises(ConfigError, match=r"model\.gone: 3 -> None"):
        start({**trained, "model": {**trained["model"], "gone": 3}})


def test_a_changed_setting_is_shown_and_taken_where_that_is_allowed(trained):
    changed = ["optim.learning_rate=0.002", "train.label_dropout=0.2"]
    with pytest.raises(ConfigError, match="or resume_changed=true to go on from it with yours"):
        start(trained, *changed)
    assert start(trained, *changed, "resume_changed=true") == [
        "optim.learning_rate: 0.001 -> 0.002",
        "train.label_dropout: 0.1 -> 0.2",
    ]
    assert start(trained, "resume_changed=true") == []


def test_a_checkpoint_of_pixels_from_before_the_encoders_precision_continues(trained):
    del trained["codec"]["encode_precision"]
    start(trained)


def test_other_data_are_refused(trained):
    trained["data_set"]["index_sha256"] = "other"
    with pytest.raises(ConfigError, match=r"data_set\.index_sha256: other -> digest"):
        start(trained)


def test_a_checkpoint_from_before_there_were_codecs_is_of_pixels(trained):
    del trained["codec"]
    start(trained)
    with pytest.raises(ConfigError, match=r"codec\.kind: identity -> autoencoder_kl"):
        start(trained, "codec=sd_vae")


def test_a_moved_autoencoder_continues_also_when_a_setting_came_later():
    latent = ["+exp=digits", "codec=sd_vae"]
    digests = {"data_digest": "digest", "codec_digest": "autoencoder"}
    trained = copy.deepcopy(science(configuration(*latent), **digests))
    del trained["model"]["attention"]
    moved = configuration(*latent, "codec.source=/elsewhere")
    check_start(moved, science(moved, **digests), manifest_of(trained))
    other = science(moved, data_digest="digest", codec_digest="other")
    with pytest.raises(ConfigError, match=r"autoencoder\.sha256: autoencoder -> other"):
        check_start(moved, other, manifest_of(trained))


def test_a_checkpoint_from_before_the_encoders_precision_continues_in_fp32():
    digests = {"data_digest": "digest", "codec_digest": "autoencoder"}
    latent = ["+exp=digits", "codec=sd_vae"]
    trained = copy.deepcopy(science(configuration(*latent), **digests))
    del trained["codec"]["encode_precision"]
    same = configuration(*latent, "codec.encode_precision=fp32")
    check_start(same, science(same, **digests), manifest_of(trained))
    faster = configuration(*latent)
    with pytest.raises(ConfigError, match=r"codec\.encode_precision: fp32 -> bf16"):
        check_start(faster, science(faster, **digests), manifest_of(trained))


@pytest.mark.parametrize("value", [None, [], "x", 5])
def test_what_is_no_science_is_a_difference_or_refused(trained, value):
    with pytest.raises(InvalidManifest, match="its optim is no group of settings"):
        start({**trained, "optim": value})
    inner = {**trained, "data": {**trained["data"], "augment": value}}
    with pytest.raises(ConfigError, match=r"data\.augment: "):
        start(inner)


COUNTERS: dict[str, Any] = {"images": 100, "updates": 4, "skipped_updates": 1}
METRICS = {"loss": ["mean", "0x1p+0", "nan"]}
POINT = Point(90, {"loss": 0.1, "norm": float("inf")})


def counters(**changes: Any) -> SavedCounters:
    values = {**COUNTERS, "metrics": METRICS, "unsent_points": [POINT.to_json()], **changes}
    return SavedCounters.of(manifest_of({}, train_state=json.loads(json.dumps(values))))


def test_counters_are_read_as_they_were_saved():
    read = counters()
    assert read.state == TrainState(images=100, updates=4, skipped_updates=1)
    assert read.unsent == [POINT]
    assert {name: list(entry) for name, entry in read.metrics.items()} == METRICS
    assert SavedCounters.of(manifest_of({}, train_state=COUNTERS)).unsent == []


@pytest.mark.parametrize(
    "changes",
    [
        *({"images": value} for value in (-1, 1.0, True, None, 2**64, 101)),
        *({"skipped_updates": value} for value in ("1", [])),
        {"extra": 1},
        *({"unsent_points": value} for value in (None, 5, [5], [[1]], [[1, {"a": 0.5}]])),
        *({"unsent_points": [[1, {"a": text}]]} for text in ("x", "0x1p+99999")),
        {"unsent_points": [POINT.to_json()] * (MAX_POINTS + 1)},
        *(
            {"metrics": {"loss": value}}
            for value in (None, ["mean"], ["median", "0x1p+0", "0x1p+0"])
        ),
    ],
)
def test_counters_that_no_run_has_saved_are_refused(changes):
    with pytest.raises(InvalidManifest, match="its train_state"):
        counters(**changes)
    incomplete = {name: COUNTERS[name] for name in ("images", "updates")}
    with pytest.raises(InvalidManifest, match="skipped_updates"):
        SavedCounters.of(manifest_of({}, train_state=incomplete))
