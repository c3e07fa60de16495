"""The model card that goes with every saved patch: what it is, where it sits, how to use it, what was measured."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

MARK = "<!-- Written by patchattn, and again with every save: delete this line to keep your own text. -->"
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_ours(text: str) -> bool:
    """Whether this README.md may be written anew."""
    return MARK in text


def is_repo_id(name: str | None) -> bool:
    """Whether this is the name of a repository on the hub, and not of a folder here."""
    return name is not None and REPO_ID.fullmatch(name) is not None and not os.path.exists(name)


def render(
    description: Mapping[str, Any], where: str, auto_class: str | None, whole: bool, quantized: bool = False
) -> str:
    """README.md for a patch alone, or for a whole patched model.

    Args:
        where: the folder or repository that the example opens.
        auto_class: the class of transformers or diffusers that opens the base model, if there is one.
        whole: whether `where` holds the whole model and not just the patch.
        quantized: whether the base model of a whole one is quantized, so that it opens as remote code only.
    """
    base, revision = description["base_model"], description["base_revision"]
    methods = [method["method"] for entry in description["plan"] for method in entry["methods"]]
    front: dict[str, Any] = {"library_name": "patchattn", "tags": ["patchattn", *dict.fromkeys(methods)]}
    if is_repo_id(base):
        front["base_model"] = base
        if not whole:
            front["base_model_relation"] = "adapter"
    title = " + ".join(dict.fromkeys(methods)) + (f" on {base}" if is_repo_id(base) else "")
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        MARK,
        f"# {title}",
        "",
        f"{_opening(description, whole)}. Made with patchattn {description['patchattn_version']} and transformers "
        f"{description['transformers_version']}.",
        "",
        "## Use",
        "",
        "```python",
        *_usage(description, where, auto_class, whole, quantized),
        "```",
        "",
        *(["`trust_remote_code=True` does in place of `import patchattn`.", ""] if _remote(description, whole) else []),
        "## What is patched",
        "",
        *_settings(description),
        "",
        f"Base model: {f'`{base}`' if base else 'not recorded'}"
        + (f", revision `{revision}`" if revision else "")
        + f" (`{description['architecture']}`: "
        + ", ".join(f"{key} {value}" for key, value in description["shape"].items() if value is not None)
        + ").",
    ]
    if description.get("results"):
        lines += ["", "## Results", "", "| what | value |", "| --- | --- |"]
        lines += [f"| {name} | {value} |" for name, value in _flat(description["results"])]
    return "\n".join(lines) + "\n"


def _opening(description: Mapping[str, Any], whole: bool) -> str:
    what = f"A whole `{description['architecture']}` whose" if whole else "A patch for a pretrained model: its"
    return f"{what} attention is replaced in {sum(len(e['layers']) for e in description['plan'])} modules"


def _remote(description: Mapping[str, Any], whole: bool) -> bool:
    return whole and description["shape"]["model_type"] is not None  # which diffusers does not have


def _usage(
    description: Mapping[str, Any], where: str, auto_class: str | None, whole: bool, quantized: bool
) -> Iterator[str]:
    library = "diffusers" if description["shape"]["model_type"] is None else "transformers"
    yield "import patchattn"
    if auto_class is not None and (whole or description["base_model"]):
        yield f"from {library} import {auto_class}"
        yield ""
        if whole:
            trust = ", trust_remote_code=True" if quantized else ""
            yield f"model = {auto_class}.from_pretrained({_quoted(where)}{trust})"
            return
        revision = f", revision={_quoted(description['base_revision'])}" if description["base_revision"] else ""
        yield f"model = {auto_class}.from_pretrained({_quoted(description['base_model'])}{revision})"
    else:
        yield ""
        yield f"model = ...  # the {description['architecture']} that the patch was made for"
    yield f"patchattn.load(model, {_quoted(where)})"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def point_to(text: str, where: str) -> str:
    """The card with its example opening `where`."""
    text = re.sub(r"(?m)^(patchattn\.load\(model, ).*\)$", lambda match: f"{match[1]}{_quoted(where)})", text)
    if "patchattn.load(model, " not in text:
        text = re.sub(
            r'(?m)^(model = \w+\.from_pretrained\()".*?"(.*)$',
            lambda match: f"{match[1]}{_quoted(where)}{match[2]}",
            text,
            count=1,
        )
    return text


def _settings(description: Mapping[str, Any]) -> Iterator[str]:
    yield "| modules | method | settings |"
    yield "| --- | --- | --- |"
    for entry in description["plan"]:
        for method in entry["methods"]:
            fields = ", ".join(f"{key}={_short(value)}" for key, value in method.items() if key != "method")
            yield f"| {_short_names(entry['layers'])} | {method['method']} | {fields or 'none'} |"


def _short(value: Any) -> str:
    text = repr(value)
    if len(text) <= 60:
        return text
    return f"({len(value)} rows, see the config)" if isinstance(value, list) else text[:57] + "..."


def _short_names(names: list[str]) -> str:
    return f"`{names[0]}`" if len(names) == 1 else f"{len(names)}: `{names[0]}` ... `{names[-1]}`"


def _flat(results: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in results.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} / ")
        else:
            yield f"{prefix}{name}", value
