"""Draw what a run will see, before it is started: images of its first step, their views, what SiT makes of them.

    python tools/show_views.py data.root=photos out=views.png
    python tools/show_views.py data.root=photos method=sit count=8 out=sit.png

Takes every key of `ssl-vit pretrain`, and `out` (an image file) and `count` (images, 6 by default).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from ssl_vit.commands.load_config import load_config
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.data.dataset import SkippedImageLog
from ssl_vit.data.dataset_factory import build_dataset
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.first_step_views import RunSettings, load_first_step
from ssl_vit.visualization.views_figure import views_sheet


def main(words: list[str]) -> None:
    """Read the words, draw the sheet, say where it is."""
    own = {"out": "views.png", "count": "6"}
    own |= {key: value for key, _, value in (word.partition("=") for word in words) if key in own}
    config = load_config("pretrain", [word for word in words if word.partition("=")[0] not in own], PretrainConfig)
    settings = RunSettings.model_validate(config.model_dump())
    with tempfile.TemporaryDirectory() as folder:
        skipped = SkippedImageLog(Path(folder) / "skipped_images.txt")
        seen = load_first_step(
            settings, build_dataset(config.data.source, config.data.root), count=int(own["count"]), skipped=skipped
        )
    views_sheet(seen).save(own["out"])
    print(f"{len(seen)} images, method={config.method.name}: {own['out']}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
