"""Masks in every usual coding give the same foreground, and what does not tell it is refused."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ssl_vit.config.visualize import MaskValuesConfig
from ssl_vit.data.annotations.object_masks import MaskFolder, MissingMaskError
from ssl_vit.data.sources.decode import decode
from ssl_vit.runtime.errors import UserError

SIZE = (64, 96)


def scene(index):
    """Return the true mask (H, W) bool: an ellipse and a rectangle."""
    mask = Image.new("L", SIZE[::-1], 0)
    draw = ImageDraw.Draw(mask)
    draw.ellipse((10 + 4 * index, 8 + 2 * index, 45 + 4 * index, 40 + 2 * index), fill=255)
    draw.rectangle((60, 44, 66 + 3 * index, 58), fill=255)
    return np.asarray(mask) > 0


def gray(values):
    return Image.fromarray(np.asarray(values).astype(np.uint8))


def compressed(mask, kind, **options):
    data = io.BytesIO()
    gray(mask * 255).save(data, kind, **options)
    return Image.open(data).convert("L")


def resized(mask, resample):
    small = gray(mask * 255).resize((SIZE[1] * 5 // 2, SIZE[0] * 5 // 2), Image.Resampling.NEAREST)
    return small.resize(SIZE[::-1], resample)


def with_palette(mask, colors):
    image = gray(mask)
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([channel for color in colors for channel in color])
    return image


def with_alpha(color, mask):
    image = color.convert("RGBA")
    image.putalpha(gray(mask * 255))
    return image


def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8))


BINARY = {
    "0/255": lambda m: gray(m * 255),
    "0/1": lambda m: gray(m),
    "0/128": lambda m: gray(m * 128),
    "1/2": lambda m: gray(m + 1),
    "100/200": lambda m: gray(m * 100 + 100),
    "254/255": lambda m: gray(m + 254),
    "1 bit": lambda m: Image.fromarray(m),
    "RGB": lambda m: gray(m * 255).convert("RGB"),
    "red on black": lambda m: Image.fromarray((m[..., None] * np.array([200, 0, 0])).astype(np.uint8)),
    "yellow on blue": lambda m: Image.fromarray(np.where(m[..., None], [250, 250, 0], [0, 0, 99]).astype(np.uint8)),
    "uint16": lambda m: Image.fromarray(m.astype(np.uint16) * 1000),
    "float": lambda m: Image.fromarray(m.astype(np.float32)),
    "palette": lambda m: with_palette(m, [(0, 0, 0), (128, 0, 0)]),
    "palette, black last": lambda m: with_palette(~m, [(200, 0, 0), (0, 0, 0)]),
    "palette, black nowhere": lambda m: with_palette(m, [(0, 0, 250), (200, 0, 0)]),
    "CMYK": lambda m: gray(m * 255).convert("CMYK"),
    "YCbCr": lambda m: gray(m * 255).convert("RGB").convert("YCbCr"),
    "gray palette": lambda m: with_palette(m, [(0, 0, 0), (255, 255, 255)]),
    "gray palette, white first": lambda m: with_palette(~m, [(255, 255, 255), (0, 0, 0)]),
    "alpha, white": lambda m: with_alpha(Image.new("RGB", SIZE[::-1], "white"), m),
    "alpha, black": lambda m: with_alpha(Image.new("RGB", SIZE[::-1]), m),
    "alpha of a photograph": lambda m: with_alpha(photo(), m),
    "alpha and color": lambda m: with_alpha(gray(m * 255), m),
    "opaque": lambda m: with_alpha(gray(m * 255), np.ones(SIZE, bool)),
    "gray and alpha": lambda m: with_alpha(gray(m * 0), m).convert("LA"),
}
SOFT = {
    **{f"PNG of a JPEG, quality {q}": lambda m, q=q: compressed(m, "JPEG", quality=q) for q in (30, 75, 95)},
    **{f"PNG of a WebP, quality {q}": lambda m, q=q: compressed(m, "WEBP", quality=q) for q in (20, 75)},
    **{kind: lambda m, kind=kind: resized(m, Image.Resampling[kind]) for kind in ("BILINEAR", "BICUBIC", "LANCZOS")},
    "float": lambda m: Image.fromarray(np.asarray(resized(m, Image.Resampling.BILINEAR), np.float32) / 255),
    "uint16": lambda m: Image.fromarray(np.asarray(resized(m, Image.Resampling.BILINEAR)).astype(np.uint16) * 257),
    "soft alpha": lambda m: with_alpha(photo(), np.asarray(resized(m, Image.Resampling.BICUBIC)) / 255),
}


def iou(one, other):
    return (one & other).sum() / (one | other).sum()


@pytest.mark.parametrize("kind", BINARY)
def test_mask_folder_reads_every_binary_coding_exactly(tmp_path, kind):
    for index in range(4):
        BINARY[kind](scene(index)).save(tmp_path / f"{index}.tiff")
    folder = MaskFolder(tmp_path)
    for index in range(4):
        assert np.array_equal(folder.read(f"{index}.jpg", SIZE).numpy(), scene(index)), index
    without_zero = {"1/2": "2 is", "100/200": "200 is", "254/255": "255 is", "yellow on blue": "2 is"}
    notes = folder.notes()
    assert len(notes) == (kind in without_zero)
    assert all(f"4 masks: {without_zero[kind]} foreground and" in note for note in notes)


@pytest.mark.parametrize("kind", SOFT)
def test_mask_folder_cuts_soft_masks_in_the_middle_and_says_so(tmp_path, kind):
    for index in range(4):
        SOFT[kind](scene(index)).save(tmp_path / f"{index}.tiff")
    folder = MaskFolder(tmp_path)
    for index in range(4):
        assert iou(folder.read(f"{index}.jpg", SIZE).numpy(), scene(index)) > 0.97, index
    assert any("4 masks: more than two values, cut" in note for note in folder.notes())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_mask_folder_takes_transparent_colors_of_a_palette_for_background(tmp_path, order, suffix):
    for index in range(4):
        values = np.where(scene(index), *order)
        image = with_palette(values, [(255, 0, 0), (255, 0, 0)])
        image.save(tmp_path / f"{index}.{suffix}", transparency=order[1])
    folder = MaskFolder(tmp_path)
    for index in range(4):
        assert np.array_equal(folder.read(f"{index}.jpg", SIZE).numpy(), scene(index))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_mask_folder_turns_masks_by_their_exif_orientation_as_images(tmp_path, orientation, suffix):
    image = gray(scene(0) * 255)
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if suffix == "webp" else {"quality": 95} if suffix == "jpg" else {}
    image.save(tmp_path / f"0.{suffix}", exif=exif, **options)
    turned = decode(tmp_path / f"0.{suffix}")[0]
    assert iou(MaskFolder(tmp_path).read("0.bmp", tuple(turned.shape)).numpy(), turned.numpy() > 127) > 0.99


@pytest.mark.parametrize("top", [100, 127, 128, 200, 1023, 4095])
def test_mask_folder_cuts_soft_masks_of_another_white_at_half_of_it(tmp_path, top):
    for index in range(4):
        soft = np.asarray(resized(scene(index), Image.Resampling.BILINEAR), np.float64) / 255
        values = (soft * top).round().astype(np.uint8 if top < 256 else np.uint16)
        Image.fromarray(values).save(tmp_path / f"{index}.png")
    folder = MaskFolder(tmp_path)
    for index in range(4):
        assert iou(folder.read(f"{index}.jpg", SIZE).numpy(), scene(index)) > 0.97


@pytest.mark.parametrize("top", [100, 128, 250])
def test_mask_folder_reads_dark_jpegs_and_refuses_those_that_are_noise(tmp_path, top):
    for index in range(4):
        gray(scene(index) * top).save(tmp_path / f"{index}.jpg")
    folder = MaskFolder(tmp_path)
    for index in range(4):
        assert iou(folder.read(f"{index}.png", SIZE).numpy(), scene(index)) > 0.97
        gray(scene(index)).save(tmp_path / f"{index}.jpg")
    with pytest.raises(UserError, match="save them without losses"):
        MaskFolder(tmp_path).read("0.png", SIZE)


@pytest.mark.parametrize("values", [(0, 85, 170), (0, 100, 200), (0, 70, 90), (0, 64, 128, 192)])
def test_mask_folder_takes_regions_of_any_gray_for_labels(tmp_path, values):
    columns = np.arange(SIZE[1]) * (len(values) - 1) // SIZE[1]
    for index in range(2):
        gray(np.where(scene(index), np.array(values)[1:][columns], 0)).save(tmp_path / f"{index}.png")
        assert np.array_equal(MaskFolder(tmp_path).read(f"{index}.jpg", SIZE).numpy(), scene(index))


@pytest.mark.parametrize("unknown", [70, 127, 128, 200])
def test_mask_folder_refuses_regions_beside_white_and_proposes_both_readings(tmp_path, unknown):
    inner = scene(0) & np.roll(scene(0), 6, 1)
    gray(np.where(inner, 255, np.where(scene(0), unknown, 0))).save(tmp_path / "0.png")
    with pytest.raises(UserError, match=rf"void:\[{unknown}\].*foreground:\[{unknown}, 255\]"):
        MaskFolder(tmp_path).read("0.jpg", SIZE)


def test_mask_folder_refuses_several_colors_in_a_jpeg(tmp_path):
    colors = np.zeros((*SIZE, 3), np.uint8)
    colors[scene(0)] = 200, 0, 0
    Image.fromarray(colors).save(tmp_path / "one.jpg")
    colors[:, 60:][scene(0)[:, 60:]] = 0, 0, 90
    Image.fromarray(colors).save(tmp_path / "0.jpg")
    folder = MaskFolder(tmp_path)
    assert iou(folder.read("one.png", SIZE).numpy(), scene(0)) > 0.97
    with pytest.raises(MissingMaskError, match="several colors"):
        folder.read("0.png", SIZE)


@pytest.mark.parametrize(("suffix", "options"), [("jpg", {"quality": 60}), ("webp", {"quality": 30})])
def test_mask_folder_reads_lossy_files(tmp_path, suffix, options):
    for index in range(4):
        gray(scene(index) * 255).save(tmp_path / f"{index}.{suffix}", **options)
    folder = MaskFolder(tmp_path)
    for index in range(4):
        assert iou(folder.read(f"{index}.png", SIZE).numpy(), scene(index)) > 0.97


def trimap(mask, inside=1, outside=2, border=3):
    values = np.where(mask, inside, outside)
    values[mask ^ np.roll(mask, 2, 1)] = border
    return gray(values)


def test_mask_folder_refuses_a_trimap_and_proposes_its_values(tmp_path):
    trimap(scene(0)).save(tmp_path / "0.png")
    with pytest.raises(UserError, match=r"mask_values=\{foreground:\[1\],void:\[3\]\}"):
        MaskFolder(tmp_path).read("0.jpg", SIZE)
    given = MaskFolder(tmp_path, mask_values=MaskValuesConfig(foreground=[1], void=[3])).annotation("0.jpg", SIZE)
    border = scene(0) ^ np.roll(scene(0), 2, 1)
    assert np.array_equal(given.valid.numpy(), ~border)
    assert np.array_equal(given.foreground.numpy(), scene(0) & ~border)


def test_mask_folder_takes_a_file_of_one_value_by_the_other_files(tmp_path):
    gray(np.full(SIZE, 255)).save(tmp_path / "full.png")
    gray(scene(0) * 255).save(tmp_path / "0.png")
    folder = MaskFolder(tmp_path)
    assert folder.read("full.jpg", SIZE).all()
    assert folder.notes() == ["1 mask: everything is foreground"]


def test_mask_folder_takes_noise_of_an_empty_mask_for_empty(tmp_path):
    compressed(scene(0), "JPEG", quality=50).save(tmp_path / "0.png")
    noise = np.random.default_rng(0).integers(0, 2, SIZE)
    gray(noise).save(tmp_path / "empty.png")
    with pytest.raises(Exception, match="no object"):
        MaskFolder(tmp_path).read("empty.jpg", SIZE)


def test_mask_folder_remarks_on_labels_and_inverted_masks(tmp_path):
    gray(scene(0) * np.arange(SIZE[1]) // 30).save(tmp_path / "labels.png")
    gray(~scene(0) * 255).save(tmp_path / "inverted.png")
    folder = MaskFolder(tmp_path)
    folder.read("labels.jpg", SIZE)
    folder.read("inverted.jpg", SIZE)
    assert [note.split(",")[0] for note in folder.notes()] == [
        "1 mask: more than two values",
        "1 mask: the foreground covers most of the image's border; if it is the background",
    ]
    inverted = MaskFolder(tmp_path, mask_values=MaskValuesConfig(foreground=[0], void=[]))
    assert np.array_equal(inverted.read("inverted.jpg", SIZE).numpy(), scene(0))


def test_mask_folder_takes_255_alone_for_void_where_it_is_void_in_other_masks(tmp_path):
    labels = np.where(scene(0), 1, 0)
    labels[:3] = 255
    gray(labels).save(tmp_path / "0.png")
    gray(scene(1) * 255).save(tmp_path / "1.png")
    folder = MaskFolder(tmp_path)
    assert np.array_equal(folder.read("0.jpg", SIZE).numpy(), scene(0) & (np.arange(SIZE[0]) >= 3)[:, None])
    with pytest.raises(MissingMaskError, match="no object"):
        folder.read("1.jpg", SIZE)
