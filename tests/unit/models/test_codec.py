import torch

from models.codec import Codec, IdentityCodec


def test_pixel_space_is_the_image_itself() -> None:
    codec: Codec = IdentityCodec()
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(codec.decode(codec.encode(images)), images)
    assert torch.equal(codec.encode(images), images)
    assert codec.factor == 1
    assert codec.latent_channels(3) == 3
