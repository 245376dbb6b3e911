"""What can happen to a file: bits flip, disks cut, people replace."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

from tests.fuzz import mutation

_BLOCK = 512
_SPARSE_BYTES = 1 << 40

Strike = Callable[[Path, random.Random, list[Path]], str]


def strike(path: Path, chance: random.Random, others: list[Path]) -> str:
    """Do one thing to a file.

    Args:
        path: The file.
        chance: Decides what, and where.
        others: Other files, to be confused with it.

    Returns:
        What was done, in words.
    """
    name = chance.choices(list(STRIKES), [weight for weight, _ in STRIKES.values()])[0]
    done = STRIKES[name][1](path, chance, others)
    return f"{name}{f' ({done})' if done else ''}"


def _flip_bit(path: Path, chance: random.Random, _others: list[Path]) -> str:
    data = bytearray(path.read_bytes())
    place, bit = chance.randrange(len(data)), chance.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {place} of {len(data)}"


def _set_byte(path: Path, chance: random.Random, _others: list[Path]) -> str:
    data = bytearray(path.read_bytes())
    place = chance.randrange(len(data))
    before, data[place] = data[place], (data[place] + chance.randrange(1, 256)) % 256
    path.write_bytes(data)
    return f"byte {place} of {len(data)} from {before:#04x} to {data[place]:#04x}"


def _set_digit(path: Path, chance: random.Random, _others: list[Path]) -> str:
    """Another digit, which stays well-formed: what no parser notices."""
    data = bytearray(path.read_bytes())
    places = [place for place, byte in enumerate(data) if 0x30 <= byte <= 0x39]
    if not places:
        return _flip_bit(path, chance, _others)
    place = chance.choice(places)
    data[place] = 0x30 + (data[place] - 0x30 + chance.randrange(1, 10)) % 10
    path.write_bytes(data)
    return f"digit at byte {place} is now {chr(data[place])}"


def _set_letter(path: Path, chance: random.Random, _others: list[Path]) -> str:
    data = bytearray(path.read_bytes())
    places = [place for place, byte in enumerate(data) if 0x61 <= byte <= 0x7A]
    if not places:
        return _flip_bit(path, chance, _others)
    place = chance.choice(places)
    data[place] = ord(chance.choice([c for c in "abcdefxyz" if ord(c) != data[place]]))
    path.write_bytes(data)
    return f"letter at byte {place} is now {chr(data[place])}"


def _cut(path: Path, chance: random.Random, _others: list[Path]) -> str:
    size = path.stat().st_size
    left = chance.choice([0, 1, size // 2, size - 1, chance.randrange(size)])
    os.truncate(path, left)
    return f"{left} of {size} bytes left"


def _extend(path: Path, chance: random.Random, _others: list[Path]) -> str:
    garbage = chance.choice([b"\0", b" ", b"\n", b"}", chance.randbytes(chance.randrange(1, 4096))])
    with path.open("ab") as file:
        file.write(garbage)
    return f"by {len(garbage)} bytes from {garbage[:1]!r} on"


def _zero_block(path: Path, chance: random.Random, _others: list[Path]) -> str:
    data = bytearray(path.read_bytes())
    start = chance.randrange(-(-len(data) // _BLOCK)) * _BLOCK
    end = min(start + _BLOCK, len(data))
    data[start:end] = bytes(end - start)
    path.write_bytes(data)
    return f"bytes {start} to {end}"


def _swap(path: Path, chance: random.Random, others: list[Path]) -> str:
    other = chance.choice(others)
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)
    return f"with {other.name} of {other.parent.name}"


def _copy_over(path: Path, chance: random.Random, others: list[Path]) -> str:
    other = chance.choice(others)
    path.write_bytes(other.read_bytes())
    return f"{other.name} of {other.parent.name}"


def _edit(path: Path, chance: random.Random, _others: list[Path]) -> str:
    """Change what is said in a form that is kept, as far as there is one."""
    edit = mutation.edited_bytes
    if path.suffix == ".json":
        edit = mutation.edited_json
    elif path.suffix == ".safetensors":
        edit = mutation.edited_safetensors
    data, done = edit(path.read_bytes(), chance)
    path.write_bytes(data)
    return done


def _delete(path: Path, _chance: random.Random, _others: list[Path]) -> str:
    path.unlink()
    return ""


def _replace(make: Callable[[Path], object]) -> Strike:
    def act(path: Path, _chance: random.Random, _others: list[Path]) -> str:
        path.unlink()
        make(path)
        return ""

    return act


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        os.truncate(file.fileno(), _SPARSE_BYTES)


def _folder_with_files(path: Path) -> None:
    path.mkdir()
    (path / "file").write_bytes(b"x")


STRIKES: dict[str, tuple[float, Strike]] = {
    "flip a bit": (6, _flip_bit),
    "set a byte": (4, _set_byte),
    "set a digit": (3, _set_digit),
    "set a letter": (2, _set_letter),
    "edit": (8, _edit),
    "cut": (3, _cut),
    "extend": (2, _extend),
    "zero a block": (2, _zero_block),
    "swap": (1.5, _swap),
    "put another file there": (1.5, _copy_over),
    "delete": (1, _delete),
    "make an empty folder": (0.7, _replace(os.mkdir)),
    "make a folder with a file": (0.3, _replace(_folder_with_files)),
    "make a link to nowhere": (0.5, _replace(lambda path: path.symlink_to("nowhere"))),
    "make a link to itself": (0.5, _replace(lambda path: path.symlink_to(path))),
    "make a link to an endless device": (0.5, _replace(lambda path: path.symlink_to("/dev/zero"))),
    "make a pipe": (0.7, _replace(os.mkfifo)),
    "make a sparse file of 1 TiB": (0.7, _replace(_sparse)),
}
"""How often each of them, in proportion, and what it does."""
