"""Legend of the axis letters in shape types, and the type of a pyramid.

===========  ==============================================================================
``b``        images of the batch (``b_p`` of them carry the scale at position ``p``)
``c h w``    channels, height and width of an image or a band; ``z zh zw`` of a latent;
             ``g``, height and width of what the active scales add up to
``n``        tokens of one scale; in ``noise [b, n]``, the numbers one image's noise needs
``heads e``  attention heads and the width of one head
``d``        width of a token
``K``        scales; ``bins``, equal parts of the time axis
===========  ==============================================================================

Bands are always listed from coarse to fine: position ``p`` holds scale ``k = K - 1 - p`` in the
paper's numbering, where 0 is the finest. The scales that are active at a time are therefore a
prefix of the tuple.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

Band = Float[Tensor, "_b _c _h _w"]
"""One scale of a pyramid."""

Bands = tuple[Band, ...]
"""Scales of a pyramid, coarse to fine."""

VelocityModel = Callable[[Bands, Tensor, Tensor], Bands]
"""``(states, time [b], labels [b]) -> velocities``: one velocity for each state, same shapes.

``states`` may be any prefix of the scales. The state at position ``p`` may hold fewer images than
the one before it: its image ``i`` is then image ``i`` of the batch too. In sampling it may also
hold ``n`` times as many: its images ``n i … n i + n - 1`` are then variations of image ``i``.
"""


def to_images(rows: Tensor, images: int) -> Tensor:
    """Hand what the images of a scale have to those of a finer one.

    Args:
        rows: One row for each image of the scale, along the first dimension.
        images: How many images the finer scale holds: as many, fewer (the first ones), or a
            multiple, of which neighbours get the same row.
    """
    held = rows.shape[0]
    if images <= held:
        return rows[:images]
    return rows.unsqueeze(1).expand(-1, images // held, *rows.shape[1:]).flatten(0, 1)
