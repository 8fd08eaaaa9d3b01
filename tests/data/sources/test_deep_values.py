"""Values of any depth, kind and photometric interpretation, written as TIFF and PNG files by hand."""

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_vit.config.types import ValueRange
from ssl_vit.data.sources.decode import decode
from ssl_vit.data.sources.deep_values import own_range
from ssl_vit.data.sources.image_folder import scan_image_folder
from ssl_vit.data.value_notes import VEILED, value_notes
from tests.helpers.tiff import HEIGHT, RAMP, WIDTH, tiff


def png16(path, values, color):
    """Write values (H, W) or (H, W, C) uint16 as PNG of this color type."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = (b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, color, 0, 0, 0)), (b"IDAT", zlib.compress(rows))
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body + b"\0\0\0\0IEND\xaeB`\x82")
    return path


def stretched(values, valid=None):
    """The rule for gray values without outliers, in its simplest form."""
    kept = values[np.ones(values.shape, bool) if valid is None else valid].astype(np.float64)
    low, high = kept.min(), kept.max()
    values = values if valid is None else np.where(valid, values, low)
    return ((values.astype(np.float64) - low) * (255 / (high - low))).round().astype(np.uint8)


def planes(path, value_range="auto"):
    return decode(path, value_range=ValueRange.parse(value_range)).permute(1, 2, 0).numpy()


def mapped(values, low, high):
    """The rule for a range of values, in its simplest form."""
    return ((values.astype(np.float64) - low) * (255 / (high - low))).clip(0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("dtype", ["u2", "i2", "u4", "i4", "f4"])
@given(bits=st.integers(9, 31), low=st.integers(0, 200), seed=st.integers(0, 99))
@settings(max_examples=5, deadline=None)
def test_decode_stretches_gray_of_any_depth(tmp_path_factory, order, photometric, dtype, bits, low, seed):
    kind = np.dtype(dtype)
    top = 2 ** min(bits, kind.itemsize * 8 - (kind.kind != "u")) - 1
    values = np.random.default_rng(seed).permutation(np.linspace(low, top, RAMP.size)).reshape(RAMP.shape)
    values = (values - (low + 5 if kind.kind == "i" else 0)).astype(kind)
    path = tiff(tmp_path_factory.mktemp("t") / "a.tif", values, photometric, order=order)
    try:
        image = planes(path)
    except Exception as error:  # what Pillow does not read is named
        assert f"{kind.itemsize * 8}" in str(error)
        return
    expected = stretched(values)
    expected = 255 - expected if photometric == 0 else expected
    assert (image == expected[..., None]).all()


@pytest.mark.parametrize("photometric", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["u2", "i2", "i4", "f4"])
@given(low=st.integers(-300, 300), width=st.integers(1, 40_000))
@settings(max_examples=4, deadline=None)
def test_decode_maps_a_given_range_of_any_kind_of_values(tmp_path_factory, photometric, dtype, low, width):
    values = np.random.default_rng(width).permutation(np.linspace(-500, 40_000, RAMP.size)).reshape(RAMP.shape)
    values = values.clip(0 if dtype == "u2" else None, 30_000).astype(dtype)
    if (photometric == 2 and dtype != "u2") or (photometric == 0 and dtype[0] == "i"):  # Pillow does not read these
        return
    if photometric == 2:
        values = np.dstack([values, values[::-1], values // 2])
    path = tiff(tmp_path_factory.mktemp("t") / "a.tif", values, photometric)
    expected = mapped(values, low, low + width)
    expected = 255 - expected if photometric == 0 else expected
    assert (planes(path, [low, low + width]) == (expected if photometric == 2 else expected[..., None])).all()


@given(low=st.integers(0, 40), high=st.integers(60, 100))
@settings(max_examples=5, deadline=None)
def test_decode_maps_percentiles_of_each_image(tmp_path_factory, low, high):
    values = np.random.default_rng(low).permutation(RAMP.ravel() ** 2 % 65_521).reshape(RAMP.shape).astype(np.uint16)
    path = tiff(tmp_path_factory.mktemp("t") / "a.tif", values, 1)
    expected = mapped(values, *np.percentile(values, [low, high]))
    assert (planes(path, f"[{low}%, {high}%]") == expected[..., None]).all()


@pytest.mark.parametrize("nodata", [-9999, np.nan, np.inf, -123.0])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("given", [[0, 960], "[0%,100%]"])
def test_decode_with_a_range_makes_nodata_black(tmp_path, nodata, photometric, given):
    values = RAMP.astype(np.float32)
    values[:, :8] = nodata
    path = tiff(tmp_path / "a.tif", values, photometric, nodata="-123" if nodata == -123 else None)
    image = planes(path, given)
    assert not image[:, :8].any()
    assert len(np.unique(image[:, 8:])) > 200


def test_decode_maps_percentiles_of_nearly_one_value_by_its_extremes(tmp_path):
    values = np.full(RAMP.shape, 7, np.uint16)
    values[0, :4] = 900
    assert (planes(tiff(tmp_path / "a.tif", values, 1), "[1%,99%]") == mapped(values, 7, 900)[..., None]).all()


@pytest.mark.parametrize("value", ["auto", [0, 4095], "[0, 4095]", "[1%,99%]", ["1%", "99%"], [-1.5, 2]])
def test_value_range_reads_back_what_it_prints(value):
    parsed = ValueRange.parse(value)
    assert ValueRange.parse(str(parsed)) == parsed


@pytest.mark.parametrize("value", ["", "full", [3], [5, 5], [7, 2], "[1%, 2]", "[-1%,50%]", "[1%,101%]", [0, "inf"]])
def test_value_range_refuses_what_is_no_range(value):
    with pytest.raises(ValueError, match=r"write (auto|the smaller)"):
        ValueRange.parse(value)


def test_value_notes_with_a_range_name_clipped_and_plain_images(tmp_path):
    for number in range(8):
        tiff(tmp_path / f"{number}.tif", (RAMP * 4).astype(np.uint16), 1)
    dataset = scan_image_folder(tmp_path).with_range(ValueRange.parse([0, 4095]))
    assert value_notes(dataset) == ["data.range=[0, 4095]: values of more than 8 bits are mapped from it to 0..255"]
    assert any("more than 1 %" in note for note in value_notes(dataset.with_range(ValueRange.parse([0, 1000]))))
    for number in range(8):
        tiff(tmp_path / f"{number}.tif", (RAMP % 256).astype(np.uint8), 1)
    assert any("have 8 bits" in note for note in value_notes(dataset))


@pytest.mark.parametrize("kind", ["tiff <", "tiff >", "png"])
@pytest.mark.parametrize("bits", range(8, 17))
@pytest.mark.parametrize("hot", [False, True])
def test_decode_keeps_the_upper_eight_of_the_bits_in_use_of_colors(tmp_path, kind, bits, hot):
    colors = np.dstack([RAMP, RAMP[::-1], RAMP // 2]) * ((2**bits - 1) / RAMP.max())
    colors = colors.astype(np.uint16)
    expected = colors >> (bits - 8)
    if hot:
        colors[2, 2, 0], expected[2, 2, 0] = 65535, 255
    path = tmp_path / "a"
    png16(path, colors, 2) if kind == "png" else tiff(path, colors, 2, order=kind[-1])
    assert (planes(path) == expected).all()


def test_decode_rescales_gray_and_color_beside_alpha(tmp_path):
    gray, opaque = (RAMP * 4).astype(np.uint16), np.full(RAMP.shape, 65535, np.uint16)
    assert (planes(png16(tmp_path / "la.png", np.dstack([gray, opaque]), 4)) == stretched(gray)[..., None]).all()
    half = opaque.copy()
    half[:12] = 0
    colors = np.dstack([gray, gray, gray])
    for name in ("rgba.png", "rgba.tif"):
        path, values = tmp_path / name, np.dstack([colors, half])
        image = planes(png16(path, values, 6) if name.endswith("png") else tiff(path, values, 2, extra=2))
        assert (image[:12] == 255).all()  # transparent
        assert (image[12:] == colors[12:] >> 4).all()


@pytest.mark.parametrize(("start", "outlier"), [(1000, 65535), (60000, 0)])
def test_decode_is_not_decided_by_one_hot_or_dead_pixel(tmp_path, start, outlier):
    values = (start + RAMP * 4).astype(np.uint16)
    values[3, 3] = outlier
    image = planes(tiff(tmp_path / "a.tif", values, 1))
    assert image.min() == 0
    assert image.max() == 255
    assert 120 < image.mean() < 135


@pytest.mark.parametrize("nodata", [-9999, -32768, np.finfo(np.float32).min, np.nan, -123.0])
def test_decode_leaves_nodata_out_of_the_range(tmp_path, nodata):
    values = (RAMP / RAMP.max()).astype(np.float32)
    values[:, :8] = nodata
    path = tiff(tmp_path / "a.tif", values, 1, nodata="-123" if nodata == -123 else None)
    valid = np.ones(RAMP.shape, bool)
    valid[:, :8] = False
    assert (planes(path) == stretched(values, valid)[..., None]).all()


@pytest.mark.parametrize(
    ("dtype", "nodata"), [("u2", 65535), ("f4", -999), ("f4", 9999), ("f4", 3.4e38), ("f4", -3.4e38), ("f4", 1e10)]
)
def test_decode_takes_one_value_far_from_all_others_for_nodata(tmp_path, dtype, nodata):
    values = (RAMP / RAMP.max() * (4095 if dtype == "u2" else 1)).astype(dtype)
    values[:2] = nodata
    valid = np.ones(RAMP.shape, bool)
    valid[:2] = False
    path = tiff(tmp_path / "a.tif", values, 1)
    assert (planes(path) == stretched(values, valid)[..., None]).all()
    assert any("one value far from all others" in note for note in value_notes(scan_image_folder(tmp_path)))


def test_decode_keeps_the_bits_of_colors_beside_saturated_pixels(tmp_path):
    colors = (np.dstack([RAMP, RAMP[::-1], RAMP // 2]) * (4095 / RAMP.max())).astype(np.uint16)
    expected = colors >> 4
    colors[:2], expected[:2] = 65535, 255
    assert (planes(tiff(tmp_path / "a.tif", colors, 2)) == expected).all()


def test_decode_reads_signed_bytes_in_order(tmp_path):
    values = (RAMP % 256 - 128).astype(np.int8)
    assert (planes(tiff(tmp_path / "a.tif", values, 1)) == stretched(values)[..., None]).all()


@pytest.mark.parametrize("low", [1, 17])
@given(bits=st.integers(8, 16))
@settings(max_examples=4, deadline=None)
def test_decode_leaves_eight_bits_as_they_are(tmp_path_factory, low, bits):
    values = (low + RAMP % bits).astype(np.uint8)
    folder = tmp_path_factory.mktemp("t")
    assert (planes(tiff(folder / "a.tif", values, 1)) == values[..., None]).all()
    assert (planes(tiff(folder / "b.tif", values, 0)) == 255 - values[..., None]).all()


def test_value_range_of_few_or_equal_values_is_their_extremes():
    assert own_range(np.array([[5, 7]]), None) == (5, 7, [])
    sparse = np.zeros((100, 100), np.uint16)
    sparse[0, 0] = 9
    assert own_range(sparse, None) == (0, 9, [])
    with pytest.raises(ValueError, match="finite"):
        own_range(np.full((2, 2), -9999.0), None)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("extra", [None, 0])
def test_decode_takes_a_fourth_band_for_transparency_only_if_the_file_says_so(tmp_path, extra, dtype):
    bands = np.dstack([RAMP % 256, RAMP // 8, RAMP // 4, RAMP % 256]).astype(dtype)
    image = planes(tiff(tmp_path / "nir.tif", bands, 2, extra=extra))
    colors = bands[..., :3]
    assert (image == colors).all()
    assert any("4 bands, the first 3 used" in note for note in value_notes(scan_image_folder(tmp_path)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_decode_ignores_a_transparency_of_zero_everywhere(tmp_path, dtype):
    colors = np.dstack([RAMP % 256, RAMP // 8, RAMP // 4]).astype(dtype)
    bands = np.dstack([colors, np.zeros_like(RAMP)]).astype(dtype)
    assert (planes(tiff(tmp_path / "nir.tif", bands, 2, extra=2)) == colors).all()
    assert any("4 bands, the first 3 used" in note for note in value_notes(scan_image_folder(tmp_path)))


def test_value_notes_names_what_was_chosen(tmp_path):
    tiff(tmp_path / "deep.tif", (RAMP * 16).astype(np.uint16), 1)
    tiff(tmp_path / "dark.tif", (RAMP % 16).astype(np.uint8), 1)
    tiff(tmp_path / "veil.tif", np.dstack([RAMP % 256, RAMP % 256, RAMP % 256, RAMP % 99]).astype(np.uint8), 2, extra=2)
    notes = value_notes(scan_image_folder(tmp_path))
    assert any("stretched" in note and "deep.tif" in note for note in notes)
    assert any("less than a quarter" in note and "dark.tif" in note for note in notes)
    assert any(VEILED in note and "veil.tif" in note for note in notes)
    for path in tmp_path.iterdir():
        path.unlink()
    tiff(tmp_path / "plain.tif", (RAMP % 256).astype(np.uint8), 1)
    assert value_notes(scan_image_folder(tmp_path)) == []
