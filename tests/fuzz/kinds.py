"""The kinds of tries, and how many of them there are of each."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.fuzz.attempt import Kind
from tests.fuzz.damage.kind import damage
from tests.fuzz.damage.resealed import resealed
from tests.fuzz.hostile.archives import archives
from tests.fuzz.hostile.arrays import arrays
from tests.fuzz.hostile.autoencoders import autoencoders
from tests.fuzz.hostile.experiments import experiments
from tests.fuzz.hostile.folders import folders
from tests.fuzz.hostile.images import images
from tests.fuzz.hostile.places import places
from tests.fuzz.hostile.rows import rows
from tests.fuzz.hostile.samplers import samplers
from tests.fuzz.hostile.settings import settings
from tests.fuzz.hostile.tables import tables
from tests.fuzz.hostile.weights import weights
from tests.fuzz.kills import kills
from tests.fuzz.resumed import resumed


@dataclass(frozen=True)
class Share:
    """A kind and its weight.

    Attributes:
        kind: Makes a try.
        tries: How many of the tries, in proportion.
    """

    kind: Kind
    tries: float


KINDS: dict[str, Share] = {
    "damage": Share(damage, 50),
    "resealed": Share(resealed, 16),
    "resumed": Share(resumed, 4),
    "kills": Share(kills, 1.5),  # which take longer than all others
    "images": Share(images, 8),
    "archives": Share(archives, 6),
    "rows": Share(rows, 5),
    "tables": Share(tables, 5),
    "arrays": Share(arrays, 6),
    "autoencoders": Share(autoencoders, 6),
    "weights": Share(weights, 2),
    "settings": Share(settings, 8),
    "samplers": Share(samplers, 4),
    "folders": Share(folders, 8),
    "experiments": Share(experiments, 12),
    "places": Share(places, 5),
}


def kind_of(seed: int, number: int) -> str:
    """Return the kind of a try, which the seed decides."""
    shares = [share.tries for share in KINDS.values()]
    return random.Random(f"{seed} {number}").choices(list(KINDS), shares)[0]
