"""Learning rates of a backbone that starts from weights."""

import math

import pytest

from ssl_vit.config.pretrain import StartConfig
from ssl_vit.methods.backbone_rates import default_backbone_lr, make_backbone_rates
from ssl_vit.methods.schedules import TrainingPlan

PLAN = TrainingPlan(total_steps=100, steps_per_epoch=10, batch_size=64, log_every=1, seed=0)


def start(**keys):
    defaults = {"name": "weights", "trainable": "all", "freeze_backbone": "20%", "ramp": "10%"}
    rates = {"backbone_lr": 1e-4, "layer_decay": 0.5, "patch_embed_lr": 0.2}
    return StartConfig(**defaults | rates | keys)


@pytest.fixture
def backbone(build):
    return build("backbone.depth=3").student.backbone


def rates(backbone, **keys):
    return make_backbone_rates(start(**keys), PLAN, backbone, peak_lr=1e-3, num_images=640)


def test_make_backbone_rates_halves_the_rate_from_each_block_to_the_one_before(backbone):
    scales = rates(backbone).scales
    assert scales.keys() == dict(backbone.named_parameters()).keys()
    assert scales["vit.norm.weight"] == pytest.approx(0.1)
    for block, share in enumerate((1 / 8, 1 / 4, 1 / 2)):
        found = [scale for name, scale in scales.items() if name.startswith(f"vit.blocks.{block}.")]
        assert found == pytest.approx([0.1 * share] * len(found))
    assert scales["vit.cls_token"] == scales["vit.pos_embed"] == pytest.approx(0.1 / 16)
    assert scales["vit.patch_embed.proj.weight"] == pytest.approx(0.1 / 16 * 0.2)


def test_make_backbone_rates_without_a_rate_takes_that_of_the_heads(backbone):
    assert set(rates(backbone, backbone_lr=None, layer_decay=1.0, patch_embed_lr=1.0).scales.values()) == {1.0}


def test_factor_is_zero_while_frozen_then_rises_linearly_to_one(backbone):
    found = [rates(backbone).factor(step) for step in range(100)]
    assert found[:20] == [0.0] * 20
    assert found[20:30] == pytest.approx([n / 11 for n in range(1, 11)])
    assert set(found[30:]) == {1.0}
    assert [rates(backbone, freeze_backbone="0%", ramp="0%").factor(step) for step in (0, 1)] == [1.0, 1.0]


@pytest.mark.parametrize("keys", [{"freeze_backbone": "100%"}, {"ramp": "95steps"}, {"freeze_backbone": "12epochs"}])
def test_make_backbone_rates_refuses_a_freeze_as_long_as_the_run(backbone, keys):
    with pytest.raises(ValueError, match="and the run has 100: the backbone would hardly learn"):
        rates(backbone, **keys)


@pytest.mark.parametrize(
    ("images", "batch", "expected"),
    [
        (100, 64, 1e-5),
        (20_000, 1024, 1e-5),
        (100_000, 1024, 5e-5),
        (2_000_000, 256, 2.5e-5),
        (round(math.sqrt(20_000 * 100_000)), 1024, math.sqrt(5) * 1e-5),
    ],
)
def test_default_backbone_lr_follows_the_number_of_images_and_the_batch(images, batch, expected):
    assert default_backbone_lr(images, batch) == pytest.approx(expected, rel=1e-4)
