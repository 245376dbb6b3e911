"""Named sizes: those of DiT, which the paper keeps, and two larger ones."""

from models.transformer.config import TransformerConfig, TransformerConfigError

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
