"""Images that people and devices leave behind, made on the spot: odd ones to be read, broken ones to be skipped."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Make = Callable[[Path], None]

SIZE = (40, 24)  # width, height
HUGE = 50_000  # side in pixels


def pixels(seed: int = 0) -> np.ndarray:
    """A coarse image (24, 40, 3) uint8 with some noise, so that its files are not all too small."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(SIZE)
    return (np.asarray(coarse) // 2 + rng.integers(0, 128, (*SIZE[::-1], 3))).astype(np.uint8)


def image(mode: str = "RGB", seed: int = 0) -> Image.Image:
    """The coarse image in a mode."""
    return Image.fromarray(pixels(seed)).convert(mode)


def saved(mode: str, kind: str, **options: object) -> Make:
    """Save an image of this mode in this format, whatever the file is called."""
    return lambda path: image(mode).save(path, format=kind, **options)


def encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    """The bytes of a good file."""
    buffer = io.BytesIO()
    image(mode).save(buffer, format=kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, bits: int, color: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG from its compressed rows; color type 0 is gray, 2 RGB, 3 palette, 6 RGBA."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def zeros(count: int) -> bytes:
    """So many zero bytes, compressed; never in memory at once."""
    packer, block = zlib.compressobj(9), bytes(1 << 20)
    parts = [packer.compress(block) for _ in range(count >> 20)]
    return b"".join([*parts, packer.compress(bytes(count & 0xFFFFF)), packer.flush()])


def tiff(*entries: tuple[int, int, int, int], data: bytes = b"") -> bytes:
    """A little-endian TIFF of one directory: (tag, type, count, value or offset) each, `data` from byte 8 on."""
    directory = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    return head + data + struct.pack("<H", len(entries)) + directory + bytes(4)


def rgb16_tiff(path: Path) -> None:
    """16 bits per channel, as scanners save; Pillow cannot write it."""
    values = (pixels().astype("<u2") * 257).tobytes()
    shape = [(256, 4, 1, SIZE[0]), (257, 4, 1, SIZE[1]), (277, 3, 1, 3), (278, 4, 1, SIZE[1])]
    kind = [(258, 3, 3, 8 + len(values)), (259, 3, 1, 1), (262, 3, 1, 2)]
    place = [(273, 4, 1, 8), (279, 4, 1, len(values))]
    path.write_bytes(tiff(*shape, *kind, *place, data=values + struct.pack("<3H", 16, 16, 16)))


def rgb16_png(path: Path) -> None:
    """16 bits per channel; Pillow cannot write it."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels().astype(int) * 257)
    path.write_bytes(png(*SIZE, bits=16, color=2, rows=zlib.compress(rows)))


def ycck(path: Path) -> None:
    """A CMYK JPEG whose Adobe marker says that it is stored as YCCK."""
    content = bytearray(encoded("JPEG", "CMYK"))
    content[content.index(b"Adobe") + 11] = 2
    path.write_bytes(content)


def mpo(path: Path) -> None:
    """Two JPEGs in one file, as phones save depth and panoramas."""
    image().save(path, format="MPO", save_all=True, append_images=[image(seed=1)])


def frames(kind: str, **options: object) -> Make:
    """Three frames."""
    more = [image(seed=seed) for seed in (1, 2)]
    return lambda path: image().save(path, format=kind, save_all=True, append_images=more, **options)


def palette_with_alpha(path: Path) -> None:
    image("P").save(path, format="PNG", transparency=bytes(range(256)))


def much_exif(path: Path) -> None:
    exif = Image.Exif()
    exif[0x9286] = b"x" * 60_000
    image().save(path, format="JPEG", exif=exif)


def turned(orientation: int) -> Make:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved("RGB", "JPEG", exif=exif)


# Odd, and to be read all the same.
READABLE: dict[str, Make] = {
    "png_called.jpg": saved("RGB", "PNG"),
    "jpeg_called.png": saved("RGB", "JPEG"),
    "animated.gif": frames("GIF", duration=50),
    "animated.webp": frames("WEBP", duration=50),
    "animated.png": frames("PNG", duration=50),
    "pages.tif": frames("TIFF"),
    "two_in_one.jpg": mpo,
    "gray16.png": saved("I;16", "PNG"),
    "gray16.tif": saved("I;16", "TIFF"),
    "rgb16.png": rgb16_png,
    "rgb16.tif": rgb16_tiff,
    "float.tif": saved("F", "TIFF"),
    "int32.tif": saved("I", "TIFF"),
    "lab.tif": saved("LAB", "TIFF"),
    "ycbcr.tif": saved("YCbCr", "TIFF"),
    "jpeg_inside.tif": saved("RGB", "TIFF", compression="jpeg"),
    "palette_alpha.png": palette_with_alpha,
    "palette_alpha.gif": saved("P", "GIF", transparency=3),
    "gray_alpha.png": saved("LA", "PNG"),
    "cmyk.jpg": saved("CMYK", "JPEG"),
    "ycck.jpg": ycck,
    "one_bit.png": saved("1", "PNG"),
    "one_bit.tif": saved("1", "TIFF", compression="group4"),
    "huge_icc.jpg": saved("RGB", "JPEG", icc_profile=b"x" * 4_000_000),
    "huge_icc.tif": saved("RGB", "TIFF", icc_profile=b"x" * 4_000_000),
    "huge_exif.jpg": much_exif,
    "one_pixel.png": lambda path: Image.new("RGB", (1, 1)).save(path),
    "a_line.png": lambda path: Image.new("RGB", (20_000, 1)).save(path),
    **{f"turned{i}.jpg": turned(i) for i in range(1, 9)},
}

# Good images under names that break careless code.
NAMES: tuple[bytes, ...] = (
    b"with space.jpg", b"new\nline.jpg", b"tab\there.jpg", "\N{GRINNING FACE}.jpg".encode(), b"caf\xe9.jpg", b"a=b.jpg",
    b"a,b.jpg", b"[a].jpg", b"{a: 1}.jpg", b"--overwrite.jpg", b"-rf.jpg", b"$HOME.jpg", b"'\".jpg", b"back\\slash.jpg",
    "\u202egpj.jpg".encode(), "line\u2028separator.jpg".encode(), b"bell\x07\x1b[31m.jpg", b"n" * 251 + b".jpg",
)  # fmt: skip


def cut(kind: str, **options: object) -> Make:
    def make(path: Path) -> None:
        content = encoded(kind, **options)
        path.write_bytes(content[: len(content) * 6 // 10])

    return make


def written(content: bytes) -> Make:
    return lambda path: path.write_bytes(content) and None


def bomb(path: Path) -> None:
    """50,000 x 50,000 pixels of one bit, all there: 310 MB of rows in 300 kB."""
    path.write_bytes(png(HUGE, HUGE, bits=1, color=0, rows=zeros(HUGE * (1 + HUGE // 8))))


def text_bomb(path: Path) -> None:
    """A good image with 200 MB of compressed comments."""
    comment = chunk(b"zTXt", b"comment\0\0" + zeros(1 << 20))
    rows = zlib.compress(b"\0" + bytes(3))
    path.write_bytes(png(1, 1, bits=8, color=2, rows=rows, extra=comment * 200))


def huge_gif(path: Path) -> None:
    header = b"GIF89a" + struct.pack("<HHBBB", HUGE, HUGE, 0xF7, 0, 0) + bytes(768)
    path.write_bytes(header + b"," + struct.pack("<HHHHB", 0, 0, HUGE, HUGE, 0) + b"\x08\0;")


def many_scans(path: Path) -> None:
    """A progressive JPEG whose last scan comes a thousand times."""
    content = encoded("JPEG", progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    path.write_bytes(content[:-2] + last * 1000 + content[-2:])


def pipe_behind_a_link(path: Path) -> None:
    os.mkfifo(path.with_suffix(".pipe"))
    path.symlink_to(path.with_suffix(".pipe").name)


def socket_behind_a_link(path: Path) -> None:
    """A socket is bound by a short relative path: absolute ones may be too long for it."""
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{folder}/{path.stem}.socket")
    os.close(folder)
    path.symlink_to(f"{path.stem}.socket")


# To be skipped, and a part of the reason.
BROKEN: dict[str, tuple[Make, str]] = {
    **{f"cut.{kind.lower()}": (cut(kind), "") for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")},
    "cut_progressive_header.jpg": (lambda path: path.write_bytes(encoded("JPEG", progressive=True)[:300]) and None, ""),
    "empty.jpg": (written(b""), "an empty file"),
    "one_byte.jpg": (written(b"\xff"), "none of JPEG"),
    "heic.jpg": (written(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)), "a HEIC image"),
    "jxl.png": (written(b"\xff\x0a" + bytes(200)), "a JPEG XL image"),
    "text.jpg": (written(b"this is no image"), "none of JPEG"),
    "page.jpg": (written(b"<!DOCTYPE html><title>404 Not Found</title>"), "none of JPEG"),
    "zeros.png": (written(bytes(5000)), "none of JPEG"),
    "header_only.png": (written(encoded("PNG")[:33]), ""),
    "huge_header.png": (written(png(HUGE, HUGE, bits=8, color=2, rows=b"")), "more than"),
    "bomb.png": (bomb, "more than"),
    "text_bomb.png": (text_bomb, "text"),
    "icc_bomb.png": (saved("RGB", "PNG", icc_profile=bytes(50_000_000)), "too large"),
    "huge.gif": (huge_gif, "more than"),
    "many_scans.jpg": (many_scans, "scans"),
    "huge.bmp": (
        written(b"BM" + struct.pack("<IIIIiiHHI", 54, 0, 54, 40, HUGE, HUGE, 1, 24, 0) + bytes(20)),
        "more than",
    ),
    "huge.ppm": (written(b"P6 50000 50000 255\n"), "more than"),
    "nowhere.tif": (
        written(tiff((256, 4, 1, 40), (257, 4, 1, 24), (273, 4, 1, 2**32 - 1), (279, 4, 1, 2**32 - 1))),
        "",
    ),
    "endless_tags.tif": (written(tiff((256, 4, 2**32 - 1, 8), (257, 12, 2**31, 8), (273, 4, 2**32 - 1, 8))), ""),
    "not_a_number.tif": (lambda path: Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(path), ""),
    "dangling.jpg": (lambda path: path.symlink_to("nowhere.jpg"), "No such file"),
    "itself.jpg": (lambda path: path.symlink_to(path.name), "symbolic links"),
    "pipe.jpg": (pipe_behind_a_link, "pipe"),
    "socket.jpg": (socket_behind_a_link, ""),
    "device.jpg": (lambda path: path.symlink_to("/dev/zero"), "device"),
}


def put_ignored(folder: Path) -> None:
    """What no one takes for an image, and must not be opened."""
    os.mkfifo(folder / "bare_pipe.jpg")
    (folder / "folder.jpg").mkdir()
    (folder / "loop").symlink_to(folder)
    (folder / "up").symlink_to(folder.parent)
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden.jpg").write_text("x")


def put_hostile(folder: Path, good: int = 16) -> set[str]:
    """A folder with everything above among good images; returns the names of the broken ones."""
    for i in range(good):
        image(seed=i).save(folder / f"good{i:02}.png")
    for name in NAMES:
        image().save(Path(os.fsdecode(os.fsencode(folder) + b"/" + name)), format="JPEG")
    for name, make in READABLE.items():
        make(folder / name)
    for name, (make, _) in BROKEN.items():
        make(folder / name)
    put_ignored(folder)
    return set(BROKEN)
