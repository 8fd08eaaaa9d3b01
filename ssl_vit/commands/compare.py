"""`ssl-vit compare`: results of several models in one table, with paired tests on the same images.

ssl-vit compare runs/dino runs/sit
ssl-vit compare runs/*/eval/knn-photos.json format=markdown out=table.md
ssl-vit compare runs/photos format=latex
"""

from __future__ import annotations

from ssl_vit.config.evaluate import CompareConfig
from ssl_vit.evaluation.results.comparison import compare
from ssl_vit.evaluation.results.comparison_tables import render
from ssl_vit.evaluation.results.result_reader import find_results
from ssl_vit.runtime.atomic_io import atomic_write
from ssl_vit.runtime.outputs import check_outputs, record_outputs


def main(config: CompareConfig) -> None:
    """Run the command.

    Raises:
        UserError: A named file is no result, or the results do not belong in one table.
    """
    if config.out is not None:
        check_outputs([config.out], "compare", inputs={})
    found = find_results(config.results)
    comparison = compare(found.results, mix=config.mix)
    skipped = [f"skipped: {text}" for text in found.skipped]
    table = render(comparison._replace(notes=[*comparison.notes, *skipped]), config.format)
    print(table)
    if config.out is not None:
        record_outputs([config.out], "compare")
        with atomic_write(config.out) as file:
            file.write(f"{table}\n".encode("utf-8", "backslashreplace"))
        print(f"\n{config.out}")
