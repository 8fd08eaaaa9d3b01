"""`ssl-vit features`: extract features once, for every evaluation and for other tools.

ssl-vit features checkpoint=runs/photos data.root=labeled
ssl-vit features checkpoint=runs/photos data.train=unlabeled to=npz out=features.npz
ssl-vit features checkpoint=runs/photos data.root=labeled to=parquet out=features.parquet pca=true
torchrun --nproc-per-node=8 -m ssl_vit features checkpoint=runs/photos data.root=labeled
"""

from __future__ import annotations

from ssl_vit.config.evaluate import FeaturesConfig
from ssl_vit.data.dataset import escape_path
from ssl_vit.data.dataset_factory import TrainTestSplit, build_feature_splits
from ssl_vit.data.value_notes import value_notes
from ssl_vit.evaluation.evaluator import fill_caches, load_model
from ssl_vit.evaluation.features.cache_writer import FillResult
from ssl_vit.evaluation.features.extractor import BackboneExtractor, on_best_device, subsample, validate_features
from ssl_vit.evaluation.features.feature_export import FeatureSplit, check_pyarrow, write_npz, write_parquet
from ssl_vit.evaluation.results.provenance import data_inputs
from ssl_vit.models.feature_statistics import effective_rank, feature_std
from ssl_vit.runtime.errors import RankFinished
from ssl_vit.runtime.launch import torchrun_rank
from ssl_vit.runtime.outputs import check_outputs, record_outputs
from ssl_vit.runtime.text import pluralize


def main(config: FeaturesConfig) -> None:
    """Run the command."""
    if config.to == "parquet":
        check_pyarrow()
    if config.out is not None and not torchrun_rank()[0]:
        check_outputs([config.out], "features", inputs=data_inputs(config.data))
    loaded, transform = load_model(config)
    dataset = build_feature_splits(config.data).with_range(config.data.range or loaded.value_range)
    blocks = min(config.blocks, loaded.backbone.num_blocks)
    extractor = BackboneExtractor(on_best_device(loaded), transform, blocks=blocks)
    filled = fill_caches(extractor, dataset, config=config, run=loaded.run)
    if torchrun_rank()[0]:
        raise RankFinished
    splits = []
    for name, result in zip(TrainTestSplit._fields, filled, strict=False):
        features = result.cache.features(blocks=blocks)
        validate_features(features, loaded.source)
        splits.append(FeatureSplit(name, result.cache.dataset, features))
        print(_summary(splits[-1], result))
    if config.out is not None:
        record_outputs([config.out], "features")
        if config.to == "npz":
            write_npz(config.out, splits)
        else:
            write_parquet(config.out, splits, pca=config.pca)
        print(f"\n{escape_path(config.out)}: {config.out.stat().st_size / 1e6:,.1f} MB")


def _summary(split: FeatureSplit, result: FillResult) -> str:
    """Describe the cached features of one dataset."""
    folder, last = result.cache.folder, subsample(split.features.cls[:, -1], 25_600)
    lines = [
        f"{split.name}: {split.dataset.describe()}",
        f"extracted at {result.new / result.seconds:,.0f} images/s" if result.new else "all from the cache",
        f"[CLS] of the last {split.features.cls.shape[1]} blocks and mean patch, {last.shape[1]} numbers each, float16",
        f"feature std {float(feature_std(last)):.3f}, effective rank {float(effective_rank(last)):.1f} (last [CLS])",
        f"{sum(file.stat().st_size for file in folder.iterdir()) / 1e6:,.1f} MB in {escape_path(folder)}",
    ]
    lines += value_notes(split.dataset)
    if missing := len(split.dataset) - len(split.features.index):
        lines.append(f"{pluralize(missing, 'image')} could not be read: {escape_path(result.cache.skipped.path)}")
    return "\n  ".join(lines)
