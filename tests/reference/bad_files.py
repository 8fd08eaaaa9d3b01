"""Checkpoints, safetensors files, JSON and YAML that would run code, or make a careless reader fall over."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Mark:
    """Creates a file when it is unpickled: the proof that code ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def in_torch_zip(path: Path, mark: Mark) -> None:
    torch.save({"ssl_vit": {}, "state_dict": {}, "hook": mark}, path)


def in_legacy_file(path: Path, mark: Mark) -> None:
    torch.save({"ssl_vit": {}, "hook": mark}, path, _use_new_zipfile_serialization=False)


def bare_pickle(path: Path, mark: Mark) -> None:
    path.write_bytes(pickle.dumps(mark))


def as_module(path: Path, mark: Mark) -> None:
    """A whole model, which weights_only refuses as well."""
    torch.save(torch.nn.Linear(2, 2), path)


def zip_of_torchscript(path: Path, mark: Mark) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/code/__torch__.py", f"import os\nos.mkdir({str(mark.path)!r})\n")
        archive.writestr("archive/data.pkl", pickle.dumps(mark))
        archive.writestr("archive/constants.pkl", pickle.dumps(mark))
        archive.writestr("archive/version", "3")


def build_instruction(path: Path, mark: Mark) -> None:
    """A pickle that sets the state of an allowed class by hand."""
    script = b"\x80\x02cargparse\nNamespace\n)\x81}X\x01\x00\x00\x00acos\nmkdir\nsb."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", script)
        archive.writestr("archive/version", "3")


CHECKPOINTS: dict[str, Callable[[Path, Mark], None]] = {
    "torch zip": in_torch_zip,
    "torch legacy": in_legacy_file,
    "bare pickle": bare_pickle,
    "whole module": as_module,
    "TorchScript": zip_of_torchscript,
    "hidden in a Namespace": build_instruction,
}


BACKBONE: dict[str, Any] = {
    "name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "in_chans": 3, "reg_tokens": 0, "drop_path": 0.0,
    "embed_dim": 64, "depth": 1, "num_heads": 1, "init": "timm",
}  # fmt: skip


def plain(**changes: Any) -> Callable[[Path, Mark], None]:
    """A checkpoint of ours, of plain containers, but of the wrong kind."""
    content = {"ssl_vit": {"backbone": BACKBONE, "mean": [0.5] * 3, "std": [0.5] * 3}, "state_dict": {}}
    return lambda path, mark: torch.save(content | changes, path)


CHECKPOINTS |= {
    "empty entry": plain(ssl_vit={}),
    "a number for an entry": plain(ssl_vit=3),
    "no weights": plain(),
    "no backbone": plain(ssl_vit={"backbone": {}, "mean": [0.5], "std": [0.5]}),
    "a model of 10^14 numbers": plain(
        ssl_vit={"backbone": BACKBONE | {"embed_dim": 640_000, "img_size": 80_000}, "mean": [0.5] * 3, "std": [0.5] * 3}
    ),
    "a list of weights": plain(state_dict=[1]),
    "numbers for names": plain(state_dict={3: torch.zeros(1)}),
    "texts for weights": plain(state_dict={"teacher.backbone.vit.norm.weight": "x"}),
    "numbers for all names": lambda path, mark: torch.save({1: torch.zeros(1)}, path),
    "odd shapes": lambda path, mark: torch.save(
        {"cls_token": torch.zeros(1), "pos_embed": torch.zeros(1), "patch_embed.proj.weight": torch.zeros(1)}, path
    ),
    "no width": lambda path, mark: torch.save(
        {
            "cls_token": torch.zeros(1, 1, 0),
            "pos_embed": torch.zeros(1, 0, 0),
            "patch_embed.proj.weight": torch.zeros(0, 3, 0, 0),
        },
        path,
    ),
    "half a SiT file": lambda path, mark: torch.save({"contrastive_token": torch.zeros(1)}, path),
}


def header(size: int, content: bytes, rest: bytes = b"") -> bytes:
    return struct.pack("<Q", size) + content + rest


def described(entries: dict[str, Any], rest: bytes = b"\0" * 4) -> bytes:
    text = json.dumps(entries).encode()
    return header(len(text), text, rest)


def one(name: str = "norm.weight", **changes: Any) -> dict[str, Any]:
    return {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes}


# From the bytes of a good file and the mark to those of a bad one.
SAFETENSORS: dict[str, Callable[[bytes, Mark], bytes]] = {
    "empty": lambda good, mark: b"",
    "a header of 2^63 bytes": lambda good, mark: header(2**63, good[8:]),
    "a header of no JSON": lambda good, mark: header(10, b"x" * 10),
    "a header of nested lists": lambda good, mark: header(200_000, b"[" * 100_000 + b"]" * 100_000),
    "code for metadata": lambda good, mark: described(
        one() | {"__metadata__": {"hook": f"__import__('os').mkdir({str(mark.path)!r})"}}
    ),
    "offsets out of range": lambda good, mark: described(one(data_offsets=[0, 2**40], shape=[2**38])),
    "negative offsets": lambda good, mark: described(one(data_offsets=[-4, 0])),
    "overlapping weights": lambda good, mark: described(one("a") | one("b")),
    "a shape of 2^64": lambda good, mark: described(one(shape=[2**32, 2**32])),
    "the same name twice": lambda good, mark: header(
        (text := b"{" + json.dumps(one())[1:-1].encode() + b"," + json.dumps(one())[1:-1].encode() + b"}")
        and len(text),
        text,
        b"\0" * 4,
    ),
    "an unknown type": lambda good, mark: described(one(dtype="OBJECT")),
    "a pickle": lambda good, mark: pickle.dumps(mark),
    "cut": lambda good, mark: good[:-100],
    "longer": lambda good, mark: good + b"\0" * 100,
    "another model's": lambda good, mark: described(one()),
}

# From the good JSON beside a safetensors file and the mark to a bad one.
SIDECARS: dict[str, Callable[[dict[str, Any], Mark], str]] = {
    "no JSON": lambda good, mark: "nonsense",
    "nothing": lambda good, mark: "",
    "a number": lambda good, mark: "1",
    "nested lists": lambda good, mark: "[" * 100_000 + "]" * 100_000,
    "no model": lambda good, mark: json.dumps(good | {"backbone": None}),
    "a size of nothing": lambda good, mark: json.dumps(good | {"backbone": good["backbone"] | {"depth": 0}}),
    "infinite drop path": lambda good, mark: json.dumps(
        good | {"backbone": good["backbone"] | {"drop_path": float("inf")}}
    ),
    "a mean of text": lambda good, mark: json.dumps(
        good | {"normalization": {"mean": "x", "std": f"__import__('os').mkdir({str(mark.path)!r})"}}
    ),
    "a mean of one channel": lambda good, mark: json.dumps(good | {"normalization": {"mean": [0.5], "std": [0.5]}}),
    "a std of zero": lambda good, mark: json.dumps(good | {"normalization": {"mean": [0.5] * 3, "std": [0.0] * 3}}),
}


def yaml_tags(mark: Mark) -> list[str]:
    """YAML values that an unsafe loader would turn into a folder."""
    return [
        f"!!python/object/apply:os.mkdir ['{mark.path}']",
        f"!!python/object/new:os.mkdir ['{mark.path}']",
        "!!python/name:os.mkdir",
        f'!!python/object/apply:builtins.exec ["import os; os.mkdir({str(mark.path)!r})"]',
        "!!python/module:antigravity",
    ]


def recipe(text: str) -> bytes:
    return f"# @package _global_\n{text}\n".encode()


RECIPES: dict[str, Callable[[Mark], bytes]] = {
    **{
        f"yaml tag {i}": (lambda mark, i=i: recipe(f"seed: {yaml_tags(mark)[i]}"))
        for i in range(len(yaml_tags(Mark(Path()))))
    },
    "_target_": lambda mark: recipe(f"_target_: os.mkdir\n_args_: ['{mark.path}']"),
    "_target_ in a section": lambda mark: recipe(f"method: {{_target_: os.mkdir, _args_: ['{mark.path}']}}"),
    "a callback of Hydra": lambda mark: recipe(
        f"hydra: {{callbacks: {{x: {{_target_: os.mkdir, path: '{mark.path}'}}}}}}\nseed: x"
    ),
    "a job of Hydra": lambda mark: recipe(f"hydra: {{launcher: {{_target_: os.mkdir, path: '{mark.path}'}}}}\nseed: x"),
    "eval": lambda mark: recipe(f'seed: ${{eval:\'__import__("os").mkdir("{mark.path}")\'}}'),
    "an unset variable": lambda mark: recipe("seed: ${oc.env:NO_SUCH_VARIABLE_AT_ALL}"),
    "a loop of references": lambda mark: recipe("seed: ${data.batch_size}\ndata: {batch_size: '${seed}'}"),
    "a search path": lambda mark: recipe("hydra: {searchpath: ['pkg://antigravity']}\nseed: x"),
    "a list": lambda mark: b"[1, 2]",
    "a text": lambda mark: b"text",
    "no text": lambda mark: b"\xff\xfe\x00\x01",
    "a bad character": lambda mark: b"seed: \x07",
    "nested lists": lambda mark: recipe("seed: " + "[" * 5000 + "]" * 5000),
    "defaults of a number": lambda mark: recipe("defaults: 5"),
    "defaults of numbers": lambda mark: recipe("defaults: [5, {a: 6}, null]"),
    "defaults of itself": lambda mark: recipe("defaults: [evil]"),
    "defaults above": lambda mark: recipe("defaults: ['../../../../etc/passwd']"),
    "an unclosed bracket": lambda mark: recipe("seed: [1"),
    "a cut reference": lambda mark: recipe("seed: ${"),
}

CONFIGS: dict[str, Callable[[Mark], str]] = {
    "yaml tag": lambda mark: f"seed: {yaml_tags(mark)[0]}",
    "no YAML": lambda mark: "seed: [1",
    "a list": lambda mark: "[1, 2]",
    "nothing": lambda mark: "",
    "aliases without end": lambda mark: "a: &a [*a]",
    "a bomb of aliases": lambda mark: "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}' if i else '1'] * 9)}]\n" for i in range(9)
    ),
    "5,000 levels": lambda mark: f"a: {'[' * 5000}{']' * 5000}",
    "an integer of 6,000 digits": lambda mark: f"seed: {'9' * 6000}",
    "a text for a number": lambda mark: "trainer: {max_epochs: many, max_steps: null}",
}
