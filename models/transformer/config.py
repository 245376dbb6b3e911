"""Choices that define the transformer; plain values, so that its cost needs no torch."""

from dataclasses import dataclass, field
from typing import Literal, get_args

AttentionKind = Literal["causal", "full", "own_scale"]
Part = Literal["embedding", "attention", "mlp", "modulation", "output"]

PARTS: tuple[Part, ...] = get_args(Part)

MAX_DEPTH = 10_000
"""Blocks; what plans a step goes through all of them."""
"""The parts of a scale's weights, which scales can share one by one."""


class TransformerConfigError(ValueError):
    """Transformer sizes that do not fit each other, the image, or the number of scales."""


@dataclass(frozen=True, kw_only=True)
class Ties:
    """Scales that share weights, the paper's future work on parameter sharing.

    The coarsest of the scales owns the weights and names them.

    Attributes:
        scales: The scales, in the paper's numbering; at least two, or none for no sharing.
        parts: What they share: "embedding" (patches), "attention" (projections and their norms),
            "mlp", "modulation" (adaLN of the blocks) and "output" (the whole last layer).

    Raises:
        TransformerConfigError: A scale or part is listed twice, is unknown, or is alone.
    """

    scales: tuple[int, ...] = ()
    parts: tuple[Part, ...] = PARTS

    def __post_init__(self) -> None:
        unknown = sorted(set(self.parts) - set(PARTS))
        if unknown or not self.parts or len(set(self.parts)) < len(self.parts):
            raise TransformerConfigError(
                f"parts={self.parts} must be different ones of {', '.join(PARTS)}."
            )
        alone = len(self.scales) == 1
        if alone or len(set(self.scales)) < len(self.scales) or min(self.scales, default=0) < 0:
            raise TransformerConfigError(
                f"scales={self.scales} must be two or more different scales, 0 for the finest, as "
                "in [0, 1]; an empty list ties nothing."
            )

    def owner(self, scale: int, part: Part) -> int:
        """Scale whose weights ``scale`` uses for a part."""
        tied = scale in self.scales and part in self.parts
        return max(self.scales) if tied else scale


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes of the transformer, and the options the paper and its field vary.

    Attributes:
        depth: Number of blocks.
        width: Width of a token.
        heads: Attention heads.
        patch_size: Side of a patch, on every scale.
        mlp_ratio: Width of the MLP's hidden layer, in widths.
        qk_norm: Normalise queries and keys (RMS, with learned gains for each scale).
        attention: What a scale's tokens see: "causal" themselves and coarser scales (the paper),
            "full" all active scales, "own_scale" themselves alone (the paper's ablations).
        positions: Where a token is: "own_grid" counts patches on its own scale's grid, "aligned"
            measures every scale in patches of the finest, so that tokens over one spot agree.
        class_tokens: In-context class tokens: copies of the label's vector with learned positions
            that join the coarsest scale, which every scale sees.
        modulation: "per_block" is adaLN-Zero; "shared" computes it once for all blocks of a scale,
            to which each block adds learned offsets (adaLN-single of PixArt-alpha).
        ties: Scales that share weights.

    Raises:
        TransformerConfigError: A size is not positive, ``width`` is not divisible by ``heads`` and
            by 4, or a name is unknown.
    """

    depth: int
    width: int
    heads: int
    patch_size: int = 2
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    attention: AttentionKind = "causal"
    positions: Literal["own_grid", "aligned"] = "own_grid"
    class_tokens: int = 0
    modulation: Literal["per_block", "shared"] = "per_block"
    ties: Ties = field(default_factory=Ties)

    def __post_init__(self) -> None:
        for name in ("depth", "width", "heads", "patch_size", "mlp_ratio"):
            if getattr(self, name) <= 0:
                raise TransformerConfigError(f"{name}={getattr(self, name)} must be positive.")
        if self.depth > MAX_DEPTH:
            raise TransformerConfigError(f"depth={self.depth} must be at most {MAX_DEPTH} blocks.")
        if not 1 <= self.width * self.mlp_ratio < float("inf"):
            raise TransformerConfigError(
                f"mlp_ratio={self.mlp_ratio} gives the MLP no hidden layer that can be built at "
                f"width={self.width}; usual is 4."
            )
        if self.class_tokens < 0:
            raise TransformerConfigError(f"class_tokens={self.class_tokens} must not be negative.")
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
        for name, known in (
            ("attention", get_args(AttentionKind)),
            ("positions", ("own_grid", "aligned")),
            ("modulation", ("per_block", "shared")),
        ):
            if getattr(self, name) not in known:
                raise TransformerConfigError(
                    f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(known)}."
                )


def check_image(
    config: TransformerConfig, *, scales: int, channels: int, image_size: int, classes: int
) -> None:
    """Check that a transformer can be built for images.

    Args:
        config: The transformer.
        scales: Number of scales, K.
        channels: Channels of the images.
        image_size: Height and width of the images.
        classes: Number of classes.

    Raises:
        TransformerConfigError: The image does not divide into patches on every scale, a count is
            not positive, or scales are tied that there are not.
    """
    if min(scales, channels, classes) < 1:
        raise TransformerConfigError(
            f"scales={scales}, channels={channels} and classes={classes} must be at least 1."
        )
    factor = config.patch_size * 2 ** (scales - 1)
    if image_size < factor or image_size % factor:
        raise TransformerConfigError(
            f"an image of {image_size} pixels does not divide into patches of {config.patch_size} "
            f"on each of {scales} scales: its size must be a multiple of {factor}. Use fewer "
            "scales, smaller patches, or another image size."
        )
    missing = [scale for scale in config.ties.scales if scale >= scales]
    if missing:
        raise TransformerConfigError(
            f"ties.scales={config.ties.scales} names scale {missing[0]}, but there are {scales} "
            f"scales, numbered 0 (finest) to {scales - 1}."
        )


# Beyond DiT each size has twice the weights and multiply-adds of the one before (18 d^2 for each
# block and scale: 669 M, 1,359 M, 2,718 M). Three quarters of the factor go to d^2 and the rest to
# depth, as wide products use a GPU better than many blocks; heads grow to 96 and 128 numbers, sizes
# that attention kernels are made for. Widths divide by 4 heads, and over up to 128 ranks.
_SIZES = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "XXL": (32, 1536, 16),
    "XXXL": (36, 2048, 16),
}
_PATCHES = (2, 4)

PRESETS: tuple[str, ...] = tuple(f"{size}/{patch}" for size in _SIZES for patch in _PATCHES)
"""Names that ``preset`` knows."""


def preset(name: str) -> TransformerConfig:
    """Sizes of a named transformer.

    Args:
        name: Size and patch, such as "XL/2".

    Raises:
        TransformerConfigError: There is no such preset.
    """
    if name not in PRESETS:
        raise TransformerConfigError(
            f"no preset is named {name!r}; there are {', '.join(PRESETS)}."
        )
    size, patch = name.split("/")
    depth, width, heads = _SIZES[size]
    return TransformerConfig(depth=depth, width=width, heads=heads, patch_size=int(patch))
