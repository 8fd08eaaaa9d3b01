"""Every script that the documentation names is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def scripts_in(text):
    """Return the paths of `tools/x.py` and of `python -m tests.benchmarks.x`."""
    modules = re.findall(r"\btests\.benchmarks\.(\w+)", text)
    return {*re.findall(r"\btools/\w+\.py", text), *(f"tests/benchmarks/{name}.py" for name in modules)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_scripts_exist(page):
    missing = [script for script in scripts_in(page.read_text(encoding="utf-8")) if not (ROOT / script).is_file()]
    assert not missing


def test_scripts_in_finds_both_forms():
    text = "`python tools/a.py x` and `PYTHONPATH=. python -m tests.benchmarks.b y`"
    assert scripts_in(text) == {"tools/a.py", "tests/benchmarks/b.py"}
