"""Images through Pillow, which is imported where one is read."""

from __future__ import annotations

import io
from types import ModuleType
from typing import TYPE_CHECKING

from smidgen.common.errors import DataError
from smidgen.data.media.media_file import MediaFile

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of so many channels


def pillow() -> ModuleType:
    """Pillow's module Image. Raises DataError if it is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("images are read with Pillow: pip install 'smidgen[image]'") from error
    return Image


def open_image(file: MediaFile, channels: int = 3) -> Image:
    """The decoded image, with so many channels. Raises DataError, naming the file, if it cannot be read."""
    image = pillow()
    data = file.read_bytes()
    try:
        with image.open(io.BytesIO(data)) as found:
            decoded: Image = found.convert(MODES[channels])
            return decoded
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
        raise _broken(file, error) from None


def check_header(file: MediaFile) -> None:
    """Raises DataError, naming the file, if it does not begin as an image does."""
    image = pillow()
    data = file.read_bytes()
    try:
        image.open(io.BytesIO(data)).close()
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
        raise _broken(file, error) from None


def _broken(file: MediaFile, error: Exception) -> DataError:
    said = " ".join(str(error).split()) or type(error).__name__
    if "cannot identify" in said:
        said = "no image format that Pillow knows"
    return DataError(f"cannot read the image {file.name}: {said}; mend or remove it")


def as_png(values: object) -> bytes:
    """An array of bytes (H, W) or (H, W, C), or an image of Pillow's, as a PNG file."""
    found = values if hasattr(values, "save") else pillow().fromarray(values)
    buffer = io.BytesIO()
    found.save(buffer, "PNG")
    return buffer.getvalue()
