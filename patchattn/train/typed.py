"""From plain YAML values to dataclasses, by their type hints; everything wrong is noted, not only the first."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from .located import Located, Place, Problems

SHOWN = 60  # characters of a wrong value that an error shows


class Unreadable(Exception):
    """A value was asked for that could not be read."""


class Part:
    """As much of a dataclass as could be read: asking for the rest raises `Unreadable`."""

    def __init__(self, of: type, values: dict[str, Any]) -> None:
        vars(self).update(values, part_of=of)

    def __getattr__(self, name: str) -> Any:
        of = vars(self)["part_of"]
        if name in _field_names(of) or not hasattr(of, name):
            raise Unreadable(name)
        return getattr(of, name)  # a constant of the class, such as its kind


UNREADABLE = Part(object, {})


class Converter:
    """Reads located YAML as dataclasses; `kinds` lists the classes that the key `kind` chooses from."""

    def __init__(self, kinds: Mapping[type, tuple[type, ...]], problems: Problems) -> None:
        self.kinds, self.problems = kinds, problems
        self.places: dict[str, Place] = {}

    def read(self, node: Located, hint: Any, path: str, limits: Mapping[str, Any] = types.MappingProxyType({})) -> Any:
        """The value of `node` as `hint` says, or `UNREADABLE`."""
        self.places[path] = node.place
        for option in options(hint):
            if fits(node.value, option):
                value = self._as(node, option, path)
                wrong = value is not UNREADABLE and _outside(value, limits)
                if not wrong:
                    return value
                self.problems.add(node.place, path, f"{shown(node.plain())} is not allowed; {wrong}")
                return UNREADABLE
        quote = "; for text, put it in quotes" if str in options(hint) and not _nested(node.value) else ""
        wanted = _choice(limits) or f"it must be {describe(hint, limits)}"
        self.problems.add(node.place, path, f"{shown(node.plain())} is not allowed; {wanted}{quote}")
        return UNREADABLE

    def place(self, path: str) -> Place:
        """Where the value at `path` was written, or the nearest value around it that was."""
        while path and path not in self.places:
            path = path.rpartition(".")[0]
        return self.places[path]

    def _as(self, node: Located, option: Any, path: str) -> Any:
        if dataclasses.is_dataclass(option):
            return self._dataclass(node, option, path)  # type: ignore[arg-type]
        if get_origin(option) is list:
            return self._list(node, get_args(option)[0], path)
        if get_origin(option) is dict:
            values = {key: self.read(child, get_args(option)[1], _join(path, key)) for key, child in node.value.items()}
            return UNREADABLE if any(value is UNREADABLE for value in values.values()) else values
        if option in (int, float):
            return option(node.value)
        return self._plain(node, path)

    def _list(self, node: Located, item: Any, path: str) -> Any:
        nodes = node.value if isinstance(node.value, list) else [node]  # one may stand without a list
        values = [self.read(child, item, f"{path}.{index}") for index, child in enumerate(nodes)]
        # Parts of a recipe are checked one by one; of other lists nothing can be said if an item is wrong.
        whole = dataclasses.is_dataclass(item) or all(value is not UNREADABLE for value in values)
        return values if whole else UNREADABLE

    def _plain(self, node: Located, path: str) -> Any:
        self.places[path] = node.place
        if isinstance(node.value, dict):
            return {key: self._plain(child, _join(path, key)) for key, child in node.value.items()}
        if isinstance(node.value, list):
            return [self._plain(child, f"{path}.{index}") for index, child in enumerate(node.value)]
        return node.value

    def _dataclass(self, node: Located, base: type, path: str) -> Any:
        chosen = self._of_kind(node, base, path) if base in self.kinds else base
        if chosen is None:
            return UNREADABLE
        names = ["kind"] * (base in self.kinds) + _field_names(chosen)
        for key, child in node.value.items():
            if key not in names:
                self.problems.add(child.place, _join(path, key), f"unknown key; {choose(key, names)}")
        hints = typing.get_type_hints(chosen)
        values = {}
        for field in dataclasses.fields(chosen):
            inner = _join(path, field.name)
            if field.name in node.value:
                values[field.name] = self.read(node.value[field.name], hints[field.name], inner, field.metadata)
            elif field.default is not dataclasses.MISSING:
                values[field.name] = field.default
            elif field.default_factory is not dataclasses.MISSING:
                values[field.name] = field.default_factory()
            else:
                wanted = _choice(field.metadata) or f"give {describe(hints[field.name], field.metadata)}"
                self.problems.add(node.place, inner, f"missing ({field.metadata['explain']}); {wanted}")
                values[field.name] = UNREADABLE
        readable = {name: value for name, value in values.items() if value is not UNREADABLE}
        return chosen(**values) if len(readable) == len(values) else Part(chosen, readable)

    def _of_kind(self, node: Located, base: type, path: str) -> Any:
        """The class that `kind` names, or None."""
        kinds = {cls.kind: cls for cls in self.kinds[base]}  # type: ignore[attr-defined]
        given = node.value.get("kind")
        if given is None:
            self.problems.add(node.place, _join(path, "kind"), f"missing; {choose(None, kinds)}")
            return None
        self.places[_join(path, "kind")] = given.place
        if not isinstance(given.value, str) or given.value not in kinds:
            said = f"{shown(given.plain())} is not allowed; {choose(given.value, kinds)}"
            self.problems.add(given.place, _join(path, "kind"), said)
            return None
        return kinds[given.value]


def options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def fits(value: Any, option: Any) -> bool:
    """Whether a value is of this type, seen from outside: items are not looked at."""
    origin = get_origin(option)
    if option is types.NoneType:
        return value is None
    if option is bool:
        return isinstance(value, bool)
    if option is int:
        return _is_number(value) and float(value).is_integer()  # 5e6 tokens are a whole number
    if option is float:
        return _is_number(value)
    if option is str:
        return isinstance(value, str)
    if origin is Literal:
        return value in get_args(option)
    if origin is list:
        item = get_args(option)[0]
        return isinstance(value, list) or (value is not None and any(fits(value, one) for one in options(item)))
    if origin is dict or option is dict or dataclasses.is_dataclass(option):
        return isinstance(value, dict)
    if isinstance(option, type) and issubclass(option, enum.Enum):
        return value in [member.value for member in option]
    return option is Any


def describe(hint: Any, limits: Mapping[str, Any] = types.MappingProxyType({})) -> str:
    """What a value may be, in words."""
    words = [_describe(option, limits) for option in options(hint)]
    return " or ".join(dict.fromkeys(words))


def choose(given: Any, names: Iterable[str]) -> str:
    """The allowed names, the one that was probably meant first."""
    known = [str(name) for name in names]
    close = difflib.get_close_matches(given, known, n=1) if isinstance(given, str) else []
    return (f"did you mean {close[0]}? " if close else "") + "allowed: " + ", ".join(known)


def shown(value: Any) -> str:
    """A value as an error shows it."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _describe(option: Any, limits: Mapping[str, Any]) -> str:
    if dataclasses.is_dataclass(option) or option is dict or get_origin(option) is dict:
        return "a mapping"
    if get_origin(option) is list:
        item = get_args(option)[0]
        return "a list of mappings" if dataclasses.is_dataclass(item) else f"a list of {_PLURALS.get(item, 'values')}"
    if get_origin(option) is Literal:
        return " or ".join(shown(value) for value in get_args(option))
    if isinstance(option, type) and issubclass(option, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in option)
    return _NAMES.get(option, "any value") + (_range(limits) if option in (int, float) else "")


_NAMES = {types.NoneType: "null", bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_PLURALS = {str: "texts", int: "whole numbers", float: "numbers"}


def _range(limits: Mapping[str, Any]) -> str:
    """The numbers that are allowed, in words."""
    least, above, most = (limits.get(name) for name in ("least", "above", "most"))
    words = [f"of at least {least}"] * (least is not None) + [f"above {above}"] * (above is not None)
    words += [f"at most {most}"] * (most is not None)
    return " " + " and ".join(words) if words else ""


def _outside(value: Any, limits: Mapping[str, Any]) -> str | None:
    """How a value breaks the limits of its field, or None."""
    allowed = limits.get("allowed")
    if allowed is not None and value is not None and value not in allowed:
        return choose(value, allowed)
    if not _is_number(value):
        return None
    least, above, most = (limits.get(name) for name in ("least", "above", "most"))
    below = (least is not None and value < least) or (above is not None and value <= above)
    return f"it must be {_describe(type(value), limits)}" if below or (most is not None and value > most) else None


def _choice(limits: Mapping[str, Any]) -> str | None:
    return choose(None, limits["allowed"]) if limits.get("allowed") else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _nested(value: Any) -> bool:
    return value is None or isinstance(value, (list, dict))


def _field_names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
