"""Which checkpoints a configuration may continue."""

import copy

import pytest

from tests.support.configuration import configuration
from trainer.checkpoint.manifest import Manifest
from trainer.config.job import config_fingerprint, science
from trainer.config.reading import ConfigError
from trainer.training.resume import check_start


def checkpoint_of(trained: dict) -> Manifest:
    return Manifest(
        run="run",
        images=100,
        attempt="a",
        saved_at="",
        world_size=1,
        config_fingerprint=config_fingerprint(trained),
        science=trained,
        train_state={},
        kinds=(),
        parameters={},
        cuts={},
        block_bytes=4,
        objects=(),
        versions={},
    )


def start(trained: dict, *overrides: str) -> list[str]:
    job = configuration("+exp=digits", *overrides)
    return check_start(job, science(job, data_digest="digest"), checkpoint_of(trained))


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
    check_start(moved, science(moved, **digests), checkpoint_of(trained))
    other = science(moved, data_digest="digest", codec_digest="other")
    with pytest.raises(ConfigError, match=r"autoencoder\.sha256: autoencoder -> other"):
        check_start(moved, other, checkpoint_of(trained))


def test_a_checkpoint_from_before_the_encoders_precision_continues_in_fp32():
    digests = {"data_digest": "digest", "codec_digest": "autoencoder"}
    latent = ["+exp=digits", "codec=sd_vae"]
    trained = copy.deepcopy(science(configuration(*latent), **digests))
    del trained["codec"]["encode_precision"]
    same = configuration(*latent, "codec.encode_precision=fp32")
    check_start(same, science(same, **digests), checkpoint_of(trained))
    faster = configuration(*latent)
    with pytest.raises(ConfigError, match=r"codec\.encode_precision: fp32 -> bf16"):
        check_start(faster, science(faster, **digests), checkpoint_of(trained))
