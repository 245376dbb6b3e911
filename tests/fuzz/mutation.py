"""Random edits of valid input that keep its structure, so that they get past the first look."""

from __future__ import annotations

import copy
import json
import random
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

_CONTROLS = ("\x1b[31m", "\x1b]0;title\x07", "\r", "\n", "\x00", "\x9b", "\u202e", "\udcff", "\x7f")
_WORDS = (
    "..",
    "/etc/passwd",
    "${oc.env:AWS_SECRET_ACCESS_KEY}",
    "NaN",
    "null",
    "é",
    "😀",
    "-1",
    "",
)
_NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 1e308, -0.0, 5e-324, 0.5),
    *(float("nan"), float("inf"), float("-inf")),
)


def text(chance: random.Random) -> str:
    """Return a text that somebody chose in order to do harm."""
    parts = [chance.choice((*_CONTROLS, *_WORDS, "a", "class")) for _ in range(chance.randrange(4))]
    return "".join(parts) or chance.choice(("x" * 300, "x" * 70_000, "", " "))


def name(chance: random.Random) -> bytes:
    """Return the name of a file, bytes that a file system takes."""
    parts = (b"\x1b[31m", b"\n", b"\r", b"\xff\xfe", b"'", b'"', b"\xe2\x80\xae", b"$(id)", b"-rf")
    made = b"".join(
        chance.choice((*parts, b"a", b"b", b" ")) for _ in range(chance.randrange(1, 5))
    )
    return made.strip(b"/") or b"a"


def value(chance: random.Random) -> Any:
    """Return a value of a type that nobody expects."""
    return chance.choice(
        (
            lambda: chance.choice(_NUMBERS),
            lambda: text(chance),
            lambda: None,
            lambda: chance.choice((True, False)),
            lambda: [],
            lambda: {},
            lambda: [chance.choice(_NUMBERS)],
            lambda: {text(chance): chance.choice(_NUMBERS)},
            lambda: _nested(chance.choice((3, 50, 300))),
        )
    )()


def _nested(depth: int) -> Any:
    made: Any = 1
    for _ in range(depth):
        made = [made]
    return made


def edited_json(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Change one place of a JSON text, or its form.

    Args:
        data: The text; what is no JSON has a byte changed.
        chance: Decides where and how.

    Returns:
        The changed text and what was done.
    """
    try:
        document = json.loads(data)
    except ValueError:
        return edited_bytes(data, chance)
    if chance.random() < 0.2:
        return _misformed(data, chance)
    places = list(_places(document))
    if not places:
        return edited_bytes(data, chance)
    path = chance.choice(places)
    changed = copy.deepcopy(document)
    *way, last = path
    parent = changed
    for key in way:
        parent = parent[key]
    done = chance.choice(("replace", "remove", "rename", "like"))
    if done == "remove":
        del parent[last]
    elif done == "rename" and isinstance(parent, dict):
        parent[text(chance)] = parent.pop(last)
    elif done == "like" and type(parent[last]) in (int, float):
        parent[last] = parent[last] + chance.choice((1, -1, 1e-9, 2**40, -(2**40)))
    else:
        done, parent[last] = "replace", value(chance)
    told = "" if done == "remove" else f" by {parent!r:.80}"
    place = ".".join(map(str, path))
    return json.dumps(changed).encode(errors="surrogatepass"), f"{done} {place[:80]}{told}"


def _misformed(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    whole = data.decode()
    forms: dict[str, Callable[[], str]] = {
        "nested deep": lambda: whole.replace(":", ":" + "[" * 100_000, 1),
        "a long number": lambda: _number_for(whole, chance, "9" * 5000),
        "a long fraction": lambda: _number_for(whole, chance, "0." + "1" * 5000),
        "a huge exponent": lambda: _number_for(whole, chance, "1e999999"),
        "keys twice": lambda: whole.replace("{", '{"images": 7, "shards": [], ', 1),
        "a byte order mark": lambda: "\ufeff" + whole,
        "a lone surrogate": lambda: whole.replace('"', '"\\ud800', 1),
        "text behind it": lambda: whole + whole,
        "a list around it": lambda: f"[{whole}]",
        "large": lambda: whole[:-1] + " " * (1 << 22) + whole[-1:],
    }
    done = chance.choice(list(forms))
    return forms[done]().encode(), done


def _number_for(whole: str, chance: random.Random, number: str) -> str:
    places = [found.start() for found in re.finditer(r"(?<= )\d", whole)]
    if not places:
        return number
    start = chance.choice(places)
    end = start
    while end < len(whole) and (whole[end].isalnum() or whole[end] in ".+-"):
        end += 1
    return whole[:start] + number + whole[end:]


def _places(document: Any, way: tuple[Any, ...] = ()) -> Sequence[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    keys: Any = ()
    if isinstance(document, dict):
        keys = list(document)
    elif isinstance(document, list):
        keys = range(len(document))
    for key in keys:
        found += [(*way, key), *_places(document[key], (*way, key))]
    return found


def edited_bytes(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Change bytes: a few, a number among them, a part that is cut, doubled or moved."""
    if not data:
        return chance.randbytes(20), "20 bytes"
    changed = bytearray(data)
    place = chance.randrange(len(data))
    done = chance.choice(("flip", "flips", "cut", "double", "number", "zeros", "ends"))
    if done == "flip":
        changed[place] ^= 1 << chance.randrange(8)
    elif done == "flips":
        for _ in range(chance.randrange(2, 20)):
            changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif done == "cut":
        del changed[place : place + chance.choice((1, 4, 100, len(data)))]
    elif done == "double":
        changed[place:place] = changed[place : place + 100]
    elif done == "number":
        number = chance.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF))
        changed[place : place + 4] = struct.pack(chance.choice("<>") + "I", number)
    elif done == "zeros":
        changed[place : place + 64] = bytes(len(changed[place : place + 64]))
    else:
        changed += chance.randbytes(chance.randrange(1, 600))
    return bytes(changed), f"{done} at {place} of {len(data)}"


def edited_safetensors(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Change the header of a safetensors file, or the length that is said of it."""
    length = int.from_bytes(data[:8], "little")
    header, values = data[8 : 8 + length], data[8 + length :]
    if chance.random() < 0.2:
        said = chance.choice((0, 1, length - 1, length + 1, 1 << 31, (1 << 64) - 1))
        return struct.pack("<Q", said) + header + values, f"the header's length is {said}"
    changed, done = edited_json(header, chance)
    return struct.pack("<Q", len(changed)) + changed + values, f"header: {done}"
