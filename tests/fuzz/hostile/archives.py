"""Tar archives: members that are no files, sizes that are not there, names that lead out."""

from __future__ import annotations

import io
import tarfile
from contextlib import suppress

from pipelines.ingest.__main__ import main as ingest
from tests.fuzz import mutation
from tests.fuzz.attempt import Try, announce
from tests.fuzz.hostile.datasets import LEFT_OUT, complaint
from tests.fuzz.hostile.judging import judged
from tests.fuzz.verdict import Seen
from tests.fuzz.watched import commanded
from tests.unit.pipelines import pictures

_TYPES = {
    "link": tarfile.SYMTYPE,
    "hard link": tarfile.LNKTYPE,
    "device": tarfile.CHRTYPE,
    "pipe": tarfile.FIFOTYPE,
    "sparse": tarfile.GNUTYPE_SPARSE,
    "contiguous": tarfile.CONTTYPE,
    "unknown": b"Z",
    "extended header": tarfile.XHDTYPE,
    "long name": tarfile.GNUTYPE_LONGNAME,
}
_NAMES = ("../../outside/x.png", "/tmp/x.png", "ant/../../x.png", "ant/good0.png", "./ant/x.png")


def archives(attempt: Try) -> Seen:
    """Ingest an archive of class folders, some of whose members are hostile."""
    chance = attempt.chance
    given: dict[bytes, set[str]] = {}
    must: dict[bytes, str] = {}
    whole = io.BytesIO()
    form = chance.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT))
    attacks = []
    with tarfile.open(fileobj=whole, mode="w", format=form) as archive:
        for number in range(6):
            label = ("ant", "bee")[number % 2]
            data = pictures.png(8, 8, seed=number)
            given[data], must[data] = {label}, label
            _add(archive, f"{label}/good{number // 2}.png", data)
            if chance.random() < 0.3:
                with suppress(ValueError):  # ustar has no place for a long name
                    attacks.append(_plant(attempt, archive, given))
    data = whole.getvalue()
    if chance.random() < 0.5:
        data, done = _edited(data, attempt)
        attacks.append(done)
    path = attempt.sandbox.inside / "pictures.tar"
    path.write_bytes(data)
    attack = "; ".join(attacks) or "none"
    announce("hostile: archives", attack)
    target = attempt.sandbox.inside / "out"
    words = [
        "image-folder",
        str(path),
        str(target),
        "--workers",
        "1",
        "--max-skipped-fraction",
        "1",
    ]
    return judged(
        attempt,
        "archives",
        attack,
        commanded(ingest, words),
        lambda: _complaint(attempt, given, must, data),
        told=LEFT_OUT,
    )


def _complaint(
    attempt: Try, given: dict[bytes, set[str]], must: dict[bytes, str], data: bytes
) -> str | None:
    """Members are judged as Python's own tarfile reads them, as far as it does."""
    seen = dict(given)
    left: dict[bytes, str] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                if member.isreg() and member.size < 1 << 20 and not member.issparse():
                    file = archive.extractfile(member)
                    content = b"" if file is None else file.read()
                    label = member.name.split("/")[-2] if "/" in member.name else ""
                    seen.setdefault(content, set()).add(label)
                    if content in must:
                        left[content] = must[content]
    except (tarfile.TarError, ValueError, OSError, EOFError):
        left = {}
    return complaint(attempt.sandbox.inside / "out", given=seen, must=left, left_out=None)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def _plant(attempt: Try, archive: tarfile.TarFile, given: dict[bytes, set[str]]) -> str:
    chance = attempt.chance
    name = chance.choice(_NAMES)
    if chance.random() < 0.15:
        return _long_name(attempt, archive, given)
    if chance.random() < 0.4:
        data = pictures.png(8, 8, seed=chance.randrange(10**6))
        given[data] = {part for part in name.split("/") if part} | {"", "outside", "tmp", "."}
        _add(archive, name, data)
        return f"member {name}"
    kind = chance.choice(list(_TYPES))
    info = tarfile.TarInfo(f"ant/{kind.replace(' ', '')}.png")
    info.type = _TYPES[kind]
    info.linkname = chance.choice(
        (str(attempt.sandbox.bait), "../../outside/private.png", "good0.png", "/dev/zero")
    )
    if kind in ("sparse", "unknown"):
        info.size = chance.choice((0, 512, 1 << 32))
    archive.addfile(info)
    return f"{kind} to {info.linkname[-30:]}"


def _long_name(attempt: Try, archive: tarfile.TarFile, given: dict[bytes, set[str]]) -> str:
    """A member whose name has thousands of parts, or one that is long."""
    chance = attempt.chance
    part = chance.choice(("a/", "a/", "ant/", "./", ".x/", f"{'x' * 200}/"))
    times = chance.choice((300, 10_000, 60_000, 60_000))
    name = f"{part * times}x.png" if chance.random() < 0.8 else f"ant/{'x' * times}.png"
    data = pictures.png(8, 8, seed=chance.randrange(10**6))
    given[data] = {name.split("/")[-2], *(part.strip("/") for part in ("ant/", part)), ""}
    if chance.random() < 0.3:
        info = tarfile.TarInfo(name.removesuffix("x.png"))
        info.type = tarfile.DIRTYPE
        archive.addfile(info)
    elif chance.random() < 0.3:
        info = tarfile.TarInfo("ant/linked.png")
        info.type, info.linkname = tarfile.LNKTYPE, name
        archive.addfile(info)
    else:
        _add(archive, name, data)
    return f"a name of {times} times {part[:8]}"


def _edited(data: bytes, attempt: Try) -> tuple[bytes, str]:
    """Change a header and have its checksum be right again, or any bytes."""
    chance = attempt.chance
    if chance.random() < 0.4:
        return mutation.edited_bytes(data, chance)
    changed = bytearray(data)
    start = 1024 * chance.randrange(max(1, len(data) // 1024 - 10))
    fields = {"name": (0, 100), "size": (124, 12), "type": (156, 1), "link": (157, 100)}
    done = chance.choice(list(fields))
    offset, length = fields[done]
    new = {
        "name": chance.choice((b"../../x.png", b"/x.png", b"\x1b[31m/x.png", b"a/\xff.png")),
        "size": chance.choice((b"7" * 11, b"-0000000001", b"\xff" * 12, b"\x80" + b"\x7f" * 11)),
        "type": chance.choice((b"1", b"2", b"S", b"x", b"L", b"\0", b"V")),
        "link": b"/etc/passwd",
    }[done]
    changed[start + offset : start + offset + length] = new.ljust(length, b"\0")[:length]
    block = changed[start : start + 512]
    block[148:156] = b" " * 8
    changed[start + 148 : start + 156] = b"%06o\0 " % sum(block)
    return bytes(changed), f"{done} {new[:12]!r} at {start}"
