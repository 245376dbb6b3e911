"""Files of NumPy that nobody vouches for, looked at without its own loader."""

import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MAX_AXES = 8


class BadArrayError(Exception):
    """A file holds no array that can be used; others may."""


def parse_npy(data: bytes) -> NDArray[Any]:
    """Look at the bytes of a .npy file as an array of floating-point numbers.

    Unlike `numpy.load` it takes no memory for what a header only promises, and knows no other
    kinds of files.

    Raises:
        BadArrayError: It is damaged, or holds something else.
    """
    file = io.BytesIO(data)
    form: Any = np.lib.format
    try:
        version = form.read_magic(file)
        read = {
            (1, 0): form.read_array_header_1_0,
            (2, 0): form.read_array_header_2_0,
        }[version]
        shape, in_columns, dtype = read(file)
    except KeyError:
        raise BadArrayError("its version of the format .npy is unknown") from None
    except Exception as error:  # NumPy's parser raises what it comes upon, also of tokens
        reason = " ".join(str(error).split())[:100]
        raise BadArrayError(f"it is no .npy file ({reason})") from None
    if dtype.hasobject:
        raise BadArrayError("it holds pickled objects, which are not loaded")
    if dtype.kind != "f":
        raise BadArrayError(f"it holds {dtype}, not floating-point numbers")
    # A header may name truth values for numbers, and more axes than NumPy has.
    if len(shape) > _MAX_AXES or any(type(side) is not int or side < 1 for side in shape):
        raise BadArrayError(f"its shape is {str(list(shape))[:80]}")
    promised, found = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
    if promised != found:
        raise BadArrayError(f"it holds {found} bytes of numbers instead of {promised}")
    numbers = np.frombuffer(data, dtype=dtype, offset=file.tell())
    return numbers.reshape(shape, order="F" if in_columns else "C")
