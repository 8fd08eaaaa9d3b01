"""Print the result of an evaluation and, with logger=wandb, send it to Weights & Biases."""

from __future__ import annotations

from pathlib import Path

from ssl_vit.config.evaluate import EvaluationConfig
from ssl_vit.evaluation.evaluator import Evaluation
from ssl_vit.evaluation.results.confusion_matrix import ConfusionSummary
from ssl_vit.evaluation.results.eval_result import EvalResult, lock_result
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.confusion_figure import plot_confusion, read_hardest_images


def report_result(result: EvalResult, path: Path, config: EvaluationConfig) -> None:
    """Print the table of a result and its file, `path`; with logger=wandb also send the metrics.

    Raises:
        UserError: Weights & Biases cannot be reached; the result is written all the same.
    """
    print(format_result(result, path))
    if config.logger.name == "wandb":
        _send(result, path, config)


def draw_confusion(result: EvalResult, evaluation: Evaluation) -> None:
    """Draw the confusions of a written result into the figure that it names, if it names one."""
    path = _figure(result, evaluation.out)
    if path is None or result.by_class is None:
        return
    metric = result.by_class["metric"]
    predictions = result.score.predictions[metric.removeprefix("top-1")]
    confusion = ConfusionSummary(metric, evaluation.test_images.classes, predictions.target, predictions.predicted)
    title = f"{result.model.name}: {result.task}, {metric}, on {result.data.name}"
    hardest = read_hardest_images(predictions, evaluation.test_images)
    with lock_result(evaluation.out):
        plot_confusion(path, confusion, hardest, title)


def format_result(result: EvalResult, path: Path) -> str:
    """Return the table, the file that it was written to, and its figure if there is one."""
    figure = _figure(result, path)
    return f"{result.table()}\n\n{path}" + (f"\n{figure}" if figure else "")


def _figure(result: EvalResult, path: Path) -> Path | None:
    """Return the figure of the confusions, if it was drawn."""
    name = None if result.by_class is None else result.by_class["figure"]
    return path.with_name(name) if name else None


def _send(result: EvalResult, path: Path, config: EvaluationConfig) -> None:
    """Send a result to the wandb run of the pretraining if there is one, else to a new run."""
    import wandb

    title = f"{result.task}-{result.data.name}"
    parts = {f"eval/{title}": result.score, **{f"eval/{title}/{score.name}": score for score in result.baselines}}
    metrics = {f"{name}/{metric.name}": metric.value for name, score in parts.items() for metric in score.metrics}
    run = result.model.run
    folder = path.parent if run is None else Path(run)
    id_file = folder / "wandb_id.txt"
    run_id = id_file.read_text(encoding="utf-8").strip() if run is not None and id_file.is_file() else ""
    try:
        with wandb.init(
            project=config.logger.project,
            id=run_id or None,
            name=None if run_id else f"{result.model.name} {title}",
            resume="allow" if run_id and not config.logger.offline else None,  # not possible offline
            dir=folder,
            mode="offline" if config.logger.offline else "online",
        ) as wandb_run:
            wandb_run.summary.update(metrics)
            if figure := _figure(result, path):
                wandb_run.log({f"eval/{title}/figure": wandb.Image(str(figure))})
    except wandb.errors.Error as error:
        raise UserError(
            f"Weights & Biases: {error}; the result is in {path}. "
            "Use logger.offline=true to keep the run for `wandb sync`"
        ) from None
