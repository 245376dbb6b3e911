"""Archives are read as if they were unpacked; damaged ones are refused, and sizes not believed."""

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.errors import DataError, UnreadableSourceError
from pipelines.ingest.__main__ import main
from pipelines.ingest.listing import Listing, list_images

IMAGE = b"any bytes: a listing does not look at them" * 20
BLOCK = 512
TEBIBYTE = 1 << 40


def packed(files: dict[str, bytes], *, links: dict[str, str] | None = None) -> bytes:
    """An archive, with symbolic links if there are any."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return file.getvalue()


WHOLE = packed({f"{c}/{n}.png": IMAGE for c in ("ant", "bee", "cow") for n in range(8)})
ENTRIES = 24 * (BLOCK + 2 * BLOCK)  # a header and two blocks of data for each


def listed(content: bytes, folder: Path) -> Listing:
    (folder / "a.tar").write_bytes(content)
    return list_images(folder / "a.tar")


def told(listing: Listing) -> object:
    return listing.classes, [(i.name, i.label, i.size, i.offset) for i in listing.images]  # type: ignore[attr-defined]


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None
)
@given(member=st.integers(0, 23), bit=st.integers(0, 8 * BLOCK - 1))
def test_a_flipped_bit_in_a_header_loses_nothing_in_silence(
    tmp_path: Path, member: int, bit: int
) -> None:
    damaged = bytearray(WHOLE)
    damaged[member * 3 * BLOCK + bit // 8] ^= 1 << bit % 8
    want = told(listed(WHOLE, tmp_path))
    try:
        got = told(listed(bytes(damaged), tmp_path))
    except UnreadableSourceError:
        return
    assert got == want  # the bit means nothing, such as one behind the end of a number


CUTS = [*range(0, ENTRIES + BLOCK, BLOCK), 100, ENTRIES - 7, ENTRIES + 700]


@pytest.mark.parametrize("end", CUTS)
def test_an_archive_that_was_cut_is_refused(end: int, tmp_path: Path) -> None:
    with pytest.raises(UnreadableSourceError, match="archive"):
        listed(WHOLE[:end], tmp_path)


@pytest.mark.parametrize("begin", [0, 3 * BLOCK, 12 * 3 * BLOCK, 12 * 3 * BLOCK + 900])
def test_a_tail_of_zeros_is_refused(begin: int, tmp_path: Path) -> None:
    """As a download leaves it that took its place on the disk before it was broken off."""
    with pytest.raises(UnreadableSourceError, match="zeros follow"):
        listed(WHOLE[:begin] + bytes(len(WHOLE) - begin), tmp_path)


def test_data_behind_the_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableSourceError, match=f"data behind its end at byte {ENTRIES}"):
        listed(WHOLE + packed({"dog/1.png": IMAGE}), tmp_path)
    with pytest.raises(UnreadableSourceError, match="data behind its end"):
        listed(WHOLE[:-1] + b"x", tmp_path)
    # Some writers end with the marker alone.
    assert told(listed(WHOLE[: ENTRIES + 2 * BLOCK], tmp_path)) == told(listed(WHOLE, tmp_path))


def test_an_archive_in_an_archive_has_to_be_whole_too(tmp_path: Path) -> None:
    inner = packed({f"{n}.png": IMAGE for n in range(20)})
    assert listed(packed({"ant.tar": inner, "bee.tar": inner}), tmp_path).classes == ("ant", "bee")
    with pytest.raises(UnreadableSourceError, match="from byte 512 on"):
        listed(packed({"ant.tar": inner[: 5 * BLOCK], "bee.tar": inner}), tmp_path)
    nested = inner
    for level in range(6):
        nested = packed({f"{level}.tar": nested})
    with pytest.raises(UnreadableSourceError, match="archives in archives"):
        listed(nested, tmp_path)


def header(kind: bytes, size: int, *, real_size: int | None = None) -> bytes:
    """A header that claims what it likes."""
    info = tarfile.TarInfo("ant/big.png")
    info.size = size
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[156:157] = kind
    if size < 0:
        block[124:136] = (1 << 96).__sub__(-size).to_bytes(12, "big")
    if real_size is not None:
        block[483:495] = (
            b"%011o\0" % real_size
            if real_size < 1 << 33
            else b"\x80" + (real_size.to_bytes(11, "big"))
        )
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


SMALL = packed({"ant/1.png": IMAGE})


@pytest.mark.parametrize(
    ("lie", "word"),
    [
        (header(tarfile.XHDTYPE, TEBIBYTE), "header of"),
        (header(tarfile.GNUTYPE_LONGNAME, TEBIBYTE), "header of"),
        (header(tarfile.REGTYPE, TEBIBYTE), "unexpected end"),
        (header(tarfile.REGTYPE, -512), "archive"),
        (header(tarfile.REGTYPE, -5120), "archive"),
        (header(tarfile.XHDTYPE, -512), "archive"),
    ],
)
def test_sizes_that_no_file_has_are_refused(lie: bytes, word: str, tmp_path: Path) -> None:
    with pytest.raises(UnreadableSourceError, match=word):
        listed(lie + SMALL, tmp_path)


@pytest.mark.parametrize("name", ["a/" * 10_000 + "1.png", f"ant/{'a' * 5000}.png"])
def test_names_that_no_file_has_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnreadableSourceError, match=r"holds a name of [\d,]+ characters in"):
        listed(packed({name: IMAGE, "ant/1.png": IMAGE}), tmp_path)
    inner = packed({"1.png": IMAGE})
    with pytest.raises(UnreadableSourceError, match="holds a name of"):
        listed(packed({f"{name}.tar": inner, "ant/1.png": IMAGE}), tmp_path)


def test_a_sparse_member_of_a_tebibyte_is_passed_over(tmp_path: Path) -> None:
    sparse = header(tarfile.GNUTYPE_SPARSE, 0, real_size=TEBIBYTE)
    listing = listed(sparse + SMALL, tmp_path)
    assert len(listing.images) == 1
    assert listing.passed_over == (("sparse file", 1),)


def test_a_chain_of_headers_ends(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="archive"):
        listed(header(tarfile.XHDTYPE, 0) * 3000 + SMALL, tmp_path)


def test_members_are_what_unpacking_makes_of_them(tmp_path: Path) -> None:
    """The last of a name counts, hard links are files, and symbolic ones are not followed."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in (("./ant/1.png", b"old"), ("./ant/1.png", b"newer"), ("bee/2.png", b"b")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, kind in (("bee/3.png", tarfile.LNKTYPE), ("bee/4.png", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "ant/1.png"
            archive.addfile(info)
    listing = listed(file.getvalue(), tmp_path)
    assert {image.name: image.read() for image in listing.images} == {
        "ant/1.png": b"newer",
        "bee/2.png": b"b",
        "bee/3.png": b"newer",
    }
    assert listing.passed_over == (("linked file", 1), ("replaced file", 1))


NAMES = st.sampled_from(["ant", "bee", "cow", "images", ".git", "__MACOSX"])
FILES = st.sampled_from(["1.png", "2.JPEG", "3.jfif", "4.jpe", "5.bmp", ".6.png", "no", "a.zip"])
PATHS = st.builds(lambda folders, file: [*folders, file], st.lists(NAMES, max_size=3), FILES).map(
    "/".join
)


def outcome(source: Path) -> tuple[object, ...]:
    try:
        listing = list_images(source)
    except DataError as error:
        return (type(error),)
    return (
        listing.classes,
        [(image.name, image.label, image.read()) for image in listing.images],
        listing.passed_over,
        listing.inside,
    )


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=120, deadline=None
)
@given(paths=st.sets(PATHS, min_size=1, max_size=7), data=st.data())
def test_packed_and_unpacked_images_have_the_same_classes(
    tmp_path_factory: pytest.TempPathFactory, paths: set[str], data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("alike")
    files = {path: path.encode() for path in sorted(paths)}
    folder = root / "set"
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    order = data.draw(st.permutations(sorted(files)))
    (root / "set.tar").write_bytes(packed({path: files[path] for path in order}))
    if outcome(folder)[0] != ("set",):  # without any folder an archive does not tell a class
        assert outcome(root / "set.tar") == outcome(folder)
    # A folder of one archive for each class.
    tops = {path.split("/")[0] for path in files if "/" in path}
    (root / "tars").mkdir()
    for top in tops:
        inside = {path[len(top) + 1 :]: files[path] for path in order if path.startswith(f"{top}/")}
        (root / "tars" / f"{top}.tar").write_bytes(packed(inside))
    if all("/" in path for path in files) and not tops & {".git", "__MACOSX"}:
        assert outcome(root / "tars") == outcome(folder)


def test_a_flat_archive_is_one_class_if_told_so(tmp_path: Path) -> None:
    """The folder it unpacks to is one class without a word; an archive has no name for it."""
    (tmp_path / "a.tar").write_bytes(packed({"1.png": IMAGE, "2.png": IMAGE}))
    with pytest.raises(UnreadableSourceError, match=r"outside of any class folder.*--one-class"):
        list_images(tmp_path / "a.tar")
    listing = list_images(tmp_path / "a.tar", classes_from="nothing")
    assert (listing.classes, len(listing.images)) == (("a",), 2)


def test_a_damaged_archive_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.tar").write_bytes(WHOLE[: 4 * 3 * BLOCK])
    assert main(["image-folder", str(tmp_path / "a.tar"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "end marker is missing" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", "/", "."])
def test_a_member_without_a_name_is_told(name: str, tmp_path: Path) -> None:
    """As a damaged extension header leaves it; its image would be missing without a word."""
    listing = listed(packed({"ant/0.png": IMAGE, name: IMAGE}), tmp_path)
    assert [image.name for image in listing.images] == ["ant/0.png"]
    assert dict(listing.passed_over) == {"file without a name": 1}
