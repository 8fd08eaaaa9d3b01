"""Fast forms of the blocks compute the same: attention by products, activation checkpointing, compilation."""

import copy
import shutil

import pytest
import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block

from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.methods.heads import Prototypes
from ssl_vit.methods.schedules import make_plan
from ssl_vit.models.attention import matmul_attention, set_attention_impl
from ssl_vit.models.backbone import Backbone
from ssl_vit.runtime.launch import disable_malloc_trim
from ssl_vit.runtime.rng import sample_keys
from ssl_vit.training.trainer import build_method


def tiny(**changes):
    settings = {"img_size": 32, "patch_size": 8, "in_chans": 3, "reg_tokens": 0, "drop_path": 0.0, "init": "timm"}
    sizes = {"embed_dim": 32, "depth": 3, "num_heads": 2}
    return BackboneConfig(name="vit_tiny_patch16_224", **(settings | sizes | changes))


def pass_of(backbone, images, keys, *, autocast=False):
    """[CLS] of two resolutions in one step, as DINO has them, and the gradients by name."""
    backbone.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        cls = torch.cat([backbone(x, key).cls for x, key in zip(images, keys, strict=True)])
    cls.float().square().sum().backward()
    return cls.detach(), {name: p.grad.clone() for name, p in backbone.named_parameters()}


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(n, 3, s, s, generator=generator) for n, s in ((4, 32), (6, 16))]
    return images, [sample_keys(0, 0, torch.arange(len(x))) for x in images]


# --- attention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "width"), [(1, 1, 1, 4), (2, 5, 3, 8), (3, 17, 2, 16), (2, 65, 3, 64)]
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_matmul_attention_and_its_gradient_equal_the_formula(batch, tokens, heads, width, dtype, tolerance):
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(batch, tokens, 3, heads, width, generator=generator, dtype=torch.float64, requires_grad=True)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    textbook = torch.stack([torch.softmax(q[:, h] @ k[:, h].mT / width**0.5, -1) @ v[:, h] for h in range(heads)], 2)
    ours = matmul_attention(qkv.to(dtype), width**-0.5)
    assert ours.shape == (batch, tokens, heads * width)
    weight = torch.randn(textbook.shape, generator=generator, dtype=torch.float64)
    (expected,) = torch.autograd.grad((textbook * weight).sum(), qkv)
    (gradient,) = torch.autograd.grad((ours.view_as(textbook).double() * weight).sum(), qkv)
    torch.testing.assert_close(ours.double(), textbook.flatten(2), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("autocast", [False, True])
def test_set_attention_impl_computes_as_timm(inputs, autocast):
    ours, timms = (Backbone(tiny()).train() for _ in range(2))
    timms.load_state_dict(ours.state_dict())
    ours.set_fused_attention(False)
    for block in timms.vit.blocks:
        block.attn.fused_attn = False
    images, keys = inputs
    if not autocast:
        ours, timms, images = ours.double(), timms.double(), [x.double() for x in images]
    (cls, gradients), (expected, theirs) = (pass_of(x, images, keys, autocast=autocast) for x in (ours, timms))
    tolerance = 0.05 if autocast else 1e-7  # positions are interpolated in float32
    torch.testing.assert_close(cls, expected, rtol=tolerance, atol=tolerance)
    for name, gradient in theirs.items():
        assert (gradients[name] - gradient).abs().max() <= tolerance * gradient.abs().max().clamp(min=1e-3), name


def test_matmul_attention_keeps_its_dtype_under_gpu_autocast():
    """On a GPU, autocast computes a softmax in float32."""
    from tests.reference.fake_gpu import FakeGPU

    with FakeGPU(), torch.autocast("cuda", torch.bfloat16):
        qkv = torch.zeros(2, 5, 3, 2, 8, dtype=torch.bfloat16).to("cuda", non_blocking=True).requires_grad_()
        out = matmul_attention(qkv, 0.5)
        (gradient,) = out.grad_fn.apply(torch.empty_like(out))[:1]
    assert out.dtype == gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("extra", [{"qk_norm": True, "norm_layer": torch.nn.LayerNorm}, {"gated": True}])
def test_set_attention_impl_keeps_attention_with_extra_parts(extra):
    attention = Attention(16, num_heads=2, **extra).eval()
    x = torch.randn(2, 5, 16)
    before = attention(x)
    set_attention_impl(attention, fused=False)
    torch.testing.assert_close(attention(x), before)


def test_set_attention_impl_can_be_reversed():
    backbone = Backbone(tiny())
    images = torch.randn(2, 3, 32, 32)
    backbone.set_fused_attention(True)
    fused = backbone(images).cls
    backbone.set_fused_attention(False)
    torch.testing.assert_close(backbone(images).cls, fused, rtol=1e-4, atol=1e-5)
    backbone.set_fused_attention(True)
    assert torch.equal(backbone(images).cls, fused)


# --- recomputed activations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_activation_checkpointing_gives_the_same_gradients(inputs, autocast, drop_path):
    """With drop path too: the recomputation uses the paths of its own pass, not those of a later one."""
    plain = Backbone(tiny(drop_path=drop_path)).train()
    plain.set_fused_attention(False)
    saving = Backbone(tiny(drop_path=drop_path)).train()
    saving.load_state_dict(plain.state_dict())
    saving.set_fused_attention(False)
    saving.enable_activation_checkpointing()
    (cls, gradients), (expected, theirs) = (pass_of(x, *inputs, autocast=autocast) for x in (saving, plain))
    assert torch.equal(cls, expected)
    tolerance = 0.02 if autocast else 1e-6  # bfloat16: the gradients of two resolutions meet in another format
    for name, gradient in theirs.items():
        assert (gradients[name] - gradient).abs().max() <= tolerance * gradient.abs().max().clamp(min=1e-3), name
    assert saving.state_dict().keys() == plain.state_dict().keys()


def test_activation_checkpointing_keeps_fewer_activations(inputs):
    def kept(backbone):
        """Return the bytes that a forward pass keeps."""
        images, keys = inputs
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            result = backbone(images[0], keys[0]).cls
        assert result.requires_grad
        return sum(event.self_cpu_memory_usage for event in profile.key_averages())

    plain = Backbone(tiny(depth=6)).train()
    saving = copy.deepcopy(plain)
    for backbone in (plain, saving):
        backbone.set_fused_attention(False)
    saving.enable_activation_checkpointing()
    assert 0 < kept(saving) < 0.7 * kept(plain)


# --- compiled blocks -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("recompute", [False, True])
def test_compile_blocks_computes_the_same_in_one_graph_per_shape(inputs, recompute, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **settings: COMPILE(f, backend="aot_eager", **settings))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = Backbone(tiny(drop_path=0.5)).train()
    compiled = Backbone(tiny(drop_path=0.5)).train()
    compiled.load_state_dict(plain.state_dict())
    compiled.compile_blocks()
    if recompute:
        compiled.enable_activation_checkpointing()
    for _ in range(2):
        (cls, gradients), (expected, theirs) = (pass_of(x, *inputs) for x in (compiled, plain))
        torch.testing.assert_close(cls, expected, rtol=1e-5, atol=1e-5)
        for name, gradient in theirs.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)
    assert compiled.state_dict().keys() == plain.state_dict().keys()  # no _orig_mod
    assert not torch._dynamo.utils.counters["graph_break"]
    # The first block has no drop path; the others share their graphs; two resolutions.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    for width in (16, 48, 64):  # torch's own limit of graphs would be passed
        other = Backbone(tiny(drop_path=0.5, embed_dim=width)).train()
        other.compile_blocks()
        pass_of(other, *inputs)


COMPILE = torch.compile


def test_configure_backbones_selects_the_attention(pretrain_config):
    def blocks_of(*words):
        config = pretrain_config(*words)
        method = build_method(config, make_plan(config, num_images=192))
        return [module for module in method.modules() if isinstance(module, Block)]

    plain = blocks_of()
    assert not any("forward" in vars(block) for block in plain)  # on a CPU nothing is compiled by itself
    assert not any(block.attn.fused_attn for block in plain)
    assert all("forward" in vars(block) for block in blocks_of("trainer.compile=true"))
    assert all("forward" in vars(block) for block in blocks_of("trainer.activation_checkpointing=true"))


# --- weights and memory ----------------------------------------------------------------------------------------


def test_prototypes_gradient_equals_autograd():
    prototypes = Prototypes(8, 30, norm_last_layer=False).double()
    z = torch.randn(5, 8, dtype=torch.float64)
    weight = torch.randn(5, 30, dtype=torch.float64)
    logits = prototypes(z)
    ours = torch.autograd.grad((logits.block(slice(None)) * weight).sum(), list(prototypes.parameters()))
    g, v = prototypes.weight_g, prototypes.weight_v
    textbook = z @ (g * torch.nn.functional.normalize(v, dim=1)).T
    named = dict(prototypes.named_parameters())
    expected = torch.autograd.grad((textbook * weight).sum(), [named[name] for name in named])
    for our, their in zip(ours, expected, strict=True):
        torch.testing.assert_close(our, their)


def test_disable_malloc_trim_keeps_freed_memory():
    """In a process of its own, as the setting is permanent."""
    import platform
    import subprocess
    import sys

    if platform.libc_ver()[0] != "glibc":
        disable_malloc_trim()  # does nothing
        return
    code = """
import resource, torch
from ssl_vit.runtime.launch import disable_malloc_trim
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(8_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
disable_malloc_trim()
faults()
print(first, faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 5_000  # 39,000 pages of 4 kB, or fewer where the system gives larger ones
    assert after < 1_000
