"""Where a run starts from: random weights, or a checkpoint that is loaded, adapted, described and kept with the run."""

from __future__ import annotations

from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.methods.base import SSLMethod
from ssl_vit.methods.continuation import MethodState, load_start_weights, prepare_continuation
from ssl_vit.models.checkpoint import START_WEIGHTS, LoadedBackbone, load_backbone, load_method_state
from ssl_vit.models.export import export_backbone
from ssl_vit.runtime.launch import is_rank_zero
from ssl_vit.training.config_check import StartFacts
from ssl_vit.training.run_dir import RunState


class Start:
    """The start of a run. A resumed run is already past it, and does not read its source again."""

    def __init__(self, config: PretrainConfig, run: RunState) -> None:
        self.config = config
        self.run = run
        self.notes: list[str] = []
        self.facts = StartFacts(None, None)
        self.source = "random weights" if config.checkpoint is None else config.checkpoint

    def prepare(self, method: SSLMethod) -> None:
        """Load the start weights into a method, unless its run is resumed; set up its learning rates and its anchor.

        Raises:
            UserError: The checkpoint cannot be loaded, or has another shape.
            ValueError: The settings contradict the length of the run or the backbone.
        """
        config = self.config
        if config.checkpoint is None:
            return
        if self.run.checkpoint is None:
            loaded = load_backbone(config.checkpoint, config.weights, require_cls=False)
            self._load(method, loaded)
        prepare_continuation(method, config.start, config.anchor, num_images=len(self.run.train))

    def _load(self, method: SSLMethod, loaded: LoadedBackbone) -> None:
        content = load_method_state(str(self.config.checkpoint))
        weights = loaded.weights or "student"
        heads = MethodState(content["method"], weights, content["state_dict"]) if content else None
        with_heads = load_start_weights(method, loaded.backbone, heads)
        self.source = loaded.source
        self.facts = StartFacts(not with_heads, (loaded.mean, loaded.std))
        self.notes = _differences(loaded, method)
        self.notes.append(
            "heads, prototypes and center are those of the checkpoint" if with_heads else "the heads are new"
        )
        if is_rank_zero():
            backbone, views = method.eval_backbone, method.views
            export_backbone(
                backbone,
                self.run.path / START_WEIGHTS,
                mean=views.mean,
                std=views.std,
                source=loaded.source,
                value_range=self.config.data.range,
            )

    def describe(self, method: SSLMethod) -> list[str]:
        """Return the settings of a run from weights as a table, and what differs from the checkpoint."""
        if self.config.checkpoint is None or method.rates is None:
            return []
        start, anchor, rates = self.config.start, self.config.anchor, method.rates
        lrs = [scale * method.peak_lr for scale in rates.scales.values()]
        rows = {
            "trained": f"{start.trainable} of the backbone"
            + (f", frozen for the first {rates.frozen_steps:,} steps" if rates.frozen_steps else "")
            + (f", then ramped over {rates.ramp_steps:,}" if rates.ramp_steps else ""),
            "learning rates": f"heads {method.peak_lr:.3g}, backbone {max(lrs):.3g} (last norm) to {min(lrs):.3g}",
            "anchor": f"{anchor.name}, weight {anchor.weight:g}" if anchor.name != "none" else "none",
        }
        return [
            f"start={start.name}:",
            *(f"  {name:<16}{text}" for name, text in rows.items()),
            *(f"  {note}" for note in self.notes),
        ]


def _differences(loaded: LoadedBackbone, method: SSLMethod) -> list[str]:
    """Return what of the checkpoint was adapted."""
    before, after = loaded.backbone.config, method.eval_backbone.config
    notes = []
    if before.img_size != after.img_size:
        notes.append(
            f"position embeddings resampled once from {before.img_size} to {after.img_size} pixels, as timm does"
        )
    if before.in_chans != after.in_chans:
        notes.append(f"patch filters adapted from {before.in_chans} to {after.in_chans} channels")
    if after.reg_tokens > before.reg_tokens:
        notes.append(f"{after.reg_tokens - before.reg_tokens} new registers, drawn at random")
    return notes
