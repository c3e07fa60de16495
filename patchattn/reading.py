"""What the source of an attention module's forward says about the way it attends.

Most modules only project, rotate, update the cache and call the attention once, with the mask they were given.
Those that do more are told by their code, not by their names.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

TABLE = "ALL_ATTENTION_FUNCTIONS"


def forward_function(module: nn.Module) -> Callable[..., Any]:
    """The module's own forward, without decorators, hooks or accelerate's wrapper."""
    return inspect.unwrap(type(module).forward)


@dataclass(frozen=True)
class Reading:
    """What can be read from a forward; the defaults are what is usual.

    Attributes:
        calls: how often it calls the attention.
        keywords: the names it hands over beside q, k, v and the mask.
        draws_mask: it changes the mask, or takes another than it was given.
        own_index: it updates the cache at `self.layer_idx`, and nowhere else.
        eager: the name of the function it takes for "eager".
    """

    calls: int = 1
    keywords: frozenset[str] = frozenset()
    draws_mask: bool = False
    own_index: bool = True
    eager: str = "eager_attention_forward"


@functools.cache
def read_forward(function: Callable[..., Any]) -> Reading:
    """Read the forward of a module that asks transformers' attention table; without its source, take the usual."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return Reading()
    values = _assigned(tree)
    attentions = {name for name, given in values.items() if any(TABLE in ast.unparse(value) for value in given)}
    calls = [call for call in _calls(tree) if isinstance(call.func, ast.Name) and call.func.id in attentions]
    updates = [call for call in _calls(tree) if isinstance(call.func, ast.Attribute) and call.func.attr == "update"]
    lookups = [call for call in _calls(tree) if TABLE in ast.unparse(call.func) and len(call.args) > 1]
    eager = [call.args[1].id for call in lookups if isinstance(call.args[1], ast.Name)]
    return Reading(
        calls=len(calls),
        keywords=frozenset(keyword.arg for call in calls for keyword in call.keywords if keyword.arg),
        draws_mask=_computes_with_mask(tree) or any(_takes_new_mask(call, values) for call in calls),
        own_index=all(ast.unparse(call.args[2]) == "self.layer_idx" for call in updates if len(call.args) > 2),
        eager=eager[0] if eager else Reading.eager,
    )


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _assigned(tree: ast.AST) -> dict[str, list[ast.expr]]:
    """What is assigned to each plain name."""
    values: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    values.setdefault(target.id, []).append(node.value)
    return values


def _computes_with_mask(tree: ast.AST) -> bool:
    """Whether the mask is looked into: `attention_mask[...]`, `attention_mask.dtype`."""
    owners = (node.value for node in ast.walk(tree) if isinstance(node, (ast.Subscript, ast.Attribute)))
    return any(isinstance(owner, ast.Name) and owner.id == "attention_mask" for owner in owners)


def _takes_new_mask(call: ast.Call, values: dict[str, list[ast.expr]]) -> bool:
    """Whether the mask of an attention call was computed here, or is not the one that transformers makes."""
    for mask in [keyword.value for keyword in call.keywords if keyword.arg == "attention_mask"] + call.args[4:5]:
        if isinstance(mask, ast.Name):
            sources = values.get(mask.id, [])  # one that is only renamed was not computed
            if any(not isinstance(value, (ast.Name, ast.Constant)) for value in sources):
                return True
            if not sources and mask.id not in ("attention_mask", "mask"):
                return True
    return False
