"""Versions of packages whose private parts are used here.

A private part may change its meaning with any release, and then training could go on and be wrong.
So whoever touches one asks first, and pyproject.toml asks pip for the same versions.
"""

import contextlib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.specifiers import SpecifierSet

TESTED_RAY = ">=2.60.0,<2.61"
TESTED_TORCH = ">=2.13.0,<2.14"


class UntestedVersion(ValueError):
    """A package is installed in a version that its use here was not tested with."""


def require_tested(package: str, tested: str) -> None:
    """Refuse a version of a package outside the tested ones.

    Args:
        package: Its name as pip knows it. One that is not installed passes: its import fails.
        tested: The versions, as pip writes them.

    Raises:
        UntestedVersion: Another one is installed.
    """
    try:
        found = version(package)
    except PackageNotFoundError:
        return
    if not SpecifierSet(tested).contains(found, prereleases=True):
        raise UntestedVersion(
            f"{package} {found} is installed. Private parts of it are used here, which were tested "
            f"with {package} {tested} alone: pip install '{package}{tested}'"
        )


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Puts something else in the place of a private part, where a package cannot be told otherwise.

    Args:
        owner: What has the part: a module, a class, an object.
        name: The part's name there.
        value: What takes its place for the length of a `with` block.
    """
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
