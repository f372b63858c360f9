"""Settings in a YAML file, of a size that fits its text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from pathlib import Path

# With aliases a few lines can stand for more values than fit into memory.
_MOST_VALUES = 100_000


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.1, but with numbers such as ``2e-4`` as numbers, which it takes for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is no YAML, holds no mapping, or stands for far more than it says.
    """
    data = path.read_bytes()
    try:
        loader = _Loader(data)
        node = loader.get_single_node()
        _count(node, {})
        values = None if node is None else loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"{path} is no YAML: it is nested too deeply") from None
    # Its constructors raise what comes: KeyError for !!bool x, AttributeError for !!timestamp x, ValueError for a 13th
    # month, OverflowError for a number without end.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        said = str(error) if isinstance(error, (yaml.YAMLError, ValueError)) else f"a value cannot be read: {error!r}"
        raise ValueError(f"{path} is no YAML: {said}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of fields to values")
    return values


def _count(node: Any, known: dict[int, int]) -> int:
    """Returns how many values a node stands for, with each alias as what it names.

    Raises:
        ValueError: Too many, or a value within itself.
    """
    if id(node) in known:
        if known[id(node)] == 0:
            raise ValueError("an alias names what it is a part of")
        return known[id(node)]
    known[id(node)] = 0
    parts: list[Any] = []
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    known[id(node)] = total = 1 + sum(_count(part, known) for part in parts)
    if total > _MOST_VALUES:
        raise ValueError(f"its aliases stand for more than {_MOST_VALUES:,} values")
    return total
