"""The room on the device in which an average that is kept on the host follows the weights."""

CHUNK_ELEMENTS = 4 * 2**20
"""Of a lane's room: 16 MiB, long enough for a copy to run at the speed of the link."""

LANES = 2
"""While one chunk is copied in, the one before is copied back."""

_FLOAT32_BYTES = 4


def room_bytes(largest: int) -> int:
    """Bytes of all lanes.

    Args:
        largest: Elements of the largest of its tensors.
    """
    return LANES * room_elements(largest) * _FLOAT32_BYTES


def room_elements(largest: int) -> int:
    """Elements of a lane's room."""
    return min(CHUNK_ELEMENTS, largest)
