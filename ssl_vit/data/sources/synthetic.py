"""Synthetic images: patterned objects on smooth backgrounds, with classes and object masks, and noise photos.

The twelve classes are four hues times three patterns. Position, size, outline, angle, second color and background are
independent of the class, so raw pixels and mean colors classify poorly. Light from above shows the orientation.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

HUES = {"red": 0.0, "yellow": 0.14, "green": 0.36, "blue": 0.62}  # fractions of the color circle
PATTERNS = ("stripes", "dots", "blotches")
CLASSES = tuple(f"{hue}-{pattern}" for hue in HUES for pattern in PATTERNS)
SIDE = 48  # pixels
_CHUNK = 250  # images rendered at once
_WAVES = 5  # plane waves per blotch pattern

Array = npt.NDArray[np.floating]


def make_synthetic_dataset(folder: Path, *, num_images: int, seed: int) -> None:
    """Write `train/<class>/NNNN.png`, `test/<class>/NNNN.png` and `test_masks/<class>/NNNN.png` into `folder`.

    A fifth of the images are test images. Masks are 255 on the object and 0 elsewhere and have their images' names.
    The same seed and number of images give the same pixels.
    """
    rng = np.random.default_rng(seed)
    _write(num_images - num_images // 5, rng, folder / "train", masks=None)
    _write(num_images // 5, rng, folder / "test", masks=folder / "test_masks")


def _write(count: int, rng: np.random.Generator, folder: Path, masks: Path | None) -> None:
    for name in CLASSES:
        for kind in filter(None, (folder, masks)):
            (kind / name).mkdir(parents=True, exist_ok=True)
    for start in range(0, count, _CHUNK):
        numbers = np.arange(start, min(start + _CHUNK, count))
        for number, image, mask in zip(numbers, *render(numbers % len(CLASSES), rng), strict=True):
            name = f"{CLASSES[number % len(CLASSES)]}/{number // len(CLASSES):04d}.png"
            Image.fromarray(image).save(folder / name, compress_level=1)
            if masks:
                Image.fromarray(mask).save(masks / name, compress_level=1)


def render(
    labels: npt.NDArray[np.int64], rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Render images (N, 48, 48, 3) of the classes `labels` (N,), and their object masks (N, 48, 48), 0 or 255."""
    count = len(labels)
    middle = (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE
    radius = _uniform(rng, count, 0.24, 0.40)
    x = middle[None, None, :] - _uniform(rng, count, 0.2, 0.8)  # (N, 1, S): relative to the object's center
    y = middle[None, :, None] - _uniform(rng, count, 0.2, 0.8)  # (N, S, 1)
    depth = _outline(x, y, radius, rng)  # (N, S, S): 1 at the center, 0 on the outline, negative outside
    inside = np.clip(depth * radius * SIDE + 0.5, 0, 1)[..., None]  # soft over one pixel

    second_color_weight = _pattern(x * SIDE, y * SIDE, labels % len(PATTERNS), rng)[..., None]
    color, second_color = _colors(labels // len(PATTERNS), rng)  # (N, 1, 1, 3) each
    above = np.clip(-y / radius, -1, 1)[..., None]
    shading = 0.62 + 0.3 * above + 0.38 * np.sqrt(np.clip(depth, 0, 1))[..., None]  # a convex object, lit from above
    surface = (color + (second_color - color) * second_color_weight) * shading

    lowered = np.concatenate([depth[:, :1], depth[:, :1], depth[:, :1], depth[:, :-3]], axis=1)
    shadow = 1 - 0.45 * np.clip(1 + lowered * radius * 14, 0, 1)[..., None]
    image = _background(count, rng) * shadow * (1 - inside) + surface * inside
    image += rng.standard_normal(image.shape, dtype=np.float32) * _uniform(rng, count, 0.01, 0.05)[..., None]
    pixels = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
    return pixels, (inside[..., 0] > 0.5).astype(np.uint8) * np.uint8(255)


def _uniform(rng: np.random.Generator, count: int, low: float, high: float) -> Array:
    """Sample one number per image, (N, 1, 1)."""
    return rng.uniform(low, high, (count, 1, 1)).astype(np.float32)


def _outline(x: Array, y: Array, radius: Array, rng: np.random.Generator) -> Array:
    """Return the depth of pixels in a lobed ellipse (N, S, S): 1 at the center, 0 on the outline, negative outside."""
    count = len(radius)
    u, v = _rotate(x, y, _uniform(rng, count, 0, 2 * np.pi))
    stretch = np.exp(_uniform(rng, count, -0.2, 0.2))
    u, v = u * stretch, v / stretch
    angle = np.arctan2(v, u)
    lobes = np.ones_like(angle)
    for waves in (2, 3, 5):
        lobes += _uniform(rng, count, 0, 0.3 / waves) * np.cos(waves * angle + _uniform(rng, count, 0, 2 * np.pi))
    return 1 - np.hypot(u, v) / (radius * lobes)


def _pattern(x: Array, y: Array, patterns: npt.NDArray[np.int64], rng: np.random.Generator) -> Array:
    """Return the weight of the second color (N, S, S) in [0, 1], soft over about a pixel; x and y in pixels."""
    count = len(patterns)
    period = _uniform(rng, count, 6, 9)
    u, v = _rotate(x, y, _uniform(rng, count, 0, 2 * np.pi))
    u = 2 * np.pi * (u / period + _uniform(rng, count, 0, 1))
    v = 2 * np.pi * (v / period + _uniform(rng, count, 0, 1))
    stripes = np.sin(u)
    dots = np.cos(u) + np.cos(v) - 0.9
    direction = rng.uniform(0, 2 * np.pi, (count, _WAVES, 1, 1)).astype(np.float32)
    phase = rng.uniform(0, 2 * np.pi, (count, _WAVES, 1, 1)).astype(np.float32)
    wave = (x[:, None] * np.cos(direction) + y[:, None] * np.sin(direction)) * (2 * np.pi / 3 / period[:, None])
    blotches = np.cos(wave + phase).sum(axis=1) + 0.5
    values = np.choose(patterns[:, None, None], [stripes, dots, blotches])
    return np.clip(0.5 + values * 1.5, 0, 1)


def _rotate(x: Array, y: Array, angle: Array) -> tuple[Array, Array]:
    """Rotate the coordinate axes by `angle`; return coordinates (N, S, S) each."""
    cos, sin = np.cos(angle), np.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def _colors(hues: npt.NDArray[np.int64], rng: np.random.Generator) -> tuple[Array, Array]:
    """Sample the object's color and a darker or lighter second color, RGB (N, 1, 1, 3) each."""
    count = len(hues)
    hue = np.array(list(HUES.values()), np.float32)[hues][:, None, None] + _uniform(rng, count, -0.035, 0.035)
    saturation, value = _uniform(rng, count, 0.6, 0.95), _uniform(rng, count, 0.65, 1.0)
    dark = rng.random((count, 1, 1)) < 0.5
    tone_saturation = np.where(dark, saturation, saturation * _uniform(rng, count, 0.0, 0.15))
    tone_value = np.where(dark, value * _uniform(rng, count, 0.05, 0.25), 1)
    return _rgb(hue, saturation, value), _rgb(hue, tone_saturation, tone_value)


def _rgb(hue: Array, saturation: Array, value: Array) -> Array:
    """RGB in a new last axis; hue in turns."""
    sector = (np.array([5, 3, 1], np.float32) + 6 * hue[..., None]) % 6
    rgb: Array = value[..., None] * (1 - saturation[..., None] * np.clip(np.minimum(sector, 4 - sector), 0, 1))
    return rgb


def _background(count: int, rng: np.random.Generator) -> Array:
    """Smooth random colors (N, S, S, 3), brighter above than below."""
    knots = rng.random((count, 4, 4, 3), dtype=np.float32)
    bicubic = np.asarray(Image.fromarray(np.eye(4, dtype=np.float32)).resize((4, SIDE), Image.Resampling.BICUBIC))
    colors: Array = np.einsum("yi,nijc,xj->nyxc", bicubic, knots, bicubic, optimize=True)
    colors = np.clip(0.5 + 1.3 * (colors - 0.5), 0, 1) * np.linspace(1.2, 0.8, SIDE, dtype=np.float32)[:, None, None]
    return colors


WIDTH, HEIGHT = 500, 375  # pixels
_TEXTURE = 1024  # pixels; photos are crops of it
_QUALITY = 88  # of the JPEG files: about 110 kB each, as those of ImageNet


def make_synthetic_photos(folder: Path, *, num_images: int, seed: int) -> None:
    """Write `NNNN.jpg` into `folder`: color noise with the spectrum of natural images, amplitude 1 / frequency."""
    rng = np.random.default_rng(seed)
    texture = _texture(rng)
    for number in range(num_images):
        top, left = rng.integers(_TEXTURE - HEIGHT), rng.integers(_TEXTURE - WIDTH)
        crop = texture[top : top + HEIGHT, left : left + WIDTH, rng.permutation(3)]
        Image.fromarray(crop).save(folder / f"{number:04d}.jpg", quality=_QUALITY)


def _texture(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Sample an RGB texture (1024, 1024, 3)."""
    frequency = np.hypot(np.fft.fftfreq(_TEXTURE)[:, None], np.fft.rfftfreq(_TEXTURE)[None])
    amplitude = 1 / np.maximum(frequency, 1 / _TEXTURE)
    shape = (3, *amplitude.shape)
    waves = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) * amplitude
    light, warm, green = (plane / plane.std() for plane in np.fft.irfft2(waves, s=(_TEXTURE, _TEXTURE)))
    colors = np.stack([light + 0.4 * warm, light + 0.2 * green, light - 0.4 * warm], axis=-1)
    return np.clip(127.5 + 55 * colors, 0, 255).astype(np.uint8)
