"""Which layers can bear a method: what patching each of them costs, and plans that keep the dearest as they were.

A profile measures a model on rows of text or of a task with its patch on every layer, on none, on one layer alone, and
on all layers but one. What it found, and how far it got, stands in one JSON file; the same call goes on with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .living import disabled, only, patch_state
from .method import as_methods, describe, method_class
from .record import patch_of, record_of, root_of
from .sites import default_sites, find_sites
from .tables import Report, add_row, table
from .train.tasks import IGNORED, Batch, Task

if TYPE_CHECKING:
    from rich.console import RenderableType

FORMAT = 1
WAYS = ("alone", "without")
MEASURES = ("divergence", "loss", "right")
Rows = Mapping[str, Sequence[Batch]]
Sums = list[float]  # of one batch: loss, divergence, targets that are likeliest, targets


@dataclass(frozen=True)
class Score:
    """How well a model does on some rows, each the mean over their targets.

    Attributes:
        loss: cross-entropy (of a diffusion model the squared error).
        divergence: Kullback-Leibler divergence from the unpatched model's prediction (squared difference).
        right: the share of targets that are the likeliest; None for a diffusion model.
    """

    loss: float
    divergence: float
    right: float | None


@dataclass(frozen=True)
class Layer:
    """One patched layer.

    Attributes:
        selector: what names it in a plan: its number, or the module's name.
        methods: what it was patched with, outermost first.
        bytes, dense_bytes: of its cache after `Profile.cached` tokens, with the patch and without; None if it has none.
        alone, without: what the model scores, by rows, with this layer alone patched, and with all but this one.
    """

    name: str
    selector: str
    methods: list[dict[str, Any]]
    bytes: int | None
    dense_bytes: int | None
    alone: dict[str, Score]
    without: dict[str, Score]


@dataclass(frozen=True)
class Profile(Report):
    """What `profile` measured.

    Attributes:
        unpatched, patched: what the model scores, by rows, with the patch on no layer and on all.
        targets: by rows, how many predictions a score is the mean of.
        cached: tokens in the cache whose bytes the layers tell; None where there is no cache.
    """

    model: str
    layers: list[Layer]
    unpatched: dict[str, Score]
    patched: dict[str, Score]
    targets: dict[str, int]
    cached: int | None

    def sensitivity(
        self, way: str | float = 0.5, *, by: str = "divergence", on: str | Sequence[str] | None = None
    ) -> list[float]:
        """What patching each layer costs, in the order of `layers`.

        Args:
            way: "alone": what patching it does to the unpatched model; "without": what taking the patch off it spares
                the patched model; or a number from 0 to 1: the first, weighed with it, and the second with the rest.
            by: "divergence", "loss" or "right" (the share of right answers that is lost).
            on: the rows that count, each as much as the others; default: all.
        """
        _require("by", by, MEASURES)
        names = list(self.unpatched) if on is None else [on] if isinstance(on, str) else list(on)
        for name in names:
            _require("on", name, list(self.unpatched))
        if isinstance(way, str):
            _require("way", way, WAYS)
        measured = [kind for kind in WAYS if all(getattr(layer, kind) for layer in self.layers)]
        if isinstance(way, str) and way not in measured:
            raise ValueError(f"profile: {way!r} was not measured; it has {', '.join(measured)}")

        def value(scores: dict[str, Score]) -> float:
            found = [getattr(scores[name], by) for name in names]
            if None in found:
                raise ValueError(f"profile: by is {by!r}, which this model's predictions have not; use 'loss'")
            return sum(found) / len(found) * (-1 if by == "right" else 1)

        costs = {}
        if "alone" in measured:
            costs["alone"] = [value(layer.alone) - value(self.unpatched) for layer in self.layers]
        if "without" in measured:
            costs["without"] = [value(self.patched) - value(layer.without) for layer in self.layers]
        if isinstance(way, str):
            return costs[way]
        if len(measured) == 1:
            return costs[measured[0]]
        return [way * a + (1 - way) * b for a, b in zip(costs["alone"], costs["without"], strict=True)]

    def kept(
        self, budget: float, *, of: str = "layers", by: str = "divergence", on: str | Sequence[str] | None = None,
        way: str | None = None,
    ) -> list[Layer]:  # fmt: skip
        """The layers to be kept as they were: the most sensitive that a budget pays for.

        Args:
            budget: from 0 to 1, of all layers, or of the bytes that the unpatched model's cache takes.
            of: "layers" or "cache".
            by, on: see `sensitivity`.
            way: "alone" or "without". By default both count, the first the more the more layers are kept.
        """
        _require("of", of, ("layers", "cache"))
        if not 0 <= budget <= 1:
            raise ValueError(f"profile: budget is {budget}; it must be from 0 to 1")
        costs = self.sensitivity(budget if way is None else way, by=by, on=on)
        sizes, left = [1.0] * len(self.layers), budget * len(self.layers)
        if of == "cache":
            held = [(layer.bytes, layer.dense_bytes) for layer in self.layers]
            if self.cached is None or any(None in pair for pair in held):
                raise ValueError("profile: of is 'cache', but this model was measured without one; use 'layers'")
            sizes = [float(dense - own) for own, dense in held]  # type: ignore[operator]
            left = budget * sum(layer.dense_bytes or 0 for layer in self.layers) - sum(own or 0 for own, _ in held)
            if left < 0:
                least = sum(own or 0 for own, _ in held) / sum(dense or 0 for _, dense in held)
                raise ValueError(f"profile: budget is {budget} of the cache; with every layer patched it takes "
                                 f"{least:.3f} at {self.cached} tokens, so give at least that")  # fmt: skip
            if min(sizes) <= 0:
                raise ValueError("profile: of is 'cache', but the patched layers hold as much as before at "
                                 f"{self.cached} tokens; use 'layers', or a profile of longer rows")  # fmt: skip
        densest = _bought(costs, sizes, left, lambda place: -costs[place] / sizes[place])
        dearest = _bought(costs, sizes, left, lambda place: -costs[place])
        best = max(densest, dearest, key=lambda chosen: sum(costs[place] for place in chosen))
        return [self.layers[place] for place in sorted(best)]

    def plan(self, budget: float, **options: Any) -> dict[str, Any]:
        """A plan for `patchattn.patch`, and for a recipe's `patch`, that keeps `kept(budget, ...)` as they were."""
        kept = {layer.name for layer in self.kept(budget, **options)}
        plan: dict[str, tuple[list[str], Any]] = {}
        for layer in self.layers:
            if layer.name not in kept:
                given = [_without_defaults(method) for method in layer.methods]
                methods = given[0] if len(given) == 1 else given
                plan.setdefault(json.dumps(methods), ([], methods))[0].append(layer.selector)
        if not plan:
            raise ValueError(f"profile: with a budget of {budget} every layer stays as it was; give a smaller one")
        found: dict[str, Any] = {}
        for selectors, methods in plan.values():
            numbers = [selector for selector in selectors if selector.isdigit()]
            names = [selector for selector in selectors if not selector.isdigit()]
            found.update({selector: methods for selector in ([",".join(numbers)] if numbers else []) + names})
        return found

    def parts(self) -> list[RenderableType]:
        heads = [f"{name} {way}" for name in self.unpatched for way in WAYS if getattr(self.layers[0], way)]
        rows = table("divergence", *heads, "cache bytes", "if dense", title=self.model)
        for label, scores in (("on no layer", self.unpatched), ("on all layers", self.patched)):
            cells = [_shown(scores[name]) for name in scores for way in WAYS if getattr(self.layers[0], way)]
            add_row(rows, label, *cells, None, None)
        for layer in self.layers:
            found = [getattr(layer, way) for way in WAYS]
            cells = [_shown(scores[name]) for name in self.unpatched for scores in found if scores]
            add_row(rows, layer.name, *cells, layer.bytes, layer.dense_bytes)
        return [rows, "alone: the patch on this layer only; without: on all but this one"]


def profile(
    model: nn.Module, what: Any, rows: Rows, *, layers: Any = None, task: Task | None = None,
    reference: nn.Module | None = None, ways: Sequence[str] = WAYS, file: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Profile:  # fmt: skip
    """Measure what patching each layer of `model` costs. The model is afterwards as it was.

    Args:
        what: methods, or a plan, as for `patch`; None for a model that is patched, and perhaps trained, already.
        rows: batches by name, such as `text_rows` and `task_rows` make them.
        layers: which, where `what` is no plan.
        task: what the model is for, where that is not language modelling: see `patchattn.train.tasks`.
        reference: the model whose predictions are to be kept; default: this one without its patch.
        ways: "alone", "without" or both.
        file: JSON that is written after every step; what stands there already is not measured again.
        say: called with a line for people on the way.
    """
    from .attach import patch, unpatch

    if (what is None) != (patch_of(model) is not None):
        wrong = "not patched; name methods for it" if what is None else "patched already; give None for its own patch"
        raise ValueError(f"profile: this model is {wrong}")
    for way in ways:
        _require("ways", way, WAYS)
    if not rows or not all(rows.values()):
        raise ValueError("profile: there are no rows to measure on; give at least one batch under each name")
    if what is not None:
        patch(model, what, layers)
    training = model.training
    model.eval()
    try:
        return _Profiling(model, what, rows, task or Task(), reference, tuple(ways), file, say).run()
    finally:
        model.train(training)
        if what is not None:
            unpatch(model)


def load_profile(file: str | os.PathLike[str]) -> Profile:
    """The profile in a file that `profile` wrote to its end."""
    try:
        state = json.loads(Path(file).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise ValueError(f"{os.fspath(file)} has format {state['format']!r}; this version reads {FORMAT}")
        return _read(state, os.fspath(file))
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{os.fspath(file)} is no profile: {type(error).__name__}: {error}") from None


class _Profiling:
    """One run of `profile` on a patched model."""

    def __init__(
        self, model: nn.Module, what: Any, rows: Rows, task: Task, reference: nn.Module | None, ways: tuple[str, ...],
        file: Any, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.model, self.rows, self.task, self.reference, self.say = model, rows, task, reference, say
        self.file = None if file is None else Path(file)
        record = record_of(model)
        names = [site.name for site in record.patched]
        numbers = {site.name: str(place) for place, site in enumerate(default_sites(find_sites(root_of(model))))}
        given = [as_methods(item) for item in what.values()] if isinstance(what, dict) and "method" not in what else (
            [] if what is None else [as_methods(what)])  # fmt: skip
        methods = {
            name: [describe(method) for method in (given[place] if given else resolved)]
            for place, (_, chosen, resolved) in enumerate(record.plan) for name in chosen
        }  # fmt: skip
        self.cells: dict[str, list[str]] = {"unpatched": [], "patched": names}
        for way in ways:
            for name in names:
                self.cells[f"{way} {name}"] = [name] if way == "alone" else [n for n in names if n != name]
        settings = {
            "ways": list(ways),
            "layers": [
                {"name": name, "selector": numbers.get(name, name), "methods": methods[name]} for name in names
            ],
            "rows": {name: _fingerprint(one for batch in batches for one in batch.values())
                     for name, batches in rows.items()},
            "patch": _fingerprint(patch_state(model).values()) if what is None else None,
            "reference": None if reference is None else _name(reference),
        }  # fmt: skip
        self.state: dict[str, Any] = {
            "format": FORMAT, "model": _name(model), "settings": json.loads(json.dumps(settings)), "cached": None,
            "bytes": {}, "sums": {name: {cell: [] for cell in self.cells} for name in rows},
        }  # fmt: skip

    def run(self) -> Profile:
        self._resume()
        total = sum(len(batches) for batches in self.rows.values()) * len(self.cells)
        with torch.no_grad():
            for name, batches in self.rows.items():
                for place, batch in enumerate(batches):
                    self._measure(name, place, batch, total)
            cached = any(site.cache_index is not None for site in record_of(self.model).patched)
            if cached and not self.state["bytes"]:
                self._cache_bytes()
        return _read(self.state, "this profile")

    def _resume(self) -> None:
        if self.file is None or not self.file.is_file():
            return
        state = json.loads(self.file.read_text(encoding="utf-8"))
        for key in ("format", "model", "settings"):
            if state.get(key) != self.state[key]:
                raise ValueError(f"{self.file} holds a profile of another kind (its {_difference(state, self.state)} "
                                 "differ); name another file")  # fmt: skip
        self.state = state

    def _save(self) -> None:
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            written = self.file.with_name(self.file.name + ".tmp")
            written.write_text(json.dumps(self.state, indent=1) + "\n", encoding="utf-8")
            written.replace(self.file)

    def _measure(self, name: str, place: int, batch: Batch, total: int) -> None:
        """All that is missing of one batch."""
        sums: dict[str, list[Sums]] = self.state["sums"][name]
        missing = [cell for cell in self.cells if len(sums[cell]) <= place]
        if not missing:
            return
        device = next(self.model.parameters()).device
        batch = {key: value.to(device) for key, value in batch.items()}
        inputs = self.task.inputs(batch)
        with disabled(self.model) if self.reference is None else contextlib.nullcontext():
            wanted = self.task.prediction((self.reference or self.model)(**inputs)).to(device)
        for cell in missing:
            if cell == "unpatched" and self.reference is None:
                prediction = wanted
            else:
                with disabled(self.model) if cell == "unpatched" else only(self.model, self.cells[cell]):
                    prediction = self.task.prediction(self.model(**inputs))
            sums[cell].append(_sums(self.task, prediction, wanted, batch))
            self._save()
            done = sum(len(rows) for cells in self.state["sums"].values() for rows in cells.values())
            self.say(f"{done} of {total}: {name}, {cell}")

    def _cache_bytes(self) -> None:
        """What each layer's cache holds after the longest rows, with the patch and without."""
        from transformers import DynamicCache

        from .explanation import explain

        batch = max((batches[0] for batches in self.rows.values()), key=lambda one: one["input_ids"].shape[1])
        ids = batch["input_ids"][:1].to(next(self.model.parameters()).device)
        cache = DynamicCache(config=self.model.config)
        self.model(input_ids=ids, past_key_values=cache, use_cache=True)
        held = {layer.name: [layer.bytes, layer.dense_bytes] for layer in explain(self.model).layers if layer.methods}
        self.state["cached"], self.state["bytes"] = ids.shape[1], held
        self._save()


def _read(state: dict[str, Any], where: str) -> Profile:
    """The profile that a finished run's file says."""
    sums: dict[str, dict[str, list[Sums]]] = state["sums"]
    counts = {len(rows) for cells in sums.values() for rows in cells.values()}
    per_name = {name: {len(rows) for rows in cells.values()} for name, cells in sums.items()}
    if 0 in counts or any(len(found) > 1 for found in per_name.values()):
        raise ValueError(f"{where} is not finished; the same command goes on with it")

    def scores(cell: str) -> dict[str, Score]:
        return {name: _score(cells[cell]) for name, cells in sums.items() if cell in cells}

    layers = []
    for entry in state["settings"]["layers"]:
        own, dense = state["bytes"].get(entry["name"], [None, None])
        alone, without = (scores(f"{way} {entry['name']}") for way in WAYS)
        layers.append(Layer(**entry, bytes=own, dense_bytes=dense, alone=alone, without=without))
    targets = {name: int(sum(batch[3] for batch in cells["unpatched"])) for name, cells in sums.items()}
    return Profile(state["model"], layers, scores("unpatched"), scores("patched"), targets, state["cached"])


def _score(batches: list[Sums]) -> Score:
    loss, divergence, right, count = (sum(column) for column in zip(*batches, strict=True))
    return Score(loss / count, divergence / count, None if right < 0 else right / count)


def _sums(task: Task, prediction: Tensor, wanted: Tensor, batch: Batch) -> Sums:
    """Loss, divergence from `wanted`, right targets (-1 where there is no such thing) and targets of a batch."""
    count, loss = task.count(batch) or 0, task.loss(prediction, batch).item()
    if task.names == ("denoising",):
        return [loss, (prediction.float() - wanted.float()).square().sum().item(), -1, count]
    labels = batch["labels"]
    if task.token_level:
        chosen = labels[:, 1:] != IGNORED
        prediction, wanted, labels = (x[chosen] for x in (prediction[:, :-1], wanted[:, :-1], labels[:, 1:]))
    own, base = (x.float().log_softmax(dim=-1) for x in (prediction, wanted))
    divergence = functional.kl_div(own, base, reduction="sum", log_target=True).item()
    return [loss, divergence, int((own.argmax(dim=-1) == labels).sum()), count]


# ---- rows to measure on --------------------------------------------------------------------------------------------


def text_rows(
    tokenizer: Any, texts: Iterable[str], *, length: int = 512, rows: int = 8, batch: int = 4
) -> list[dict[str, Tensor]]:
    """Stretches of `length` tokens, evenly spread over texts, in batches; every token but the first is a target."""
    start = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    if len(ids) < length - 1:
        raise ValueError(f"text_rows: the texts have {len(ids)} tokens; with length {length} they must have as many")
    places = torch.linspace(0, len(ids) - length + 1, rows).long().tolist()
    found = torch.tensor([start + ids[place : place + length - 1] for place in places])
    return [{"input_ids": some, "labels": some.clone()} for some in found.split(batch)]


def task_rows(
    tokenizer: Any,
    task: str,
    *,
    length: int = 512,
    rows: int = 8,
    batch: int = 4,
    seed: int = 1_000_003,
    **options: Any,
) -> list[dict[str, Tensor]]:
    """Samples of a generated task, in batches; targets are its answers.

    Args:
        task: a generator of `patchattn.train.synthetic`: "passkey", "mqar", "needle", ...
        seed: of the samples; recipes draw theirs from other ones.
        options: of the generator, such as `pairs=8`.
    """
    from .train.synthetic import make

    generator = make(task, tokenizer, seed, **options)
    samples: dict[int, list[Any]] = {}
    for index in range(rows):
        sample = generator.sample(index, length)
        samples.setdefault(len(sample["input_ids"]), []).append(sample)
    found = []
    for same in samples.values():
        for first in range(0, len(same), batch):
            some = same[first : first + batch]
            found.append({key: torch.tensor([one[key] for one in some]) for key in ("input_ids", "labels")})
    return found


# ---- small things --------------------------------------------------------------------------------------------------


def _bought(costs: list[float], sizes: list[float], left: float, order: Callable[[int], float]) -> list[int]:
    """The layers that a budget pays for, asked in this order."""
    chosen = []
    for place in sorted(range(len(costs)), key=order):
        if sizes[place] <= left + 1e-9:
            chosen.append(place)
            left -= sizes[place]
    return chosen


def _fingerprint(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _name(model: nn.Module) -> str:
    root = root_of(model)
    place = getattr(getattr(root, "config", None), "_name_or_path", "") or ""
    return f"{type(root).__name__} {Path(place).name}".strip()


def _difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """The first thing in which two runs differ."""
    if one.get("model") != other["model"] or one.get("format") != other["format"]:
        return "model" if one.get("format") == other["format"] else "format"
    mine, given = one.get("settings", {}), other["settings"]
    return next(key for key in given if mine.get(key) != given[key])


def _require(field: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"profile: {field} is {value!r}; it must be one of {', '.join(allowed)}")


def _without_defaults(described: dict[str, Any]) -> dict[str, Any]:
    usual = {field.name: field.default for field in dataclasses.fields(method_class(described["method"]).Config)}
    return {key: value for key, value in described.items() if key == "method" or value != usual[key]}


def _shown(score: Score) -> str:
    return f"{score.divergence:.4f}"
