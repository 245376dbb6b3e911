"""One file of a source: what is taken of it, or why it is passed over.

A source is a folder, or an archive, which counts as a folder of its name. Both are walked to the
same entries, so that it makes no difference whether images lie packed or unpacked.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_PLAIN_SUFFIX = re.compile(r"(\.tar)?\.[a-z0-9_-]{1,12}")
# What systems and tools leave beside images, next to everything whose name begins with a dot.
_TOOL_FOLDERS = frozenset(
    ("__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information")
)

PassedOver = tuple[tuple[str, int], ...]
"""How many files there are of each kind that is not taken, the most frequent first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A file of a source, or a folder of it that is not looked into.

    Attributes:
        parts: Its folders and its name, from the source on.
        path: File that holds its bytes.
        offset: First byte there.
        size: Number of bytes.
        modified_ns: When the file that holds it was changed last.
        passed_over: Kind of thing that is not taken, such as ".bmp"; empty for what is.
    """

    parts: tuple[str, ...]
    path: Path
    offset: int = 0
    size: int = 0
    modified_ns: int = 0
    passed_over: str = ""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which files are looked for.

    Attributes:
        suffixes: Ends of their names, in lower case.
        max_bytes: Size above which one is passed over, for it is read as a whole.
        archives: Whether .tar archives are looked into.
    """

    suffixes: tuple[str, ...]
    max_bytes: int = sys.maxsize
    archives: bool = True

    def why_not(self, name: str, size: int) -> str:
        """Say why a regular file is passed over; nothing if it is wanted."""
        if is_hidden(name):
            return "hidden file"
        if PurePosixPath(name).suffix.lower() not in self.suffixes:
            return _kind(name)
        return "" if size <= self.max_bytes else "oversized file"


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder is none of the data, by its name."""
    return name.startswith(".") or name in _TOOL_FOLDERS


def _kind(name: str) -> str:
    path = PurePosixPath(name)
    packed = path.suffixes[-2:-1] == [".tar"]  # as in .tar.gz
    suffix = "".join(path.suffixes[-2:] if packed else path.suffixes[-1:]).lower()
    return suffix if _PLAIN_SUFFIX.fullmatch(suffix) else "other file"


def count(kinds: Iterable[str]) -> PassedOver:
    """Count what is passed over."""
    return tuple(sorted(Counter(kinds).items(), key=lambda pair: (-pair[1], pair[0])))


def in_words(passed_over: PassedOver) -> str:
    """List what is passed over, as in "6 .bmp, 1 linked folder"."""
    return ", ".join(
        f"{number:,} {kind}{'' if number == 1 or kind.startswith('.') else 's'}"
        for kind, number in passed_over
    )
