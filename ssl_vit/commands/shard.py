"""`ssl-vit shard`: image files into tar shards, for what outgrows one disk or a file system's patience."""

from __future__ import annotations

from ssl_vit.config.pretrain import ShardConfig
from ssl_vit.data.sources.image_folder import read_image_list, scan_image_folder
from ssl_vit.data.sources.shard_writer import write_shards


def main(config: ShardConfig) -> None:
    """Run the command."""
    find = {"folder": scan_image_folder, "list": read_image_list}[config.data.source]
    dataset = find(config.data.root)
    print(dataset.describe())
    shards = write_shards(dataset, config.out, shard_bytes=int(config.shard_mb * 1e6))
    print(f"{shards.num_images:,} images in {shards.tars:,} shards in {config.out}, {shards.bytes / 1e6:,.1f} MB")
    if count := shards.skipped.count():
        print(f"{count:,} could not be read and were left out: {shards.skipped.path} names them")
    print(f"To train on them: ssl-vit pretrain data.source=shards data.root={config.out}")
