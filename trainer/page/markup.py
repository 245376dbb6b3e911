"""HTML and SVG from text that is never believed: what is not markup of ours is escaped."""

from __future__ import annotations

import html
import re

from pipelines.addresses import hide_credentials
from pipelines.console import visible

_VOID = frozenset({"img", "meta", "br", "hr"})
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]*")

Attribute = str | int | float | bool | None


class Html(str):
    """Markup, made by `tag` or `join` alone; any other text is escaped where it is put."""

    __slots__ = ()


def text(words: str) -> Html:
    """Return text for a page: in one line, without credentials of addresses, and no markup."""
    return words if isinstance(words, Html) else Html(_escaped(words))


def tag(name: str, /, *children: str, **attributes: Attribute) -> Html:
    """Return an element.

    Args:
        name: Its name.
        children: What it holds; what is no `Html` is text.
        attributes: By name, with `_` for a hyphen and one more at the end of Python's own words.
            True has no value, and neither False nor None is written.

    Raises:
        ValueError: A name has characters that no name here has.
    """
    told = [name]
    for key, value in attributes.items():
        written = key.removesuffix("_").replace("_", "-")
        if not _NAME.fullmatch(written):
            raise ValueError(f"{written!r} is no name of an attribute")
        if value is True:
            told.append(written)
        elif value is not None and value is not False:
            number = f"{value:.6g}" if isinstance(value, float) else str(value)
            told.append(f'{written}="{text(value if isinstance(value, Html) else number)}"')
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of an element")
    start = f"<{' '.join(told)}>"
    return Html(start if name in _VOID else f"{start}{join(*children)}</{name}>")


def join(*parts: str) -> Html:
    """Return parts one after the other; what is no `Html` is text."""
    return Html("".join(map(text, parts)))


def style_sheet(rules: str) -> Html:
    """Return a style element of rules that are written here.

    Raises:
        ValueError: They could end the element.
    """
    if "<" in rules:
        raise ValueError("rules of a style sheet have no '<'")
    return Html(f"<style>{rules}</style>")


def document(*, title: str, head: Html, body: Html) -> str:
    """Return a whole document in English.

    Args:
        title: Its title.
        head: What the head holds beside it.
        body: What it shows.
    """
    whole = tag("html", tag("head", head, tag("title", title)), tag("body", body), lang="en")
    return f"<!DOCTYPE html>\n{whole}\n"


def _escaped(words: str) -> str:
    return html.escape(hide_credentials(visible(words)), quote=True)
