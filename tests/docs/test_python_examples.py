"""The Python examples of the documentation run as they stand."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/weights.md"])
def test_example_of_a_model_with_its_transform_runs(page, sample, tiny_model, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (PAGE.parents[1] / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    example = next(block for block in blocks if "loaded.transform" in block)
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/photos").symlink_to(tiny_model.parent)
    Path("photos").mkdir()
    Path("photos/one.jpg").symlink_to(next((sample / "test").rglob("*.png")))
    exec(example, {})


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
