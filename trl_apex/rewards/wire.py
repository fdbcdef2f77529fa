"""How images and prompts travel between a trainer and a reward server, without loss and without pickle.

A request is `multipart/form-data` with a JSON part `metadata` and either one part `images` per image (PNG or WebP) or a
single part `tensor` with the raw little-endian bytes of all images, whose type and shape `metadata` declares.
"""

import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trl_apex.rewards.images import to_arrays
from trl_apex.rewards.protocol import Images

PROTOCOL = 1
DTYPES: dict[str, np.dtype] = {"uint8": np.dtype("u1"), "float32": np.dtype("<f4")}
Part = tuple[str, tuple[str, bytes, str]]


def encode_request(
    prompts: Sequence[str], images: Images, columns: dict[str, list], as_uint8: bool = False
) -> list[Part]:
    """The parts of a request.

    Float tensors travel as float32, so that the server sees the very numbers; pictures of one size as uint8, others as
    PNG files. All three are lossless for RGB.

    Args:
        prompts (`Sequence[str]`): One prompt per image.
        images (`Sequence[PIL.Image.Image]` or `Tensor` of shape `[B, 3, H, W]`): The images.
        columns (`dict[str, list]`): Further columns, of JSON values.
        as_uint8 (`bool`, *optional*, defaults to `False`): Send float tensors as bytes, a quarter of the size.

    Returns:
        `list` of `(name, (file name, data, content type))`, as httpx takes for `files`.

    Example:

    ```python
    >>> import torch
    >>> from trl_apex.rewards.wire import encode_request
    >>> parts = encode_request(["a cat"], torch.zeros(1, 3, 2, 2), {})
    >>> parts[0][1][1].decode()
    '{"prompts": ["a cat"], "columns": {}, "tensor": {"dtype": "float32", "shape": [1, 3, 2, 2]}}'
    >>> len(parts[1][1][1])
    48

    ```
    """
    metadata: dict[str, Any] = {"prompts": list(prompts), "columns": columns}
    if isinstance(images, Tensor) and images.is_floating_point() and not as_uint8:
        array = images.detach().to("cpu", torch.float32).contiguous().numpy().astype(DTYPES["float32"], copy=False)
        return _tensor_parts(metadata, array, "float32")
    arrays = to_arrays(images)
    if len({array.shape for array in arrays}) == 1:
        return _tensor_parts(metadata, np.stack(arrays).transpose(0, 3, 1, 2), "uint8")
    files: list[Part] = []
    for i, array in enumerate(arrays):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, format="PNG", compress_level=1)
        files.append(("images", (f"{i}.png", buffer.getvalue(), "image/png")))
    return [_metadata_part(metadata), *files]


def decode_tensor(data: bytes, dtype: str, shape: Sequence[int]) -> Tensor:
    """The images of a `tensor` part.

    Args:
        data (`bytes`): The raw bytes.
        dtype (`str`): `"uint8"` or `"float32"`.
        shape (`Sequence[int]`): `[B, 3, H, W]`.

    Returns:
        `Tensor` of shape `[B, 3, H, W]`, of that type.

    Raises:
        ValueError: If the bytes do not fill the shape, or the type is another.

    Example:

    ```python
    >>> from trl_apex.rewards.wire import decode_tensor
    >>> decode_tensor(bytes(range(12)), "uint8", [1, 3, 2, 2])[0, 2].tolist()
    [[8, 9], [10, 11]]

    ```
    """
    if dtype not in DTYPES or len(shape) != 4 or shape[1] != 3 or min(shape) < 1:
        raise ValueError(
            f"`tensor` must be uint8 or float32 of shape [B, 3, H, W]. Found {dtype} of {list(shape)}. Declare its form."
        )
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if len(data) != expected:
        raise ValueError(
            f"`tensor` must hold {expected} bytes for {dtype} of shape {list(shape)}. Found {len(data)}. "
            "Send the whole array, row by row."
        )
    # A copy, since the bytes are read-only; astype to this machine's byte order.
    array = np.frombuffer(data, DTYPES[dtype]).reshape(tuple(shape))
    return torch.from_numpy(array.astype(DTYPES[dtype].newbyteorder("=")))


def json_columns(columns: dict[str, Any], size: int) -> dict[str, list]:
    """The columns that can travel: lists with one JSON value per sample.

    Args:
        columns (`dict[str, Any]`): All keywords of a reward call.
        size (`int`): Samples in the batch.

    Returns:
        `dict[str, list]`.

    Example:

    ```python
    >>> from trl_apex.rewards.wire import json_columns
    >>> json_columns({"target": ["cat"], "log_metric": print, "photo": [object()], "seed": 3}, size=1)
    {'target': ['cat']}

    ```
    """
    return {
        key: list(value)
        for key, value in columns.items()
        if isinstance(value, (list, tuple)) and len(value) == size and _is_json(list(value))
    }


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _metadata_part(metadata: dict[str, Any]) -> Part:
    return ("metadata", ("metadata.json", json.dumps(metadata, allow_nan=False).encode(), "application/json"))


def _tensor_parts(metadata: dict[str, Any], array: np.ndarray, dtype: str) -> list[Part]:
    metadata = metadata | {"tensor": {"dtype": dtype, "shape": list(array.shape)}}
    return [_metadata_part(metadata), ("tensor", ("tensor.bin", array.tobytes(), "application/octet-stream"))]
