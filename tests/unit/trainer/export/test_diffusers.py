"""Exported folders do in diffusers what its users expect of a model and of a pipeline."""

import json

import numpy as np
import pytest
import torch

from models.codec import AutoencoderKlCodec
from models.flow.flow import Flow
from models.flow.sampler import sample
from models.flow.sampler_config import SamplerConfig
from tests.support.autoencoder import tiny_autoencoder
from tests.unit.trainer.export.runs import (
    export,
    inputs,
    model_class,
    pipeline_class,
    same_outputs,
    save_run,
)
from trainer.autoencoder.config import CodecConfig
from trainer.config.job import DataConfig
from trainer.config.reading import ConfigError

LATENTS = CodecConfig(kind="autoencoder_kl", source="/home/somebody/vae", scale=0.5, shift=0.25)


def exported(run, place, weights="ema"):
    return export(run, place / "out", weights=weights)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("store"), "everything")


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    return exported(run, tmp_path_factory.mktemp("exports"), weights="both")


@pytest.fixture(scope="module")
def latent_run(tmp_path_factory):
    data = DataConfig(name="kinds", image_size=64, channels=1, classes=3)
    return save_run(
        tmp_path_factory.mktemp("latent"), data=data, codec=LATENTS, codec_digest="ab" * 32
    )


@pytest.fixture(scope="module")
def latent_folder(latent_run, tmp_path_factory):
    return exported(latent_run, tmp_path_factory.mktemp("latent exports"))


def noise(flow: Flow, job, count: int, seed: int, *, channels=1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, flow.noise_size(channels=channels, image_size=8), generator=generator)


def test_nothing_is_missing_and_nothing_unexpected(folder):
    model, report = model_class().from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert not model.training
    assert model.config.num_classes == 3


def test_a_model_saved_by_diffusers_loads_again(run, folder, tmp_path):
    model = model_class().from_pretrained(folder)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() != ""
    again = model_class().from_pretrained(tmp_path)
    assert same_outputs(again, run.ema, run.job)
    assert dict(again.config).keys() == dict(model.config).keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_model_is_the_cast_of_the_model(run, folder, dtype):
    model = model_class().from_pretrained(folder, torch_dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    cast = model_class().from_pretrained(folder).to(dtype)
    assert same_outputs(model, cast, run.job)
    assert {velocity.dtype for velocity in model(*inputs(run.job))} == {torch.float32}


def test_tied_scales_stay_tied(folder):
    model = model_class().from_pretrained(folder)
    experts = model.blocks[0].experts
    assert experts["scale0"].mlp_hidden is experts["scale1"].mlp_hidden
    assert experts["scale0"].qkv is not experts["scale1"].qkv


def test_a_config_alone_builds_an_untrained_model(folder):
    config = model_class().load_config(folder)
    model = model_class().from_config(config)
    assert sum(p.abs().sum() for p in model.final.parameters()) == 0


def test_a_setting_that_does_not_exist_is_named(folder):
    config = model_class().load_config(folder)
    config["transformer"] = {**config["transformer"], "widht": 16}
    with pytest.raises(ConfigError, match=r"transformer\.widht.*width"):
        model_class().from_config(config)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_pipeline_draws_what_the_sampler_draws(run, folder, scale):
    flow = Flow(run.job.flow)
    expected = sample(
        run.ema,
        flow=flow,
        config=SamplerConfig(steps=4, guidance_scale=scale),
        noise=noise(flow, run.job, 2, seed=5),
        labels=torch.tensor([2, 0]),
        channels=1,
        image_size=8,
        null_label=3,
    ).images
    pipeline = pipeline_class().from_pretrained(folder)

    def drawn(output_type: str):
        return pipeline(
            [2, 0],
            num_inference_steps=4,
            guidance_scale=scale,
            generator=torch.Generator().manual_seed(5),
            output_type=output_type,
        ).images

    assert torch.equal(drawn("latent"), expected)
    values = (expected / 2 + 0.5).clamp(0, 1)
    assert torch.equal(drawn("pt"), values)
    assert np.array_equal(drawn("np"), values.permute(0, 2, 3, 1).numpy())
    pictures = drawn("pil")
    assert [(picture.mode, picture.size) for picture in pictures] == [("L", (8, 8))] * 2
    pixels = (values[:, 0] * 255).round().byte().numpy()
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), pixels)


def test_each_image_can_have_a_generator(folder):
    pipeline = pipeline_class().from_pretrained(folder)
    options = {"num_inference_steps": 2, "output_type": "pt"}
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = pipeline([0, 1], generator=generators, **options).images
    (alone,) = pipeline(1, generator=torch.Generator().manual_seed(2), **options).images
    torch.testing.assert_close(both[1], alone)
    (unpacked,) = pipeline(
        1, generator=torch.Generator().manual_seed(2), return_dict=False, **options
    )
    assert torch.equal(unpacked[0], alone)
    with pytest.raises(ConfigError, match="2 generators for 3 images"):
        pipeline([0, 1, 2], generator=generators, **options)


def test_a_pipeline_takes_other_weights_as_a_component(run, folder):
    with pytest.raises(ValueError, match="variant=master"):
        pipeline_class().from_pretrained(folder, variant="master")
    master = model_class().from_pretrained(folder, variant="master")
    pipeline = pipeline_class().from_pretrained(folder, transformer=master)
    assert same_outputs(pipeline.transformer, run.master, run.job)


@pytest.mark.parametrize("labels", [[], [3], [-1, 0]])
def test_classes_that_the_model_does_not_know_are_refused(folder, labels):
    with pytest.raises(ConfigError, match=r"class_labels=.*0 … 2"):
        pipeline_class().from_pretrained(folder)(labels)


def test_latents_become_images_by_the_autoencoder(latent_run, latent_folder, tmp_path):
    vae = tiny_autoencoder()
    pipeline = pipeline_class().from_pretrained(latent_folder)
    options = {"class_labels": [1], "num_inference_steps": 2}

    def drawn(with_pipeline, **more):
        generator = torch.Generator().manual_seed(6)
        return with_pipeline(generator=generator, **options, **more).images

    with pytest.raises(ConfigError, match="vae="):
        drawn(pipeline)
    latents = drawn(pipeline, output_type="latent")
    assert latents.shape == (1, 4, 8, 8)
    images = AutoencoderKlCodec(vae, scale=0.5, shift=0.25).decode(latents)
    complete = pipeline_class().from_pretrained(latent_folder, vae=vae)
    values = drawn(complete, output_type="pt")
    assert torch.equal(values, (images / 2 + 0.5).clamp(0, 1))
    # Saved with its autoencoder, it is one folder in the usual layout.
    complete.save_pretrained(tmp_path)
    again = pipeline_class().from_pretrained(tmp_path)
    assert type(again.vae) is type(vae)
    assert torch.equal(drawn(again, output_type="pt"), values)


def test_which_autoencoder_it_was_is_told_and_where_it_was_is_not(latent_folder):
    config = json.loads((latent_folder / "config.json").read_text())
    assert config["latents"] == {"factor": 8, "scale": 0.5, "shift": 0.25, "sha256": "ab" * 32}
    for file in latent_folder.iterdir():
        assert b"somebody" not in file.read_bytes()


def test_there_is_no_guidance_without_a_trained_null_label(folder, tmp_path):
    run = save_run(tmp_path / "store", changed_science={"train": {"label_dropout": 0.0}})
    place = exported(run, tmp_path)
    pipeline = pipeline_class().from_pretrained(place)
    with pytest.raises(ConfigError, match=r"guidance_scale=2\.0 needs a null label"):
        pipeline([0], num_inference_steps=2, guidance_scale=2.0)
    assert pipeline([0], num_inference_steps=2).images
    assert "no null label was trained: there is no guidance" in (place / "README.md").read_text()
    trained = pipeline_class().from_pretrained(folder)
    assert trained([0], num_inference_steps=2, guidance_scale=2.0).images
    assert "3 is the null label of guidance" in (folder / "README.md").read_text()
