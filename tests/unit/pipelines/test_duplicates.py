"""Samples with the same bytes."""

import numpy as np

from pipelines.ingest.verify import find_duplicates


def test_duplicates_agree_with_a_dictionary() -> None:
    rng = np.random.default_rng(0)
    digests = rng.integers(0, 2, (500, 16), dtype=np.uint8) * np.uint8(255)
    digests[:, 3:] = 0  # eight different ones
    digests[rng.random(500) < 0.5, 8:] = rng.integers(0, 256, 8, dtype=np.uint8)
    labels = rng.integers(0, 2, 500) * (rng.random(500) < 0.01)
    sample_ids = np.sort(rng.choice(10_000, 500, replace=False))
    groups: dict[bytes, list[int]] = {}
    for place, digest in enumerate(digests):
        groups.setdefault(digest.tobytes(), []).append(place)
    repeated = [places for places in groups.values() if len(places) > 1]
    mixed = [places for places in repeated if len({labels[place] for place in places}) > 1]
    found = find_duplicates(digests, sample_ids=sample_ids, labels=labels, examples=1000)
    assert 0 < len(mixed) < len(repeated)
    assert (found.groups, found.relabelled) == (len(repeated), len(mixed))
    assert found.surplus == 500 - len(groups)
    want = [*mixed, *(places for places in repeated if places not in mixed)]
    assert found.examples == tuple(tuple(sample_ids[places].tolist()) for places in want)
