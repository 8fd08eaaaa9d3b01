"""Draw what a run will see, before it is started: pictures of its first step, their views, what SiT makes of them.

    python tools/show_views.py data.root=photos out=views.png
    python tools/show_views.py data.root=photos method=sit count=8 out=sit.png

Takes every key of `ssl-vit pretrain`, and `out` (a picture file) and `count` (pictures, 6 by default).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from ssl_vit.commands.compose import load_config
from ssl_vit.config import PretrainConfig
from ssl_vit.data.find import find_pictures
from ssl_vit.data.pictures import SkippedPictures
from ssl_vit.errors import UserError
from ssl_vit.inspection.settings import RunSettings
from ssl_vit.inspection.views import first_seen
from ssl_vit.inspection.views_sheet import views_sheet


def main(words: list[str]) -> None:
    """Read the words, draw the sheet, say where it is."""
    own = {"out": "views.png", "count": "6"}
    own |= {key: value for key, _, value in (word.partition("=") for word in words) if key in own}
    config = load_config("pretrain", [word for word in words if word.partition("=")[0] not in own], PretrainConfig)
    settings = RunSettings.model_validate(config.model_dump())
    with tempfile.TemporaryDirectory() as folder:
        skipped = SkippedPictures(Path(folder) / "skipped.txt")
        seen = first_seen(
            settings, find_pictures(config.data.source, config.data.root), count=int(own["count"]), skipped=skipped
        )
    views_sheet(seen).save(own["out"])
    print(f"{len(seen)} pictures, method={config.method.name}: {own['out']}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
