"""Codecs against diffusers called directly."""

from functools import partial

import pytest
import torch

import models.codec
from models.codec import AutoencoderKlCodec, Codec, CodecError, IdentityCodec, Moments
from models.products import float32_products
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


def test_moments_are_those_of_diffusers_and_latents_are_drawn_from_them(autoencoder, images):
    posterior = autoencoder.encode(images).latent_dist
    codec = AutoencoderKlCodec(autoencoder, scale=2.0, shift=0.5)
    moments = codec.moments(images)
    assert torch.equal(moments.mean, posterior.mean)
    assert torch.equal(moments.std, posterior.std)
    unit = normals().flatten(1)
    by_hand = (posterior.mean + posterior.std * normals() - 0.5) * 2.0
    assert torch.equal(codec.latents(moments, unit), by_hand)
    assert torch.equal(codec.encode(images, unit), by_hand)
    mean = AutoencoderKlCodec(autoencoder, posterior="mean", scale=2.0, shift=0.5)
    assert torch.equal(mean.latents(moments, torch.empty(3, 0)), (posterior.mean - 0.5) * 2.0)


def test_bf16_rounds_the_encoder_and_leaves_the_decoder() -> None:
    exact, rounded = (
        AutoencoderKlCodec(tiny_autoencoder(channels=3), encode_precision=precision)
        for precision in ("fp32", "bf16")
    )
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for wanted, moment in zip(exact.moments(images), rounded.moments(images), strict=True):
        assert moment.dtype == torch.float32
        assert not torch.equal(moment, wanted)
        error = (moment - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
        # A value in bf16 is off by up to 2^-9 of itself; some 20 layers in a row add up.
        assert 2**-12 < error < 2**-5, error
    latents = torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(2))
    assert torch.equal(exact.decode(latents), rounded.decode(latents))


def test_an_encoder_multiplies_in_float32_whatever_a_training_has_allowed(
    monkeypatch: pytest.MonkeyPatch, images
) -> None:
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    on_a_gpu = partial(float32_products, torch.device("cuda"))
    monkeypatch.setattr(models.codec, "float32_products", lambda _, *, tf32: on_a_gpu(tf32=tf32))
    autoencoder, seen = tiny_autoencoder(channels=3), []
    autoencoder.encoder.register_forward_pre_hook(
        lambda *_: seen.append((matmul.allow_tf32, convolution.allow_tf32))
    )
    with on_a_gpu(tf32=True):
        AutoencoderKlCodec(autoencoder).moments(images)
        assert matmul.allow_tf32
        assert convolution.allow_tf32
    assert seen == [(False, False)]


def test_bf16_weights_are_in_half_the_memory_and_in_the_layout_of_tensor_cores() -> None:
    autoencoder = tiny_autoencoder(channels=3).train()
    decoder = {name: tensor.clone() for name, tensor in autoencoder.decoder.state_dict().items()}
    codec = AutoencoderKlCodec(autoencoder, encode_precision="bf16")
    encoding = [*autoencoder.encoder.parameters(), *autoencoder.quant_conv.parameters()]
    assert {parameter.dtype for parameter in encoding} == {torch.bfloat16}
    kernels = [parameter for parameter in encoding if parameter.ndim == 4]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    for name, tensor in autoencoder.decoder.state_dict().items():
        assert torch.equal(tensor, decoder[name])
        assert tensor.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in autoencoder.parameters())
    assert not any(module.training for module in autoencoder.modules())
    moments = codec.moments(torch.zeros(1, 3, 32, 32, requires_grad=True))
    assert not moments.mean.requires_grad
    without = tiny_autoencoder(use_quant_conv=False, use_post_quant_conv=False)
    codec = AutoencoderKlCodec(without, encode_precision="bf16")
    assert isinstance(codec.moments(torch.zeros(1, 1, 32, 32)), Moments)


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
