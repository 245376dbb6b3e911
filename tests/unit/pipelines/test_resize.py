"""Images made smaller once: as ADM does, and with a bound on the work for hostile shapes."""

import io
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.errors import IngestSettingError
from pipelines.ingest.images import Resize
from tests.unit.pipelines import pictures


def adm(picture: Image.Image, size: int) -> Image.Image:
    """`center_crop_arr` of Dhariwal and Nichol's guided-diffusion."""
    while min(*picture.size) >= 2 * size:
        picture = picture.resize(tuple(x // 2 for x in picture.size), resample=Image.BOX)
    scale = size / min(*picture.size)
    picture = picture.resize(
        tuple(max(size, round(x * scale)) for x in picture.size), resample=Image.BICUBIC
    )
    top, left = (picture.height - size) // 2, (picture.width - size) // 2
    return picture.crop((left, top, left + size, top + size))


@given(
    short=st.integers(1, 90), times=st.floats(1, 64), upright=st.booleans(), size=st.integers(1, 40)
)
@settings(max_examples=60, deadline=None)
def test_ordinary_images_are_resized_as_adm_does(
    short: int, times: float, upright: bool, size: int
) -> None:
    width, height = short, min(int(short * times), 2000)
    picture = pictures.photo(*((height, width) if upright else (width, height)))
    stored = Resize(image_size=size, encoding="png")(pictures.encode(picture))
    with Image.open(io.BytesIO(stored)) as image:
        wanted = adm(Image.fromarray(picture), size)
        assert np.array_equal(np.asarray(image), np.asarray(wanted))


_LIMITED = """
import resource, sys
from pathlib import Path
from pipelines.ingest.images import Resize
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (1 << 29)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.stdout.buffer.write(Resize(image_size=256, encoding="png")(Path(sys.argv[1]).read_bytes()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 65_000), (65_000, 1), (3, 65_000)])
def test_a_thread_of_an_image_takes_little_memory(
    shape: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Enlarged before it is cropped, such an image takes over 6 GiB."""
    picture = np.full((*shape, 3), 255, np.uint8)
    height, width = shape
    picture[max(0, height // 2 - 500) :, max(0, width // 2 - 500) :] = (10, 200, 90)
    picture[height // 2 + 500 :], picture[:, width // 2 + 500 :] = 255, 255
    file = tmp_path_factory.mktemp("thread") / "thread.png"
    file.write_bytes(pictures.encode(picture))
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(file)], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    with Image.open(io.BytesIO(done.stdout)) as image:
        # The middle, and nothing of the white ends.
        assert image.size == (256, 256)
        assert image.getextrema() == ((10, 10), (200, 200), (90, 90))


def test_sizes_that_no_decoder_reads_are_refused() -> None:
    for size in (0, 9460):
        with pytest.raises(IngestSettingError, match=f"image_size={size}"):
            Resize(image_size=size)
    Resize(image_size=9459)
