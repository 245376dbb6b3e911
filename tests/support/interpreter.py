"""Interpreters that have some of the packages installed here and no others; clones to install."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OWN = "lapflow-trainer"
ROOT = Path(__file__).resolve().parents[2]


class Interpreter:
    """A virtual environment of links to packages that are installed here.

    Args:
        folder: Where to make it.
        needed: Packages as pip knows them, which come with what they need.
    """

    def __init__(self, folder: Path, needed: Iterable[str]) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.bin = folder / "bin"
        (packages,) = folder.glob("lib/python*/site-packages")
        for each in with_requirements(needed):
            if canonicalize_name(each.name) != OWN:
                _link(each, packages)
        pip = self.bin / "pip"
        # The pip that is here, working on that environment.
        own = shlex.join([sys.executable, "-m", "pip", "--python", str(self.bin / "python")])
        pip.write_text(f'#!/bin/sh\nexec {own} "$@"\n')
        pip.chmod(0o755)

    def environment(self, home: Path) -> dict[str, str]:
        """Variables of a process that finds this interpreter, and this pip without an index."""
        return {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(home),
            "PIP_NO_INDEX": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # pip's word for: do not isolate
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *command: str | Path, place: Path) -> str:
        """Run a command in a folder, and return what it says."""
        ended = subprocess.run(
            command,
            cwd=place,
            env=self.environment(place),
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout


def clone_project(folder: Path) -> None:
    """Copy what is installed: building leaves things behind, and takes along what lies about."""
    folder.mkdir()
    for name in ("trainer", "models", "pipelines", "cluster", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)


def with_requirements(needed: Iterable[str]) -> list[Distribution]:
    """Return the installed packages that are asked for, and all that they need."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    wanted = [(Requirement(each), "") for each in needed]
    while wanted:
        requirement, of_extra = wanted.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": of_extra}):
            continue
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                found[name] = distribution(name)
            except PackageNotFoundError:
                continue  # what does without it will show
            wanted += [(Requirement(each), extra) for each in found[name].requires or ()]
    return list(found.values())


def _link(package: Distribution, packages: Path) -> None:
    here = Path(sysconfig.get_path("purelib"))
    for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
        link = packages / top
        if not link.exists() and (here / top).exists():
            link.symlink_to(here / top)
