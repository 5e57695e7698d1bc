"""Sounds through soundfile, which is imported where one is read; resampled by scipy."""

from __future__ import annotations

import io
import math
from types import ModuleType

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.signal import resample_poly

from smidgen.common.errors import DataError
from smidgen.data.media.media_file import MediaFile

Sound = NDArray[np.float32]


class ResampledWarning(UserWarning):
    """Sounds are at another rate than the model's, and are resampled to it."""


def soundfile() -> ModuleType:
    """The module soundfile. Raises DataError if it is not installed."""
    try:
        import soundfile as module
    except ImportError as error:
        raise DataError("sounds are read with soundfile: pip install 'smidgen[audio]'") from error
    found: ModuleType = module
    return found


def sound_header(file: MediaFile) -> tuple[int, int]:
    """Samples for each channel, and samples a second. Raises DataError, naming the file, if it holds no sound."""
    module = soundfile()
    data = file.read_bytes()
    try:
        found = module.info(io.BytesIO(data))
    except (RuntimeError, TypeError) as error:
        raise _broken(file, error) from None
    if not found.frames:
        raise DataError(f"the sound {file.name} is empty; mend or remove it")
    return int(found.frames), int(found.samplerate)


def read_sound(file: MediaFile, rate: int) -> Sound:
    """The mean of all channels, float32 (samples,), at `rate` samples a second.

    Raises:
        DataError: the file cannot be read; it is named.
    """
    module = soundfile()
    data = file.read_bytes()
    try:
        values, own = module.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except (RuntimeError, TypeError) as error:
        raise _broken(file, error) from None
    return resampled(values.mean(1), int(own), rate)


def resampled(values: Sound, rate: int, wanted: int) -> Sound:
    """Sound (samples,) at another rate, by a polyphase filter; as it is where the rates are equal."""
    if rate == wanted:
        return values
    common = math.gcd(rate, wanted)
    found: Sound = resample_poly(values, wanted // common, rate // common).astype(np.float32)
    return found


def as_wav(values: ArrayLike, rate: int) -> bytes:
    """Sound (samples,) or (samples, channels) as a .wav file of float32."""
    buffer = io.BytesIO()
    soundfile().write(buffer, np.asarray(values, np.float32), rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def _broken(file: MediaFile, error: Exception) -> DataError:
    said = " ".join(str(error).split()).rpartition(": ")[2] or type(error).__name__
    return DataError(f"cannot read the sound {file.name}: {said}; mend or remove it")
