"""An ingest that was broken off: all its shards are finished, and there is no index yet."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines.ingest.__main__ import main as ingest
from tests.fuzz.watched import commanded
from tests.unit.pipelines import pictures

_NAMES = ("ant", "bee")
_IMAGES, _SIZE = 8, 320  # of which three fill a shard


def make_unfinished(folder: Path) -> None:
    """Begin an ingest that ends at a damaged image, with all shards finished but no index.

    Another one beside it is not disturbed.

    Raises:
        RuntimeError: It did not end there.
    """
    for number, data in enumerate(_images()):
        path = folder / "source" / _NAMES[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (path.parent / "damaged.png").write_bytes(data[:-100])
    whole = commanded(ingest, words(folder, folder / "whole", max_skipped=1))
    done = commanded(ingest, words(folder, folder / "out", max_skipped=0))
    records = [*folder.glob("out/.train.building/*.record")]
    if whole.value != 0 or not done.refusal or not records:
        raise RuntimeError(f"ingests did not end as they should: {whole.said}\n{done.said}")


def _images() -> list[bytes]:
    rng = np.random.default_rng(2026)
    noise = rng.integers(0, 256, (_IMAGES, _SIZE, _SIZE, 3), dtype=np.uint8)
    return [pictures.encode(image, compress_level=0) for image in noise]


def words(begun: Path, out: Path, *, max_skipped: int) -> list[str]:
    """Return the words that ingest it; with no sample to be skipped, it ends before its end."""
    given = ["image-folder", str(begun / "source"), str(out), "--shard-mib", "1"]
    return [*given, "--workers", "1", "--max-skipped-fraction", str(max_skipped)]
