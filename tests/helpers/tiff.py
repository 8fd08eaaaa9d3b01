"""Uncompressed TIFF files of any depth, number of bands and photometric interpretation."""

import struct

import numpy as np

HEIGHT, WIDTH = 24, 40
RAMP = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
FORMATS = {"u": 1, "i": 2, "f": 3}  # numpy kind -> TIFF sample format


def tiff(path, values, photometric, *, extra=None, order="<", nodata=None):
    """Write values (H, W) or (H, W, C) as one uncompressed strip."""
    bits, samples = values.dtype.itemsize * 8, 1 if values.ndim == 2 else values.shape[2]
    raw = values.astype(values.dtype.newbyteorder(order)).tobytes()
    tags = {256: (4, [WIDTH]), 257: (4, [HEIGHT]), 258: (3, [bits] * samples), 259: (3, [1]), 262: (3, [photometric])}
    tags |= {273: (4, [8]), 277: (3, [samples]), 278: (4, [HEIGHT]), 279: (4, [len(raw)])}
    tags[339] = 3, [FORMATS[values.dtype.kind]] * samples
    if extra is not None:
        tags[338] = 3, [extra] * (samples - (3 if photometric == 2 else 1))
    if nodata is not None:
        tags[42113] = 2, [*nodata.encode(), 0]
    start, entries, blob = 8 + len(raw), b"", b""
    for tag, (kind, numbers) in sorted(tags.items()):
        packed = struct.pack(order + {2: "B", 3: "H", 4: "I"}[kind] * len(numbers), *numbers)
        if len(packed) > 4:
            offset = start + 6 + 12 * len(tags) + len(blob)
            blob, packed = blob + packed, struct.pack(order + "I", offset)
        entries += struct.pack(order + "HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    head = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, start)
    path.write_bytes(head + raw + struct.pack(order + "H", len(tags)) + entries + bytes(4) + blob)
    return path
