"""The Python examples of docs/api.md run as they stand."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_examples_are_found():
    assert len(EXAMPLES) == 3
    own_trainer = [line for line in EXAMPLES[1].splitlines() if line]
    assert len(own_trainer) <= 10


@pytest.mark.parametrize("example", EXAMPLES, ids=["commands", "own Trainer", "own datasets"])
def test_example_runs(example, sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").symlink_to(sample / "train")
    Path("labeled").symlink_to(sample)
    exec(example, {})
