"""Pictures of a run for its page: decoded with bounds, drawn anew, and put into the page itself."""

from __future__ import annotations

import base64
import io
import logging

from PIL import Image

from trainer.page.markup import Html, tag
from trainer.storage.errors import MissingObject
from trainer.storage.store import Store

logger = logging.getLogger(__name__)

_MAX_FILE_BYTES = 1 << 26
_MAX_PIXELS = 1 << 26
_MAX_PNG_BYTES = 3 << 19
_PIXELATED_BELOW = 64
"""Width in pixels of what is drawn larger without smoothing."""


def fetch_picture(store: Store, key: str, *, max_side: int) -> bytes | None:
    """Fetch a picture and draw it anew, so that nothing but its pixels comes into a page.

    Args:
        store: Where it is.
        key: Its key.
        max_side: Most pixels on a side; a larger one is made smaller.

    Returns:
        A PNG, or a JPEG where that would be large; None if there is none or it is no picture, which
        a warning tells.

    Raises:
        StoreError: The store fails.
    """
    try:
        content = store.get_range(key, 0, _MAX_FILE_BYTES + 1)
    except MissingObject:
        return None
    try:
        if len(content) > _MAX_FILE_BYTES:
            raise ValueError(f"it has more than {_MAX_FILE_BYTES} bytes")
        return _drawn_anew(content, max_side)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        logger.warning("passing over the picture %s: %s", store.uri(key), error)
        return None


def _drawn_anew(content: bytes, max_side: int) -> bytes:
    with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
        width, height = picture.size
        if width * height > _MAX_PIXELS:
            raise ValueError(f"it has {width} x {height} pixels")
        drawn = picture.convert("L" if picture.mode in ("1", "L") else "RGB")
    drawn.info.clear()  # a profile of its colours would be saved with them
    drawn.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    drawn.save(buffer, format="PNG", optimize=True)
    if buffer.tell() > _MAX_PNG_BYTES:
        buffer = io.BytesIO()
        drawn.save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def picture(content: bytes, *, about: str, class_: str = "") -> Html:
    """Return the element that shows a picture.

    Args:
        content: What `fetch_picture` returned.
        about: What it shows, for who cannot see it.
        class_: Class of the style sheet.
    """
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    with Image.open(io.BytesIO(content)) as shown:
        width, height = shown.size
    classes = f"{class_} pixels" if width < _PIXELATED_BELOW else class_
    source = Html(f"data:image/{kind};base64,{base64.b64encode(content).decode()}")
    return tag("img", src=source, alt=about, width=width, height=height, class_=classes or None)
