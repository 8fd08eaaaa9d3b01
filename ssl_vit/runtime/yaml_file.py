"""Read YAML files that may be damaged or hostile: limits on size, depth and aliases, and one kind of error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 10**6
MOST_VALUES = 100_000  # with every alias followed: a config has a few hundred


def read_yaml(path: Path) -> Any:  # noqa: ANN401 - any YAML
    """Return the content of a YAML file of plain values.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not YAML, too large, too deep, or grows beyond a limit when its aliases are followed.
    """
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"larger than {MOST_BYTES:,} bytes")
    text = path.read_text(encoding="utf-8")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and _count_values(node, {}) > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values when its aliases are followed")
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("too deeply nested, or an alias that contains itself") from None
    except (yaml.YAMLError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(str(error)) from None


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """Return the number of values below a node, each alias counted as a copy; nodes without end recurse without end."""
    if id(node) not in counts:
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        else:
            children = node.value if isinstance(node, yaml.SequenceNode) else []
        counts[id(node)] = 1 + sum(_count_values(child, counts) for child in children)
    return counts[id(node)]
