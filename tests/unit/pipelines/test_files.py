"""Locks end with their holder, and a file that cannot be written leaves the older one."""

import errno
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.files import take_lock, try_lock, write_atomic

HOLD = """
import sys, time
from pathlib import Path
from pipelines.files import take_lock
with take_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(3600)
"""


def test_a_lock_is_held_until_its_process_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert try_lock(file) is None
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(take_lock, file)
            time.sleep(0.2)
            assert not waiting.done()
            holder.send_signal(signal.SIGKILL)
            with waiting.result():
                assert try_lock(file) is None
    lock = try_lock(file)
    assert lock is not None
    with lock:
        pass


def test_threads_exclude_each_other(tmp_path: Path) -> None:
    inside, most = 0, 0

    def enter() -> None:
        nonlocal inside, most
        with take_lock(tmp_path / "lock"):
            inside += 1
            most = max(most, inside)
            time.sleep(0.01)
            inside -= 1

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(enter) for _ in range(8)]:
            done.result()
    assert most == 1


WRITE = """
import resource, signal, sys
from pathlib import Path
from pipelines.files import write_atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    write_atomic(Path(sys.argv[1]), bytes(1 << 20))
except OSError as error:
    sys.exit(error.errno)
"""


def test_a_file_that_cannot_be_written_leaves_the_older_one(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folders" / "file"
    write_atomic(file, b"old")
    ended = subprocess.run([sys.executable, "-c", WRITE, str(file)], check=False)
    assert ended.returncode == errno.EFBIG
    assert {path.name: path.read_bytes() for path in file.parent.iterdir()} == {"file": b"old"}
    write_atomic(file, b"new")
    assert file.read_bytes() == b"new"
    assert os.listdir(file.parent) == ["file"]


def test_a_lock_in_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("…")
    with pytest.raises(OSError, match="file"):
        take_lock(tmp_path / "file" / "a.lock")
