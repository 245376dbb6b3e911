"""The LapFlow network: a Mixture-of-Transformers over the scales of a pyramid."""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.axes import Bands
from models.transformer.block import Block
from models.transformer.embed import LabelEmbed, PatchEmbed, TimeEmbed
from models.transformer.experts import FinalExpert, per_scale


class TransformerConfigError(ValueError):
    """Transformer sizes that do not fit each other, the image, or the number of scales."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes of the transformer.

    Attributes:
        depth: Number of blocks.
        width: Width of a token.
        heads: Attention heads.
        patch_size: Side of a patch, on every scale.
        mlp_ratio: Width of the MLP's hidden layer, in widths.
        qk_norm: Normalise queries and keys (RMS, with learned gains for each scale).

    Raises:
        TransformerConfigError: A size is not positive, or ``width`` is not divisible by ``heads``
            and by 4.
    """

    depth: int
    width: int
    heads: int
    patch_size: int = 2
    mlp_ratio: float = 4.0
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("depth", "width", "heads", "patch_size", "mlp_ratio"):
            if getattr(self, name) <= 0:
                raise TransformerConfigError(f"{name}={getattr(self, name)} must be positive.")
        if self.width % self.heads:
            raise TransformerConfigError(
                f"width={self.width} is not divisible by heads={self.heads}: every head gets an "
                "equal share of the width."
            )
        if self.width % 4:
            raise TransformerConfigError(
                f"width={self.width} is not divisible by 4: the positions of a token take a "
                "quarter each for the sine and cosine of its row and column."
            )


class LapFlowTransformer(nn.Module):
    """Predicts the velocity of every active scale.

    A scale's tokens see those of its own and of coarser scales only, so the outputs of coarse
    scales do not depend on finer ones, and leaving scales out that are not active is exact. With
    one scale it is a DiT. Every weight comes from torch's default generator, in module order.

    Parameters are named by the paper's k: ``blocks.3.experts.scale0.qkv.weight`` belongs to the
    finest scale. Names without ``scale`` are shared by all scales.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        scales: int,
        channels: int,
        image_size: int,
        classes: int,
    ) -> None:
        """Build the network with fresh weights.

        Args:
            config: Sizes of the transformer.
            scales: Number of scales, K.
            channels: Channels of the images.
            image_size: Height and width of the images.
            classes: Number of classes; label ``classes`` is the null label.

        Raises:
            TransformerConfigError: The image does not divide into patches on every scale, or a
                count is not positive.
        """
        super().__init__()
        _check_image(config, scales=scales, channels=channels, image_size=image_size)
        if classes < 1:
            raise TransformerConfigError(f"classes={classes} must be at least 1.")
        width, patch = config.width, config.patch_size
        self.time_embed = TimeEmbed(width)
        self.label_embed = LabelEmbed(classes=classes, width=width)
        self.patch_embed = per_scale(
            scales,
            lambda k: PatchEmbed(
                patch_size=patch, channels=channels, grid=(image_size >> k) // patch, width=width
            ),
        )
        self.blocks = nn.ModuleList(
            Block(
                scales=scales,
                width=width,
                heads=config.heads,
                mlp_ratio=config.mlp_ratio,
                qk_norm=config.qk_norm,
            )
            for _ in range(config.depth)
        )
        self.final = per_scale(
            scales, lambda _: FinalExpert(patch_size=patch, channels=channels, width=width)
        )

    def forward(self, states: Bands, time: Float[Tensor, "b"], labels: Int[Tensor, "b"]) -> Bands:
        """Predict velocities.

        Args:
            states: States of the active scales, coarse to fine, any number from 1 to K. The first
                holds the whole batch; each other one the first images of the one before it.
            time: Time of each image, in [0, 1]; float32, for bfloat16 cannot tell times apart.
            labels: Class of each image, or the null label.

        Returns:
            The velocities, in the shapes and precision of the states.
        """
        condition = F.silu(self.time_embed(time) + self.label_embed(labels))
        active = len(states)
        tokens = tuple(
            embed(state)
            for embed, state in zip(list(self.patch_embed.values())[:active], states, strict=True)
        )
        for block in self.blocks:
            tokens = block(tokens, condition)
        return tuple(
            final(x, condition[: x.shape[0]]).to(state.dtype)
            for final, x, state in zip(
                list(self.final.values())[:active], tokens, states, strict=True
            )
        )


def _check_image(config: TransformerConfig, *, scales: int, channels: int, image_size: int) -> None:
    if scales < 1 or channels < 1:
        raise TransformerConfigError(f"scales={scales} and channels={channels} must be at least 1.")
    factor = config.patch_size * 2 ** (scales - 1)
    if image_size < factor or image_size % factor:
        raise TransformerConfigError(
            f"an image of {image_size} pixels does not divide into patches of {config.patch_size} "
            f"on each of {scales} scales: its size must be a multiple of {factor}. Use fewer "
            "scales, smaller patches, or another image size."
        )
