"""Refine a mask of patches along the edges of its image by a guided filter."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ssl_vit.models.attention_maps import upsample_mask
from ssl_vit.runtime.errors import UserError

RADIUS = 1.0  # of the filter's windows, in sides of a patch
EDGE = 0.01  # standard deviation of the colors in a window, in [0, 1], below which it is smoothed as if without an edge


def refine(mask: Tensor, image: Tensor) -> Tensor:
    """Move the outline of a mask of patches (rows, columns) bool to the edges of its image (1 or 3, H, W) uint8.

    The mask at the image's size goes through a guided filter with the image as guide (He et al. 2013, TPAMI 35(6):
    window by window the mask is replaced by the linear function of the colors that fits it best; radius one patch,
    epsilon .01²), and pixels above one half are kept. TokenCut's bilateral solver is not used: OpenCV's published
    builds lack it, and on ECSSD it helped less. A mask of one component may have several afterwards; a mask of all or
    no patches stays as it is.

    Returns:
        (H, W) bool.

    Raises:
        UserError: OpenCV's extra modules are not installed.
    """
    height, width = image.shape[-2:]
    patch = math.sqrt(height / mask.shape[0] * width / mask.shape[1])  # pixels
    radius = max(1, round(RADIUS * patch))
    guide = np.ascontiguousarray(image.permute(1, 2, 0).numpy())  # (H, W, C)
    blocks = upsample_mask(mask, (height, width)).float().numpy()  # (H, W)
    filtered = import_opencv().ximgproc.guidedFilter(guide, blocks, radius, (255 * EDGE) ** 2)
    return torch.from_numpy(filtered > 0.5)


def import_opencv() -> ModuleType:
    """Import OpenCV with its extra modules.

    Raises:
        UserError: They are not installed.
    """
    try:
        import cv2.ximgproc
    except ImportError:
        raise UserError(
            "refined masks need OpenCV's extra modules: install them by `pip install 'ssl-vit[refine]'`"
        ) from None
    return cv2
