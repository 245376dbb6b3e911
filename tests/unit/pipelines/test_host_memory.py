"""What the C library does with blocks that were freed."""

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes
from trainer.data.loading import return_large_blocks

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    _fields_ = [(name, ctypes.c_size_t) for name in names]

c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
c.free.argtypes, c.mallinfo2.restype = [ctypes.c_void_p], Info
{call}
c.free(c.malloc(20 << 20))
before = c.mallinfo2().hblkhd
block = c.malloc(8 << 20)
print(c.mallinfo2().hblkhd - before >= 8 << 20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize(
    ("call", "environment", "mapped"),
    [
        ("", {}, False),  # else there would be nothing to do
        ("return_large_blocks()", {}, True),
        ("return_large_blocks()", {"MALLOC_MMAP_THRESHOLD_": str(16 << 20)}, False),
    ],
)
def test_large_blocks_are_mapped_by_themselves(
    call: str, environment: dict[str, str], mapped: bool
) -> None:
    script = SCRIPT.replace("{call}", call)
    found = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == str(mapped)
