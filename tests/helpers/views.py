"""Load the views of the first training step of a configuration."""

from pathlib import Path

from ssl_vit.commands.run_figures import pretext_of
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog
from ssl_vit.visualization.first_step_views import FirstStepViews, RunSettings, load_first_step


def settings_of(config: PretrainConfig) -> RunSettings:
    """Return the settings that a run of this configuration stores."""
    return RunSettings.model_validate(config.model_dump())


def load_views(config: PretrainConfig, dataset: ImageDataset, folder: Path, count: int = 6) -> list[FirstStepViews]:
    """Load the first images with their views; unreadable images are listed in `folder`."""
    settings, skipped = settings_of(config), SkippedImageLog(folder / "skipped_images.txt")
    return load_first_step(settings, dataset, pretext_of(settings.method), count=count, skipped=skipped)
