"""Addresses that may carry credentials, which would reach logs: told, quoted and said without."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

# A letter before a slash is a disk of Windows.
_SCHEME = re.compile(r"\s*(?![A-Za-z]:[/\\])([A-Za-z][A-Za-z0-9+.-]*):(/*)")
_FILES = ("file", "sqlite")
_MARKS = frozenset("@?#")
_PATHS = ("/", "./", "../", "~")

_WORD = re.compile(r"\S+")
_URL = re.compile(r"((?<![A-Za-z0-9+.-])[A-Za-z0-9+.-]{2,}+:/+)")
_HOST = re.compile(r"(\[[^\]]*\]|[^:@\[]*+)(:\d{0,5})?[^\w:@]*")
_COLON = re.compile(r"(?<=[\w.+%*-]):(?=[^'\"])")
_NO_USERS = ("run", "mailto")  # `run:NAME@URI` is a run of a tracker
_NO_NAME = re.compile(r"[^\w.+%*-]")
_TIME = re.compile(
    r"[^\w@]*(\d{4}-\d\d-\d\d[T_])?\d{1,2}:\d\d(:\d\d([.,]\d+)?)?(Z|[+-]\d\d:?\d\d)?[^\w@]*"
)
_PARAMETER = re.compile(r"[?&#;]([\w.%\[\]-]++)=")
_SECRET = re.compile(
    r"token|secret|passw|passphrase|pwd|credential|signature|auth|jwt|(api|access)[-_]?key"
    r"|^(sig|key|pw|pass|sid|session|hmac|code)$",
    re.IGNORECASE,
)
_VALUE = re.compile(r"[^\s&]*")
_CLOSING = "'\"`)]}>.,;:…"
_HIDDEN = "***"


def hide_credentials(text: str) -> str:
    """Put `***` in place of what looks like credentials in the addresses of a text.

    That is what stands before an "@", if it has a ":" or a scheme, as in `scheme://user:password@`
    and `user:password@`, and the values of parameters such as `?token=`. The scheme may be in
    capitals, and have a slash too few or too many. Other text stays: `a@b`, `key=value`, times,
    paths of any system, `run:NAME@URI`. A password is not told from other text where it has a
    space, or where no scheme is before it and it has a slash.

    The time that it takes is proportional to the length, whatever the text is.
    """
    text = _hide_parameters(text)
    if "@" in text or ":/" in text:
        text = _WORD.sub(lambda word: _hide_users(word[0]), text)
    return text


def _hide_users(word: str) -> str:
    before, *parts = _URL.split(word)
    urls = zip(parts[::2], parts[1::2], strict=True)
    return _hide_in_path(before) + "".join(head + _hide_in_url(head, rest) for head, rest in urls)


def _hide_in_url(head: str, rest: str) -> str:
    """Hide what comes before the host, and behind the bucket of S3.

    Args:
        head: The scheme with its colon and slashes.
        rest: The URL behind it.
    """
    scheme, _, slashes = head.lower().partition(":")
    host, slash, path = rest.partition("/")
    if (scheme in _FILES and len(slashes) > 2) or (scheme != "s3" and _HOST.fullmatch(host)):
        return _hide_in_path(rest)
    # A secret key may have slashes, and a password an "@".
    at = rest.rfind("@") if not _HOST.fullmatch(host) and ":" in host else host.rfind("@")
    if at >= 0:
        return _HIDDEN + rest[at:]
    bucket, colon, secret = host.partition(":")
    if scheme == "s3" and secret.strip(_CLOSING):
        host = f"{bucket}{colon}{_hidden(secret)}"
    return f"{host}{slash}{_hide_in_path(path)}"


def _hide_in_path(text: str) -> str:
    return "/".join(map(_hide_in_part, text.split("/")))


def _hide_in_part(part: str) -> str:
    before, at, after = part.rpartition("@")
    colon = _COLON.search(before)
    if colon is None or _TIME.fullmatch(before):
        return part
    user, secret = _NO_NAME.split(before[: colon.start()])[-1], before[colon.end() :]
    is_disk = len(user) == 1 and secret.startswith("\\")
    if is_disk or (user in _NO_USERS and "@" not in secret):
        return part
    return f"{before[: colon.end()]}{_HIDDEN}{at}{after}"


def _hide_parameters(text: str) -> str:
    told, done = [], 0
    for match in _PARAMETER.finditer(text):
        if match.start() < done or not _SECRET.search(match[1]):
            continue
        value = _VALUE.match(text, match.end())
        if value and value[0].strip(_CLOSING):
            told += [text[done : match.end()], _hidden(value[0])]
            done = value.end()
    return "".join(told) + text[done:]


def _hidden(secret: str) -> str:
    """Hide a secret, and leave the quotation mark or bracket that ends what it stands in."""
    return _HIDDEN + secret[len(secret.rstrip(_CLOSING)) :]


def may_carry_credentials(address: str) -> bool:
    """Tell whether a place that was typed has what may be a user, a password or a token.

    A URL that is mistyped, with a slash too few or too many, is judged by what was meant. A path
    that begins as one may have any name.
    """
    match = _SCHEME.match(address)
    if match is None:
        return not address.startswith(_PATHS) and hide_credentials(address) != address
    scheme, slashes, rest = match[1].lower(), match[2], address[match.end() :]
    host = rest.partition("/")[0]
    if scheme in _FILES:
        return len(slashes) < 3 and not {"@", ":"}.isdisjoint(host)
    if scheme != "s3":
        return not _MARKS.isdisjoint(rest)
    # An "@" and a "#" are fine in a key; a secret comes before the first slash or has a name.
    return not {"@", ":"}.isdisjoint(host) or "?" in rest or _hide_parameters(rest) != rest


def quote_address(address: str) -> str:
    """Quote an address for a message: of one that may carry credentials the scheme alone."""
    if not may_carry_credentials(address):
        return repr(address)
    match = _SCHEME.match(address)
    return f"'{match[0].strip()}…'" if match else "'…'"


def find_path_fault(text: str) -> str | None:
    """Say why what was typed is no path of this machine, but an address; None if it may be one."""
    is_address = may_carry_credentials(text) or _URL.match(text.strip())
    if not is_address or os.path.exists(text):
        return None
    return (
        f"{quote_address(text)} is an address, and a file or folder of this machine is wanted. "
        "Fetch it first; or begin it with ./ if it is called so."
    )


def find_endpoint_fault(url: str) -> str | None:
    """Say what is wrong with the address of an S3 service; None if it is a plain web address."""
    if not _MARKS.isdisjoint(url):
        return (
            "The S3 endpoint contains an '@', a '?' or a '#', which credentials may come with: "
            "leave them out of it and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the "
            "environment."
        )
    try:
        parts = urlsplit(url)
        is_plain = parts.scheme in ("http", "https") and bool(parts.netloc)
    except ValueError:  # brackets that are no address
        is_plain = False
    if not is_plain:
        return (
            f"The S3 endpoint {quote_address(url)} is not a web address: write e.g. "
            "'http://localhost:9000'."
        )
    return None
