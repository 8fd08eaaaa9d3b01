"""`ssl-vit features`: describe pictures once, for every evaluation and for other tools.

ssl-vit features checkpoint=runs/photos data.root=labelled
ssl-vit features checkpoint=runs/photos data.train=unlabelled to=npz out=features.npz
ssl-vit features checkpoint=runs/photos data.root=labelled to=parquet out=features.parquet pca=true
torchrun --nproc-per-node=8 -m ssl_vit features checkpoint=runs/photos data.root=labelled
"""

from __future__ import annotations

from ssl_vit.config_evaluation import FeaturesConfig
from ssl_vit.data.find import LabelledSplit, find_described
from ssl_vit.data.pictures import printable
from ssl_vit.errors import PartDone
from ssl_vit.evaluation.export import Part, check_pyarrow, write_npz, write_parquet
from ssl_vit.evaluation.features import NetworkTokens, a_few, check_health, on_best_device
from ssl_vit.evaluation.filling import Filled
from ssl_vit.evaluation.study import load_network, stored
from ssl_vit.losses.diversity import effective_rank, spread
from ssl_vit.processes import place_in_launch


def main(config: FeaturesConfig) -> None:
    """Run the command."""
    if config.to == "parquet":
        check_pyarrow()
    loaded, transform = load_network(config)
    pictures = find_described(config.data)
    blocks = min(config.blocks, len(loaded.backbone.vit.blocks))
    describe = NetworkTokens(on_best_device(loaded), transform, blocks=blocks)
    sets = stored(describe, pictures, config=config, run=loaded.run)
    if place_in_launch()[0]:
        raise PartDone
    parts = []
    for name, found in zip(LabelledSplit._fields, sets, strict=False):
        features = found.store.features(blocks=blocks)
        check_health(features, loaded.source)
        parts.append(Part(name, found.store.pictures, features))
        print(_report(parts[-1], found))
    if config.out is not None and config.to == "npz":
        write_npz(config.out, parts)
    elif config.out is not None:
        write_parquet(config.out, parts, pca=config.pca)
    if config.out is not None:
        print(f"\n{printable(config.out)}: {config.out.stat().st_size / 1e6:,.1f} MB")


def _report(part: Part, found: Filled) -> str:
    """What there is of one set of pictures."""
    folder, last = found.store.folder, a_few(part.features.cls[:, -1], 25_600)
    lines = [
        f"{part.name}: {part.pictures.describe()}",
        f"described now at {found.new / found.seconds:,.0f} pictures/s" if found.new else "all described before",
        f"[CLS] of the last {part.features.cls.shape[1]} blocks and mean patch, {last.shape[1]} numbers each, float16",
        f"spread {float(spread(last)):.3f}, effective rank {float(effective_rank(last)):.1f} (last [CLS])",
        f"{sum(file.stat().st_size for file in folder.iterdir()) / 1e6:,.1f} MB in {printable(folder)}",
    ]
    if missing := len(part.pictures) - len(part.features.index):
        lines.append(f"{missing:,} pictures could not be read: {printable(found.store.skipped.path)}")
    return "\n  ".join(lines)
