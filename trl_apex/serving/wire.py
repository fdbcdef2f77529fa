"""How images and prompts travel between a trainer and a reward server: exactly, and never unpickled.

A request's body is one line of JSON, the header, and then the raw bytes of all images, one after the other:

```
{"prompts": ["a cat"], "columns": {}, "dtype": "uint8", "sizes": [[512, 512]], "floats": true}\\n
<512 * 512 * 3 bytes: RGB, row by row>
```

`dtype` is `"uint8"` or `"float32"` (little-endian), `sizes` holds the height and width of each image, and `floats` says
that the client had a float tensor, so that the server gives `images` to a reward that takes them.
"""

import json
import math
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from trl_apex.rewards.base import Images, is_column, to_arrays

PROTOCOL = 2
MEDIA_TYPE = "application/vnd.trl-apex.images"
DTYPES: dict[str, np.dtype] = {"uint8": np.dtype("u1"), "float32": np.dtype("<f4")}


def encode_request(prompts: Sequence[str], images: Images, columns: dict[str, list], as_uint8: bool = True) -> bytes:
    """The body of a request; `columns` are of JSON values.

    With `as_uint8`, floats are rounded to bytes, as saving an image does, instead of sent as float32.

    Example:
        >>> import torch
        >>> encode_request(["a cat"], torch.ones(1, 3, 1, 1), {})
        b'{"prompts": ["a cat"], "columns": {}, "dtype": "uint8", "sizes": [[1, 1]], "floats": true}\\n\\xff\\xff\\xff'
    """
    floats = isinstance(images, Tensor) and images.is_floating_point()
    dtype = "uint8"
    if isinstance(images, Tensor) and floats and not as_uint8:
        arrays, dtype = list(images.detach().float().cpu().permute(0, 2, 3, 1).numpy()), "float32"
    else:  # one by one, which needs less memory
        arrays = [array for i in range(len(images)) for array in to_arrays(images[i : i + 1])]
    header = {
        "prompts": list(prompts),
        "columns": columns,
        "dtype": dtype,
        "sizes": [list(array.shape[:2]) for array in arrays],
        "floats": floats,
    }
    line = json.dumps(header, allow_nan=False).encode() + b"\n"
    return b"".join([line, *(array.astype(DTYPES[dtype], copy=False).tobytes() for array in arrays)])


def decode_images(pixels: memoryview, dtype: str, sizes: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """The images behind the header line, as arrays of shape `[H, W, 3]` that are views of `pixels`, which they must fill.

    Example:
        >>> decode_images(memoryview(bytes(range(9))), "uint8", [[1, 1], [2, 1]])[1].tolist()
        [[[3, 4, 5]], [[6, 7, 8]]]
    """
    counts = [3 * math.prod(size) for size in sizes]
    needed = sum(counts) * DTYPES[dtype].itemsize
    if len(pixels) != needed:
        raise ValueError(f"the images must have {needed} bytes, as the header says. Found {len(pixels)}.")
    ends = np.cumsum(counts)
    flat = np.frombuffer(pixels, DTYPES[dtype])
    return [flat[end - count : end].reshape(*size, 3) for count, end, size in zip(counts, ends, sizes, strict=True)]


def json_columns(columns: dict[str, Any], size: int) -> dict[str, list]:
    """The columns among the keywords of a reward call for `size` images: lists with one JSON value per image.

    Example:
        >>> json_columns({"target": ["cat"], "log_metric": print, "seed": 3}, size=1)
        {'target': ['cat']}
    """
    found = {key: list(value) for key, value in columns.items() if is_column(value, size)}
    for key, values in found.items():
        check_column(key, values)
    return found


def check_column(name: str, values: Iterable[Any]) -> None:
    """Raise ValueError for a value that JSON does not carry as it is, such as a picture, a date or NaN."""
    for row, value in enumerate(values):
        try:
            same = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError, RecursionError):
            same = False
        if not same:
            raise ValueError(
                f"The column `{name}` must hold JSON values to reach a reward server. Found {reprlib.repr(value)} "
                f"({type(value).__name__}) in row {row}. Convert it, or name in `columns` of RemoteReward the columns "
                "that this reward needs."
            )
