"""The folder of a try, bait beside it, and a watch over what is done outside."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "canary-s3cr3t-7Qx",
    "AWS_SESSION_TOKEN": "canary-t0ken-9Ty",
    "MLFLOW_TRACKING_PASSWORD": "canary-mlfl0w-1Ab",
    "FUZZ_PIN": "48151623",  # which a number may hide
}
"""What is in the environment of each try and must not get anywhere."""
BAIT = b"bait-0ut51d3-4Ef"
"""What is in the files that nobody names."""

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    "os.mkdir": (0,),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.rename": (0, 1),
    "os.link": (1,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "os.chmod": (0,),
}
_COMMANDS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")
# What libraries write into that is no file of anybody's.
_OTHERS = ("/dev/null", "/dev/shm/", "/dev/tty", "/proc/self/", "/tmp/pymp-")


@dataclass
class Sandbox:
    """A folder that a try may write into.

    Attributes:
        inside: The folder.
        outside: A folder beside it, with files that nothing has named.
        canary: A place that only code from a file would create something at.
        trespasses: What was done outside: written, made, removed, run, or bait that was opened.
    """

    inside: Path
    outside: Path
    trespasses: list[str] = field(default_factory=list)
    _hidden: set[str] = field(default_factory=set)
    _watches: bool = False

    @property
    def canary(self) -> Path:
        """Is there only if something was executed."""
        return self.outside / "canary"

    @property
    def bait(self) -> Path:
        """A picture that nobody has named."""
        return self.outside / "private.png"

    def enter(self) -> None:
        """Make it this process's home, and watch from now on."""
        for folder in (self.inside, self.inside / "tmp", self.outside):
            folder.mkdir(parents=True, exist_ok=True)
        from tests.unit.pipelines.pictures import png

        self.bait.write_bytes(png(12, 12, seed=4711) + BAIT)
        (self.outside / "private.txt").write_bytes(BAIT)
        self._hidden |= {path.name for path in self.outside.iterdir()}
        os.chdir(self.inside)
        sys.dont_write_bytecode = True
        tempfile.tempdir = str(self.inside / "tmp")
        os.environ.update(SECRETS, HOME=str(self.inside), TMPDIR=str(self.inside / "tmp"))
        # Processes that are started from here find these tests, and no others of that name.
        os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
        sys.addaudithook(self._look)
        self._watches = True

    def hide(self, path: Path) -> None:
        """Move a file or folder to where nobody may look."""
        self._watches = False
        shutil.move(path, self.outside / path.name)
        self._hidden.add(path.name)
        self._watches = True

    def problems(self, said: str) -> list[str]:
        """Return what must not have happened, after the try.

        Args:
            said: All that was said.
        """
        found = list(self.trespasses)
        if (there := {path.name for path in self.outside.iterdir()}) != self._hidden:
            found.append(f"files outside: {sorted(there)}")
        texts = {"the output": said.encode(errors="surrogateescape")}
        texts |= {str(path): path.read_bytes() for path in _small_files(self.inside)}
        for place, data in texts.items():
            found += [f"{name} is in {place}" for name, v in SECRETS.items() if v.encode() in data]
            if BAIT in data:
                found.append(f"bait is in {place}")
        return found

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._watches:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int):
                return
            if flags & _WRITES and not self._is_inside(path):
                self.trespasses.append(f"opened for writing: {path!r}")
            elif self._is_outside(path):
                self.trespasses.append(f"read: {path!r}")
        elif event in _CHANGES:
            places = [arguments[number] for number in _CHANGES[event]]
            bad = [p for p in places if not isinstance(p, int) and not self._is_inside(p)]
            self.trespasses += [f"{event}: {place!r}" for place in bad]
        elif event in _COMMANDS and "canary" in repr(arguments):
            self.trespasses.append(f"{event}: {arguments!r}"[:300])

    def _is_inside(self, path: Any) -> bool:
        name = _absolute(path)
        return name.startswith((f"{self.inside}/", *_OTHERS)) or name == str(self.inside)

    def _is_outside(self, path: Any) -> bool:
        return _absolute(path).startswith(f"{self.outside}/")


def _absolute(path: Any) -> str:
    return os.path.abspath(os.fsdecode(path))


def _small_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 22:
            yield path
