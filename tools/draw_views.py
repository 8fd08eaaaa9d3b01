"""Draw the views of the first training step before a run is started, with the inputs and targets of SiT.

    python tools/draw_views.py data.root=photos out=views.png
    python tools/draw_views.py data.root=photos method=sit count=8 out=sit.png

Takes every key of `ssl-vit pretrain`, `out` (an image file) and `count` (number of images, 6 by default).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from ssl_vit.commands.load_config import load_config
from ssl_vit.commands.run_figures import pretext_of
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.data.dataset import SkippedImageLog
from ssl_vit.data.dataset_factory import build_dataset
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.first_step_views import RunSettings, load_first_step, views_figure


def main(argv: list[str]) -> None:
    """Draw the figure and print its path."""
    own = {"out": "views.png", "count": "6"}
    own |= {key: value for key, _, value in (argument.partition("=") for argument in argv) if key in own}
    overrides = [argument for argument in argv if argument.partition("=")[0] not in own]
    config = load_config("pretrain", overrides, PretrainConfig)
    settings = RunSettings.model_validate(config.model_dump())
    dataset = build_dataset(config.data.source, config.data.root)
    with tempfile.TemporaryDirectory() as directory:
        skipped = SkippedImageLog(Path(directory) / "skipped_images.txt")
        pretext = pretext_of(settings.method)
        examples = load_first_step(settings, dataset, pretext, count=int(own["count"]), skipped=skipped)
    views_figure(examples).save(own["out"])
    print(f"{len(examples)} images, method={config.method.name}: {own['out']}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
