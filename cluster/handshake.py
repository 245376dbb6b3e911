"""A handshake in which the ranks of a run prove to each other that they know its secret.

gloo believes whoever connects first: another user of the machine, or another host, can take a
rank's place by sending a small number to a port. So every group is asked, right after it was formed
and over the very connections that it will use, for a proof that only a rank of this run can give.
What comes after goes over the same connections. They are not encrypted: who can change packets on
their way is not kept out (docs/scale-out.md).
"""

import hashlib
import hmac
import secrets
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_BYTES = 32
"""Length of the secret, of a challenge, and of a proof."""


class PeerUnproven(RuntimeError):
    """Something that does not know the run's secret took a rank's place."""


def new_secret() -> bytes:
    """A secret for one attempt of a run."""
    return secrets.token_bytes(_BYTES)


def shake_hands(group: Any, secret: bytes, *, timeout: timedelta) -> None:
    """Lets each pair of a group's ranks prove itself to the other; a collective call.

    Each rank sends every other a challenge of its own, and gets back a keyed hash over both
    challenges, the group and who speaks to whom, so that no proof serves for another pair.

    Args:
        group: A process group of gloo's.
        secret: The run's.
        timeout: How long the others may take.

    Raises:
        PeerUnproven: A rank gave a wrong proof, or none.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    name = str(group.group_name)
    asked = [secrets.token_bytes(_BYTES) for _ in range(size)]
    were_asked = _exchanged(asked, group, timeout)

    def proof(speaker: int, listener: int, challenge: bytes, own: bytes) -> bytes:
        told = f"lapflow\0{name}\0{size}\0{speaker}\0{listener}\0".encode() + challenge + own
        return hmac.digest(secret, told, hashlib.sha256)

    given = _exchanged(
        [proof(rank, peer, were_asked[peer], asked[peer]) for peer in range(size)], group, timeout
    )
    for peer in range(size):
        expected = proof(peer, rank, asked[peer], were_asked[peer])
        if not hmac.compare_digest(given[peer], expected):
            raise PeerUnproven(
                f"What answers rank {rank} in place of rank {peer} of the group {name!r} does not "
                "know this run's secret: some other program connected to a port of the run. Run it "
                "where nobody else reaches its ports (docs/scale-out.md, Network)."
            )


def _exchanged(messages: list[bytes], group: Any, timeout: timedelta) -> list[bytes]:
    """Send the i-th message to the i-th rank, and return what each sent to this one."""
    out = torch.frombuffer(bytearray(b"".join(messages)), dtype=torch.uint8)
    into: Tensor = torch.zeros_like(out)
    # Directly between the two of each pair; a gather would let others pass messages on.
    work = dist.all_to_all_single(into, out, group=group, async_op=True)
    try:
        work.wait(timeout)
    except RuntimeError as error:
        raise PeerUnproven(
            f"The ranks of the group {group.group_name!r} did not prove themselves to each other "
            f"within {timeout.total_seconds():g} s, or lost their connection. A worker died, or "
            "some other program connected to a port of the run (docs/scale-out.md, Network); "
            f"gloo says: {error}"
        ) from error
    data = into.numpy().tobytes()
    return [data[_BYTES * peer :][:_BYTES] for peer in range(len(messages))]
