"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.files import sync, sync_all
from trainer.config.reading import ConfigError


def check_file(output: Path, *, overwrite: bool) -> None:
    """Refuse a place where a file must not be written.

    Raises:
        ConfigError: There is a folder, or a file that may not be replaced.
    """
    if output.is_dir():
        raise ConfigError(f"output={output} is a folder; name a file in it")
    if output.exists() and not overwrite:
        raise ConfigError(
            f"output={output} exists; choose another, or set overwrite=true to replace it"
        )


def check_folder(output: Path, *, own: Collection[str], overwrite: bool) -> None:
    """Refuse a place where a folder must not be written.

    Args:
        output: The place.
        own: Names of all files that may be in a folder that is replaced.
        overwrite: Whether one may be replaced.

    Raises:
        ConfigError: There is a file, a folder that may not be replaced, or one that holds something
            else.
    """
    if not os.path.lexists(output):
        return
    if output.is_symlink() or not output.is_dir():
        raise ConfigError(f"output={output} is not a folder; choose another place")
    names = {entry.name for entry in output.iterdir()}
    if names and not overwrite:
        raise ConfigError(
            f"output={output} exists and is not empty; choose another, or set overwrite=true to "
            "replace an earlier export"
        )
    if foreign := sorted(names - set(own)):
        raise ConfigError(
            f"output={output} holds {foreign[0]}, which no export has written, so overwrite=true "
            "does not replace it; choose another folder, or move that away"
        )


@contextmanager
def write_whole(output: Path) -> Iterator[Path]:
    """Give a place beside `output` to write to; what is there at the end becomes `output`.

    Whatever fails, an interrupt too, leaves `output` as it was, and nothing beside it. A process
    that is killed leaves a hidden folder or file beside it; an earlier folder it may leave there
    alone, renamed, if it is killed between two renames.

    Args:
        output: A file or folder, checked before; what is there is replaced.

    Yields:
        The place, where nothing is yet.

    Raises:
        ConfigError: It cannot be written, as on a full disk; or what was there cannot be put back,
            and lies beside it.
    """
    name = f".{output.name}.{secrets.token_hex(4)}"
    partial, replaced = output.with_name(f"{name}.partial"), output.with_name(f"{name}.replaced")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        sync_all(partial)
        if output.is_dir():
            output.rename(replaced)
        partial.rename(output)
        sync(output.parent)
    except OSError as error:
        raise ConfigError(
            f"output={output} cannot be written, and nothing of it is left: {error}"
        ) from error
    finally:
        _settle(output, partial=partial, replaced=replaced)


def _settle(output: Path, *, partial: Path, replaced: Path) -> None:
    """Put an earlier folder back if nothing has come to its place, and remove what is left over.

    Raises:
        ConfigError: It cannot be put back, and is not removed either.
    """
    try:
        # An interrupt, too, may come between the renames.
        if replaced.exists() and not os.path.lexists(output):
            replaced.rename(output)
    except OSError as error:
        raise ConfigError(
            f"output={output} cannot be written, and what was there is now at {replaced}, which "
            f"cannot be renamed back: {error}"
        ) from error
    finally:
        _remove(partial)
    _remove(replaced)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
