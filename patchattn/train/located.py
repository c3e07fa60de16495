"""YAML whose every value knows where it stands, so that an error can name file and line."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

_TAG = "tag:yaml.org,2002:"
# Plain words as YAML 1.2 reads them: 1e-4 is a number; on, off, yes, no and dates are words.
_WORDS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9_]*)",
    "float": r"[-+]?([0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+|[0-9][0-9_]*\.[0-9]*|\.[0-9]+([eE][-+]?[0-9]+)?)",
}
_VALUES: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": lambda text: int(text.replace("_", "")),
    "float": lambda text: float(text.replace("_", "")),
    "str": str,
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML's own way


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either YAML 1.1 or 1.2 would not read back as the same text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _reader in (_Loader, _Dumper):
    for _name, _pattern in _WORDS.items():
        _reader.add_implicit_resolver(_TAG + _name, re.compile(f"({_pattern})$"), None)


class Place(NamedTuple):
    """A line of a file; what comes from the command line stands after all lines."""

    line: float
    name: str


COMMAND_LINE = Place(math.inf, "command line")


@dataclass
class Located:
    """A scalar, a list of `Located`, or a dict of them by key; and where it was written."""

    value: Any
    place: Place

    def plain(self) -> Any:
        """The value without its places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        return [child.plain() for child in self.value] if isinstance(self.value, list) else self.value


@dataclass
class Problems:
    """Everything found wrong so far."""

    found: list[tuple[Place, str]] = field(default_factory=list)

    def add(self, place: Place, path: str, text: str) -> None:
        """`text` says what is wrong with the value at `path`, a key such as `stages.0.steps`."""
        self.found.append((place, f"{place.name}: {path}: {text}" if path else f"{place.name}: {text}"))

    def lines(self) -> list[str]:
        """One line for each, in the order of the file."""
        return [" ".join(text.split()) for _, text in sorted(self.found, key=lambda problem: problem[0].line)]


def parse(text: str, at: Callable[[int], Place], problems: Problems, path: str = "") -> Located | None:
    """The YAML in `text`, or None if it cannot be read; `at` gives the place of a line, counted from 1."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problems.add(
            at(line), path, f"this is not YAML: {error.problem}" + (f", {error.context}" if error.context else "")
        )
        return None
    except yaml.YAMLError as error:
        problems.add(at(1), path, f"this is not YAML: {error}")
        return None
    if node is None:
        return Located(None, at(1))
    return _Builder(at, problems).build(node, at(node.start_mark.line + 1), path)


def override(root: Located, path: str, value: Located, problems: Problems) -> None:
    """Put `value` at `path` of the tree; mappings on the way that are not there yet are made."""
    *parents, last = path.split(".")
    here = root
    for depth, part in enumerate(parents):
        here = _only(here, part)
        inner = _inside(here, part)
        if inner is None and isinstance(here.value, dict):
            inner = here.value[part] = Located({}, value.place)
        if inner is None:
            problems.add(value.place, path, _nothing_at(".".join(parents[:depth]), here, part))
            return
        here = inner
    here = _only(here, last)
    if isinstance(here.value, dict):
        here.value[last] = value
    elif isinstance(here.value, list) and last.isdigit() and int(last) < len(here.value):
        here.value[int(last)] = value
    else:
        problems.add(value.place, path, _nothing_at(".".join(parents), here, last))


def dump(value: Any) -> str:
    """Plain data as YAML that `parse` reads back as the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _only(here: Located, part: str) -> Located:
    """The one item of a list that has no other, if `part` is no index: `data.train.path` with a single source."""
    return here.value[0] if isinstance(here.value, list) and len(here.value) == 1 and not part.isdigit() else here


def _inside(here: Located, part: str) -> Located | None:
    """What stands at key or index `part`, if anything does."""
    if isinstance(here.value, list):
        return here.value[int(part)] if part.isdigit() and int(part) < len(here.value) else None
    child = here.value.get(part) if isinstance(here.value, dict) else None
    return None if child is None or child.value is None else child


def _nothing_at(path: str, here: Located, part: str) -> str:
    name = path or "the recipe"
    if not isinstance(here.value, list):
        return f"{name} is {here.value!r} and has no {part!r} inside"
    count = len(here.value)
    return f"{name} has no item {part!r}; " + (f"its items are 0 to {count - 1}" if count else "it is empty")


class _Builder:
    """Turns PyYAML's nodes into `Located` values."""

    def __init__(self, at: Callable[[int], Place], problems: Problems) -> None:
        self.at, self.problems = at, problems
        self.open: list[yaml.Node] = []  # the nodes around this one: an alias may lead back to them

    def build(self, node: yaml.Node, place: Place, path: str) -> Located:
        if isinstance(node, yaml.ScalarNode):
            return Located(self._scalar(node, place, path), place)
        if node in self.open:
            self.problems.add(place, path, "this alias leads back into itself")
            return Located(None, place)
        self.open.append(node)
        if isinstance(node, yaml.SequenceNode):
            value: Any = [
                self.build(item, self._place(item), f"{path}.{index}") for index, item in enumerate(node.value)
            ]
        else:
            value = self._mapping(node, path)
        self.open.pop()
        return Located(value, place)

    def _mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Located]:
        children: dict[str, Located] = {}
        for key, child in node.value:
            place = self._place(key)
            if not isinstance(key, yaml.ScalarNode):
                self.problems.add(place, path, "a key must be a plain word")
                continue
            inner = f"{path}.{key.value}" if path else key.value
            if key.value in children:
                self.problems.add(place, inner, f"given twice, first at {children[key.value].place.name}; keep one")
            children[key.value] = self.build(child, place, inner)
        return children

    def _scalar(self, node: yaml.ScalarNode, place: Place, path: str) -> Any:
        make = _VALUES.get(node.tag.removeprefix(_TAG))
        if make is None:
            self.problems.add(place, path, f"the tag {node.tag} is not allowed in a recipe")
            return node.value
        try:
            return make(node.value)
        except ValueError:
            self.problems.add(place, path, f"{node.value!r} is no {node.tag.removeprefix(_TAG)}")
            return node.value

    def _place(self, node: yaml.Node) -> Place:
        return self.at(node.start_mark.line + 1)
