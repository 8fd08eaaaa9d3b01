"""The formats that are read, and the names of those that are not, by the first bytes of a file."""

from __future__ import annotations

from contextlib import suppress
from io import BytesIO
from pathlib import Path

from PIL import features
from PIL.TiffImagePlugin import BITSPERSAMPLE, SAMPLEFORMAT, SAMPLESPERPIXEL, ImageFileDirectory_v2

from ssl_vit.runtime.text import pluralize

FORMATS = (
    *("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"),
    *(["JPEG2000"] if features.check_codec("jpg_2000") else []),
    *(["AVIF"] if "avif" in features.modules and features.check_module("avif") else []),  # Pillow 11.3 and later
)
EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
    | ({".jp2", ".j2k", ".j2c", ".jpx"} if "JPEG2000" in FORMATS else set())
    | ({".avif"} if "AVIF" in FORMATS else set())
)

_HEADER_BYTES = 132
_BRANDS = {  # of the ISO container that HEIC and AVIF share
    "an AVIF image": (b"avif", b"avis"),
    "a HEIC image": (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"),
    "a CR3 raw file": (b"crx ",),
    "a video": (b"isom", b"mp41", b"mp42", b"qt  ", b"M4V ", b"avc1", b"iso2"),
}
_SIGNATURES = {
    b"\xff\x0a": "a JPEG XL image",
    b"\0\0\0\x0cJXL ": "a JPEG XL image",
    b"\0\0\0\x0cjP  ": "a JPEG 2000 image",
    b"\xff\x4f\xff\x51": "a JPEG 2000 image",
    b"II\xbc\x01": "a JPEG XR image",
    b"\x93NUMPY": "a NumPy array",
    b"8BPS": "a Photoshop file",
    b"%PDF": "a PDF document",
    b"DDS ": "a DDS texture",
    b"\0\0\1\0": "an icon",
    b"\x76\x2f\x31\x01": "an OpenEXR image",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip file",
    b"PK\3\4": "a zip file",
}
_SAMPLE_FORMATS = {1: "{} bits", 2: "signed {} bits", 3: "{}-bit floats"}


def describe_kind(file: Path | BytesIO) -> str:
    """Return what a file is that cannot be read, such as "a HEIC image" or "a TIFF of 5 bands of 8 bits".

    Empty if it is not known.
    """
    content = file.getvalue() if isinstance(file, BytesIO) else b""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            content = opened.read(_HEADER_BYTES)
    if content[4:8] == b"ftyp":
        size = min(int.from_bytes(content[:4], "big"), _HEADER_BYTES)
        brands = [content[8:12], *(content[start : start + 4] for start in range(16, size, 4))]
        return next((kind for kind, known in _BRANDS.items() if any(brand in known for brand in brands)), "")
    if content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _describe_tiff(file)
    if content[128:132] == b"DICM":
        return "a DICOM file"
    return next((kind for signature, kind in _SIGNATURES.items() if content.startswith(signature)), "")


def _describe_tiff(file: Path | BytesIO) -> str:
    """Return the bands and the type of the values of a TIFF; empty if its first directory is damaged."""
    with suppress(Exception):  # of a damaged file
        stream = BytesIO(file.getvalue()) if isinstance(file, BytesIO) else file.open("rb")
        with stream:
            header = stream.read(8)
            header += stream.read(8) if header[2:3] == b"+" or header[3:4] == b"+" else b""
            tags = ImageFileDirectory_v2(header)
            stream.seek(tags.next)
            tags.load(stream)
        count, bits = int(tags.get(SAMPLESPERPIXEL, 1)), int(tags.get(BITSPERSAMPLE, (1,))[0])
        sample = _SAMPLE_FORMATS.get(tags.get(SAMPLEFORMAT, (1,))[0], "complex numbers of {} bits")
        return f"a TIFF of {pluralize(count, 'band')} of {sample.format(bits)}"
    return ""
