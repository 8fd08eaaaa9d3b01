"""`ssl-vit shard`: picture files into tar shards, for what outgrows one disk or a file system's patience."""

from __future__ import annotations

from ssl_vit.config import ShardConfig
from ssl_vit.data.files import folder_pictures, listed_pictures
from ssl_vit.data.sharding import write_shards


def main(config: ShardConfig) -> None:
    """Run the command."""
    find = {"folder": folder_pictures, "list": listed_pictures}[config.data.source]
    pictures = find(config.data.root)
    print(pictures.describe())
    shards = write_shards(pictures, config.out, shard_bytes=int(config.shard_mb * 1e6))
    print(f"{shards.pictures:,} pictures in {shards.tars:,} shards in {config.out}, {shards.bytes / 1e6:,.1f} MB")
    if count := shards.skipped.count():
        print(f"{count:,} could not be read and were left out: {shards.skipped.path} names them")
    print(f"To train on them: ssl-vit pretrain data.source=shards data.root={config.out}")
