"""What a method is: a strict configuration and a module that computes attention from a context."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module, metadata
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .cache import PatchCacheLayer
    from .context import AttentionContext
    from .sites import Site

ENTRY_POINT_GROUP = "patchattn.methods"


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """Plain values that define a method; checked on creation, and the same again after a trip through JSON.

    A field that may be changed while a model runs (`patchattn.settings`) is declared with `runtime(default)`.
    """

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MethodConfig:
        """The config these fields describe; an unknown field is an error."""
        return cls(**checked_fields(cls, values))

    def replace(self, **changes: Any) -> MethodConfig:
        """A copy with some fields changed, checked again."""
        return type(self)(**{**self.to_dict(), **checked_fields(type(self), changes)})

    @classmethod
    def runtime_fields(cls) -> list[str]:
        """Names of the fields that `patchattn.settings` may change."""
        return [field.name for field in dataclasses.fields(cls) if field.metadata.get("runtime")]

    def resolve(self, sites: Sequence[Site], total_layers: int) -> MethodConfig:
        """The config with everything that needs the model or the disk filled in; called once a patch."""
        return self

    def measure(self, model: nn.Module) -> MethodConfig:
        """The config with everything filled in that takes a run of the model; called by `patch` after `resolve`."""
        return self

    def part(self, places: Sequence[int]) -> MethodConfig:
        """The config for some of the layers that it was resolved for, by their places among them."""
        return self

    def _require(self, condition: bool, field: str, allowed: str) -> None:
        if not condition:
            raise ValueError(f"{_owner(type(self))}: {field} is {getattr(self, field)!r}; it must be {allowed}")

    def _require_choice(self, field: str, choices: Iterable[str]) -> None:
        self._require(getattr(self, field) in tuple(choices), field, "one of " + ", ".join(map(repr, choices)))

    def _require_int(self, field: str, least: int) -> None:
        value = getattr(self, field)
        self._require(isinstance(value, int) and not isinstance(value, bool) and value >= least, field,
                      f"an integer of at least {least}")  # fmt: skip


def runtime(default: Any) -> Any:
    """A config field that may be changed while the model runs."""
    return dataclasses.field(default=default, metadata={"runtime": True})


def checked_fields(config_class: type[MethodConfig], values: dict[str, Any]) -> dict[str, Any]:
    """`values`, or an error that names the first unknown field and the ones there are."""
    known = [field.name for field in dataclasses.fields(config_class)]
    for name in values:
        if name not in known:
            allowed = ", ".join(known) or "none: it has no settings"
            raise ValueError(f"{_owner(config_class)}: unknown field {name!r}; allowed: {allowed}")
    return values


def _owner(config_class: type[MethodConfig]) -> str:
    return config_class.__qualname__.rsplit(".Config", 1)[0].rsplit(".", 1)[-1]


class Method(nn.Module):
    """Base of every method. A subclass is one file: docstring, `Config`, `build`, `forward`.

    `DuoAttention(sink=64)` is a method that sits on no model yet: `patch` makes one copy for each attention
    module and calls its `build`. The parameters created there are the patch's parameters.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""  # title and link, for the table of methods
    summary: ClassVar[str] = ""  # what it is for, in one line
    trained: ClassVar[bool] = False  # whether it needs training to be of use
    # "raw": q and k arrive before rotary, and the method rotates them itself; "either": so where the module's rotary
    # can be held back, which `ctx.raw` tells.
    rotary: str = "applied"
    needs: frozenset[str] = frozenset()  # of "residual", "model_inputs", and projection names
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({},)  # settings that `inspect` shows beside each other
    exact: ClassVar[bool] = False  # computes what the unpatched model computes, for every setting
    chooses: ClassVar[bool] = False  # by comparing scores, so that rounding may move a few tokens' results in jumps
    innermost: ClassVar[bool] = False  # computes attention itself: what follows it in a list of methods would not run
    example: ClassVar[dict[str, Any]] = {}  # settings that make sense on a toy model of a few dozen tokens
    transfer_kinds: ClassVar[tuple[str, ...]] = ("output",)  # losses it can be transferred with, its own choice first

    def __init__(self, config: MethodConfig | None = None, **fields: Any) -> None:
        super().__init__()
        if config is None:
            config = self.Config(**checked_fields(self.Config, fields))
        elif fields:
            raise TypeError(f"{type(self).__name__}: give a config or fields, not both")
        if not isinstance(config, self.Config):
            raise TypeError(f"{type(self).__name__}: config is a {type(config).__name__}; it must be its own Config")
        self.config = config
        self._losses: dict[str, Tensor] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Config" in cls.__dict__:
            cls.__signature__ = inspect.signature(cls.Config)  # type: ignore[attr-defined]

    @classmethod
    def unfit(cls, site: Site, config: MethodConfig) -> str | None:
        """Why this method cannot sit on this attention module, or None if it can."""
        return None

    def build(self, site: Site) -> None:
        """Create the parameters this method needs on one attention module."""

    def cache_layer(self, static_length: int | None) -> PatchCacheLayer | None:
        """This method's own cache layer, or None to keep the one transformers made."""
        return None

    def forward(self, ctx: AttentionContext) -> Tensor:
        """Attention of one layer: `[B, T, H, D]`, before the output projection."""
        raise TypeError(f"{type(self).__name__} defines no forward(ctx)")

    def transfer_loss(self, ctx: AttentionContext, target: Tensor, kind: str) -> Tensor:
        """How far this method is from the base attention, whose output is `target` `[B, T, H, D]`.

        Args:
            kind: one of `transfer_kinds`: "output" compares outputs, "map" attention maps (see `attention_map`),
                "block_map" maps of block maxima (see `block_map`).
        """
        from . import losses

        if kind == "output":
            return losses.output_error(self(ctx), target, ctx.mask)
        if kind == "map":
            return losses.map_cross_entropy(ctx, self.attention_map)
        return losses.block_map_divergence(ctx, *self.block_map(ctx))

    def attention_map(self, ctx: AttentionContext, first: int, last: int) -> Tensor:
        """This method's own attention weights of the queries `first` to `last`: `[B, H, last - first, S]`."""
        raise TypeError(f"{type(self).__name__} has no attention map")

    def block_map(self, ctx: AttentionContext) -> tuple[Tensor, int | tuple[int, int]]:
        """Scores before the softmax for blocks of queries and keys `[B, H or G, N, M]`, and the block's size.

        The size is that of both, or (of queries, of keys). A score is -inf where nothing is to be foreseen: in the
        future, and where the method does not learn.
        """
        raise TypeError(f"{type(self).__name__} has no block map")

    def diagnostics(self, ctx: AttentionContext) -> dict[str, Tensor]:
        """What a transfer shows beside its held-out loss, by name; the mean over layers is logged."""
        return {}

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Further loss terms of the last forward while training, by name, weighted; given once."""
        terms, self._losses = self._losses, {}
        return terms

    def add_loss(self, **terms: Tensor) -> None:
        """Note terms of this forward for `auxiliary_losses`: load balance, sparsity, ...

        What gradient checkpointing runs a second time, in the backward pass, counts for nothing.
        """
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            self._losses = {**self._losses, **terms}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_losses": {}}  # a graph can be neither copied nor pickled

    def report(self) -> dict[str, Any]:
        """What happened in the last call, for `patchattn.explain`."""
        return {}

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={_short(value)}" for key, value in self.config.to_dict().items())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


_REGISTERED: dict[str, type[Method]] = {}
AnyMethod = TypeVar("AnyMethod", bound=type[Method])


def register(name: str) -> Callable[[AnyMethod], AnyMethod]:
    """Class decorator: make a method known by `name` to `patch`, `load` and the command line."""

    def add(cls: AnyMethod) -> AnyMethod:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"register: name is {name!r}; it must be lower_case letters, digits and underscores")
        known = _REGISTERED.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"register: the name {name!r} is taken by {known.__module__}.{known.__qualname__}")
        cls.name = name
        _REGISTERED[name] = cls
        return cls

    return add


def builtin_names() -> list[str]:
    """Names of the methods that ship with patchattn: the files in `patchattn/methods`."""
    package = import_module("patchattn.methods")
    return sorted(module.name for module in iter_modules(package.__path__) if not module.name.startswith("_"))


def methods() -> dict[str, type[Method]]:
    """Every known method by name: shipped, registered by decorator, or installed as an entry point."""
    for name in builtin_names():
        import_module(f"patchattn.methods.{name}")
    for entry in metadata.entry_points(group=ENTRY_POINT_GROUP):
        if entry.name not in _REGISTERED:
            register(entry.name)(entry.load())
    return dict(sorted(_REGISTERED.items()))


def method_class(name: str) -> type[Method]:
    """The method called `name`; case, hyphens and underscores do not matter."""
    wanted = _squashed(name)
    for known in builtin_names():
        if _squashed(known) == wanted:
            import_module(f"patchattn.methods.{known}")
    candidates = _REGISTERED if any(_squashed(known) == wanted for known in _REGISTERED) else methods()
    for known, cls in candidates.items():
        if _squashed(known) == wanted:
            return cls
    raise ValueError(f"unknown method {name!r}; known methods: {', '.join(methods())}")


def _squashed(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).lower()


def as_methods(what: Any) -> list[Method]:
    """`what` as a list of methods, outermost first: a method, a class, a config, a name, a dict, or a list of those."""
    if isinstance(what, (list, tuple)):
        if not what:
            raise ValueError("an empty list of methods; name at least one")
        return [method for item in what for method in as_methods(item)]
    if isinstance(what, Method):
        return [what]
    if isinstance(what, type) and issubclass(what, Method):
        return [what()]
    if isinstance(what, str):
        return [_from_string(what)]
    if isinstance(what, MethodConfig):
        for cls in methods().values():
            if type(what) is cls.Config:
                return [cls(what)]
        raise ValueError(f"no registered method has the config {type(what).__qualname__}")
    if isinstance(what, dict) and "method" in what:
        fields = {key: value for key, value in what.items() if key != "method"}
        cls = method_class(what["method"])
        return [cls(cls.Config.from_dict(fields))]
    raise TypeError(
        f"{what!r} is no method; give a method such as patchattn.DuoAttention(), its name, a list of methods, "
        "or a plan {layers: method}"
    )


def _from_string(text: str) -> Method:
    """`"duo_attention"`, or with fields as `"duo_attention:sink=4,recent=128"`."""
    name, _, rest = text.partition(":")
    fields = {}
    for part in re.split(r",(?=\s*\w+=)", rest) if rest else []:
        key, equals, value = part.strip().partition("=")
        if not equals:
            raise ValueError(f"method {text!r}: {part!r} is no setting; write name:key=value,key=value")
        fields[key] = _value(value)
    cls = method_class(name)
    return cls(cls.Config.from_dict(fields))


def _value(text: str) -> Any:
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        return text


def describe(method: Method) -> dict[str, Any]:
    """A method as JSON-ready data, which `as_methods` reads back."""
    return {"method": method.name, **method.config.to_dict()}
