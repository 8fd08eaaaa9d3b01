"""Reading an image: every format and mode to the pixels one expects, and broken files named, not fatal."""

import os
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

from ssl_vit.data.dataset import UnreadableImageError
from ssl_vit.data.sources import decode as decoding
from ssl_vit.data.sources.decode import MAX_PIXELS, decode

pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:PIL\.", "ignore::PIL.Image.DecompressionBombWarning")

RNG = np.random.default_rng(0)
RED, GRAY, WHITE = (200, 30, 40), (90, 90, 90), (255, 255, 255)


def smooth(height=24, width=40, channels=3):
    """An image that lossy formats keep nearly as it is."""
    y, x = np.mgrid[:height, :width]
    planes = [x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)]
    return np.stack(planes[:channels], axis=-1).round().astype(np.uint8)


def hwc(image):
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("ending", "options", "tolerance"),
    [
        ("jpg", {"quality": 95, "subsampling": 0}, 4),
        ("png", {}, 0),
        ("webp", {"lossless": True}, 0),
        ("webp", {"quality": 95}, 12),
        ("bmp", {}, 0),
        ("tif", {}, 0),
        ("tiff", {"compression": "tiff_lzw"}, 0),
        ("ppm", {}, 0),
    ],
)
def test_decode_reads_every_format(tmp_path, ending, options, tolerance):
    pixels = smooth()
    Image.fromarray(pixels).save(tmp_path / f"a.{ending}", **options)
    image = decode(tmp_path / f"a.{ending}")
    assert image.shape == (3, 24, 40)
    assert image.dtype == torch.uint8
    assert np.abs(hwc(image).astype(int) - pixels).max() <= tolerance


def test_decode_reads_the_first_frame_of_a_gif(tmp_path):
    frames = [Image.new("RGB", (6, 5), color) for color in (RED, GRAY)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (hwc(decode(tmp_path / "a.gif")) == RED).all()


def in_mode(mode):
    """An image 8 x 8 of one color in a mode, and the RGB one expects: transparency lies on white."""
    half_on_white = tuple(round(c * 128 / 255 + 255 * 127 / 255) for c in RED)
    if mode == "P":
        return Image.new("RGB", (8, 8), RED).convert("P", palette=Image.Palette.ADAPTIVE), RED
    made = {
        "1": (1, WHITE),
        "L": (90, GRAY),
        "LA": ((90, 255), GRAY),
        "RGB": (RED, RED),
        "RGBA": ((*RED, 128), half_on_white),
        "CMYK": ((0, 0, 0, 255), (0, 0, 0)),
    }
    color, expected = made[mode]
    return Image.new(mode, (8, 8), color), expected


@pytest.mark.parametrize(
    ("mode", "ending"),
    [
        *[("1", e) for e in ("png", "bmp", "tif", "gif")],
        *[("L", e) for e in ("png", "bmp", "tif", "gif", "jpg", "webp", "pgm")],
        *[("LA", e) for e in ("png", "tif")],
        *[("P", e) for e in ("png", "bmp", "tif", "gif")],
        *[("RGBA", e) for e in ("png", "tif", "webp")],
        *[("CMYK", e) for e in ("jpg", "tif")],
    ],
)
def test_decode_reads_every_mode(tmp_path, mode, ending):
    image, expected = in_mode(mode)
    options = {"lossless": True} if ending == "webp" else {}
    image.save(tmp_path / f"a.{ending}", **options)
    rgb = hwc(decode(tmp_path / f"a.{ending}")).astype(int)
    assert np.abs(rgb - expected).max() <= 1
    gray = decode(tmp_path / f"a.{ending}", channels=1)
    luma = np.dot(expected, (0.299, 0.587, 0.114))
    assert gray.shape == (1, 8, 8)
    assert np.abs(gray.numpy().astype(int) - luma).max() <= 1


def test_decode_composites_transparent_pixels_on_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2] = (*RED, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).convert("P").save(tmp_path / "p.png", transparency=0)
    rgb = hwc(decode(tmp_path / "a.png"))
    assert (rgb[:2] == RED).all()
    assert (rgb[2:] == 255).all()
    assert (hwc(decode(tmp_path / "p.png"))[2:] == 255).all()


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_decode_rescales_sixteen_bits_from_their_own_range(tmp_path, ending):
    values = np.linspace(1000, 5095, 64).round().astype(np.uint16).reshape(8, 8)  # 12 bits, as a scanner gives them
    Image.fromarray(values).save(tmp_path / f"a.{ending}")
    expected = np.linspace(0, 255, 64).reshape(8, 8)
    for plane in decode(tmp_path / f"a.{ending}").numpy():
        assert np.abs(plane - expected).max() <= 1
    assert decode(tmp_path / f"a.{ending}", channels=1).shape == (1, 8, 8)


def test_decode_rescales_floats_and_makes_nan_black(tmp_path):
    values = np.array([[-1, 0, 1], [np.nan, np.inf, 0.5]], np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert decode(tmp_path / "a.tif", channels=1)[0].tolist() == [[0, 128, 255], [0, 0, 191]]
    Image.fromarray(np.full((3, 3), 7, np.int32)).save(tmp_path / "flat.tif")
    assert (decode(tmp_path / "flat.tif") == 0).all()


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_applies_the_exif_orientation(tmp_path, ending, orientation):
    upright = smooth(16, 32)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"a.{ending}", exif=exif, quality=95)
    image = hwc(decode(tmp_path / f"a.{ending}"))
    assert image.shape == upright.shape
    assert np.abs(image.astype(int) - upright).mean() < 4


def test_decode_ignores_damaged_exif_data(tmp_path):
    Image.fromarray(smooth()).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0nonsense")
    assert decode(tmp_path / "a.jpg").shape == (3, 24, 40)


def test_decode_identifies_the_format_by_content(tmp_path):
    Image.fromarray(smooth()).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.JPG")
    assert np.array_equal(hwc(decode(tmp_path / "a.JPG")), smooth())


def bomb_png(width, height):
    """A PNG whose header promises many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def cut(pixels, path, share):
    Image.fromarray(pixels).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def test_decode_names_unreadable_files_and_the_reason(tmp_path):
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("this is no image")
    (tmp_path / "bomb.png").write_bytes(bomb_png(9460, 9460))  # above the limit by a little: Pillow only warns
    (tmp_path / "large_bomb.png").write_bytes(bomb_png(60_000, 60_000))
    (tmp_path / "folder.png").mkdir()
    for ending in ("jpg", "png", "webp", "bmp", "tif", "gif"):
        cut(noise, tmp_path / f"cut.{ending}", 0.6)
    expected = {
        "empty.jpg": "empty",
        "text.jpg": "none of JPEG, PNG",
        "bomb.png": f"more than {MAX_PIXELS:,} pixels",
        "large_bomb.png": f"more than {MAX_PIXELS:,} pixels",
        "missing.png": "No such file",
        "folder.png": "directory",
        **{f"cut.{ending}": "" for ending in ("jpg", "png", "webp", "bmp", "tif", "gif")},
    }
    for name, part in expected.items():
        with pytest.raises(UnreadableImageError) as caught:
            decode(tmp_path / name)
        assert part in caught.value.reason
        assert caught.value.reason
        assert "\n" not in caught.value.reason
        assert caught.value.name == str(tmp_path / name)


def test_decode_of_damaged_bytes_raises_no_other_error(tmp_path):
    rng = np.random.default_rng(1)
    broken = 0
    for ending in ("jpg", "webp", "bmp", "tif", "gif", "ppm"):
        Image.fromarray(smooth()).save(tmp_path / f"a.{ending}")
        content = np.fromfile(tmp_path / f"a.{ending}", np.uint8)
        for _ in range(60):
            damaged = content.copy()
            damaged[rng.integers(0, min(len(content), 200), 4)] = rng.integers(0, 256, 4)
            damaged.tofile(tmp_path / f"b.{ending}")
            try:
                assert decode(tmp_path / f"b.{ending}").dtype == torch.uint8
            except UnreadableImageError:
                broken += 1
    assert broken > 50


def test_decode_reads_files_of_any_name(tmp_path):
    names = [
        "with space.png",
        "new\nline.png",
        "\N{SNOWMAN}\N{GRINNING FACE}.png",
        os.fsdecode(b"caf\xe9.png"),
        "=,[].png",
    ]
    for name in names:
        Image.new("RGB", (3, 2), RED).save(tmp_path / "plain.png")
        (tmp_path / "plain.png").rename(tmp_path / name)
        assert decode(tmp_path / name).shape == (3, 2, 3)
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UnreadableImageError) as caught:
            decode(tmp_path / name)
        assert str(caught.value).encode()
        assert "\n" not in str(caught.value)


def test_decode_leaves_pillows_settings_unchanged(tmp_path):
    before = Image.MAX_IMAGE_PIXELS, decoding.ImageFile.LOAD_TRUNCATED_IMAGES
    Image.new("L", (3, 2)).save(tmp_path / "a.png")
    decode(tmp_path / "a.png")
    assert before == (Image.MAX_IMAGE_PIXELS, decoding.ImageFile.LOAD_TRUNCATED_IMAGES)


# --- decoded smaller -------------------------------------------------------------------------------------------


def averaged(image, by):
    """The means of squares of so many pixels."""
    return avg_pool2d(image.float(), by, ceil_mode=True)


def photograph(photos, *, side=(256, 384)):
    """A real one, of this height and width."""
    return Image.open(sorted(photos.iterdir())[3]).convert("RGB").resize(side[::-1], Image.Resampling.BICUBIC)


def with_orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


KINDS = {
    "plain": ("RGB", {}),
    "progressive": ("RGB", {"progressive": True}),
    "full color": ("RGB", {"subsampling": 0}),
    "gray": ("L", {}),
    "cmyk": ("CMYK", {}),
    **{f"orientation {value}": ("RGB", {"exif": with_orientation(value)}) for value in range(2, 9)},
}


@pytest.mark.parametrize("by", [2, 4, 8])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_decode_of_a_scaled_jpeg_averages_its_pixels(photos, kind, channels, by):
    mode, options = KINDS[kind]
    photograph(photos).convert(mode).save(file := BytesIO(), "JPEG", quality=92, **options)
    asked = []
    smaller = decode(file, channels, lambda *sides: asked.append(sides) or by)
    whole = decode(file, channels)
    assert asked == [tuple(whole.shape[1:])]
    assert smaller.shape == (channels, whole.shape[1] // by, whole.shape[2] // by)
    difference = (smaller - averaged(whole, by)).abs()
    assert difference.mean() < 1
    assert difference.flatten().quantile(0.999) < 8
    assert torch.equal(decode(file, channels, lambda height, width: 1), whole)


def test_decode_of_a_scaled_jpeg_rounds_sides_up(photos, tmp_path):
    photograph(photos, side=(123, 205)).save(tmp_path / "a.jpg", quality=92)
    whole = decode(tmp_path / "a.jpg")
    for by in (2, 4, 8):
        smaller = decode(tmp_path / "a.jpg", 3, lambda height, width, by=by: by)
        assert smaller.shape == (3, -(-123 // by), -(-205 // by))
        inner = slice(0, 123 // by - 1), slice(0, 205 // by - 1)
        assert (smaller - averaged(whole, by)).abs()[:, *inner].mean() < 1


def test_decode_does_not_scale_rotated_jpegs_of_incomplete_blocks(photos, tmp_path):
    photograph(photos, side=(120, 205)).save(tmp_path / "a.jpg", exif=with_orientation(6))
    assert decode(tmp_path / "a.jpg", 3, lambda height, width: pytest.fail("asked")).shape == (3, 205, 120)


@pytest.mark.parametrize("ending", ["png", "webp", "bmp", "tif", "gif", "ppm"])
def test_decode_scales_no_other_format(tmp_path, ending):
    Image.fromarray(smooth(64, 64)).save(tmp_path / f"a.{ending}")
    assert decode(tmp_path / f"a.{ending}", 3, lambda height, width: pytest.fail("asked")).shape == (3, 64, 64)


def test_decode_reads_the_first_image_of_a_multi_picture_jpeg(photos, tmp_path):
    """As telephones write them: behind the photograph a preview or a map of depths."""
    first = photograph(photos)
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", first.size)])
    smaller = decode(tmp_path / "a.jpg", 3, lambda height, width: 4)
    assert smaller.shape == (3, 64, 96)
    assert (smaller - averaged(decode(tmp_path / "a.jpg"), 4)).abs().mean() < 1


def test_decode_refuses_a_damaged_jpeg_at_any_scale(photos, tmp_path):
    cut(np.asarray(photograph(photos)), tmp_path / "a.jpg", 0.5)
    for by in (1, 2, 4, 8):
        with pytest.raises(UnreadableImageError, match="truncated"):
            decode(tmp_path / "a.jpg", 3, lambda height, width, by=by: by)
