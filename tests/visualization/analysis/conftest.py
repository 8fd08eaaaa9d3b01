"""A small model and images for the tests of the analysis."""

import pytest
import torch

from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.visualization.analysis.activation_collector import ActivationCollector


@pytest.fixture
def make_model():
    """Return a function that makes a small model whose attention is far from uniform."""

    def make(*, registers=0, name="vit_tiny_patch16_224", heads=3, size=32, in_chans=3) -> LoadedBackbone:
        sizes = {"img_size": size, "patch_size": 8, "in_chans": in_chans, "embed_dim": 48, "depth": 3}
        torch.manual_seed(0)
        config = BackboneConfig(name=name, reg_tokens=registers, drop_path=0.0, init="jax", num_heads=heads, **sizes)
        backbone = Backbone(config)
        for block in backbone.vit.blocks:
            block.attn.qkv.weight.data *= 2
        for token in (backbone.vit.cls_token, backbone.vit.reg_token):
            if token is not None:
                torch.nn.init.normal_(token)
        backbone.requires_grad_(False).eval()
        return LoadedBackbone(backbone, [0.5] * in_chans, [0.5] * in_chans, "a test", None, None)

    return make


@pytest.fixture
def make_crops():
    """Return a function that makes random images (count, channels, size, size) uint8."""

    def make(count=2, size=32, channels=3):
        return torch.randint(0, 256, (count, channels, size, size), generator=torch.manual_seed(1)).to(torch.uint8)

    return make


@pytest.fixture
def collect():
    """Return a function that collects the activations of images: collector, layers, activations."""

    def run(model, crops, *, num_examples=2, image_size=None):
        collector = ActivationCollector(model, image_size)
        layers = collector.update(crops, num_examples=num_examples)
        return collector, layers, collector.compute()

    return run
