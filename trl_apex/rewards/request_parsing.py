"""From the bytes of a request to a job, with every bound checked on the way."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException, Request
from PIL import Image
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from torch import Tensor

from trl_apex.rewards.limits import Limits, MemoryShare, OutOfMemoryBudget
from trl_apex.rewards.picture_file import declared_size, open_picture
from trl_apex.rewards.request_schema import RewardMetadata
from trl_apex.rewards.wire import DTYPES, decode_tensor


class _InMemoryParser(MultiPartParser):
    """Keeps parts in memory, where the memory budget counts them, instead of in temporary files."""

    spool_max_size = 2**62


@dataclass(frozen=True)
class ParsedRequest:
    """A request's samples.

    Args:
        metadata ([`RewardMetadata`]): Prompts and columns.
        images (`list[PIL.Image.Image | str]` or `Tensor` of shape `[B, 3, H, W]`): Pictures, or for a broken one the
            cause; or floats.
    """

    metadata: RewardMetadata
    images: "list[Image.Image | str] | Tensor"


async def parse_request(request: Request, limits: Limits) -> ParsedRequest:
    """Read and check a scoring request.

    Args:
        request (`Request`): The request, its body not yet read.
        limits ([`Limits`]): The bounds.

    Returns:
        [`ParsedRequest`].

    Raises:
        HTTPException: 400, 413, 415, 422 or 503 with the cause.
    """
    share: MemoryShare = request.scope["memory_share"]
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise HTTPException(415, "the body must be multipart/form-data")
    files = limits.max_images + 2
    parser = _InMemoryParser(
        request.headers, request.stream(), max_files=files, max_fields=2, max_part_size=limits.max_metadata
    )
    try:
        form = await parser.parse()
    except (MultiPartException, UnicodeError, KeyError, ValueError) as error:
        raise HTTPException(400, f"the body must be well-formed multipart/form-data: {error}") from None
    try:
        parts = form.multi_items()
        metadata = parse_metadata(await _metadata_bytes(parts, limits), limits)
        pictures = [value for key, value in parts if key == "images"]
        tensors = [value for key, value in parts if key == "tensor"]
        if metadata.tensor is not None:
            return ParsedRequest(metadata, await _tensor(metadata, tensors, len(pictures), limits, share))
        if tensors or len(pictures) != len(metadata.prompts):
            raise HTTPException(
                422, f"there must be one part `images` per prompt: {len(metadata.prompts)}, found {len(pictures)}"
            )
        return ParsedRequest(metadata, [await _picture(picture, limits, share) for picture in pictures])
    finally:
        await form.close()


def parse_metadata(data: bytes, limits: Limits) -> RewardMetadata:
    """Check the JSON part.

    Args:
        data (`bytes`): The part.
        limits ([`Limits`]): The bounds.

    Returns:
        [`RewardMetadata`].

    Raises:
        HTTPException: 400 for what is no JSON, 422 for JSON of another form.

    Example:

    ```python
    >>> from trl_apex.rewards.limits import Limits
    >>> from trl_apex.rewards.request_parsing import parse_metadata
    >>> parse_metadata(b'{"prompts": ["a cat"]}', Limits()).prompts
    ['a cat']

    ```
    """
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # half surrogates and infinities end here
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"`metadata` must be JSON: {type(error).__name__}") from None
    try:
        metadata = RewardMetadata.model_validate(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:100]
        raise HTTPException(422, f"`metadata` is not as it must be at `{place}`: {first['msg'][:200]}") from None
    if len(metadata.prompts) > limits.max_images:
        raise HTTPException(413, f"a request must have at most {limits.max_images} images")
    if max(map(len, metadata.prompts)) > limits.max_prompt:
        raise HTTPException(413, f"a prompt must have at most {limits.max_prompt} characters")
    return metadata


async def _metadata_bytes(parts: list[tuple[str, Any]], limits: Limits) -> bytes:
    found = [value for key, value in parts if key == "metadata"]
    unknown = {key for key, _ in parts} - {"metadata", "images", "tensor"}
    if len(found) != 1 or unknown:
        raise HTTPException(422, "the body must have one part `metadata`, and else only `images` or `tensor`")
    if isinstance(found[0], str):
        return found[0].encode("utf-8", "surrogatepass")
    if (found[0].size or 0) > limits.max_metadata:
        raise HTTPException(413, f"`metadata` must have at most {limits.max_metadata} bytes")
    return await found[0].read()


async def _tensor(
    metadata: RewardMetadata, tensors: list[Any], pictures: int, limits: Limits, share: MemoryShare
) -> "list[Image.Image | str] | Tensor":
    assert metadata.tensor is not None
    dtype, shape = metadata.tensor.dtype, metadata.tensor.shape
    if len(tensors) != 1 or pictures or not isinstance(tensors[0], UploadFile):
        raise HTTPException(422, "with `metadata.tensor` there must be one part `tensor`, as a file, and no `images`")
    if min(shape) < 1 or shape[1] != 3:
        raise HTTPException(422, f"`tensor` must have shape [B, 3, H, W], found {shape}")
    if shape[2] * shape[3] > limits.max_pixels:
        raise HTTPException(413, f"an image must have at most {limits.max_pixels} pixels")
    pixels = shape[0] * shape[2] * shape[3]
    if (tensors[0].size or 0) != 3 * pixels * DTYPES[dtype].itemsize:
        raise HTTPException(422, f"`tensor` must hold {3 * pixels * DTYPES[dtype].itemsize} bytes for {shape}")
    _take(share, 2 * (tensors[0].size or 0))
    images = decode_tensor(await tensors[0].read(), dtype, shape)
    if dtype == "float32":
        return images
    return [Image.fromarray(array) for array in images.permute(0, 2, 3, 1).numpy()]


async def _picture(picture: Any, limits: Limits, share: MemoryShare) -> "Image.Image | str":
    if not isinstance(picture, UploadFile):
        return "an image must be sent as a file. Found a plain field. Give the part a file name."
    data = await picture.read()
    try:
        _, width, height = declared_size(data)
        if width * height <= limits.max_pixels:
            _take(share, 4 * width * height)
        return await asyncio.to_thread(open_picture, data, limits.max_pixels)
    except ValueError as error:
        return str(error)


def _take(share: MemoryShare, size: int) -> None:
    try:
        share.take(size)
    except OutOfMemoryBudget:
        raise HTTPException(503, "the server holds too many requests", {"Retry-After": "1"}) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(name)
