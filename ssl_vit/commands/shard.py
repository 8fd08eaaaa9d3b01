"""`ssl-vit shard`: write image files as tar shards, for datasets of too many files for a file system."""

from __future__ import annotations

from ssl_vit.config.pretrain import ShardConfig
from ssl_vit.data.sources.image_folder import read_image_list, scan_image_folder
from ssl_vit.data.sources.shard_writer import write_shards
from ssl_vit.runtime.text import pluralize


def main(config: ShardConfig) -> None:
    """Run the command."""
    load = {"folder": scan_image_folder, "list": read_image_list}[config.data.source]
    dataset = load(config.data.root)
    print(dataset.describe())
    shards = write_shards(dataset, config.out, shard_bytes=int(config.shard_mb * 1e6))
    written = f"{pluralize(shards.num_images, 'image')} in {pluralize(shards.tars, 'shard')}"
    print(f"{written} in {config.out}, {shards.bytes / 1e6:,.1f} MB")
    if count := shards.skipped.count():
        print(f"{pluralize(count, 'unreadable image')} skipped, listed in {shards.skipped.path}")
    print(f"To train on them: ssl-vit pretrain data.source=shards data.root={config.out}")
