"""SiT's corruption: how much of an image it touches, that it touches nothing else, and the rotation before it."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from ssl_vit.commands.load_config import load_config
from ssl_vit.config.methods import CorruptionConfig
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.data.transforms import corruption
from ssl_vit.data.transforms.corruption import Corruption, CorruptionResult, rotate
from ssl_vit.runtime.rng import sample_keys
from tests.reference.augmentations import corruption as textbook
from tests.reference.augmentations import kolmogorov_smirnov, sit_union
from tests.reference.fake_gpu import FakeGPU

KS_LIMIT = 1.95  # p = .001


@pytest.fixture(scope="module")
def sit() -> CorruptionConfig:
    return load_config("pretrain", ["data.root=.", "method=sit"], PretrainConfig).method.corruption


def only(config: CorruptionConfig, name: str) -> CorruptionConfig:
    """The configuration with one kind of block on, the others off."""
    off = {
        "gray": 0.0,
        "blur": 0.0,
        "noise": config.noise.model_copy(update={"p": 0.0}),
        "replace": config.replace.model_copy(update={"p": 0.0}),
    }
    return config.model_copy(update={**off, name: getattr(config, name)})


def dataset(count: int, channels: int, height: int, width: int) -> Tensor:
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(1))


def corrupt(config: CorruptionConfig, x: Tensor, seed: int = 0, view: int = 0) -> CorruptionResult:
    keys = sample_keys(seed, 0, torch.arange(len(x)))
    return Corruption(config)(x, keys, view=view)


@pytest.mark.parametrize(("size", "count"), [(32, 2000), (96, 800), (224, 600)])
def test_corruption_hides_a_quarter_by_noise_and_replacement(sit, size, count):
    """As simulated for SiT v1: mean .27, 95 % of images below .41, hardly one above half."""
    hidden = corrupt(sit, torch.zeros(count, 1, size, size)).mask.float().mean(dim=(1, 2, 3))
    assert hidden.mean() == pytest.approx(0.27, abs=0.01)
    assert hidden.quantile(0.95) == pytest.approx(0.41, abs=0.02)
    assert hidden.quantile(0.998) < 0.5


@pytest.mark.parametrize(("size", "side"), [(32, (0.05, 0.25)), (96, (0.05, 0.25)), (64, (0.1, 0.5))])
def test_corruption_adds_blocks_by_the_stopping_rule_of_sit_v1(sit, size, side):
    noise = sit.noise.model_copy(update={"size": side})
    config = only(sit.model_copy(update={"noise": noise}), "noise")
    ours = corrupt(config, torch.zeros(1500, 1, size, size)).mask.float().mean(dim=(1, 2, 3))
    rng = random.Random(0)
    theirs = [sit_union(size, max_area=0.3, side=side, rng=rng).mean() for _ in range(1500)]
    assert kolmogorov_smirnov(ours, torch.tensor(theirs)) < KS_LIMIT


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 48, 48), (3, 40, 72)])
def test_corruption_keeps_pixels_outside_of_blocks(sit, shape):
    x = dataset(40, *shape)
    before = x.clone()
    noise_and_mates = sit.model_copy(update={"gray": 0.0, "blur": 0.0})
    out, mask = corrupt(noise_and_mates, x)
    assert torch.equal(x, before)
    assert mask.shape == (40, 1, *shape[1:]) and mask.dtype == torch.bool
    assert torch.equal(out.where(~mask, 0), x.where(~mask, 0))
    assert ((out != x).any(dim=1, keepdim=True) == mask).all()


def test_corruption_without_blocks_changes_nothing(sit):
    off = sit.noise.model_copy(update={"p": 0.0})
    x = dataset(8, 3, 32, 32)
    out, mask = corrupt(sit.model_copy(update={"gray": 0.0, "blur": 0.0, "noise": off, "replace": off}), x)
    assert torch.equal(out, x) and not mask.any()


def test_corruption_gray_block_is_the_mean_of_the_channels(sit):
    x = dataset(1500, 3, 64, 64)
    out, mask = corrupt(only(sit, "gray"), x)
    block = (out != x).any(dim=1, keepdim=True)
    assert torch.equal(out, torch.where(block, x.mean(dim=1, keepdim=True), x))
    area = block.float().mean(dim=(1, 2, 3))
    assert area.mean() == pytest.approx(0.137, abs=0.015)  # as simulated for SiT v1
    assert area.median() == pytest.approx(0.095, abs=0.015)
    assert not mask.any()


def test_corruption_blur_block_is_a_rectangle_of_the_blurred_image(sit):
    x = dataset(200, 3, 40, 56)
    out, mask = corrupt(only(sit, "blur"), x)
    block = (out != x).any(dim=1)  # (B, H, W)
    rectangle = block.any(dim=2, keepdim=True) & block.any(dim=1, keepdim=True)
    assert (block == rectangle).float().mean() > 0.999  # a sigma near 0.1 leaves pixels as they are
    assert out[:, 0][block].abs().mean() < 0.5 * x[:, 0][block].abs().mean()
    assert not mask.any()
    flat = torch.full((50, 3, 40, 56), 0.7)
    torch.testing.assert_close(corrupt(only(sit, "blur"), flat).images, flat)


def test_corruption_blur_is_a_kernel_of_sit_v1(sit):
    """A white dot well inside its block becomes the kernel: 3 to 15 pixels wide, always odd."""
    dot = torch.zeros(3000, 1, 41, 41)
    dot[..., 20, 20] = 1
    out = corrupt(only(sit, "blur"), dot).images[:, 0]
    mirrored = torch.isclose(out, out.flip(1), atol=0) & torch.isclose(out, out.flip(2), atol=0)
    inside = mirrored.all(dim=2).all(dim=1) & (out[:, 20, 20] < 0.5)
    widths = (out[inside].amax(dim=1) > 0).sum(dim=1)
    assert set(widths.tolist()) == {3, 5, 7, 9, 11, 13, 15}


@pytest.mark.parametrize("view", [0, 1])
def test_corruption_replacement_is_clean_and_from_one_other_image(sit, view):
    """Image i holds the number i everywhere: a block shows who lent it, and nobody lends to one in both views."""
    x = torch.arange(64.0).view(64, 1, 1, 1).expand(64, 3, 32, 32).contiguous()
    out, mask = corrupt(sit, x, view=view)
    replaced = only(sit, "replace")
    lent, lent_mask = corrupt(replaced, x, view=view)
    borrowers = 0
    for i in range(64):
        seen = lent[i].unique().tolist()
        assert i in seen
        mates = [mate for mate in seen if mate != i]
        assert mates in ([], [i ^ (1, 2)[view]])
        borrowers += len(mates)
        values = out[i][:, lent_mask[i, 0]].unique().tolist()  # with gray, blur and noise in the batch, still clean
        assert all(value == int(value) for value in values)
    assert borrowers > 50
    assert (lent_mask <= mask).all()


@pytest.mark.parametrize(("count", "view", "without"), [(1, 0, [0]), (1, 1, [0]), (5, 0, [4]), (6, 1, [4, 5])])
def test_corruption_without_a_source_image_replaces_nothing(sit, count, view, without):
    x = dataset(count, 3, 32, 32)
    always = sit.model_copy(update={"replace": sit.replace.model_copy(update={"max_area": 1.0})})
    out, mask = corrupt(only(always, "replace"), x, view=view)
    assert (~mask.any(dim=(1, 2, 3))).nonzero().flatten().tolist() == without
    assert torch.equal(out[without], x[without])


@pytest.mark.parametrize("view", [0, 1])
def test_corruption_of_a_batch_split_into_fours_is_the_same(sit, view):
    x, keys = dataset(32, 3, 40, 40).double(), sample_keys(0, 0, torch.arange(32))
    whole = corrupt(sit, x, view=view)
    for size in (4, 8, 16):
        parts = [
            Corruption(sit)(some, key, view=view) for some, key in zip(x.split(size), keys.split(size), strict=True)
        ]
        torch.testing.assert_close(torch.cat([part.images for part in parts]), whole.images, rtol=0, atol=1e-14)
        assert torch.equal(torch.cat([part.mask for part in parts]), whole.mask)


def test_corruption_applies_each_kind_with_its_probability(sit):
    x = dataset(2000, 1, 32, 32)
    half = {"noise": sit.noise.model_copy(update={"p": 0.5}), "replace": sit.replace.model_copy(update={"p": 0.25})}
    for name, p in (("noise", 0.5), ("replace", 0.25)):
        share = corrupt(only(sit.model_copy(update=half), name), x).mask.any(dim=(1, 2, 3)).float().mean()
        assert share == pytest.approx(p, abs=0.03)
    colored = dataset(2000, 3, 16, 16)
    out = corrupt(only(sit.model_copy(update={"gray": 0.3}), "gray"), colored).images
    assert (out != colored).any(dim=(1, 2, 3)).float().mean() == pytest.approx(0.3, abs=0.03)


def test_corruption_noise_is_standard_normal(sit):
    x = torch.full((300, 3, 48, 48), 7.0)
    out, mask = corrupt(only(sit, "noise"), x)
    noise = out[mask.expand_as(out)]
    assert noise.mean() == pytest.approx(0, abs=0.01) and noise.std() == pytest.approx(1, abs=0.01)


def test_corruption_is_a_function_of_the_keys(sit):
    x = dataset(16, 3, 32, 32)
    first, again, other = corrupt(sit, x), corrupt(sit, x), corrupt(sit, x, seed=1)
    assert torch.equal(first.images, again.images) and torch.equal(first.mask, again.mask)
    assert not torch.equal(first.images, other.images)


def test_rotate_is_clockwise_and_has_order_four():
    x = dataset(8, 3, 12, 12)
    quarter = torch.arange(8) % 4
    turned = rotate(x, quarter)
    for i in range(8):
        assert torch.equal(turned[i], torch.rot90(x[i], -int(quarter[i]), (1, 2)))
    assert torch.equal(turned[1], tv.rotate(x[1], -90))
    assert torch.equal(rotate(turned, (4 - quarter) % 4), x)


def test_corruption_never_waits_for_a_gpu(sit):
    with FakeGPU():
        out, mask = Corruption(sit)(
            torch.empty(16, 3, 64, 64, device="cuda"), sample_keys(0, 0, torch.arange(16)), view=1
        )
        assert out.device.type == mask.device.type == "cuda"


@pytest.mark.parametrize("size", [16, 32, 96, 224])
@pytest.mark.parametrize("channels", [1, 3])
def test_corruption_equals_the_textbook_form(sit, size, channels):
    """Noise and other images to the last bit."""
    count = {16: 64, 32: 40, 96: 12, 224: 5}[size]
    x = dataset(count, channels, size, size)
    for view in (0, 1):
        ours, hidden = corrupt(sit, x, view=view)
        theirs, theirs_hidden = textbook(sit, x, sample_keys(0, 0, torch.arange(count)), view=view)
        assert torch.equal(hidden, theirs_hidden)
        assert torch.equal(ours.where(hidden, 0), theirs.where(hidden, 0))
        torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=0)


@pytest.mark.parametrize("size", [24, 25])
def test_corruption_does_not_depend_on_the_chunk(sit, monkeypatch, size):
    x = dataset(14, 3, size, size)
    expected = corrupt(sit, x)
    for values in (1, 8 * 3 * size**2, 1 << 30):
        monkeypatch.setattr(corruption, "_CHUNK", values)
        out, mask = corrupt(sit, x)
        assert torch.equal(out, expected.images) and torch.equal(mask, expected.mask)
