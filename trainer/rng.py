"""Stateless random numbers: every value is a function of (seed, stream name, image, element).

A resumed run, another number of ranks or another batch size draws the same numbers for the same
image, because nothing is consumed and nothing has to be saved. The generator is counter-based:
the 64-bit finaliser of SplitMix (Steele, Lea, Flood 2014) applied to a key per image plus an
element counter, in integer arithmetic that is the same on every device.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def uniforms(
    seed: int, stream: str, *, first: int, count: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw one uniform number in [0, 1) for each of `count` consecutive images.

    Args:
        seed: The run's seed.
        stream: Name of the random stream; different names are independent.
        first: Index of the first image.
        count: Number of images.
        device: Where the numbers are made.

    Returns:
        Float32 tensor of shape [count].
    """
    bits = _bits(seed, stream, first=first, count=count, size=1, device=device)
    # 24 bits fill a float32 mantissa exactly, so 1.0 can never appear by rounding.
    return (_shift_right(bits, 40).to(torch.float32) * 2.0**-24).squeeze(1)


def normals(
    seed: int, stream: str, *, first: int, count: int, size: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw `size` standard normal numbers for each of `count` consecutive images.

    Args:
        seed: The run's seed.
        stream: Name of the random stream.
        first: Index of the first image.
        count: Number of images.
        size: Numbers per image.
        device: Where the numbers are made.

    Returns:
        Float32 tensor of shape [count, size].
    """
    pairs = (size + 1) // 2
    bits = _bits(seed, stream, first=first, count=count, size=2 * pairs, device=device)
    # Box-Muller in float64: the rounding to float32 then hides last-bit differences between
    # vectorised and scalar code paths, so values do not depend on how a batch is cut.
    unit = (_shift_right(bits, 11).to(torch.float64) + 0.5) * 2.0**-53
    radius = torch.sqrt(-2.0 * torch.log(unit[:, :pairs]))
    angle = (2.0 * torch.pi) * unit[:, pairs:]
    both = torch.cat((radius * torch.cos(angle), radius * torch.sin(angle)), dim=1)
    return both[:, :size].to(torch.float32)


def derive_seed(seed: int, stream: str) -> int:
    """Return a 63-bit seed for `torch.manual_seed`, a pure function of seed and stream name."""
    return _key(seed, stream) & (2**63 - 1)


def _key(seed: int, stream: str) -> int:
    digest = hashlib.blake2b(f"{seed}:{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _bits(
    seed: int, stream: str, *, first: int, count: int, size: int, device: torch.device | str
) -> Tensor:
    key = _to_signed(_key(seed, stream))
    images = torch.arange(first, first + count, dtype=torch.int64, device=device)
    per_image = _mix((images + 1) * _to_signed(_GOLDEN) + key)
    elements = torch.arange(1, size + 1, dtype=torch.int64, device=device) * _to_signed(_GOLDEN)
    return _mix(per_image[:, None] + elements[None, :])


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _to_signed(_MIX_1)
    z = (z ^ _shift_right(z, 27)) * _to_signed(_MIX_2)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift logically: torch's shift of a signed integer copies the sign bit."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _to_signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
