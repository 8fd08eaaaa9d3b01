from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from ssl_vit.data.dataset import UnreadableImageError
from ssl_vit.data.sources.decode import decode
from ssl_vit.data.sources.file_kinds import FORMATS
from tests.helpers.tiff import HEIGHT, RAMP, WIDTH, tiff

UNREAD = {
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200),
    "HEIC ": b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf" + bytes(200),
    "JPEG XL": b"\xff\x0a" + bytes(200),
    "JPEG XL ": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(200),
    "DICOM": bytes(128) + b"DICM" + bytes(99),
    "video": b"\0\0\0\x18ftypisom" + bytes(200),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_decode_names_formats_that_are_not_read(tmp_path, kind):
    (tmp_path / "a.jpg").write_bytes(UNREAD[kind])
    for source in (tmp_path / "a.jpg", BytesIO(UNREAD[kind])):
        with pytest.raises(UnreadableImageError, match=rf"an? {kind.strip()}.*, which is not read; convert it to"):
            decode(source)


@pytest.mark.parametrize(
    ("dtype", "bands", "name"),
    [
        ("u1", 5, "a TIFF of 5 bands of 8 bits"),
        ("u2", 13, "a TIFF of 13 bands of 16 bits"),
        ("f8", 1, "a TIFF of 1 band of 64-bit floats"),
        ("f2", 1, "a TIFF of 1 band of 16-bit floats"),
        ("f4", 3, "a TIFF of 3 bands of 32-bit floats"),
    ],
)
@pytest.mark.parametrize("order", "<>")
def test_decode_names_the_bands_of_a_tiff(tmp_path, caplog, dtype, bands, name, order):
    values = np.repeat(RAMP[..., None], bands, axis=2).astype(dtype)
    path = tiff(tmp_path / "a.tif", values[..., 0] if bands == 1 else values, 1, extra=0, order=order)
    with pytest.raises(UnreadableImageError, match=name):
        decode(path)
    assert not caplog.text


def test_decode_of_a_tiff_with_text_for_a_number_gives_a_printable_reason(tmp_path):
    path = tiff(tmp_path / "a.tif", RAMP.astype("f2"), 1, extra=0, order="<")
    content = path.read_bytes()
    at = content.index((258).to_bytes(2, "little") + (3).to_bytes(2, "little"))  # BitsPerSample, of the type short
    path.write_bytes(content[: at + 2] + (2).to_bytes(2, "little") + content[at + 4 :])  # of the type ASCII
    with pytest.raises(UnreadableImageError) as caught:
        decode(path)
    assert caught.value.reason.isprintable()


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000"])
def test_decode_reads_what_pillow_reads_under_any_name(tmp_path, kind):
    if kind not in FORMATS:
        pytest.skip(f"this Pillow does not read {kind}")
    pixels = np.repeat((RAMP * 255 // RAMP.max())[..., None], 3, axis=2).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", format=kind)
    image = decode(tmp_path / "a.jpg")
    assert image.shape == (3, HEIGHT, WIDTH)
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - pixels).mean() < 3
