"""Pictures that cost as much to decode as photographs, for measuring where there are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

WIDTH, HEIGHT = 500, 375  # pixels
_TEXTURE = 1024  # pixels; pictures are cut out of it
_QUALITY = 88  # of the JPEG files: about 110 kB each, as those of ImageNet


def make_photos(folder: Path, *, pictures: int, seed: int) -> None:
    """Write `NNNN.jpg` into `folder`: colours with the power spectrum of natural images, amplitude 1/frequency."""
    rng = np.random.default_rng(seed)
    texture = _texture(rng)
    for number in range(pictures):
        top, left = rng.integers(_TEXTURE - HEIGHT), rng.integers(_TEXTURE - WIDTH)
        picture = texture[top : top + HEIGHT, left : left + WIDTH, rng.permutation(3)]
        Image.fromarray(picture).save(folder / f"{number:04d}.jpg", quality=_QUALITY)


def _texture(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """RGB (1024, 1024, 3)."""
    frequency = np.hypot(np.fft.fftfreq(_TEXTURE)[:, None], np.fft.rfftfreq(_TEXTURE)[None])
    amplitude = 1 / np.maximum(frequency, 1 / _TEXTURE)
    shape = (3, *amplitude.shape)
    waves = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) * amplitude
    light, warm, green = (plane / plane.std() for plane in np.fft.irfft2(waves, s=(_TEXTURE, _TEXTURE)))
    colours = np.stack([light + 0.4 * warm, light + 0.2 * green, light - 0.4 * warm], axis=-1)
    return np.clip(127.5 + 55 * colours, 0, 255).astype(np.uint8)
