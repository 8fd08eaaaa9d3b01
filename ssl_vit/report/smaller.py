"""A report whose page would be too large: the same with smaller pictures."""

from __future__ import annotations

from PIL import Image

from ssl_vit.report.content import Content

MOST_BYTES = 10_000_000  # of a page
_LEAST = 8  # pixels of a side


def halved(content: Content) -> Content:
    """The same report with pictures of half their sides."""
    plane = content.feature_map
    return content._replace(
        attended=[one._replace(image=_half(one.image)) for one in content.attended],
        segmented=[one._replace(image=_half(one.image)) for one in content.segmented],
        neighbours=[[near._replace(image=_half(near.image)) for near in row] for row in content.neighbours],
        feature_map=plane and plane._replace(images=[_half(image) for image in plane.images]),
        panels=[panel._replace(image=_half(panel.image)) for panel in content.panels],
        reconstructions=[panel._replace(image=_half(panel.image)) for panel in content.reconstructions],
    )


def _half(image: Image.Image) -> Image.Image:
    width, height = (max(_LEAST, side // 2) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)
