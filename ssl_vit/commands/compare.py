"""`ssl-vit compare`: records of several models in one table, with paired tests on the same images.

ssl-vit compare runs/dino runs/sit
ssl-vit compare runs/*/eval/knn-photos.json format=markdown out=table.md
ssl-vit compare runs/photos format=latex
"""

from __future__ import annotations

from ssl_vit.config.evaluate import CompareConfig
from ssl_vit.evaluation.results.comparison import compare
from ssl_vit.evaluation.results.comparison_tables import render
from ssl_vit.evaluation.results.result_reader import find_records
from ssl_vit.runtime.atomic_io import atomic_write


def main(config: CompareConfig) -> None:
    """Run the command.

    Raises:
        UserError: What was named is no record, or the records do not belong in one table.
    """
    found = find_records(config.results)
    comparison = compare(found.records, mix=config.mix)
    left_out = [f"left out: {text}" for text in found.left_out]
    table = render(comparison._replace(notes=[*comparison.notes, *left_out]), config.format)
    print(table)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(config.out) as file:
            file.write(f"{table}\n".encode("utf-8", "backslashreplace"))
        print(f"\n{config.out}")
