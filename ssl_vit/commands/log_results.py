"""Where the record of an evaluation goes beside its file: the terminal and, with logger=wandb, Weights & Biases."""

from __future__ import annotations

from pathlib import Path

from ssl_vit.config.evaluate import EvaluationConfig
from ssl_vit.evaluation.results.eval_result import EvalResult
from ssl_vit.runtime.errors import UserError


def report_result(record: EvalResult, path: Path, config: EvaluationConfig) -> None:
    """Print the table and the file's name; with logger=wandb send the numbers, too.

    Args:
        record: As it was written.
        path: The file that it was written to.
        config: Of the evaluation.

    Raises:
        UserError: Weights & Biases cannot be reached; the record is written all the same.
    """
    print(format_result(record, path))
    if config.logger.name == "wandb":
        _send(record, path, config)


def format_result(record: EvalResult, path: Path) -> str:
    """The table, the file that it was written to, and that of its drawing if one was made."""
    sheet = _sheet(record, path)
    return f"{record.table()}\n\n{path}" + (f"\n{sheet}" if sheet else "")


def metric_dict(record: EvalResult) -> dict[str, float]:
    """The scores as `eval/<task>-<data>/<metric>`; of baselines their name stands before the metric's."""
    prefix = f"eval/{record.task}-{record.data['name']}"
    own = {f"{prefix}/{metric.name}": metric.value for metric in record.score.metrics}
    return own | {
        f"{prefix}/{score.name}/{metric.name}": metric.value for score in record.baselines for metric in score.metrics
    }


def _sheet(record: EvalResult, path: Path) -> Path | None:
    """The drawing of the mistakes, if one was made."""
    name = None if record.by_class is None else record.by_class["sheet"]
    return path.with_name(name) if name else None


def _send(record: EvalResult, path: Path, config: EvaluationConfig) -> None:
    """Into the run of the pretraining if it has one, else into one of its own."""
    import wandb

    run = record.model["run"]
    folder = path.parent if run is None else Path(run)
    id_file = folder / "wandb_id.txt"
    known = id_file.read_text(encoding="utf-8").strip() if run is not None and id_file.is_file() else ""
    try:
        with wandb.init(
            project=config.logger.project,
            id=known or None,
            name=None if known else f"{record.model['name']} {record.task}-{record.data['name']}",
            resume="allow" if known and not config.logger.offline else None,  # it takes no more of a run offline
            dir=folder,
            mode="offline" if config.logger.offline else "online",
        ) as sent:
            sent.summary.update(metric_dict(record))
            if sheet := _sheet(record, path):
                sent.log({f"eval/{record.task}-{record.data['name']}/sheet": wandb.Image(str(sheet))})
    except wandb.errors.Error as error:
        raise UserError(
            f"Weights & Biases: {error}; the record is in {path}; logger.offline=true keeps the run for `wandb sync`"
        ) from None
