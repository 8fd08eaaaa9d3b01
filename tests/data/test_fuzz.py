"""Mutated images, configurations and checkpoints: nothing but clean errors comes out."""

import copy
import functools
import io
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ssl_vit.cli import COMMANDS
from ssl_vit.commands.load_config import compose_config
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.data.dataset import UnreadableImageError
from ssl_vit.data.sources.decode import MAX_PIXELS, decode
from ssl_vit.data.transforms.color import ColorAugmentation
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.methods.schedules import make_plan
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.checkpoint import LoadedBackbone, load_backbone
from ssl_vit.runtime.errors import UserError
from ssl_vit.training.trainer import build_method
from tests.conftest import SHRUNK, SHRUNK_DINO
from tests.helpers.cli import REQUIRED, load
from tests.helpers.crops import crop_image
from tests.models.test_backbone import tiny
from tests.reference.bad_images import READABLE, encoded, pixels, png, saved, zeros

pytestmark = pytest.mark.filterwarnings(
    "error",
    *(f"ignore::{kind}" for kind in (r"UserWarning:PIL\.", "DeprecationWarning", "PIL.Image.DecompressionBombWarning")),
    "ignore::hypothesis.errors.HypothesisWarning",
)

THOROUGH = 100  # times as many examples in the slow form of a test
LONGEST = 20.0  # seconds for one mutated image, on a busy machine
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example]


def fuzz(strategy, examples):
    """A test of a property, on the same examples each time; a slow form of it tries many more."""

    def decorate(check):
        @pytest.mark.parametrize(
            "examples", [examples, pytest.param(THOROUGH * examples, marks=pytest.mark.slow)], ids=["quick", "slow"]
        )
        def test(examples, tmp_path):
            @settings(
                max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=CHECKS
            )
            @given(strategy)
            def run(example):
                check(example, tmp_path)

            run()

        return test

    return decorate


# --- images --------------------------------------------------------------------------------------------------


@st.composite
def damaged(draw, contents):
    """A file with a few bytes flipped, set, inserted, deleted, cut off, or spliced in from another one."""
    content = bytearray(draw(contents))
    for _ in range(draw(st.integers(1, 4))):
        end = min(len(content), 200) if draw(st.booleans()) else len(content)  # headers matter most
        at, length = draw(st.integers(0, max(0, end - 1))), draw(st.integers(1, 40))
        match draw(st.integers(0, 5)):
            case 0:
                content[at : at + 1] = bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in content[at : at + 1])
            case 1:
                absurd = (b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4))
                content[at : at + 4] = draw(st.sampled_from(absurd))
            case 2:
                content[at:at] = draw(st.binary(min_size=1, max_size=40))
            case 3:
                del content[at : at + length]
            case 4:
                del content[at:]
            case 5:
                other = draw(contents)
                start = draw(st.integers(0, len(other)))
                content[at : at + length] = other[start : start + length]
    return bytes(content)


@functools.cache
def good_files():
    """A file of every format, and of every compression inside of TIFF."""
    makes = {name: make for name, make in READABLE.items() if not name.startswith(("huge", "a_line", "turned"))}
    for mode, compressions in {"1": ("group3", "group4"), "RGB": ("tiff_lzw", "packbits", "zstd")}.items():
        makes |= {f"{name}.tif": saved(mode, "TIFF", compression=name) for name in compressions}
    contents = [encoded(kind) for kind in ("BMP", "PPM", "WEBP", "GIF")]
    contents += [encoded("JPEG", progressive=True), encoded("WEBP", "RGBA", lossless=True)]
    with tempfile.TemporaryDirectory() as folder:
        for name, make in makes.items():
            make(Path(folder) / name)
            contents.append((Path(folder) / name).read_bytes())
    return contents


@fuzz(damaged(st.deferred(lambda: st.sampled_from(good_files()))), examples=300)
def test_decode_of_a_damaged_image_gives_pixels_or_a_reason(content, folder):
    (folder / "x").write_bytes(content)
    start = time.monotonic()
    for channels in (1, 3):
        try:
            image = decode(folder / "x", channels)
        except UnreadableImageError as broken:
            assert broken.reason.strip()
            assert broken.reason.isprintable()
        else:
            assert image.dtype == torch.uint8
            assert image.ndim == 3
            assert image.shape[0] == channels
            assert image.numel()
    assert time.monotonic() - start < LONGEST


@pytest.mark.slow
@pytest.mark.parametrize("color", ["one bit", "gray 16", "gray and alpha", "RGB and alpha"])
def test_decode_of_the_largest_images_takes_bounded_memory(tmp_path, color):
    """A quarter of a GiB as RGB, a few kB on disk: decoding takes at most 1.5 GB."""
    bits, kind, width = {
        "one bit": (1, 0, 1 / 8), "gray 16": (16, 0, 2), "gray and alpha": (8, 4, 2), "RGB and alpha": (8, 6, 4)
    }[color]  # fmt: skip
    side = math.isqrt(MAX_PIXELS)
    row = 1 + math.ceil(side * width)
    (tmp_path / "x.png").write_bytes(png(side, side, bits=bits, color=kind, rows=zeros(row * side)))
    script = (
        "import resource, sys, pathlib; from ssl_vit.data.sources.decode import decode\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "decode(pathlib.Path(sys.argv[1]))\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "x.png"], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 1.5


# --- configurations --------------------------------------------------------------------------------------------

VALUES = (
    "nan", "inf", "-inf", ".nan", "-1", "0", "1", "2", "0.5", "1e308", "-1e308", "1e-320", "9" * 30, "true", "null",
    "[]", "{}", "[[]]", "[1,2]", "[0,0]", "[nan,inf]", "{a:1}", "'", '"', "\\", "${seed}", "${nope}", "${eval:1}", "${",
    "${oc.env:HOME}", "${method}", "a,b", "é", "\N{GRINNING FACE}", "\0", "\ud800", "0x10", "1_000", "~", "!x", "10%",
    "-5%", "1e9epochs", "9" * 20 + "d", "..d", "1.5.5h", "0.0s", "range(1,5)", "choice(1,2)", "glob(*)", "x" * 5000,
    "???", "1 2", "",
)  # fmt: skip
ODD_KEYS = (
    "hydra", "hydra.searchpath", "hydra.mode", "hydra/launcher", "method", "backbone", "recipe", "recipes", "data",
    "--config-dir", "_target_", "method._target_", "defaults", "backbone@method", "", " ", "a.b.c", "é",
    "method.views.blur.sigma.x",
)  # fmt: skip


def dotted(values, prefix=""):
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{key}.")


def command_lines():
    keys = {
        name: [*dotted(compose_config(name, REQUIRED[name], command.config_class())), *ODD_KEYS]
        for name, command in COMMANDS.items()
    }

    def words(command):
        key = st.tuples(st.sampled_from(["", "", "", "+", "++", "~", "@"]), st.sampled_from(keys[command])).map("".join)
        word = st.tuples(key, st.sampled_from(["=", "=", "=", "", "=="]), st.sampled_from(VALUES)).map("".join)
        return st.tuples(st.just(command), st.lists(word, min_size=1, max_size=3))

    return st.sampled_from([*COMMANDS, *["pretrain"] * 5]).flatmap(words)


@fuzz(st.deferred(command_lines), examples=40)
def test_load_config_of_any_overrides_is_valid_or_explains_what_is_wrong(line, folder):
    command, words = line
    try:
        config = load(command, *words)
    except UserError as error:
        assert str(error).strip()
        assert "Traceback" not in str(error)
    else:
        assert isinstance(config, COMMANDS[command].config_class())


NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 8, 16, 0.5, 1e-30, 1e-320, 1e300, 1e-3, -1, float("nan"), float("inf"), 10**30]),
    st.floats(0, 1),
    st.integers(0, 40),
)
SCALARS = st.one_of(
    NUMBERS, NUMBERS, st.sampled_from([None, True, False, "", "auto", "1 step", "10%", "2 epochs", "dino"])
)
ANYTHING = st.one_of(
    SCALARS,
    SCALARS,
    st.lists(NUMBERS, min_size=2, max_size=2),
    st.lists(SCALARS, max_size=4),
    st.dictionaries(st.text(), SCALARS, max_size=2),
)


@st.composite
def pretrain_values(draw):
    """The values of a small run, some of them replaced."""
    method = draw(st.sampled_from(["dino", "sit"]))
    words = [*SHRUNK, f"method={method}", *(SHRUNK_DINO if method == "dino" else ()), "data.root=x"]
    values = copy.deepcopy(composed(tuple(words)))
    for key in draw(st.lists(st.sampled_from(list(dotted(values))), min_size=1, max_size=3)):
        *path, last = key.split(".")
        section = values
        for name in path:
            section = section[name] if isinstance(section.get(name), dict) else {}
        section[last] = draw(ANYTHING)
    return values


@functools.cache
def composed(words):
    return compose_config("pretrain", list(words), PretrainConfig)


def small(config):
    """Whether the model and the views are built in no time."""
    backbone, method = config.backbone, config.method
    sizes = [backbone.embed_dim or 192, backbone.reg_tokens, backbone.img_size, method.views.global_crops.size]
    if method.name == "dino":
        sizes += [method.head.prototypes, method.head.hidden_dim, method.head.bottleneck_dim, method.head.layers]
        sizes += [method.views.local_crops.size, method.views.local_crops.count]
    else:
        sizes += [method.contrastive.dim, method.contrastive.hidden_dim]
    return max(sizes) <= 256 and (backbone.depth or 12) <= 12


@fuzz(pretrain_values(), examples=200)
def test_load_config_accepts_only_what_can_be_trained(values, folder):
    """Schedules, the model, the views of an image: all of them finite, or a clean error before."""
    try:
        config = PretrainConfig.model_validate(values)
    except ValidationError:
        return
    assume(small(config))
    try:
        plan = make_plan(config, num_images=100)
        method = build_method(config, plan)
    except UserError:
        return
    for name, schedule in method.schedules.items():
        points = [schedule(step) for step in (0, 1, plan.total_steps // 2, plan.total_steps)]
        assert np.isfinite(points).all(), name
    image = torch.from_numpy(pixels()).permute(2, 0, 1)[: config.backbone.in_chans].contiguous()
    key = torch.zeros(1, dtype=torch.int64)
    global_views, _ = crop_image(MultiCrop(config.method.views), image, key[0])
    views = ColorAugmentation(config.method.views)(global_views[None], key)
    assert views.isfinite().all()


# --- checkpoints -----------------------------------------------------------------------------------------------


@functools.cache
def checkpoint():
    """The content of a small checkpoint of ours."""
    torch.manual_seed(0)
    backbone = Backbone(tiny(embed_dim=16, depth=1))
    about = {"backbone": backbone.config.model_dump(mode="json"), "mean": [0.5] * 3, "std": [0.2] * 3}
    state = {f"student.backbone.vit.{name}": value for name, value in backbone.vit.state_dict().items()}
    return {"ssl_vit": about, "state_dict": state, "global_step": 1}


@functools.cache
def checkpoint_files():
    files = []
    for new in (True, False):
        buffer = io.BytesIO()
        torch.save(checkpoint(), buffer, _use_new_zipfile_serialization=new)
        files.append(buffer.getvalue())
    return files


def loads_or_refuses(path):
    try:
        loaded = load_backbone(str(path))
    except UserError as error:
        assert str(error).strip()
    else:
        assert isinstance(loaded, LoadedBackbone)


@fuzz(damaged(st.deferred(lambda: st.sampled_from(checkpoint_files()))), examples=100)
def test_load_backbone_of_a_damaged_checkpoint_loads_or_refuses(content, folder):
    (folder / "x.ckpt").write_bytes(content)
    loads_or_refuses(folder / "x.ckpt")


@st.composite
def odd_contents(draw):
    """A checkpoint with some of its entries replaced or renamed, at any depth."""
    content = copy.deepcopy(checkpoint())
    sections = [content, content["ssl_vit"], content["ssl_vit"]["backbone"], content["state_dict"]]
    for _ in range(draw(st.integers(1, 2))):
        section = draw(st.sampled_from(sections))
        key = draw(st.sampled_from(list(section)))
        new = draw(st.sampled_from([key, key, 3, "x", "model", "teacher"]))
        tensor = st.sampled_from([torch.zeros(()), torch.zeros(0), torch.zeros(2, 2), torch.zeros(3).to_sparse()])
        value = draw(st.one_of(ANYTHING, tensor, st.just(section[key])))
        del section[key]
        section[new] = value
    return content


@fuzz(odd_contents(), examples=100)
def test_load_backbone_of_odd_contents_loads_or_refuses(content, folder):
    torch.save(content, folder / "x.ckpt")
    loads_or_refuses(folder / "x.ckpt")
