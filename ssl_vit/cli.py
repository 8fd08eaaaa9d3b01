"""`ssl-vit <command> [key=value ...]`: the table of commands. Nothing heavy is imported before one is chosen."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
import warnings
from typing import NamedTuple

from ssl_vit import __version__
from ssl_vit.runtime.atomic_io import DISK_FULL_ERRNOS
from ssl_vit.runtime.errors import AllRanksError, RankFinished, UserError
from ssl_vit.runtime.launch import is_rank_zero


class Command(NamedTuple):
    """What the overview says of a command; its code is `main` of `ssl_vit/commands/<name>.py`."""

    summary: str
    example: str


COMMANDS = {
    "demo": Command("the whole product in a few minutes, on images it makes itself", "ssl-vit demo"),
    "pretrain": Command(
        "pretrain a ViT on a folder of images, without labels",
        "ssl-vit pretrain data.root=photos method=dino backbone=vit_small run.name=photos",
    ),
    "knn": Command("kNN accuracy of the frozen features", "ssl-vit knn checkpoint=runs/photos data.root=labeled"),
    "linear": Command("linear probe on the frozen features", "ssl-vit linear checkpoint=runs/photos data.root=labeled"),
    "compare": Command(
        "records of several models in one table, with paired tests", "ssl-vit compare runs/dino runs/sit"
    ),
    "neighbors": Command(
        "the nearest images of an image, drawn side by side",
        "ssl-vit neighbors checkpoint=runs/photos data.root=photos images=photo.jpg",
    ),
    "features": Command(
        "describe images once, for all evaluations and other tools",
        "ssl-vit features checkpoint=runs/photos data.root=photos to=npz out=features.npz",
    ),
    "fewshot": Command(
        "accuracy with few labels: 1 to 25 of each class, 1 to 10 %",
        "ssl-vit fewshot checkpoint=runs/photos data.root=labeled",
    ),
    "transfer": Command(
        "a table of models by labeled data sets: linear probes of each on each",
        "ssl-vit transfer 'checkpoints=[runs/a,runs/b]' 'data.roots=[labeled/a,labeled/b]'",
    ),
    "finetune": Command(
        "train the whole model with labels, and test it once",
        "ssl-vit finetune checkpoint=runs/photos data.root=labeled run.name=photos-ft",
    ),
    "attention": Command(
        "what the [CLS] token looks at: maps, masks, overlays",
        "ssl-vit attention checkpoint=runs/photos images=photos out=maps",
    ),
    "video": Command(
        "what the [CLS] token looks at in every frame of a video, as a video",
        "ssl-vit video checkpoint=runs/photos video=clip.mp4 out=overlay.mp4",
    ),
    "propagate": Command(
        "carry the masks of a video's first frame through the others; scores on DAVIS",
        "ssl-vit propagate checkpoint=runs/photos davis=DAVIS split=val",
    ),
    "inspect": Command(
        "what is inside the model: attention, weights and features as panels and arrays",
        "ssl-vit inspect checkpoint=runs/photos images=photos out=inspect",
    ),
    "report": Command(
        "a run as one page: scores, curves, attention, neighbors, a map of the features",
        "ssl-vit report run=runs/photos",
    ),
    "export": Command("weights that bare timm loads", "ssl-vit export checkpoint=runs/photos out=backbone.safetensors"),
    "scan": Command("what is in an image folder, broken files included", "ssl-vit scan data.root=photos"),
    "bench": Command(
        "how fast a configuration trains here, where the time goes, and how two compare",
        "ssl-vit bench data.root=photos 'compare_to=[trainer.precision=32-true]'",
    ),
    "shard": Command("tar shards of an image folder (WebDataset layout)", "ssl-vit shard data.root=photos out=shards"),
}


def main(words: list[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 for a mistake of the user's, 130 after Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # no name of a file, of any bytes, can stop a command
    words = sys.argv[1:] if words is None else words
    name, *rest = words or ["help"]
    try:
        if name in ("--help", "-h", "help"):
            print(overview(), flush=True)
            return 0
        if name == "--version":
            print(__version__)
            return 0
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; choose one of {', '.join(COMMANDS)}"
            raise UserError(f"there is no such command{hint}")
        if {"--help", "-h"} & set(rest):
            from ssl_vit.commands.help import help_text

            print(help_text(name, COMMANDS[name].summary, COMMANDS[name].example, rest), flush=True)
            return 0
        if "--cfg" in rest:
            from ssl_vit.commands.load_config import compose_config, to_yaml

            print(to_yaml(compose_config(name, [word for word in rest if word != "--cfg"])), flush=True)
            return 0
        # What Pillow warns of is read all the same, or ends as a skipped image.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        if name == "pretrain" and "--multirun" in rest:
            importlib.import_module("ssl_vit.commands.sweep").main(rest)
            return 0
        from ssl_vit.commands.load_config import CONFIG_CLASSES, load_config

        config = load_config(
            name, rest, CONFIG_CLASSES[name]
        )  # mistakes are told before torch is imported, seconds later
        command = importlib.import_module(f"ssl_vit.commands.{name}")
        command.main(rest if name == "bench" else config)  # bench makes a second configuration of the words
    except RankFinished:
        return 0
    except UserError as error:
        if is_rank_zero() or not isinstance(error, AllRanksError):
            print(f"ssl-vit {name}: {error}", file=sys.stderr)
        return 2
    except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:  # of a place to write to
        print(f"ssl-vit {name}: {error.filename}: {error.strerror}; name another place", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
        print(
            f"ssl-vit {name}: {error.filename or 'a file'}: {error.strerror}; make room and try again", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        sys.excepthook = lambda *_: None  # threads that the stop has cut off have nothing to tell
        print(f"\nssl-vit {name}: stopped", file=sys.stderr)
        return 130
    return 0


def overview() -> str:
    """The commands with an example each."""
    lines = [f"ssl-vit {__version__}: self-supervised vision transformers from your own images", ""]
    for name, command in COMMANDS.items():
        lines += [f"  {name:<10} {command.summary}", f"  {'':<10} $ {command.example}", ""]
    lines.append("ssl-vit <command> --help explains every key of a command.")
    return "\n".join(lines)
