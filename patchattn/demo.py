"""`patchattn demo`: every method on the lab checkpoints, with what it costs and what must hold.

Most is shown on lab-llama, which ships with patchattn and has learned to recall what it has read: so the table shows
what a method saves and, untrained as its patch is here, what it costs in answers. The other lab checkpoints show what
is left of the digits they read, draw and answer about.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attach import patch, unfit, unpatch
from .cache import cache_bytes
from .hub import load, save
from .living import patch_parameters
from .method import Method, methods
from .sites import default_sites, find_sites
from .tables import Report, add_row, setting_text, table

if TYPE_CHECKING:
    from rich.console import RenderableType

PROMPTS = (411, 500)  # tokens of the two rows of the padded batch, beyond what DuoAttention's windows hold
NEW_TOKENS = 12
TIMED_TOKENS = 16
RECALL = {"length": 512, "samples": 8, "batch": 4}
TOLERANCE = 1e-4  # float32, on logits
# Settings for models as small as these, which defaults for large ones would leave as they are.
SMALL = {
    "longheads": {"chunk": 32, "window": 256},
    "seer_attention": {"block": 32, "density": 0.5, "init": "mean"},
    "seer_attention_decode": {"block": 32, "token_budget": 128, "init": "mean"},
    "var": {"sink_dims": (0, 1), "tau": 1.0, "min_visual": 0.1},
}
MIXED = {"even": "gated_attention over duo_attention", "odd": "dense"}


@dataclass(frozen=True)
class Row:
    """One method on the model.

    `seconds` is the fastest of some decoded tokens after `tokens` of context; `recall` the share of values that a model
    which can recall gives for their keys.
    """

    method: str
    bytes: int
    difference: float
    seconds: float
    recall: float | None


@dataclass(frozen=True)
class Score:
    """What a method leaves of what another lab checkpoint can do."""

    checkpoint: str
    method: str
    what: str
    on: str
    value: float


@dataclass(frozen=True)
class Check:
    """Something that must hold, with the first thing that does not."""

    says: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class Demo(Report):
    """What the demo saw."""

    model: str
    tokens: int
    rows: list[Row]
    left_out: dict[str, str]
    checks: list[Check]
    scores: list[Score]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "passed": self.passed}

    def parts(self) -> list[RenderableType]:
        base = self.rows[0]
        columns = ("method", f"cache at {self.tokens} tokens", "of the base's", "largest difference", "a decoded token",
                   f"recall over {RECALL['length']} tokens")  # fmt: skip
        rows = table(*columns, title=self.model)
        for row in self.rows:
            difference = f"{row.difference:.1e}" if row.difference else "0"
            add_row(rows, row.method, f"{row.bytes:,} bytes", f"{row.bytes / base.bytes:.1%}", difference,
                    f"{1000 * row.seconds:.2f} ms", None if row.recall is None else f"{row.recall:.1%}")  # fmt: skip
        lines = [f"A decoded token: the fastest of {TIMED_TOKENS}, on this machine as busy as it was."]
        lines += [f"{name}: left out, {reason}" for name, reason in self.left_out.items()]
        lines += [f"{'✓' if check.passed else '✗'} {check.says}{f': {check.detail}' if check.detail else ''}"
                  for check in self.checks]  # fmt: skip
        if not self.scores:
            return [rows, "\n".join(lines)]
        scores = table("checkpoint", "method", "what", "measured", "on")
        for score in self.scores:
            add_row(scores, score.checkpoint, score.method, score.what, f"{score.value:.1%}", score.on)
        return [rows, scores, "\n".join(lines)]


def run(model: nn.Module | None = None, tokens: int = 1024) -> Demo:
    """Patch, compare, generate, save, reload and unpatch, with every registered method and a mixed plan.

    Args:
        model: an unpatched decoder in float32, left as it was; default: lab-llama.
        tokens: how long the context is at which caches and decoding time are measured.
    """
    questions, settings, others = None, {}, []
    if model is None:
        from transformers.utils import logging

        from . import lab
        from .loading import load_tokenizer
        from .train import synthetic

        logging.disable_progress_bar()
        model, title = lab.load("lab-llama"), "lab-llama, a small Llama that ships with patchattn"
        questions = synthetic.make("mqar", load_tokenizer("lab-llama"), seed=1, pairs=8)
        settings, others = SMALL, [name for name in lab.names() if name != "lab-llama"]
    else:
        title = f"{type(model).__name__} {getattr(model.config, '_name_or_path', '')}".strip()
    patches, left_out = _patches(model, settings)
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocabulary, (1, tokens), generator=generator)
    prompts = [torch.randint(1, vocabulary, (1, length), generator=generator) for length in PROMPTS]
    with torch.no_grad():
        wanted, row = _measure(model, ids, "unpatched", None, questions)
        rows, wrong = [row], _Wrong()
        for name, what in patches.items():
            patch(model, what)
            _, row = _measure(model, ids, name, wanted, questions)
            rows.append(row)
            if isinstance(what, Method) and what.exact and row.difference > TOLERANCE:
                wrong.exact.append(f"{name} differs by {row.difference:.1e}")
            if not _padding_is_harmless(model, prompts):
                wrong.padding.append(name)
            _check_reload(model, ids, name, wanted, wrong)
    scores = [score for name in others for score in _scores(name)]
    return Demo(title, tokens, rows, left_out, wrong.checks(len(patches)), scores)


def _scores(name: str) -> Iterator[Score]:
    """What the lab checkpoint `name` can do, unpatched and with each method that fits it."""
    from . import lab
    from .lab.evaluate import score

    model = lab.load(name)
    patches, _ = _patches(model, SMALL)
    for method, what in {"unpatched": None, **patches}.items():
        if what is not None:
            patch(model, what)
        number = score(name, model)
        assert number.value is not None
        yield Score(name, method, number.what, number.on, number.value)
        if what is not None:
            unpatch(model)


def _patches(model: nn.Module, small: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What to patch with, by name, and which methods do not fit this model and why.

    Args:
        small: settings by method, to be used instead of the defaults.
    """
    sites = default_sites(find_sites(model))
    patches: dict[str, Any] = {}
    left_out = {}
    for cls in methods().values():
        for variant in cls.variants:
            method = cls(**{**small.get(cls.name, {}), **variant})
            name = setting_text({"method": cls.name, **variant})
            reasons = [unfit(site, [method]) for site in sites]
            if None in reasons:
                patches[name] = method
            else:
                left_out[name] = reasons[0] or ""
    mixed = "; ".join(f"{layers}: {what}" for layers, what in MIXED.items())
    if not set(_names(MIXED.values())) & {name.partition(":")[0] for name in left_out}:
        patches[mixed] = {layers: what.split(" over ") for layers, what in MIXED.items()}
    return patches, left_out


def _names(plans: Iterable[str]) -> list[str]:
    return [name for plan in plans for name in plan.split(" over ")]


def _measure(model: Any, ids: Tensor, name: str, wanted: Tensor | None, questions: Any) -> tuple[Tensor, Row]:
    """Logits `[1, T, V]` of the prompt, what its cache and the tokens after it cost, and how much is recalled."""
    from .lab.text import recall

    result = model(input_ids=ids, use_cache=True)
    logits, cache = result.logits, result.past_key_values
    held = cache_bytes(cache)
    token, times = logits[:, -1:].argmax(-1), []
    for _ in range(TIMED_TOKENS):
        start = time.perf_counter()
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        times.append(time.perf_counter() - start)
    difference = 0.0 if wanted is None else (logits - wanted).abs().max().item()
    recalled = None if questions is None else recall(model, questions, **RECALL).tokens
    return logits, Row(name, held, difference, min(times), recalled)


def _padding_is_harmless(model: Any, prompts: Sequence[Tensor]) -> bool:
    """Whether a left-padded batch gives, token by token, what each of its rows gives alone."""
    longest = max(prompt.shape[1] for prompt in prompts)
    batch = torch.cat([functional.pad(prompt, (longest - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.cat([functional.pad(torch.ones_like(p), (longest - p.shape[1], 0)) for p in prompts])
    together = _generate(model, batch, mask)
    alone = torch.cat([_generate(model, prompt, torch.ones_like(prompt)) for prompt in prompts])
    return torch.equal(together, alone)


def _generate(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    out = model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, max_new_tokens=NEW_TOKENS,
                         min_new_tokens=NEW_TOKENS)  # fmt: skip
    return out[:, ids.shape[1] :]


def _check_reload(model: Any, ids: Tensor, name: str, wanted: Tensor, wrong: _Wrong) -> None:
    """Save, unpatch, load, unpatch; the patch's parameters are moved first, so that there is something to load."""
    generator = torch.Generator().manual_seed(1)
    for parameter in patch_parameters(model).values():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    before = model(input_ids=ids).logits
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder, "patch"))
        unpatch(model)
        if not torch.equal(model(input_ids=ids).logits, wanted):
            wrong.unpatched.append(name)
        load(model, Path(folder, "patch"))
    if not torch.equal(model(input_ids=ids).logits, before):
        wrong.reloaded.append(name)
    unpatch(model)


@dataclass
class _Wrong:
    """Which patches failed which check."""

    exact: list[str] = field(default_factory=list)
    padding: list[str] = field(default_factory=list)
    reloaded: list[str] = field(default_factory=list)
    unpatched: list[str] = field(default_factory=list)

    def checks(self, patches: int) -> list[Check]:
        all_of = f"with each of the {patches} patches"
        says = {
            "methods that claim to be exact give the logits of the unpatched model": self.exact,
            f"{all_of}, a left-padded batch generates what its rows generate alone": self.padding,
            f"{all_of}, saved and loaded again, the logits are the same bit for bit": self.reloaded,
            f"{all_of} taken off, the logits are those of before bit for bit": self.unpatched,
        }
        return [Check(line, not failed, "; ".join(failed)) for line, failed in says.items()]
