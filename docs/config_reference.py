"""Generate the configuration reference from `conf/*.yaml` while the site is built.

A Python-Markdown extension: a line `{{ config_reference }}` of a page becomes one table per file of `conf/`, with every
key, its default and its comment. The files stay the only place where defaults and comments are written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor

CONF = Path(__file__).resolve().parent.parent / "conf"
MARKER = "{{ config_reference }}"

_KEY = re.compile(r"(?P<indent> *)(?P<key>\w+):(?: +(?P<value>[^#\s].*?))??(?: +# ?(?P<comment>.*))?$")
_PACKAGE = re.compile(r"# @package (\w+)$")


class Row(NamedTuple):
    """One key of a configuration file."""

    key: str  # dotted
    default: str | None  # as written; None for a section
    comment: str


def read_rows(path: Path) -> list[Row]:
    """Read the keys of a file in their order, without its defaults list.

    Comment lines of their own belong to the key that follows them.

    Raises:
        ValueError: A line was not understood, so that the table would lack a key.
    """
    rows: list[Row] = []
    sections: list[tuple[int, str]] = []
    above: list[str] = []
    for line in _without_defaults(path.read_text(encoding="utf-8")):
        if line.startswith("#"):
            above += [] if _PACKAGE.match(line) else [line.lstrip("# ")]
            continue
        if not line.strip():
            continue
        match = _KEY.match(line)
        if not match:
            raise ValueError(f"{path}: cannot read the line {line!r}")
        indent = len(match["indent"])
        sections = [(depth, name) for depth, name in sections if depth < indent]
        key = ".".join([name for _, name in sections] + [match["key"]])
        comment = " ".join([match["comment"] or "", *above]).strip()
        rows.append(Row(key, match["value"], comment))
        above = []
        if match["value"] is None:
            sections.append((indent, match["key"]))
    found = {row.key for row in rows if row.default is not None}
    expected = set(_leaves(yaml.safe_load("\n".join(_without_defaults(path.read_text(encoding="utf-8")))) or {}))
    if found != expected:
        raise ValueError(f"{path}: the table would differ from the file in {sorted(found ^ expected)}")
    return rows


def read_defaults(path: Path) -> dict[str, str | None]:
    """Read the defaults list of a file: the option chosen of each group; None for a file that this one builds on."""
    entries = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("defaults", [])
    chosen: dict[str, str | None] = {}
    for entry in entries:
        if isinstance(entry, dict):
            chosen |= {name.removeprefix("override /"): option for name, option in entry.items()}
        elif entry != "_self_":
            chosen[entry] = None
    return chosen


def render() -> str:
    """Render the whole reference as Markdown."""
    return "\n".join([*_render_commands(), *_render_groups()])


def _render_commands() -> Iterator[str]:
    yield "## Commands"
    for path in sorted(CONF.glob("*.yaml")):
        yield f"\n### {path.stem} {{#{path.stem}}}\n"
        yield from _table(read_rows(path))
        groups = {name: option for name, option in read_defaults(path).items() if name != "recipes"}
        if groups:
            listed = ", ".join(f"[`{name}={option}`](#{name}-{option})" for name, option in groups.items())
            yield f"\nGroups, with the option that is the default: {listed}."
        if "recipes" in read_defaults(path):
            yield "`recipe=NAME` applies a [recipe](recipes.md)."


def _render_groups() -> Iterator[str]:
    yield "\n## Groups\n"
    yield "`<group>=<option>` on the command line chooses one of these files; its keys belong to the section it names."
    for folder in sorted(path for path in CONF.iterdir() if path.is_dir()):
        yield f"\n### Group {folder.name} {{#group-{folder.name}}}"
        for path in sorted(folder.glob("*.yaml")):
            yield f"\n#### {folder.name}={path.stem} {{#{folder.name}-{path.stem}}}\n"
            lines = path.read_text(encoding="utf-8").splitlines()
            package = _PACKAGE.match(lines[0]) if lines else None
            yield f"Section `{package[1] if package else folder.name}`."
            bases = [name for name, option in read_defaults(path).items() if option is None]
            if bases:
                links = ", ".join(f"[`{folder.name}={base}`](#{folder.name}-{base})" for base in bases)
                yield f"All keys of {links}, but:"
            yield ""
            yield from _table(read_rows(path))


def _table(rows: list[Row]) -> Iterator[str]:
    yield "| key | default | what it is |"
    yield "|---|---|---|"
    for row in rows:
        if row.default is None and not row.comment:
            continue
        default = "" if row.default is None else _cell(f"`{row.default}`")
        yield f"| `{row.key}` | {default} | {_cell(row.comment)} |"


def _cell(text: str) -> str:
    """Escape what a table or Markdown would take for markup; code spans stay as they are."""
    spans = text.replace("|", "\\|").split("`")
    return "`".join(span if i % 2 else span.replace("<", "&lt;").replace("*", "\\*") for i, span in enumerate(spans))


def _without_defaults(text: str) -> list[str]:
    lines = text.splitlines()
    if "defaults:" not in lines:
        return lines
    start = lines.index("defaults:")
    end = next((i for i in range(start + 1, len(lines)) if not lines[i].startswith("  - ")), len(lines))
    return lines[:start] + lines[end:]


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


class _Insert(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        return [new for line in lines for new in (render().splitlines() if line.strip() == MARKER else [line])]


class ConfigReference(Extension):
    """Replace the marker line of a page by the reference."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 - the name is Python-Markdown's
        """Register the preprocessor."""
        md.preprocessors.register(_Insert(md), "config_reference", 40)


def makeExtension(**options: Any) -> ConfigReference:  # noqa: N802 - the name is Python-Markdown's
    """Return the extension; Python-Markdown calls this."""
    return ConfigReference(**options)
