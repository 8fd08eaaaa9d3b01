"""SiT: its losses, its views, and the model of a checkpoint that restores images."""

import itertools
import shutil

import numpy as np
import pytest
import torch

from ssl_vit.commands.load_config import load_config
from ssl_vit.commands.pretrain import pretrain
from ssl_vit.commands.run_figures import reconstruction_figure
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.methods.base import stack_views
from ssl_vit.methods.dino import DINO
from ssl_vit.methods.schedules import make_plan
from ssl_vit.methods.sit import SiT
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.rng import sample_keys
from ssl_vit.training.trainer import build_method
from ssl_vit.visualization.first_step_views import read_run_settings
from tests.conftest import SHRUNK
from tests.helpers.methods import batch_of, run_step

SUBSETS = [on for r in (1, 2, 3) for on in itertools.combinations(("rotation", "contrastive", "reconstruction"), r)]


@pytest.mark.parametrize("on", SUBSETS, ids="+".join)
@pytest.mark.parametrize("weighting", ["uncertainty", "fixed"])
def test_sit_trains_on_any_subset_of_losses(build, on, weighting):
    """A loss that is off creates no head, no weight and no token."""
    off = [name for name in ("rotation", "contrastive", "reconstruction") if name not in on]
    method = build("method=sit", f"method.weighting={weighting}", *(f"method.{name}.enabled=false" for name in off))
    assert set(method.student.heads) == set(on)
    assert method.eval_backbone.config.reg_tokens == int("rotation" in on)
    assert len(list(method.weights.parameters())) == (len(on) if weighting == "uncertainty" else 0)
    result = run_step(method, batch_of(method.config.views))
    result.loss.backward()
    assert result.loss.isfinite()
    assert set(on) <= result.logs.keys()
    assert not any(name in result.logs for name in off)


def test_sit_shared_tokens_load_into_a_vanilla_vit(build):
    method = build("method=sit", "method.tokens=shared")
    assert method.eval_backbone.config.reg_tokens == 0


def test_sit_has_no_weight_decay_on_tokens_positions_and_loss_weights(build):
    method = build("method=sit")
    decayed = {name for name, parameter in method.named_parameters() if method.has_weight_decay(name, parameter)}
    undecayed = {name for name, _ in method.named_parameters()} - decayed
    for name in ("pos_embed", "cls_token", "reg_token"):
        assert f"student.backbone.vit.{name}" in undecayed
    assert {"weights.s.rotation", "weights.s.contrastive", "weights.s.reconstruction"} <= undecayed
    assert "student.backbone.vit.patch_embed.proj.weight" in decayed


def test_sit_target_is_the_rotated_view_and_input_the_corrupted_one(build, monkeypatch):
    method = build("method=sit")
    batch = batch_of(method.config.views)
    views = method.color_augmentation(batch.global_views, batch.key)
    clean, corrupted, mask, quarter = method.pretext_views(method.config, views, batch.key)
    for image, original, turns in zip(clean, stack_views(views), quarter.tolist(), strict=True):
        torch.testing.assert_close(image, torch.rot90(original, -turns, (1, 2)))  # clockwise
    assert corrupted.shape == clean.shape
    assert mask.shape == (len(clean), 1, *clean.shape[2:])
    assert 0.05 < mask.float().mean() < 0.5
    seen = []
    forward = method.student.forward
    monkeypatch.setattr(method.student, "forward", lambda images, key: seen.append(images) or forward(images, key))
    method.step(views, views[:, :0], batch)
    torch.testing.assert_close(seen[0], corrupted)


def test_sit_rotations_are_balanced_and_independent_between_views(build):
    method = build("method=sit")
    keys = sample_keys(0, 0, torch.arange(4000))
    first, second = method.pretext_views(method.config, torch.zeros(4000, 2, 1, 1, 1), keys).quarter.chunk(2)
    joint = torch.bincount(4 * first + second, minlength=16) / 4000
    assert (joint - 1 / 16).abs().max() < 0.02


def test_sit_overfits_a_few_images(build):
    """Rotation is learned and the reconstruction gets better: the three heads are wired to the right tokens."""
    method = build("method=sit", "backbone.embed_dim=64", "method.views.jitter.p=0.0")
    batch = batch_of(method.config.views, count=8)
    smooth = torch.nn.functional.interpolate(batch.global_views.flatten(0, 1)[:, :, :3, :3].float(), (48, 48))
    batch = batch._replace(global_views=smooth.to(torch.uint8).unflatten(0, (8, 2)))
    optimizer = torch.optim.AdamW(method.parameters(), lr=2e-3)
    losses = []
    for _ in range(120):
        result = run_step(method, batch)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        losses.append({name: float(value) for name, value in result.logs.items()})
    assert losses[-1]["reconstruction"] < 0.7 * losses[0]["reconstruction"]
    assert np.mean([row["rotation_accuracy"] for row in losses[-10:]]) > 0.8
    assert np.mean([row["contrastive"] for row in losses[-10:]]) < losses[0]["contrastive"]


def test_sit_noise_differs_between_the_micro_batches_of_a_step(build):
    method = build("method=sit")
    views = torch.zeros(4, 2, 3, 48, 48)
    keys = sample_keys(0, 0, torch.arange(8)).split(4)
    first, again, other = (method.pretext_views(method.config, views, keys[part]).corrupted for part in (0, 0, 1))
    assert torch.equal(first, again)
    noisy = (first != 0) & (other != 0)
    assert noisy.sum() > 100
    assert (first == other)[noisy].float().mean() < 0.01


@pytest.fixture(scope="module")
def run(sample, tmp_path_factory):
    """Return the directory of a SiT run of three steps."""
    overrides = [*SHRUNK, "method=sit", "trainer.max_steps=3", f"data.root={sample / 'train'}"]
    overrides.append(f"run.folder={tmp_path_factory.mktemp('restoring')}")
    return pretrain(load_config("pretrain", overrides, PretrainConfig))


def test_load_figures_restores_the_model_with_its_heads(run, pretrain_config):
    config = pretrain_config("method=sit", "trainer.max_steps=3")
    restorer = SiT.load_figures(run, config.method, config.backbone)["reconstruction"]
    method = build_method(config, make_plan(config, 192))
    method.load_state_dict(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = method.student.eval()(x)[1]["reconstruction"]
    torch.testing.assert_close(restorer.restore(x), expected, rtol=1e-4, atol=1e-5)
    assert not restorer.restore(x).requires_grad


@pytest.mark.parametrize("change", ["missing", "left over", "of another shape"])
def test_load_figures_rejects_keys_that_do_not_fit(run, tmp_path, change):
    path = tmp_path / "changed.ckpt"
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    name = "student.heads.reconstruction.deconvolution.bias"
    if change == "missing":
        del content["state_dict"][name]
    elif change == "left over":
        content["state_dict"]["student.heads.color.bias"] = torch.zeros(3)
    else:
        content["state_dict"][name] = torch.zeros(4)
    torch.save(content, path)
    settings = read_run_settings(run)
    with pytest.raises(UserError, match=r"(?s)does not fit the run's config\.yaml.*heads\."):
        SiT.load_figures(path, settings.method, settings.backbone)


def test_load_figures_is_empty_without_reconstruction(run, tmp_path, pretrain_config):
    settings = read_run_settings(run)
    assert SiT.load_figures(run / "backbone.safetensors", settings.method, settings.backbone) == {}
    dino = pretrain_config()
    assert DINO.load_figures(run, dino.method, dino.backbone) == {}
    off = pretrain_config("method=sit", "method.reconstruction.enabled=false")
    assert SiT.load_figures(run, off.method, off.backbone) == {}
    shutil.copy(run / "config.yaml", tmp_path)  # without its checkpoints
    assert reconstruction_figure(tmp_path) is None
