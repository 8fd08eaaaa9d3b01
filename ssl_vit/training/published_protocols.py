"""The published linear protocols of DINO and SiT: features, heads, optimizer, augmentation, and evaluations."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from tqdm import tqdm

from ssl_vit.config.evaluate import AugmentationConfig, RandAugmentConfig, RandomResizedCropConfig
from ssl_vit.config.pretrain import TrainerConfig
from ssl_vit.data.batch import Batch
from ssl_vit.evaluation.classification.knn import rank_of_true_class
from ssl_vit.methods.schedules import Schedule, cosine
from ssl_vit.models.backbone import Backbone
from ssl_vit.runtime.atomic_io import JSONLWriter
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.progress import progress_bar

_HIDDEN = 1024  # of SiT's non-linear head
_WIDE = 768  # from this width on DINO takes the last block and the mean patch token, as for ViT-B

TRAINER = TrainerConfig(
    max_epochs=1,  # the plan has the length
    max_steps=None,
    max_time=None,
    accelerator="auto",
    devices=1,
    num_nodes=1,
    strategy="auto",
    precision="32-true",
    accumulate_grad_batches=1,
    fused_attention="auto",
    compile=False,
    activation_checkpointing=False,
    log_every_n_steps=1,
    checkpoint_every=timedelta(minutes=5),
    keep_every_epochs=None,
    max_skipped_steps=0,
)


@dataclass(frozen=True)
class Probe:
    """One or more heads on frozen features, each trained and judged by itself.

    A head is a module per feature; its answer is the mean of their logits, its loss the sum of their losses.
    """

    features: Callable[[Backbone, Tensor], list[Tensor]]  # of images (B, C, H, W): one or more of (B, D)
    heads: dict[str, nn.ModuleList]  # by name
    optimizer: Optimizer
    lr: Schedule  # of the epoch
    epochs: int
    every: int  # epochs between two looks at the test images
    augmentation: AugmentationConfig
    about: dict[str, Any]  # for the record

    def logits(self, head: str, features: list[Tensor]) -> Tensor:
        """Return the logits (B, classes) of a head."""
        return torch.stack([module(part) for module, part in zip(self.heads[head], features, strict=True)]).mean(dim=0)

    def loss(self, features: list[Tensor], targets: Tensor) -> Tensor:
        """Return the sum of all losses, given targets (B, classes)."""
        losses = [
            F.cross_entropy(module(part), targets)
            for head in self.heads.values()
            for module, part in zip(head, features, strict=True)
        ]
        return torch.stack(losses).sum()


def dino_probe(backbone: Backbone, classes: int, *, epochs: int | None, batch_size: int) -> Probe:
    """DINO's `eval_linear.py`: SGD with momentum on crops and flips, a cosine of the epoch, no penalty.

    Four [CLS] tokens of a model narrower than 768, else the last one and the mean patch token.
    """
    epochs = epochs or 100
    blocks = min(4, backbone.num_blocks) if backbone.embed_dim < _WIDE else 1
    patch_mean = backbone.embed_dim >= _WIDE

    def features(backbone: Backbone, images: Tensor) -> list[Tensor]:
        tokens = backbone.get_intermediate_tokens(images, blocks)
        parts = [block.cls for block in tokens] + ([tokens[-1].patches.mean(dim=1)] if patch_mean else [])
        return [torch.cat(parts, dim=1)]

    linear = nn.Linear((blocks + patch_mean) * backbone.embed_dim, classes)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    peak = 0.001 * batch_size / 256
    return Probe(
        features=features,
        heads={"linear": nn.ModuleList([linear])},
        optimizer=SGD(linear.parameters(), lr=peak, momentum=0.9, weight_decay=0.0),
        lr=cosine(peak, 0, epochs),
        epochs=epochs,
        every=1,
        augmentation=_augmentation(rand_augment=0, erasing=0, mixup=0, cutmix=0, smoothing=0),
        about={
            "features": f"[CLS] of the last {blocks} blocks" if not patch_mean else "last [CLS] and mean patch token",
            "optimizer": f"SGD, momentum 0.9, no penalty, lr 0.001 x {batch_size}/256, cosine of the epoch to 0",
            "not reproduced": [
                "bilinear crops: here bicubic",
                "float32 backbone: see environment.forward",
                "the last, smaller batch of an epoch: here left out, batches are whole",
            ],
        },
    )


def sit_probe(backbone: Backbone, classes: int, *, epochs: int | None, batch_size: int) -> Probe:
    """SiT's linear evaluation (code version 1.1): a head on [CLS] and one on the rotation token, their logits' mean.

    Once with linear and once with non-linear heads, with the augmentation of fine-tuning.

    Raises:
        UserError: The model has no second token.
    """
    if not backbone.config.reg_tokens:
        raise UserError(
            "protocol=sit reads two tokens, [CLS] and the rotation token that SiT trains with method.tokens=dedicated; "
            "this model has only [CLS]: use protocol=held-out or protocol=dino"
        )
    epochs, warmup = epochs or 501, 5
    heads = {
        "linear": nn.ModuleList(_small(nn.Linear(backbone.embed_dim, classes)) for _ in range(2)),
        "nonlinear": nn.ModuleList(
            nn.Sequential(
                _small(nn.Linear(backbone.embed_dim, _HIDDEN)), nn.Tanh(), _small(nn.Linear(_HIDDEN, classes))
            )
            for _ in range(2)
        ),
    }
    parameters = [parameter for head in heads.values() for parameter in head.parameters()]
    peak, start, end = 1e-3 * batch_size / 512, 1e-6, 5e-6

    def features(backbone: Backbone, images: Tensor) -> list[Tensor]:
        tokens = backbone(images)
        return [tokens.cls, tokens.registers[:, 0]]

    def lr(epoch: int) -> float:
        return start + (peak - start) * epoch / warmup if epoch < warmup else cosine(peak, end, epochs)(epoch)

    penalized = [parameter for parameter in parameters if parameter.ndim > 1]
    free = [parameter for parameter in parameters if parameter.ndim == 1]
    return Probe(
        features=features,
        heads=heads,
        optimizer=AdamW([{"params": penalized, "weight_decay": 5e-4}, {"params": free, "weight_decay": 0.0}], lr=start),
        lr=lr,
        epochs=epochs,
        every=10,
        augmentation=_augmentation(rand_augment=2, erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1),
        about={
            "features": "[CLS] and rotation token of the last block, a head each, mean of their logits",
            "heads": f"linear: Linear(D, classes); nonlinear: Linear(D, {_HIDDEN}), Tanh, Linear({_HIDDEN}, classes)",
            "optimizer": f"AdamW, weight decay 5e-4, lr 1e-3 x {batch_size}/512, warm-up 5 epochs from 1e-6, cosine of "
            "the epoch to 5e-6",
            "augmentation": "crops, flips, RandAugment (9, 2, std 0.5), erasing 0.25, mixup 0.8, cutmix 1, smoothing "
            "0.1, color jitter none",
            "not reproduced": [
                "drop path 0.1 in the frozen backbone: here in evaluation mode",
                "repeated augmentation: here each image once per epoch",
                "float16 backbone: see environment.forward",
            ],
        },
    )


PROBES = {"dino": dino_probe, "sit": sit_probe}


def _small(linear: nn.Linear) -> nn.Linear:
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


def _augmentation(
    *, rand_augment: int, erasing: float, mixup: float, cutmix: float, smoothing: float
) -> AugmentationConfig:
    """Crops of 8 to 100 % and flips, and what is given."""
    return AugmentationConfig(
        crops=RandomResizedCropConfig(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)),
        flip=0.5,
        rand_augment=RandAugmentConfig(layers=rand_augment, magnitude=9, std=0.5),
        erasing=erasing,
        mixup=mixup,
        cutmix=cutmix,
        smoothing=smoothing,
    )


@dataclass(frozen=True)
class TestFeatures:
    """Features of the readable test images, without augmentation."""

    features: list[Tensor]  # one or more of (Q, D)
    labels: Tensor  # (Q,)
    index: Tensor  # (Q,), of the images in their dataset


class ProbeEvaluation(ProgressBar):
    """Test accuracy of each head every few epochs, with the predictions of its best and its last evaluation.

    It is a progress bar, over the epochs, so that Lightning does not add its own.

    Raises:
        UserError: From a hook of Lightning: the loss is not finite.
    """

    STATE = ("accuracy", "best", "last", "losses", "seconds")

    def __init__(self, probe: Probe, test: TestFeatures, journal: JSONLWriter) -> None:
        super().__init__()
        self.probe = probe
        self.test = test
        self.journal = journal  # receives a line per epoch
        self.accuracy: dict[str, list[tuple[int, float]]] = {}  # by head: epochs done, test accuracy
        self.best: dict[str, Tensor] = {}  # by head: ranks and predictions (2, Q) of its best evaluation
        self.last: dict[str, Tensor] = {}  # of its last evaluation
        self.losses: list[Tensor] = []  # of the steps of this epoch
        self.seconds = 0.0
        self.bar: tqdm[None] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the evaluations so far, and the losses of an epoch that is interrupted."""
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in self.STATE:
            setattr(self, name, state_dict[name])

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._since = time.perf_counter()
        self.bar = progress_bar(total=self.probe.epochs, initial=trainer.current_epoch, unit=" epochs")

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].detach())  # type: ignore[index]
        if trainer.is_last_batch:
            self._end_epoch(trainer.current_epoch)
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now

    def _end_epoch(self, epoch: int) -> None:
        loss = float(torch.stack([loss.to(self.test.labels.device) for loss in self.losses]).mean())
        self.losses = []
        if not loss < float("inf"):
            raise UserError(f"the loss of the linear probe is not finite in epoch {epoch + 1}")
        line: dict[str, Any] = {"lr": self.probe.lr(epoch), "loss": loss}
        if (epoch + 1) % self.probe.every == 0 or epoch + 1 == self.probe.epochs:
            line["test"] = {head: self._evaluate(head, epoch + 1) for head in self.probe.heads}
        self.journal.write(epoch, **line)
        if self.bar:
            self.bar.update()

    @torch.no_grad()
    def _evaluate(self, head: str, epochs: int) -> float:
        """Return the accuracy of a head after so many epochs."""
        logits = self.probe.logits(head, self.test.features).cpu()
        predictions = torch.stack([rank_of_true_class(self.test.labels, logits), logits.argmax(dim=1)])  # (2, Q)
        accuracy = float((predictions[0] == 0).float().mean())
        before = self.accuracy.setdefault(head, [])
        if all(accuracy > other for _, other in before):
            self.best[head] = predictions
        self.last[head] = predictions
        before.append((epochs, accuracy))
        return accuracy

    def on_train_end(self, *_: object) -> None:
        if self.bar:
            self.bar.close()

    def on_exception(self, *_: object) -> None:
        self.on_train_end()
