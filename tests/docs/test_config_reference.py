"""The generated configuration reference holds every key of conf/, with its default and its comment."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("markdown", reason="the site is built with the extra docs")

DOCS = Path(__file__).parents[2] / "docs"
spec = importlib.util.spec_from_file_location("config_reference", DOCS / "config_reference.py")
config_reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(config_reference)


def write(folder, text):
    path = folder / "some.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "path", sorted(config_reference.CONF.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_render_shows_every_key_and_comment(path):
    page = config_reference.render()
    assert f"#{path.stem}}}" in page or f"#{path.parent.name}-{path.stem}}}" in page
    for row in config_reference.read_rows(path):  # raises if a key of the file is missing
        if row.default is not None:
            assert f"| `{row.key}` |" in page
            assert row.default.replace("|", "\\|") in page


def test_read_rows_joins_sections_and_comments(tmp_path):
    path = write(
        tmp_path,
        "defaults:\n  - _self_\n  - data: folder\n\n# Of both.\na:   # a section\n"
        "  b: [1, 2]   # pixels\n  c:\n    d: x\n",
    )
    assert config_reference.read_rows(path) == [
        ("a", None, "a section Of both."),
        ("a.b", "[1, 2]", "pixels"),
        ("a.c", None, ""),
        ("a.c.d", "x", ""),
    ]
    assert config_reference.read_defaults(path) == {"data": "folder"}


def test_read_rows_refuses_what_it_would_drop(tmp_path):
    with pytest.raises(ValueError, match="cannot read the line"):
        config_reference.read_rows(write(tmp_path, "a: 1\n- b\n"))
    with pytest.raises(ValueError, match="the table would differ"):
        config_reference.read_rows(write(tmp_path, "a: >\n  b: c\n"))


def test_cells_are_escaped_outside_of_code():
    assert config_reference._cell("a|b <c> *d* `<e>|*`") == "a\\|b &lt;c> \\*d\\* `<e>\\|*`"
