"""What a manifest says of one content object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.checkpoint import distrust, layout


@dataclass(frozen=True, kw_only=True)
class ObjectEntry:
    """One content object.

    Attributes:
        rank: The rank that wrote it.
        key: Where it lies in the store.
        size_bytes: Its size.
        block_sha256: Hash of each of its blocks, in hexadecimal.
    """

    rank: int
    key: str
    size_bytes: int
    block_sha256: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values; its key follows from its rank."""
        return {
            "rank": self.rank,
            "size_bytes": self.size_bytes,
            "block_sha256": list(self.block_sha256),
        }

    @classmethod
    def from_json(cls, value: object, *, run: str, images: int, attempt: str) -> ObjectEntry:
        """Read the values of `to_json`, believing nothing.

        Args:
            value: The values.
            run: Name of the run.
            images: Images of the checkpoint.
            attempt: Name of the save that wrote it.

        Raises:
            DocumentError: They are not an object's.
            InvalidKey: The names are not fit for a key.
        """
        body = distrust.mapping(value, "an object")
        distrust.only_fields(body, "rank", "size_bytes", "block_sha256")
        rank = distrust.whole(body["rank"], "rank", low=0, high=layout.MAX_RANKS - 1)
        key = layout.object_key(run, images, attempt, rank)
        hashes = distrust.sequence(body["block_sha256"], "hashes")
        return cls(
            rank=rank,
            key=key,
            size_bytes=distrust.whole(body["size_bytes"], f"size of {key}", low=0, high=2**63),
            block_sha256=tuple(distrust.text(each, "a hash") for each in hashes),
        )
