"""The names of classes, in the order of their labels, as a file gives them."""

from collections import Counter
from pathlib import Path

from pipelines.console import visible
from pipelines.documents import DocumentError, read_bounded
from pipelines.errors import UnreadableSourceError

_MAX_BYTES = 1 << 26


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read the names of classes in the order of their labels, one a line.

    Raises:
        UnreadableSourceError: The file cannot be read as text, names no class or one of them twice,
            or has an empty line among them.
    """
    try:
        text = read_bounded(path, max_bytes=_MAX_BYTES).decode("utf-8-sig")
        lines = text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n").split("\n")
    except (OSError, DocumentError, UnicodeDecodeError) as error:
        raise UnreadableSourceError(
            f"The class list {path} cannot be read ({error}). Give a text file with the name of "
            "one class a line, in the order of the labels."
        ) from error
    names = tuple(line.removesuffix("\r") for line in lines)
    if names == ("",):
        raise UnreadableSourceError(
            f"The class list {path} names no class. Write one a line, or leave it away to number "
            "the classes by name."
        )
    if "" in names:
        raise UnreadableSourceError(
            f"The class list {path} has nothing in line {names.index('') + 1}, and the lines are "
            "the labels. Name the class, or remove the line."
        )
    (name, times), *_ = Counter(names).most_common(1)
    if times > 1:
        raise UnreadableSourceError(
            f"The class list {path} names {visible(name)!r} {times} times, so its label is "
            "unclear. Name each class once."
        )
    return names
