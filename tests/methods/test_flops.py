"""Counted floating-point operations against a closed formula and, for whole steps, against totals of that formula.

With N patches of P pixels of C channels, T tokens, and L blocks of width D and inner width H, a forward pass takes
2·N·D·C·P² + L·(2·T·(4·D² + 2·D·H) + 4·T²·D).
"""

import pytest
import torch

from ssl_vit.commands.load_config import load_config
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.methods.schedules import make_plan
from ssl_vit.training.trainer import build_method

VIT_CPU_FORWARD = 47_519_232  # of an image of 48 pixels
TINY_32 = ("backbone=vit_tiny", "backbone.img_size=32", "backbone.patch_size=4", "method.views.local_crops.size=16")


def build(*words):
    config = load_config("pretrain", ["data.root=x", "trainer.accelerator=cpu", *words], PretrainConfig)
    return build_method(config, make_plan(config, 1000))


@pytest.mark.parametrize(
    ("words", "total"),
    [
        (TINY_32, 10_633_904_128),
        (("backbone=vit_cpu", "method.views.local_crops.count=0", "backbone.reg_tokens=4", "backbone.in_chans=1",
          "method.views.mean=[0.5]", "method.views.std=[0.5]"), 507_588_608),
        (("method=sit", "backbone=vit_cpu"), 300_754_944),
        (("method=sit", "backbone=vit_tiny", "backbone.img_size=96", "method.contrastive.head=mlp"), 2_623_964_160),
        (("method=sit", "backbone=vit_cpu", "method.reconstruction.enabled=false", "method.tokens=shared"),
         282_369_024),
    ],
    ids=["dino-32", "dino-gray-registers", "sit", "sit-mlp", "sit-no-reconstruction"],
)  # fmt: skip
def test_count_flops_of_small_models(words, total):
    flops = build(*words).count_flops()
    assert flops.total == sum(flops.parts().values()) == total


@pytest.mark.parametrize(
    ("backbone", "local_crops", "total"),
    [("vit_tiny", 10, 33_979_340_800), ("vit_small", 8, 113_427_152_896), ("vit_base", 10, 473_218_048_000)],
)
def test_count_flops_of_vits_at_224_with_the_papers_head(backbone, local_crops, total):
    with torch.device("meta"):
        method = build(
            f"backbone={backbone}", f"method.views.local_crops.count={local_crops}", "method.head.prototypes=65536"
        )
    assert method.count_flops().total == total


@pytest.mark.parametrize("changed", ["trainer.fused_attention=true", "trainer.activation_checkpointing=true"])
def test_count_flops_counts_nothing_twice_and_changes_nothing(changed):
    method = build("backbone=vit_cpu", changed).train()
    before = [(name, module.training, vars(module).get("forward")) for name, module in method.named_modules()]
    flops = method.count_flops()
    assert flops == build("backbone=vit_cpu").count_flops()
    assert flops.backbones["teacher"] == 2 * VIT_CPU_FORWARD
    assert all(parameter.grad is None for parameter in method.parameters())
    after = [(name, module.training, vars(module).get("forward")) for name, module in method.named_modules()]
    assert after == before
