"""Finding and loading autoencoders, from everywhere they may be, and every way that fails."""

import dataclasses
import json
import logging
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.codec import AutoencoderKlCodec, IdentityCodec
from tests.support.autoencoder import saved_autoencoder, tiny_autoencoder
from tests.support.saved import manifest_of
from trainer.autoencoder.codec import load_codec, open_codec
from trainer.autoencoder.config import CodecConfig, codec_digest
from trainer.autoencoder.files import AutoencoderError, AutoencoderSettings, find_autoencoder
from trainer.config.reading import ConfigError
from trainer.evaluation.model_record import ModelRecord
from trainer.storage.store import StoreConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
STORE = StoreConfig(retries=1, connect_timeout_s=1.0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return saved_autoencoder(tmp_path_factory.mktemp("autoencoder"))


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def of(source: object, **settings: object) -> CodecConfig:
    return CodecConfig(kind="autoencoder_kl", source=str(source), **settings)


def loaded(source: object, tmp_path: Path, **settings: object) -> AutoencoderKlCodec:
    codec, _ = load_codec(of(source, **settings), cache=tmp_path, store=STORE, device=CPU)
    assert isinstance(codec, AutoencoderKlCodec)
    return codec


def refused(source: object, tmp_path: Path, *, image_channels: int = 1, **settings: object) -> str:
    with pytest.raises(AutoencoderError) as caught:
        load_codec(
            of(source, **settings),
            cache=tmp_path,
            store=STORE,
            device=CPU,
            image_channels=image_channels,
        )
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_is_the_saved(codec: AutoencoderKlCodec) -> None:
    latents = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = tiny_autoencoder().eval().decode(latents / 0.18215).sample
    torch.testing.assert_close(codec.decode(latents), expected)


def test_pixel_space_needs_nothing(tmp_path):
    codec, digest = load_codec(CodecConfig(), cache=tmp_path, store=STORE, device=CPU)
    assert isinstance(codec, IdentityCodec)
    assert digest is None
    assert codec_digest(CodecConfig(), cache=tmp_path, store=STORE) is None


def test_a_folder_and_the_folder_of_a_whole_pipeline(saved, tmp_path):
    assert_is_the_saved(loaded(saved, tmp_path))
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    shutil.copytree(saved, tmp_path / "pipeline" / "vae")
    assert_is_the_saved(loaded(tmp_path / "pipeline", tmp_path))


def test_half_precision_weights_work_in_single(copied, tmp_path):
    weights = load_file(copied / WEIGHTS)
    save_file({name: tensor.half() for name, tensor in weights.items()}, copied / WEIGHTS)
    codec = loaded(copied, tmp_path)
    assert codec.decode(torch.zeros(1, 4, 2, 2)).dtype == torch.float32


def test_settings_reach_the_codec(saved, tmp_path):
    codec = loaded(saved, tmp_path, scale=0.5, shift=0.25, posterior="mean")
    assert (codec.scale, codec.shift, codec.normals_per_image(32)) == (0.5, 0.25, 0)
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    exact = loaded(saved, tmp_path).moments(images).mean
    rounded = loaded(saved, tmp_path, encode_precision="bf16").moments(images).mean
    assert 0 < (rounded - exact).abs().max() < 0.1


def test_the_digest_follows_the_content_and_not_the_place(saved, copied, tmp_path):
    def digest(folder: Path) -> str:
        return find_autoencoder(str(folder), cache=tmp_path, store=STORE).sha256

    first = digest(saved)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "_diffusers_version": "other"}))
    assert digest(copied) == first
    (copied / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}))
    assert digest(copied) != first
    assert digest(saved_autoencoder(tmp_path / "other", seed=1)) != first


@pytest.mark.slow
def test_an_s3_prefix_is_fetched_once_and_anew_when_it_changes(saved, tmp_path, s3, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
    store = StoreConfig(endpoint_url=s3.endpoint_url, region="us-east-1")
    uri = f"{s3.make_bucket('autoencoder')}/models/tiny"

    def upload(folder: Path) -> None:
        for file in folder.iterdir():
            s3.client.upload_file(str(file), "autoencoder", f"models/tiny/vae/{file.name}")

    def found() -> tuple[Path, str]:
        files = find_autoencoder(uri, cache=tmp_path / "cache", store=store)
        return files.folder, files.sha256

    with pytest.raises(AutoencoderError, match=r"s3://autoencoder/models/tiny has no config\.json"):
        found()
    upload(saved)
    places: list[tuple[Path, str]] = []
    threads = [threading.Thread(target=lambda: places.append(found())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(places) == 4
    assert len(set(places)) == 1
    ((folder, first),) = set(places)
    written = (folder / WEIGHTS).stat().st_mtime_ns
    assert found() == (folder, first)
    assert (folder / WEIGHTS).stat().st_mtime_ns == written
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", WEIGHTS]
    assert not list(folder.parent.glob("*.partial"))
    codec, _ = load_codec(of(uri), cache=tmp_path / "cache", store=store, device=CPU)
    assert_is_the_saved(codec)

    other = saved_autoencoder(tmp_path / "other", seed=1)  # of the same size in bytes
    upload(other)
    assert found()[1] == find_autoencoder(str(other), cache=tmp_path, store=STORE).sha256


@pytest.mark.slow
def test_what_a_fetch_has_left_is_believed_only_if_it_is_whole(
    saved, tmp_path, s3, monkeypatch, caplog
):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
    store = StoreConfig(endpoint_url=s3.endpoint_url, region="us-east-1")
    uri = s3.make_bucket("died")
    for file in saved.iterdir():
        s3.client.upload_file(str(file), "died", file.name)
    whole = find_autoencoder(uri, cache=tmp_path, store=store)
    whole.folder.with_suffix(".json").unlink()
    (whole.folder / WEIGHTS).write_bytes(b"half")
    assert find_autoencoder(uri, cache=tmp_path, store=store) == whole

    for name, change, reason in (
        (WEIGHTS, lambda data: data[:-1] + bytes([data[-1] ^ 1]), "it has changed since"),
        ("config.json", lambda data: data.replace(b"0.18215", b"0.28215"), "it has changed since"),
        ("config.json", lambda data: data[:-9], "it has another length than when"),
    ):
        file = whole.folder / name
        file.write_bytes(change(file.read_bytes()))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert find_autoencoder(uri, cache=tmp_path, store=store) == whole
        (line,) = (record.getMessage() for record in caplog.records)
        assert line.startswith(f"{file} cannot be believed: {reason} it was written")
        assert file.with_name(f"{name}.damaged").exists()


def test_a_name_on_the_hub_and_a_hub_out_of_reach(saved, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, sorted(allow_patterns)))
        return str(saved)

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        assert_is_the_saved(loaded("somebody/vae-1.0", tmp_path))
    ((name, patterns),) = asked
    assert name == "somebody/vae-1.0"
    assert patterns == ["config.json", WEIGHTS, "vae/config.json", f"vae/{WEIGHTS}"]

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refused("somebody/never-fetched-1.0", tmp_path)
    assert "codec.source=somebody/never-fetched-1.0" in message
    assert "set codec.source to its folder" in message


def test_a_folder_that_is_not_there(tmp_path):
    message = refused(tmp_path / "nowhere", tmp_path)
    assert f"no folder {tmp_path / 'nowhere'}" in message


@pytest.mark.parametrize("source", ["https://me:h1dden@host", "s3:/me:h1dden@b", "s3://b?t=h1dden"])
def test_a_place_with_credentials_is_not_quoted(tmp_path, source):
    with pytest.raises(
        AutoencoderError, match=r"may carry credentials|there is no folder"
    ) as caught:
        find_autoencoder(source, cache=tmp_path, store=STORE)
    assert "h1dden" not in str(caught.value)


def test_a_folder_without_a_config(copied, tmp_path):
    (copied / "config.json").unlink()
    assert "has no config.json, nor vae/config.json" in refused(copied, tmp_path)


def test_a_config_that_cannot_be_read(copied, tmp_path):
    (copied / "config.json").write_text("{")
    assert "config.json cannot be read" in refused(copied, tmp_path)


HOSTILE = {
    "nested too deep": b"[" * 100_000,
    "is a number of 5000 digits": b'{"scaling_factor": ' + b"1" * 5000 + b"}",
    "NaN is no finite number": b'{"scaling_factor": NaN}',
    "1e999 is no finite number": b'{"shift_factor": 1e999}',
    "utf-8": b'{"_class_name": "\xff\xfe"}',
    "more than 1048576": b" " * (1 << 20) + b"{}",
}


@pytest.mark.parametrize(("words", "content"), HOSTILE.items(), ids=HOSTILE)
def test_a_hostile_config_is_refused(copied, tmp_path, words, content):
    (copied / "config.json").write_bytes(content)
    message = refused(copied, tmp_path)
    assert f"{copied}/config.json cannot be read" in message
    assert words in message


@pytest.mark.parametrize(
    "changes",
    [
        {"scaling_factor": 0.0},
        {"scaling_factor": -1.0},
        {"scaling_factor": 1e30},
        {"scaling_factor": True},
        {"scaling_factor": "0.18215"},
        {"scaling_factor": [0.18215]},
        {"scaling_factor": None},
        {"shift_factor": 1e30},
        {"shift_factor": {}},
        {"block_out_channels": 64},
        {"block_out_channels": []},
        {"block_out_channels": [16, 32, 32, 32.5]},
        {"block_out_channels": [16] * 100},
        {"block_out_channels": [0] * 4},
        {"latent_channels": [4]},
        {"latent_channels": True},
        {"latent_channels": 10**12},
        {"in_channels": "1"},
        {"layers_per_block": 10**6},
        {"norm_num_groups": 0},
        {"down_block_types": 3},
        {"act_fn": None},
        {"sample_size": "large"},
        {"use_quant_conv": 1},
    ],
    ids=repr,
)
def test_a_value_that_no_autoencoder_has_is_named(copied, tmp_path, changes):
    written = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**written, **changes}))
    message = refused(copied, tmp_path)
    assert f"{copied}/config.json cannot be used" in message
    assert next(iter(changes)) in message


@pytest.mark.parametrize(
    "changes",
    [
        {"down_block_types": ["Nothing"] * 4},
        {"act_fn": "nothing"},
        {"norm_num_groups": 7},
        {"block_out_channels": [8192] * 4},  # a hundred gigabytes, if it were built
        {"up_block_types": ["UpDecoderBlock2D"]},
    ],
    ids=repr,
)
def test_settings_that_the_weights_do_not_fit(copied, tmp_path, changes):
    written = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**written, **changes}))
    assert str(copied) in refused(copied, tmp_path)


def test_what_is_left_out_has_the_defaults_of_diffusers_and_no_more_is_handed_to_it(
    copied, tmp_path
):
    import inspect

    from diffusers import AutoencoderKL

    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(AutoencoderKL.__init__).parameters.items()
        if name != "self"
    }
    assert dataclasses.asdict(AutoencoderSettings()) == defaults
    written = json.loads((copied / "config.json").read_text())
    more = {"quantization_config": {"quant_method": "bitsandbytes"}, "auto_map": {"a": "b"}}
    (copied / "config.json").write_text(json.dumps({**written, **more}))
    assert_is_the_saved(loaded(copied, tmp_path))


def test_another_kind_of_model(copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "_class_name": "VQModel"}))
    assert "holds VQModel, not an AutoencoderKL" in refused(copied, tmp_path)
    (copied / "config.json").write_text("[]")
    assert "not an AutoencoderKL" in refused(copied, tmp_path)


def test_weights_that_are_missing_or_pickled(copied, tmp_path):
    (copied / WEIGHTS).unlink()
    assert f"{WEIGHTS} is missing" in refused(copied, tmp_path)
    torch.save({}, copied / "diffusion_pytorch_model.bin")
    message = refused(copied, tmp_path)
    assert "pickle" in message
    assert "save_pretrained" in message


def test_what_is_loaded_is_what_the_digest_covers(saved, copied, tmp_path):
    """Diffusers prefers an index of weights, and follows it out of the folder."""
    saved_autoencoder(tmp_path / "other", seed=1)
    names = dict.fromkeys(load_file(copied / WEIGHTS), f"../other/{WEIGHTS}")
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (copied / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert_is_the_saved(loaded(copied, tmp_path))
    assert codec_digest(of(copied), cache=tmp_path, store=STORE) == codec_digest(
        of(saved), cache=tmp_path, store=STORE
    )


def test_weights_that_change_after_they_were_hashed_are_not_loaded(copied, tmp_path):
    files = find_autoencoder(str(copied), cache=tmp_path, store=STORE)
    saved_autoencoder(copied, seed=1)
    with pytest.raises(AutoencoderError, match="have changed since they were checked"):
        open_codec(files, device=CPU)


@pytest.mark.parametrize("damage", ["truncated", "missing", "unknown", "shape"])
def test_weights_that_do_not_fit(copied, tmp_path, damage):
    weights = load_file(copied / WEIGHTS)
    if damage == "truncated":
        data = (copied / WEIGHTS).read_bytes()
        (copied / WEIGHTS).write_bytes(data[: len(data) // 2])
    else:
        if damage == "missing":
            del weights["decoder.conv_in.bias"]
        elif damage == "unknown":
            weights["decoder.more"] = torch.zeros(1)
        else:
            weights["decoder.conv_in.bias"] = torch.zeros(3)
        save_file(weights, copied / WEIGHTS)
    message = refused(copied, tmp_path)
    assert str(copied) in message
    assert damage == "truncated" or "decoder." in message


@pytest.mark.parametrize(
    ("name", "value", "culprit"),
    [
        ("encoder.conv_in.bias", float("nan"), "encoder.conv_in.bias holds"),
        ("decoder.conv_in.weight", float("inf"), "decoder.conv_in.weight holds"),
        ("encoder.conv_in.weight", 3e38, "encoding gives"),
        ("decoder.conv_in.weight", 3e38, "decoding gives"),
    ],
)
def test_weights_that_are_or_make_no_finite_numbers(copied, tmp_path, name, value, culprit):
    weights = load_file(copied / WEIGHTS)
    weights[name].view(-1)[0] = value
    save_file(weights, copied / WEIGHTS)
    message = refused(copied, tmp_path)
    assert f"are damaged: {culprit} values that are no finite numbers" in message


def test_settings_that_describe_another_autoencoder(saved, tmp_path):
    assert "codec.factor=16 does not fit" in refused(saved, tmp_path, factor=16)
    assert "needs codec.channels=4" in refused(saved, tmp_path, channels=16)
    message = refused(saved, tmp_path, image_channels=3)
    assert "images of this run have 3 channels" in message
    assert "set data.channels=1" in message


def test_settings_that_contradict_themselves():
    for settings, part in [
        ({"source": "folder"}, "only kind=autoencoder_kl has a source"),
        ({"kind": "autoencoder_kl"}, "name on the hub"),
        ({"kind": "autoencoder_kl", "source": "x", "factor": 6}, "codec.factor=6"),
    ]:
        with pytest.raises(AutoencoderError, match=part):
            CodecConfig(**settings)


def test_a_checkpoint_gets_its_own_codec_and_no_other(saved, copied, tmp_path):
    digest = codec_digest(of(saved), cache=tmp_path, store=STORE)
    data = {"image_size": 64, "channels": 1, "classes": 10}
    network = {"model": {"depth": 1, "width": 16, "heads": 2}, "flow": {"scales": 2}}
    science = {
        "data": data,
        **network,
        "codec": {"kind": "autoencoder_kl", "source": str(tmp_path / "gone")},
        "autoencoder": {"sha256": digest},
    }

    def codec(source: Path | None, science: dict = science):
        place = None if source is None else str(source)
        record = ModelRecord.of(manifest_of(science))
        options = {"source": place, "cache": tmp_path, "store": STORE, "device": CPU}
        return record.load_codec(**options), record.shape

    with pytest.raises(AutoencoderError, match="gone"):
        codec(None)
    found, shape = codec(copied)
    assert_is_the_saved(found)
    assert (shape.channels, shape.size, shape.classes) == (4, 8, 10)
    with pytest.raises(ConfigError, match="not the one of the training"):
        codec(saved_autoencoder(tmp_path / "other", seed=1))
    older = {"data": data, **network}
    found, shape = codec(None, older)
    assert isinstance(found, IdentityCodec)
    assert (shape.channels, shape.size) == (1, 64)
    with pytest.raises(ConfigError, match="works on pixels"):
        codec(saved, older)
