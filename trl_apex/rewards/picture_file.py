"""Open PNG and WebP files that strangers send."""

import io
import struct
import warnings

from PIL import Image

PNG = b"\x89PNG\r\n\x1a\n"


def declared_size(data: bytes) -> tuple[str, int, int]:
    """Format, width and height that a file's first bytes declare, read before any decoder sees the file.

    Args:
        data (`bytes`): The file.

    Returns:
        `tuple[str, int, int]`: `"PNG"` or `"WEBP"`, width and height in pixels.

    Raises:
        ValueError: If the file is neither.

    Example:

    ```python
    >>> import io
    >>> from PIL import Image
    >>> from trl_apex.rewards.picture_file import declared_size
    >>> Image.new("RGB", (30, 20)).save(file := io.BytesIO(), format="PNG")
    >>> declared_size(file.getvalue())
    ('PNG', 30, 20)

    ```
    """
    if data[:8] == PNG and data[12:16] == b"IHDR" and len(data) >= 24:
        return "PNG", *struct.unpack(">II", data[16:24])
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        kind = data[12:16]
        if kind == b"VP8X":
            return "WEBP", 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
        if kind == b"VP8L" and data[20] == 0x2F:
            bits = int.from_bytes(data[21:25], "little")
            return "WEBP", 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
            width, height = struct.unpack("<HH", data[26:30])
            return "WEBP", width & 0x3FFF, height & 0x3FFF
    raise ValueError("an image must be a PNG or WebP file. Found another kind of data. Send one of the two.")


def open_picture(data: bytes, max_pixels: int) -> Image.Image:
    """Decode a file to RGB.

    Args:
        data (`bytes`): A PNG or WebP file.
        max_pixels (`int`): Largest width times height.

    Returns:
        `PIL.Image.Image` in RGB.

    Raises:
        ValueError: If the file is of another kind, too large or broken.
    """
    kind, width, height = declared_size(data)
    if not 0 < width * height <= max_pixels:
        raise ValueError(
            f"an image must have at most {max_pixels} pixels. Found {width} x {height}. Send a smaller one."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's remarks on odd files, which are a stranger's
            with Image.open(io.BytesIO(data), formats=[kind]) as image:
                if image.size != (width, height):
                    raise ValueError("the header does not match the data")
                image.load()
                return image.convert("RGB")
    except Exception as error:  # decoders of hostile bytes fail in many ways
        raise ValueError(
            f"an image must be a whole {kind} file. Found a broken one ({type(error).__name__}). Send it again."
        ) from error
