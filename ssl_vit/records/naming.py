"""What reports and files call a network, a set of pictures, and the record of one on the other."""

from __future__ import annotations

import re
from pathlib import Path

from ssl_vit.config_evaluation import EvalDataConfig, LabelledConfig
from ssl_vit.data.files import SPLITS
from ssl_vit.data.pictures import printable
from ssl_vit.models.weights import LoadedBackbone


def record_path(task: str, config: LabelledConfig, loaded: LoadedBackbone) -> Path:
    """Where a record goes by default: `eval/` of the run; without a run the current folder, the network in its name."""
    parts = [task, data_name(config.data)]
    if loaded.run is None:
        parts.append(model_name(loaded, config.checkpoint, config.weights))
    else:
        parts += _variant(config.checkpoint, config.weights)
    folder = Path() if loaded.run is None else loaded.run / "eval"
    return folder / f"{'-'.join(part[:80] for part in parts)}.json"


def data_name(data: EvalDataConfig) -> str:
    """What reports call the pictures: the torchvision data set, or the folder above train/, val/ and test/.

    One of these alone is called by both names, as `lab-train`; two of different data sets are, too, as `lab-field`.
    """
    if data.source != "folder" and data.source != "shards":
        return data.source
    folder = (data.root or data.train or Path()).resolve()
    if data.test is None:
        return printable(f"{folder.parent.name}-{folder.name}" if folder.name in SPLITS else folder.name)
    names = [path.parent.name if path.name in SPLITS else path.name for path in (folder, data.test.resolve())]
    return printable(names[0] if names[0] == names[1] else "-".join(names))


def model_name(loaded: LoadedBackbone, checkpoint: str, which: str) -> str:
    """What tables and file names call a network: its run; else its timm name, or its file's with a part of its hash."""
    if loaded.run is not None:
        return "-".join([loaded.run.resolve().name, *_variant(checkpoint, which)])
    kind, colon, name = checkpoint.partition(":")
    if loaded.sha256 is not None:
        name = f"{Path(checkpoint).stem}-{loaded.sha256[:8]}{'-student' if which == 'student' else ''}"
    elif not colon:
        name = checkpoint
    elif kind == "random":
        name = f"random-{Path(name).name}"
    return re.sub(r"[^\w.+-]+", "-", name)


def _variant(checkpoint: str, which: str) -> list[str]:
    """What tells apart the networks of one run: another checkpoint than the last, the student."""
    file = Path(checkpoint)
    kept = [file.stem] if file.suffix == ".ckpt" and file.stem != "last" else []
    return [*kept, *(["student"] if which == "student" else [])]
