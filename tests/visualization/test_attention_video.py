"""Attention of video frames: batches and the color scale."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from ssl_vit.data.sources.video_frames import Frame
from ssl_vit.evaluation.segmentation.image_outputs import normalize
from ssl_vit.models.attention_maps import extract_last_block
from ssl_vit.models.checkpoint import load_backbone
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.attention_video import AttentionRenderer, FrameAttention, iter_attention


def peaked(height: float) -> FrameAttention:
    """A frame whose attention is `height` times uniform on some patches."""
    map_ = torch.full((10, 10), (100 - 2 * height) / 98 / 100)
    map_[5, 5:7] = height / 100
    return FrameAttention(Frame("0", torch.full((3, 80, 80), 99, dtype=torch.uint8), Fraction(0)), map_)


def test_attention_renderer_changes_its_scale_slowly():
    renderer = AttentionRenderer(0.6)
    list(renderer.draw([peaked(20)] * 3))
    assert renderer.top == pytest.approx(20)
    steady = list(renderer.draw([peaked(20), peaked(40), peaked(20)]))
    assert renderer.top == pytest.approx(20 + 0.05 * 20 * 0.95)
    jumping = AttentionRenderer(0.6)  # scale of twice the attention, as if every frame had its own scale
    list(jumping.draw([peaked(40)]))
    (jumped,) = jumping.draw([peaked(20)])
    first, third, jumped = (np.asarray(image).astype(int) for image in (steady[0], steady[2], jumped))
    assert 0 < np.abs(first - third).sum() < np.abs(first - jumped).sum() / 5
    for _ in range(100):
        list(renderer.draw([peaked(40)]))
    assert renderer.top == pytest.approx(40, rel=0.01)


def test_iter_attention_equals_the_attention_of_single_images(tmp_path, tiny_model):
    model = load_backbone(str(tiny_model))
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)
    frames = [Frame(str(number), frame, Fraction(number)) for number, frame in enumerate(pixels)]
    (batch,) = iter_attention(frames, model, head=None, max_side=None, skip=pytest.fail)
    for found, frame in zip(batch, pixels, strict=True):
        alone = extract_last_block(model.backbone, normalize(frame[None] / 255, model))[0].cls
        assert torch.allclose(found.map, alone.mean(0), atol=1e-6)
    with pytest.raises(UserError, match="numbered from 0"):
        list(iter_attention(frames, model, head=3, max_side=None, skip=pytest.fail))
