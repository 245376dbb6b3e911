"""Looks at licences, versions and files of what is installed: `make audit`.

It asks nobody outside. It fails if a version is known to be bad or is not the pinned one, if a
package has other contents than the build that was tested, if a file is not the one that was
installed, if a licence is unknown or forbids use beside this project's, or if README.md does not
name a part that is LGPL or proprietary. `--write` notes what is installed here as tested.
"""

import argparse
import base64
import csv
import hashlib
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
OWN = "lapflow-trainer"
TESTED = ROOT / "install/contents.txt"
PLATFORM = ("CPython 3.11", "Linux", "x86_64")
"""Where those contents are from; elsewhere what is compiled is another."""
BUILT = ("torch", "torchvision", "deepspeed", "antlr4-python3-runtime")
"""Of several builds under one version (ADR 18), or built where they are installed."""

STATED = {
    "cuda-toolkit": "LicenseRef-NVIDIA-Proprietary",
    "huey": "MIT",
    "mosaicml-streaming": "Apache-2.0",
    "nvidia-libnvcomp-cu13": "LicenseRef-NVIDIA-Proprietary",
    "skops": "MIT",
}
"""Licences that a package's files state and its metadata does not."""

_KINDS = {
    "proprietary": r"proprietary|nvidia",
    "LGPL": r"LGPL|lesser general public",
    "GPL": r"GPL|general public",
    "MPL": r"MPL|mozilla",
    "permissive": r"MIT|BSD|apache|ISC\b|PSF|python software foundation|unlicense|HPND|zlib|CC0",
}
_NAMED = ("LGPL", "proprietary")


def kind_of(licence: str) -> str:
    """Tell the strictest kind of licence that a text names, or "unknown"."""
    found = (kind for kind, words in _KINDS.items() if re.search(words, licence, re.IGNORECASE))
    return next(found, "unknown")


def licence(package: Distribution) -> str:
    """Return what a package says of its licence."""
    told = package.metadata
    if stated := STATED.get(canonicalize_name(package.name)):
        return stated
    if expression := told.get("License-Expression"):
        return expression
    classes = [each for each in told.get_all("Classifier") or [] if each.startswith("License ::")]
    if names := [each.rpartition(" :: ")[2] for each in classes if not each.endswith("Approved")]:
        return ", ".join(names)
    return (told.get("License") or "").strip().partition("\n")[0]


def licences(packages: Sequence[Distribution], readme: str) -> Iterator[str]:
    """Print a line for each kind of licence; give what is wrong."""
    by_kind: dict[str, list[str]] = {}
    for package in (each for each in packages if each.name != OWN):
        by_kind.setdefault(kind_of(licence(package)), []).append(package.name)
    for kind, names in sorted(by_kind.items()):
        listed = "" if kind == "permissive" else f": {', '.join(sorted(names, key=str.lower))}"
        print(f"{kind:<12} {len(names):>4}{listed}")
    yield from (f"{name}: its licence is unknown" for name in by_kind.get("unknown", []))
    yield from (f"{name}: GPL cannot be linked here" for name in by_kind.get("GPL", []))
    for kind in _NAMED:
        for name in by_kind.get(kind, []):
            if name not in readme and not (name.startswith("nvidia-") and "`nvidia-*`" in readme):
                yield f"{name}: {kind}, and README.md does not name it"


def requirements(text: str) -> Iterator[tuple[Requirement, str]]:
    """Read requirements, one a line, each with the remark behind it."""
    for line in text.splitlines():
        requirement, _, remark = line.partition("#")
        if requirement.strip():
            yield Requirement(requirement), remark.strip()


def versions(packages: Sequence[Distribution], pins: str, bad: str) -> Iterator[str]:
    """Give what is wrong with versions."""
    installed = {canonicalize_name(each.name): Version(each.version) for each in packages}
    for wanted, why in requirements(bad):
        version = installed.get(canonicalize_name(wanted.name))
        if version is not None and wanted.specifier.contains(version, prereleases=True):
            yield f"{wanted.name} {version} is known to be bad: {why}"
    pinned = {canonicalize_name(pin.name): pin for pin, _ in requirements(pins)}
    for name, pin in pinned.items():
        if name in installed and not pin.specifier.contains(installed[name], prereleases=True):
            yield f"{pin.name} {installed[name]} is not what constraints.txt has, {pin.specifier}"
    others = sorted(set(installed) - set(pinned) - {OWN})
    print(f"pinned       {len(set(installed) & set(pinned)):>4}, and not: {', '.join(others)}")


def files(packages: Sequence[Distribution]) -> Iterator[str]:
    """Give the files that are not the ones that were installed.

    Several packages may have installed a file of one name, as parts of a common package do; then
    it is the one of any of them. What Python compiles it may compile anew.
    """
    recorded: dict[Path, dict[str, str]] = {}
    for package in packages:
        # Not package.files, which newer versions of Python leave missing files out of.
        for name, hashed, *_ in csv.reader((package.read_text("RECORD") or "").splitlines()):
            if hashed and not name.endswith(".pyc"):
                place = Path(str(package.locate_file(name)))
                recorded.setdefault(place, {})[hashed] = package.name
    for place, hashes in recorded.items():
        owners = ", ".join(dict.fromkeys(hashes.values()))
        if not place.is_file():
            yield f"{owners}: {place} is gone"
        elif not any(each == digest(place, each.partition("=")[0]) for each in hashes):
            yield f"{owners}: {place} has been changed"
    print(f"files     {len(recorded):>7} hashed")


def contents(package: Distribution) -> str:
    """Hash what a package has brought: the names and hashes of its files, by its own record.

    What an installer adds or builds (commands, bytecode, the package's description) is left out,
    so the same archive has the same contents wherever it is installed.
    """
    rows = csv.reader((package.read_text("RECORD") or "").splitlines())
    kept = sorted(
        f"{name} {hashed}"
        for name, hashed, *_ in rows
        if hashed and not name.startswith("../") and ".dist-info/" not in name
    )
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()


def builds(
    packages: Sequence[Distribution], tested: str, place: tuple[str, ...] = PLATFORM
) -> Iterator[str]:
    """Give the packages whose contents are not those of a build that was tested.

    Args:
        packages: What is installed.
        tested: Lines of `name==version contents`, several for a version of several builds.
        place: What this platform is.
    """
    if place != PLATFORM:
        print(f"contents        0 compared: they are known of {', '.join(PLATFORM)} alone")
        return
    known: dict[str, set[str]] = {}
    for line in tested.splitlines():
        if line and not line.startswith("#"):
            pin, _, value = line.partition(" ")
            known.setdefault(pin, set()).add(value)
    found = {pin_of(each): each for each in packages if each.name != OWN}
    compared = sorted(found.keys() & known.keys())
    for pin in compared:
        if contents(found[pin]) not in known[pin]:
            yield (
                f"{pin} has other contents than the build that was tested: look where it is from "
                "(install/contents.txt)"
            )
    others = ", ".join(sorted(found.keys() - known.keys()))
    print(f"contents  {len(compared):>7} compared, and not: {others}")


def pin_of(package: Distribution) -> str:
    """Return a package as it is pinned; a build's own suffix is no part of its version."""
    return f"{canonicalize_name(package.name)}=={Version(package.version).public}"


def note_contents(packages: Sequence[Distribution], pins: str, tested: str) -> str:
    """Return the lines of what was tested, with what is installed here beside it.

    Args:
        packages: What is installed.
        pins: The pinned versions; lines of no other are returned.
        tested: The lines of before.
    """
    heading = [line for line in tested.splitlines() if line.startswith("#")]
    pinned = {
        f"{name}{pin.specifier}"
        for pin, _ in requirements(pins)
        if (name := canonicalize_name(pin.name)) not in BUILT
    }
    kept = {line for line in tested.splitlines() if line.partition(" ")[0] in pinned}
    here = {f"{pin_of(each)} {contents(each)}" for each in packages if pin_of(each) in pinned}
    return "\n".join([*heading, *sorted(kept | here)]) + "\n"


def digest(path: Path, algorithm: str) -> str:
    """Hash a file, written as a package's record writes it."""
    with path.open("rb") as file:
        value = hashlib.file_digest(file, algorithm).digest()
    return f"{algorithm}={base64.urlsafe_b64encode(value).rstrip(b'=').decode()}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 1 if something is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="note what is installed as tested")
    packages = list(distributions())
    if parser.parse_args(arguments).write:
        pins = (ROOT / "constraints.txt").read_text()
        TESTED.write_text(note_contents(packages, pins, TESTED.read_text()))
        return 0
    python = f"{platform.python_implementation()} {sys.version_info[0]}.{sys.version_info[1]}"
    wrong = [
        *licences(packages, (ROOT / "README.md").read_text()),
        *versions(
            packages,
            (ROOT / "constraints.txt").read_text(),
            (ROOT / "install/known-bad.txt").read_text(),
        ),
        *builds(packages, TESTED.read_text(), (python, platform.system(), platform.machine())),
        *files(packages),
    ]
    for line in wrong:
        print(f"WRONG  {line}")
    print(f"{len(wrong)} wrong" if wrong else "all is well")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
