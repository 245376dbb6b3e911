"""Codecs against diffusers called directly."""

import pytest
import torch

from models.codec import AutoencoderKlCodec, Codec, CodecError, IdentityCodec
from tests.support.autoencoder import tiny_autoencoder

LATENT = (4, 4, 4)
ELEMENTS = 64


@pytest.fixture(scope="module")
def autoencoder():
    return tiny_autoencoder(channels=3).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def normals(seed: int = 2) -> torch.Tensor:
    return torch.randn(3, *LATENT, generator=torch.Generator().manual_seed(seed))


def test_pixel_space_is_the_image_itself() -> None:
    codec: Codec = IdentityCodec()
    images = torch.randn(2, 3, 8, 8)
    nothing = torch.empty(2, codec.normals_per_image(8))
    assert torch.equal(codec.encode(images, nothing), images)
    assert torch.equal(codec.decode(images), images)
    assert codec.factor == 1
    assert (codec.latent_channels(3), codec.image_channels(3)) == (3, 3)


def test_shapes_are_the_autoencoders(autoencoder) -> None:
    codec: Codec = AutoencoderKlCodec(autoencoder)
    assert codec.factor == 8
    assert (codec.latent_channels(3), codec.image_channels(4)) == (4, 3)
    assert codec.normals_per_image(32) == ELEMENTS


def test_the_mean_is_diffusers_mean_scaled(autoencoder, images) -> None:
    codec = AutoencoderKlCodec(autoencoder, posterior="mean")
    assert codec.normals_per_image(32) == 0
    expected = autoencoder.encode(images).latent_dist.mean * 0.18215
    assert torch.equal(codec.encode(images, torch.empty(3, 0)), expected)


def test_a_sample_is_the_one_diffusers_draws_with_the_same_numbers(autoencoder, images) -> None:
    codec = AutoencoderKlCodec(autoencoder)
    drawn = autoencoder.encode(images).latent_dist.sample(torch.Generator().manual_seed(2))
    latents = codec.encode(images, normals().flatten(1))
    torch.testing.assert_close(latents, drawn * 0.18215, rtol=1e-6, atol=1e-6)
    other = codec.encode(images, normals(seed=3).flatten(1))
    assert (other - latents).abs().mean() > 0.01


def test_a_sample_is_mean_plus_deviation_times_the_numbers(autoencoder, images) -> None:
    posterior = autoencoder.encode(images).latent_dist
    latents = AutoencoderKlCodec(autoencoder, scale=1.0).encode(images, normals().flatten(1))
    torch.testing.assert_close((latents - posterior.mean) / posterior.std, normals())


def test_decoding_takes_back_scale_and_shift(autoencoder, images) -> None:
    z = autoencoder.encode(images).latent_dist.mean
    codec = AutoencoderKlCodec(autoencoder, scale=2.0, shift=0.5, posterior="mean")
    latents = codec.encode(images, torch.empty(3, 0))
    torch.testing.assert_close(latents, (z - 0.5) * 2.0)
    torch.testing.assert_close(
        codec.decode(latents), autoencoder.decode(z).sample, rtol=1e-4, atol=1e-5
    )


def test_scale_and_shift_come_from_the_autoencoder_unless_given() -> None:
    autoencoder = tiny_autoencoder(scaling_factor=0.36, shift_factor=0.1)
    own = AutoencoderKlCodec(autoencoder)
    assert (own.scale, own.shift) == (0.36, 0.1)
    given = AutoencoderKlCodec(autoencoder, scale=0.5, shift=0.0)
    assert (given.scale, given.shift) == (0.5, 0.0)


def test_the_autoencoder_is_frozen() -> None:
    autoencoder = tiny_autoencoder().train()
    codec = AutoencoderKlCodec(autoencoder)
    assert not any(module.training for module in autoencoder.modules())
    assert not any(parameter.requires_grad for parameter in autoencoder.parameters())
    images = torch.zeros(1, 1, 32, 32, requires_grad=True)
    latents = codec.encode(images, torch.zeros(1, ELEMENTS))
    assert not latents.requires_grad
    assert not codec.decode(latents.clone().requires_grad_()).requires_grad


def test_what_does_not_fit_is_refused(autoencoder, images) -> None:
    codec = AutoencoderKlCodec(autoencoder)
    with pytest.raises(CodecError, match="takes 64 normal numbers, got 63"):
        codec.encode(images, torch.zeros(3, 63))
    with pytest.raises(CodecError, match="3 channels, not 1"):
        codec.latent_channels(1)
    with pytest.raises(CodecError, match="4 channels, not 8"):
        codec.image_channels(8)
    with pytest.raises(CodecError, match="latents_mean"):
        AutoencoderKlCodec(tiny_autoencoder(latents_mean=[0.0] * 4, latents_std=[1.0] * 4))
