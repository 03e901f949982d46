"""Where in a YAML text something stands: the line of a key, however deep, merged in with `<<` or not."""

from collections.abc import Iterator
from typing import TypeAlias

import yaml

Path: TypeAlias = tuple[str | int, ...]

MERGE = "tag:yaml.org,2002:merge"


def line_of(root: yaml.Node | None, path: Path) -> int:
    """The line of a key, from 1; of the nearest key above it where it is not there."""
    if root is None:
        return 1
    shown = node = root
    for part in path:
        found = _child(node, part)
        if found is None:
            break
        shown, node = found
    return int(shown.start_mark.line) + 1


def doubled(root: yaml.Node | None) -> Iterator[tuple[Path, int, int]]:
    """Keys that a mapping has twice, of which YAML keeps the last: the path, the line, and the first one's line."""
    waiting: list[tuple[yaml.Node | None, Path]] = [(root, ())]
    seen: set[int] = set()
    while waiting:
        node, path = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            first: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if key.tag != MERGE and key.value in first:
                    yield (*path, key.value), line, first[key.value]
                first.setdefault(key.value, line)
                waiting.append((value, (*path, key.value)))
        elif isinstance(node, yaml.SequenceNode):
            waiting.extend((value, (*path, i)) for i, value in enumerate(node.value))


def dotted(path: Path) -> str:
    """As one writes it: `a.b[0].c`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def _child(node: yaml.Node, part: str | int) -> tuple[yaml.Node, yaml.Node] | None:
    """What shows a part of a node, and what it holds."""
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part], node.value[part]
    if not isinstance(node, yaml.MappingNode):
        return None
    for key, value in reversed(node.value):  # of two, YAML keeps the last
        if key.tag != MERGE and key.value == str(part):
            return key, value
    for key, value in node.value:  # a key of its own goes before one that is merged in
        for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if key.tag == MERGE and (found := _child(merged, part)):
                return found
    return None
