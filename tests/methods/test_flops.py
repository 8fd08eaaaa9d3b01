"""The stated formula of a step's operations is what the step computes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ssl_vit.commands.load_config import load_config
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.data.batch import Batch
from ssl_vit.methods.base import SSLMethod, make_plan, stack_views
from ssl_vit.methods.flops import flops_per_image
from ssl_vit.methods.sit import SiT
from ssl_vit.runtime.rng import sample_keys
from ssl_vit.training.trainer import build_method

CIFAR = ("backbone=vit_tiny", "backbone.img_size=32", "backbone.patch_size=4", "method.views.local_crops.size=16")
IMAGES = 2


def build(*words):
    config = load_config("pretrain", ["data.root=x", "trainer.accelerator=cpu", *words], PretrainConfig)
    return build_method(config, make_plan(config, 1000))


@pytest.fixture(autouse=True)
def no_trainer_and_no_augmentation(monkeypatch):
    monkeypatch.setattr(SSLMethod, "global_step", property(lambda self: 0))
    monkeypatch.setattr(
        SiT, "rotated", lambda self, views, key: (stack_views(views), torch.zeros(2 * len(views)).long())
    )
    monkeypatch.setattr(SiT, "corrupted", lambda self, clean, key: (clean, torch.ones_like(clean[:, :1]).bool()))


def counted(method):
    """What torch counts in forward and backward of one step, without what the loss computes for a second time."""
    views, index = method.config.views, torch.arange(IMAGES)
    channels = method.target.config.in_chans
    large, small = (
        torch.rand(IMAGES, crops.count, channels, crops.size, crops.size)
        for crops in (views.global_crops, views.local_crops)
    )
    batch = Batch(large, small, index, index, sample_keys(0, 0, index))
    with FlopCounterMode(display=False) as counter:
        method.step(large, small, batch).loss.backward()
    return counter.get_total_flops() / IMAGES - again(method.config)


def again(config):
    """DINO's logits are not kept: the student's and the teacher's are computed once more for the backward pass, and
    the teacher's probabilities are multiplied with the prototypes in both."""
    if config.name == "sit":
        return 0
    crops = config.views.local_crops.count + 3 * config.views.global_crops.count
    return 2 * crops * config.head.prototypes * config.head.bottleneck_dim


@pytest.mark.parametrize(
    "words",
    [
        CIFAR,
        ("backbone=vit_small", "method.head.prototypes=65536"),
        ("backbone=vit_cpu", "method.views.local_crops.count=0", "backbone.reg_tokens=4", "backbone.in_chans=1",
         "method.views.mean=[0.5]", "method.views.std=[0.5]"),
        ("method=sit", "backbone=vit_cpu"),
        ("method=sit", "backbone=vit_tiny", "backbone.img_size=96", "method.contrastive.head=mlp"),
        ("method=sit", "backbone=vit_cpu", "method.reconstruction.enabled=false", "method.tokens=shared",),
    ],
    ids=["dino-cifar", "dino-small", "dino-gray-registers", "sit", "sit-mlp", "sit-no-reconstruction"],
)  # fmt: skip
def test_the_formula_is_what_torch_counts(words):
    method = build(*words)
    assert flops_per_image(method.config, method.target).total == pytest.approx(counted(method), rel=0.01)


@pytest.mark.parametrize(
    ("backbone", "locals_", "billions"),
    [("vit_tiny", 10, 34.2), ("vit_small", 0, 73.9), ("vit_small", 8, 113.8), ("vit_small", 10, 123.8),
     ("vit_base", 10, 474)],
)  # fmt: skip
def test_vits_at_224_with_the_papers_head(backbone, locals_, billions):
    """2 x 224 and locals of 96 pixels, 65,536 prototypes."""
    with torch.device("meta"):
        method = build(
            f"backbone={backbone}", f"method.views.local_crops.count={locals_}", "method.head.prototypes=65536"
        )
    flops = flops_per_image(method.config, method.target)
    assert flops.total / 1e9 == pytest.approx(billions, rel=0.01)
    assert flops.total == flops.teacher + flops.student + flops.head
