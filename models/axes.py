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
"""Scales of a pyramid, coarse to fine; each has a batch no larger than the one before it."""

VelocityModel = Callable[[Bands, Tensor, Tensor], Bands]
"""``(states, time [b], labels [b]) -> velocities``: one velocity for each state, same shapes.

``states`` may be any prefix of the scales. The state at position ``p`` may hold fewer images than
the one before it: its image ``i`` is then image ``i`` of the batch too.
"""
