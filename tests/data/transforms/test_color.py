"""Photometrics: each operation equals torchvision's, each probability and range is the one that was asked for."""

from __future__ import annotations

import itertools
import math
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from ssl_vit.commands.load_config import load_config
from ssl_vit.config.methods import BlurConfig, JitterConfig, ViewsConfig
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.data.transforms import color as photometric
from ssl_vit.data.transforms.color import (
    ColorAugmentation,
    JitterParams,
    apply_jitter,
    rgb_to_luma,
    sample_jitter_params,
    shift_hue,
    solarize,
)
from ssl_vit.data.transforms.gaussian_blur import blur, blur_weights
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.runtime.rng import sample_keys
from tests.helpers.crops import crop_image
from tests.reference.augmentations import blurred, dino_view, jittered, kolmogorov_smirnov, photograph, uniformity
from tests.reference.augmentations import photometric as textbook
from tests.reference.fake_gpu import FakeGPU

KS_LIMIT = 1.95  # p = .001
NO_JITTER = JitterConfig(p=0, brightness=0, contrast=0, saturation=0, hue=0)
NO_BLUR = BlurConfig(p=(0, 0, 0), sigma=(0.1, 2.0))
OFF = {"jitter": NO_JITTER, "grayscale": 0.0, "blur": NO_BLUR, "solarize": (0.0, 0.0, 0.0)}


@pytest.fixture(scope="module")
def dino() -> ViewsConfig:
    return load_config("pretrain", ["data.root=."], PretrainConfig).method.views


@pytest.fixture
def bare(dino: ViewsConfig) -> ViewsConfig:
    """DINO's views with every photometric change off and no normalization: pixels in [0, 1]."""
    return dino.model_copy(update={**OFF, "mean": [0.0] * 3, "std": [1.0] * 3})


def keys(count: int, seed: int = 0) -> Tensor:
    return sample_keys(seed, 0, torch.arange(count))


def noise(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def changed(views: ViewsConfig, dataset: Tensor, **changes: object) -> Tensor:
    """Views (B, V, C, H, W) in [0, 1], with only `changes` on."""
    return ColorAugmentation(views.model_copy(update=changes))(dataset, keys(len(dataset)))


def jitter_by(**strength: float) -> JitterConfig:
    return JitterConfig(**{"p": 1.0, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, **strength})


# --- each operation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [3, 1])
def test_apply_jitter_equals_torchvision_in_every_order(channels):
    orders = torch.tensor(list(itertools.permutations(range(4))))
    x = torch.rand(24, channels, 9, 11, generator=torch.Generator().manual_seed(1))
    factor = 0.6 + 0.8 * torch.rand(24, 3, generator=torch.Generator().manual_seed(2))
    hue = torch.linspace(-0.5, 0.5, 24)
    expected = torch.stack(
        [jittered(image, *(part.tolist() for part in how)) for image, *how in zip(x, orders, factor, hue, strict=True)]
    )
    apply_jitter(x, JitterParams(torch.ones(24, dtype=torch.bool), orders, factor, hue))
    torch.testing.assert_close(x, expected, atol=2e-5, rtol=0)


def test_shift_hue_of_gray_black_and_pure_colors():
    x = torch.tensor([[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    x = x[:, :, None, None].float()
    for shift in (-0.5, -0.1, 0.0, 1 / 3):
        ours = x.clone()
        shift_hue(ours, torch.full((7,), shift))
        torch.testing.assert_close(ours, tv.adjust_hue(x, shift), atol=1e-6, rtol=0)


def test_rgb_to_luma_and_solarize_equal_torchvision():
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rgb_to_luma(x), tv.rgb_to_grayscale(x))
    levels = torch.arange(256, dtype=torch.uint8).view(16, 16)
    pil = tv.pil_to_tensor(ImageOps.solarize(Image.fromarray(levels.numpy())))
    ours = levels / 255
    solarize(ours)
    assert torch.equal((ours * 255).round().to(torch.uint8), pil[0])


@pytest.mark.parametrize("shape", [(3, 20, 30), (1, 16, 100), (3, 5, 33), (1, 1, 96)])
def test_blur_is_a_gaussian_that_repeats_the_border(shape):
    """Each image with its own sigma and radius, whether narrower than the kernel or many bands wide."""
    sigma, radius = torch.tensor([0.1, 0.5, 1.0, 2.0]), torch.tensor([8, 1, 3, 8])
    x = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
    ours = x.clone()
    blur(ours, *(blur_weights(sigma, size=size, reach=8, radius=radius) for size in shape[1:]))
    for i, image in enumerate(x.double()):
        expected = blurred(image, float(sigma[i]), reach=8, radius=int(radius[i]))
        torch.testing.assert_close(ours[i].double(), expected, atol=1e-6, rtol=0)
        padded = tv.pad(image, 8, padding_mode="edge")
        if radius[i] == 8:
            theirs = tv.gaussian_blur(padded, [17, 17], [float(sigma[i])] * 2)[..., 8:-8, 8:-8]
            torch.testing.assert_close(expected, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("sigma", "levels"), [(0.1, 0.1), (0.3, 2.0), (0.5, 1.0), (1.0, 1.0), (1.5, 1.0), (2.0, 1.0)])
def test_blur_is_close_to_pillows(photos: Path, sigma: float, levels: float):
    """Pillow puts three box blurs for the Gaussian: mean distance in levels of 255, borders included."""
    distances = []
    for file in sorted(photos.iterdir())[:6]:
        image = Image.open(file).convert("RGB").resize((96, 96))
        weights = blur_weights(torch.tensor([sigma]), size=96, reach=8)
        ours = tv.pil_to_tensor(image)[None].contiguous().float()
        blur(ours, weights, weights)
        pillows = tv.pil_to_tensor(image.filter(ImageFilter.GaussianBlur(sigma)))
        distances.append((ours - pillows).abs().mean())
    assert torch.stack(distances).mean() < levels


# --- all together --------------------------------------------------------------------------------------------


def in_pixels(views: ViewsConfig, out: Tensor) -> Tensor:
    """Normalized views in double precision as pixels in [0, 1] again."""
    mean, std = (torch.tensor(each, dtype=torch.double).view(-1, 1, 1) for each in (views.mean, views.std))
    return out.double() * std + mean


@pytest.mark.parametrize(("size", "count"), [(16, 24), (32, 16), (96, 8), (224, 2)])
@pytest.mark.parametrize("channels", [3, 1])
def test_color_augmentation_equals_the_textbook_form(
    dino: ViewsConfig, photos: Path, size: int, count: int, channels: int
):
    statistics = {"mean": dino.mean[:channels], "std": dino.std[:channels]}
    views = dino.model_copy(update=statistics)
    image = photograph(sorted(photos.iterdir())[3])
    crops = [tv.resized_crop(image, 3 * i, 5 * i, 120, 100 + i, [size, size]) for i in range(4 * count)]
    dataset = torch.stack(crops)[:, :channels].view(count, 4, channels, size, size)
    ours, theirs = (
        in_pixels(views, of(dataset, keys(count))) for of in (ColorAugmentation(views), partial(textbook, views))
    )
    torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=0)


@pytest.mark.parametrize("hue", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_color_augmentation_equals_the_textbook_at_extremes(dino: ViewsConfig, p: float, hue: float):
    jitter = dino.jitter.model_copy(update={"p": p, "hue": hue})
    for more in ({"grayscale": p, "blur": BlurConfig(p=(p, p, p), sigma=(0, 3))}, {"solarize": (p, p, p)}):
        views = dino.model_copy(update={**OFF, "jitter": jitter, **more})
        dataset = noise(12, 3, 3, 20, 20)
        ours = in_pixels(views, ColorAugmentation(views)(dataset, keys(12), first_view=1))
        theirs = in_pixels(views, textbook(views, dataset, keys(12), first_view=1))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


# --- probabilities and ranges --------------------------------------------------------------------------------


def test_color_augmentation_applies_each_operation_with_its_probability(bare: ViewsConfig, dino: ViewsConfig):
    """DINO's: jitter .8 and grayscale .2 everywhere, blur 1, .1, .5 and solarize 0, .2, 0 by view."""
    dataset = noise(3000, 4, 3, 8, 8)
    expected = {
        "jitter": (0.8, 0.8, 0.8, 0.8),
        "grayscale": (0.2, 0.2, 0.2, 0.2),
        "blur": (1.0, 0.1, 0.5, 0.5),
        "solarize": (0.0, 0.2, 0.0, 0.0),
    }
    for name, probabilities in expected.items():
        setting = getattr(dino, name)
        if name == "blur":
            setting = setting.model_copy(update={"sigma": (1.0, 2.0)})
        out = changed(bare, dataset, **{name: setting})
        share = ((out - dataset / 255).abs().amax(dim=(2, 3, 4)) > 0.01).float().mean(dim=0)
        for view, p in enumerate(probabilities):
            assert share[view] == pytest.approx(p, abs=0.001 if p in (0, 1) else 0.03), (name, view)


def test_color_augmentation_treats_local_views_by_their_number(bare: ViewsConfig):
    dataset = noise(200, 2, 3, 8, 8)
    views = bare.model_copy(update={"solarize": (0.0, 1.0, 0.0)})
    assert torch.equal(ColorAugmentation(views)(dataset, keys(200), first_view=2), dataset / 255)


def test_sample_jitter_params_has_the_configured_ranges(bare: ViewsConfig):
    half = torch.full((2000, 1, 3, 4, 4), 128, dtype=torch.uint8)
    brightness = changed(bare, half, jitter=jitter_by(brightness=0.4)).mean(dim=(1, 2, 3, 4)) / (128 / 255)
    assert uniformity(brightness, 0.6, 1.4) < KS_LIMIT

    stripes = half.clone()
    stripes[..., ::2] = 78
    contrast = changed(bare, stripes, jitter=jitter_by(contrast=0.4)).flatten(1)
    assert uniformity((contrast.amax(1) - contrast.amin(1)) / (50 / 255), 0.6, 1.4) < KS_LIMIT

    red = half.clone()
    red[:, :, 0] = 178
    saturation = changed(bare, red, jitter=jitter_by(saturation=0.2)).flatten(1)
    assert uniformity((saturation.amax(1) - saturation.amin(1)) / (50 / 255), 0.8, 1.2) < KS_LIMIT

    hue = changed(bare, red, jitter=jitter_by(hue=0.1))[:, 0, :, 0, 0]  # (B, 3): green rises one way, blue the other
    turn = (hue[:, 1] - hue[:, 2]) / (hue.amax(1) - hue.amin(1)) / 6
    assert uniformity(turn, -0.1, 0.1) < KS_LIMIT


def test_sample_jitter_params_has_no_negative_factors(bare: ViewsConfig):
    half = torch.full((2000, 1, 3, 2, 2), 60, dtype=torch.uint8)
    out = changed(bare, half, jitter=jitter_by(brightness=3.0)).mean(dim=(1, 2, 3, 4)) / (60 / 255)
    assert uniformity(out, 0.0, 4.0) < KS_LIMIT


def test_color_augmentation_blur_sigma_has_its_range(bare: ViewsConfig):
    """Measured by how far a white dot spreads."""
    dot = torch.zeros(1000, 1, 3, 25, 25, dtype=torch.uint8)
    dot[..., 12, 12] = 255
    out = changed(bare, dot, blur=BlurConfig(p=(1, 1, 1), sigma=(0.7, 2.0)))[:, 0, 0]  # (B, 25, 25)
    variance = (out.sum(dim=1) * (torch.arange(25) - 12) ** 2).sum(dim=1)
    assert uniformity(variance.sqrt(), 0.7, 2.0) < KS_LIMIT


def test_sample_jitter_params_order_is_uniformly_random(dino: ViewsConfig):
    order = sample_jitter_params(keys(24_000), dino.jitter).order
    codes = (order * torch.tensor([64, 16, 4, 1])).sum(dim=1)
    counts = torch.unique(codes, return_counts=True)[1].double()
    expected = len(order) / 24
    assert len(counts) == 24
    assert ((counts - expected) ** 2 / expected).sum() < 49.7  # chi-square, 23 degrees of freedom, p = .001


@pytest.mark.parametrize("view", [0, 1, 2])
def test_color_augmentation_matches_the_pil_pipeline(bare: ViewsConfig, dino: ViewsConfig, photos: Path, view: int):
    """Brightness, contrast, colorfulness and sharpness of 300 views of one photograph, ours and the textbook's."""
    torch.manual_seed(0)
    random.seed(0)
    image = photograph(sorted(photos.iterdir())[2])
    count, local = 300, view == 2
    crop = (dino.local_crops if local else dino.global_crops).model_copy(update={"size": 48, "count": 1 + view})
    none = crop.model_copy(update={"count": 0})
    cropper = MultiCrop(dino.model_copy(update={"global_crops": crop, "local_crops": none}))
    views = torch.stack([crop_image(cropper, image, key)[0][view:] for key in keys(count)])
    photometric = ColorAugmentation(dino.model_copy(update={"mean": bare.mean, "std": bare.std}))
    ours = photometric(views, keys(count), first_view=view)[:, 0]
    settings = {"scale": crop.scale, "blur": dino.blur.p[view], "solarize": dino.solarize[view]}
    pil = tv.to_pil_image(image)
    theirs = torch.stack([tv.pil_to_tensor(dino_view(pil, size=48, **settings)) for _ in range(count)]) / 255
    for statistic in (
        lambda x: x.mean(dim=(1, 2, 3)),
        lambda x: x.flatten(1).std(dim=1),
        lambda x: (x.amax(dim=1) - x.amin(dim=1)).mean(dim=(1, 2)),
        lambda x: x.diff(dim=-1).abs().mean(dim=(1, 2, 3)),
    ):
        assert kolmogorov_smirnov(statistic(ours), statistic(theirs)) < KS_LIMIT


# --- what does not matter ------------------------------------------------------------------------------------


def test_color_augmentation_does_not_depend_on_the_batch(dino: ViewsConfig):
    dataset = noise(16, 3, 3, 24, 24)
    photometric = ColorAugmentation(dino)
    together = photometric(dataset, keys(16))
    for i in (0, 7, 15):
        alone = photometric(dataset[i : i + 1], keys(16)[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=0)
    last = photometric(dataset[:, 2:], keys(16), first_view=2)
    torch.testing.assert_close(last[:, 0], together[:, 2], atol=1e-5, rtol=0)
    assert torch.equal(photometric(dataset, keys(16)), together)
    assert not torch.equal(photometric(dataset, keys(16, seed=1)), together)


@pytest.mark.parametrize("values", [1, 100_000, 1 << 30])
def test_color_augmentation_does_not_depend_on_the_block(dino, monkeypatch, values):
    """To the last bit."""
    dataset = noise(24, 4, 3, 96, 96)
    expected = ColorAugmentation(dino)(dataset, keys(24))
    monkeypatch.setattr(photometric, "_BLOCK", values)
    assert torch.equal(ColorAugmentation(dino)(dataset, keys(24)), expected)


def test_color_augmentation_does_not_depend_on_the_number_of_threads(dino):
    dataset = noise(2, 2, 3, 224, 224)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(ColorAugmentation(dino)(dataset, keys(2)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize(("size", "count"), [(224, 2), (96, 8)])
def test_color_augmentation_never_waits_for_a_gpu(dino, size, count):
    with FakeGPU():
        views = torch.empty(16, count, 3, size, size, dtype=torch.uint8, device="cuda")
        out = ColorAugmentation(dino)(views, keys(16), first_view=2 if size == 96 else 0)
        assert out.shape == views.shape and out.device.type == "cuda"


def test_fake_gpu_finds_what_would_wait():
    with FakeGPU():
        x = torch.rand(4, device="cuda")
        for wait in (
            lambda: x.sum().item(),
            lambda: x.cpu(),
            lambda: x.nonzero(),
            lambda: x[torch.arange(2)],
            lambda: x + torch.ones(4),
            lambda: torch.tensor([1.0], device="cuda"),
        ):
            with pytest.raises(Exception, match=r"waits|scalar_dense|nonzero"):
                wait()
        assert (x + torch.arange(4).to("cuda", non_blocking=True)).device.type == "cuda"


def test_color_augmentation_normalizes_and_keeps_its_input(bare: ViewsConfig, dino: ViewsConfig):
    dataset = noise(3, 2, 3, 8, 8)
    before = dataset.clone()
    out = changed(bare, dataset, mean=dino.mean, std=dino.std)
    expected = tv.normalize(dataset / 255, dino.mean, dino.std)
    torch.testing.assert_close(out, expected)
    assert out.dtype == torch.float32
    ColorAugmentation(dino)(dataset, keys(3))
    assert torch.equal(dataset, before)


def test_color_augmentation_of_one_channel_has_no_color(dino: ViewsConfig, bare: ViewsConfig):
    gray = {"mean": [0.0], "std": [1.0]}
    dataset = noise(64, 2, 1, 8, 8)
    color_only = changed(bare, dataset, jitter=jitter_by(saturation=0.8, hue=0.5), grayscale=1.0, **gray)
    torch.testing.assert_close(color_only, dataset / 255)
    assert changed(dino, dataset, **gray).isfinite().all()


def test_color_augmentation_takes_no_views_and_no_blur(bare: ViewsConfig, dino: ViewsConfig):
    assert ColorAugmentation(dino)(noise(4, 0, 3, 8, 8), keys(4), first_view=2).shape == (4, 0, 3, 8, 8)
    dataset = noise(4, 2, 3, 8, 8)
    assert torch.equal(changed(bare, dataset, blur=BlurConfig(p=(1, 1, 1), sigma=(0, 0))), dataset / 255)


def test_apply_jitter_stays_within_zero_and_one(dino: ViewsConfig, bare: ViewsConfig):
    out = changed(dino, noise(200, 2, 3, 12, 12), mean=bare.mean, std=bare.std)
    assert out.min() >= 0 and out.max() <= 1 + 1e-6
    assert math.isfinite(out.sum())
