"""Named sizes: those of DiT, which the paper keeps."""

from models.transformer.config import TransformerConfig, TransformerConfigError

_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
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
