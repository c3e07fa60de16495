"""Retrieval-head patterns of DuoAttention: read, write, binarise and identify them.

A pattern is an array `[layers, KV heads]` of gate values in [0, 1]; heads near 1 need the whole context.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patchattn_kernels import sink_window

from .method import Method, MethodConfig

if TYPE_CHECKING:
    from .context import AttentionContext
    from .sites import Site

PATTERN_FILE = "full_attention_heads.tsv"
Rows = list[list[float]]


def as_rows(values: Any) -> Rows:
    """Any array `[layers, KV heads]` as nested lists of numbers."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().tolist()
    elif hasattr(values, "tolist"):
        values = values.tolist()
    try:
        rows = [[float(value) if value != int(value) else int(value) for value in row] for row in values]
    except (TypeError, ValueError):
        raise ValueError(f"DuoAttention: heads is {values!r}; it must be a share from 0 to 1, an array "
                         "[layers, KV heads] of numbers, or a pattern file") from None  # fmt: skip
    if not rows or not all(rows):
        raise ValueError("DuoAttention: heads is empty; it must have a row for each layer")
    return rows


def load_pattern(path: str | os.PathLike[str]) -> Rows:
    """Gate values `[layers][KV heads]` of a published pattern, clipped to [0, 1].

    Args:
        path: a tab-separated file with a line for each layer, a JSON file with nested lists (bare or under
            "heads"), or the folder that holds `full_attention_heads.tsv`.
    """
    file = Path(path)
    if file.is_dir():
        file = file / PATTERN_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no pattern at {file}; give a .tsv or .json file, or a folder with {PATTERN_FILE}")
    text = file.read_text(encoding="utf-8")
    try:
        if file.suffix == ".json":
            values = json.loads(text)
            rows = values["heads"] if isinstance(values, dict) else values
        else:
            rows = [[float(value) for value in line.split()] for line in text.splitlines() if line.strip()]
        rows = [[min(1.0, max(0.0, float(value))) for value in row] for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no pattern: {error}; it must hold one line of numbers for each layer") from None
    if not rows or len({len(row) for row in rows}) != 1 or not rows[0]:
        raise ValueError(f"{file} is no pattern: its {len(rows)} lines must be equally long and not empty")
    return rows


def load_settings(path: str | os.PathLike[str]) -> dict[str, int]:
    """`sink` and `recent` that a published pattern folder was trained with, from its config.json."""
    values = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    return {"sink": values["sink_size"], "recent": values["recent_size"]}


def save_pattern(path: str | os.PathLike[str], gates: Any, sink: int, recent: int) -> Path:
    """Write gate values in the published layout: a folder with a TSV and a config.json."""
    rows, folder = as_rows(gates), Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(repr(float(value)) for value in row) for row in rows]
    (folder / PATTERN_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"sink_size": sink, "recent_size": recent}, indent=2) + "\n")
    return folder


def draw_pattern(file: str | os.PathLike[str], gates: Any, share: float | None = None) -> Path:
    """Write a picture of gate values, layers by KV heads; with `share`, the heads that stay full are framed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows, file = as_rows(gates), Path(file)
    layers, heads = len(rows), len(rows[0])
    figure = Figure(figsize=(1.8 + 0.3 * layers, 1.4 + 0.3 * heads), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(list(zip(*rows)), vmin=0, vmax=1, cmap="viridis", origin="lower")
    for layer, row in enumerate([] if share is None else binarise(rows, share)):
        for head in (head for head, full in enumerate(row) if full):
            axes.add_patch(Rectangle((layer - 0.45, head - 0.45), 0.9, 0.9, fill=False, edgecolor="red"))
    axes.set_xlabel("layer")
    axes.set_ylabel("KV head")
    axes.locator_params(integer=True)
    figure.colorbar(image, label="gate")
    figure.savefig(file, dpi=120)
    return file


def binarise(gates: Any, share: float | None) -> list[list[int]]:
    """1 for heads that stay full, 0 for streaming ones; `share` of all heads of the model stay full.

    Ties go to the lower layer, then the lower head, so that the same gates always give the same pattern.
    """
    rows = as_rows(gates)
    flat = [value for row in rows for value in row]
    if share is None:
        if any(value not in (0, 1) for value in flat):
            raise ValueError("DuoAttention: heads holds gate values, so share must say how many heads stay full, "
                             "for example share=0.5")  # fmt: skip
        return [[int(value) for value in row] for row in rows]
    sparsity = 1 - share
    streaming = len(flat) if sparsity == 1 else math.ceil((len(flat) - 1) * sparsity - 1e-9)
    clipped = [min(1.0, max(0.0, value)) for value in flat]
    order = sorted(range(len(flat)), key=lambda index: (clipped[index], -index))
    dropped = set(order[:streaming])
    places = iter(range(len(flat)))
    return [[int(next(places) not in dropped) for _ in row] for row in rows]


def spread(share: float, kv_heads: Sequence[int]) -> list[list[int]]:
    """A pattern without knowledge: in every layer the first heads stay full, `share` of all in sum."""
    rows, given, wanted = [], 0, 0.0
    for count in kv_heads:
        wanted += share * count
        full = min(count, max(0, math.floor(wanted + 0.5) - given))
        given += full
        rows.append([int(head < full) for head in range(count)])
    return rows


# ---- identification: which heads need the whole context ----------------------------------------------------


class HeadGates(Method):
    """A gate a KV head mixes full and streaming attention: `(1 - a) * streaming + a * full`, `a = clamp(gate, 0, 1)`.

    The model runs twice on the same tokens. Inside `teaching` it computes full attention, and each layer keeps its
    output; then, as the student, a layer mixes that output with streaming attention on its own states. So the
    teacher takes no part in the backward pass.
    """

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """`teacher_branch`: take the student's full part from the teacher's run, as published, or compute full
        attention on the student's own states."""

        sink: int = 128
        recent: int = 256
        teacher_branch: bool = True

    config: Config

    def build(self, site: Site) -> None:
        self.group = site.heads // site.kv_heads
        self.gates = nn.Parameter(torch.ones(site.kv_heads, device=site.device))
        self.teaches = False
        self.taught: Tensor | None = None  # [B, T, H, D]

    def forward(self, ctx: AttentionContext) -> Tensor:
        if ctx.mask.padding is not None or ctx.mask.dense is not None:
            raise ValueError("HeadGates: the batch must be without padding")
        if self.teaches:
            self.taught = ctx.attend()
            return self.taught
        if self.taught is None:
            raise RuntimeError("HeadGates: the student runs before its teacher; run the model inside teaching() first")
        rank = torch.arange(ctx.q.shape[2], device=ctx.q.device).expand(ctx.q.shape[0], -1)
        streaming = sink_window(ctx.q, ctx.k, ctx.v, rank, sink=self.config.sink, recent=self.config.recent,
                                scale=ctx.scaling, softcap=ctx.softcap, sinks=ctx.sinks).transpose(1, 2)  # fmt: skip
        full = self.taught if self.config.teacher_branch else ctx.attend()
        gate = self.gates.clamp(0, 1).repeat_interleave(self.group)[None, None, :, None]  # [1, 1, H, 1]
        return ((1 - gate) * streaming.float() + gate * full.float()).to(streaming.dtype)


@contextlib.contextmanager
def teaching(model: nn.Module) -> Iterator[None]:
    """Inside this block `HeadGates` compute full attention, without gradients, and keep it for the student."""
    from . import record

    methods: list[Any] = [record.attachment_of(site.module).methods[0] for site in record.record_of(model).patched]
    training = model.training
    model.eval()
    for method in methods:
        method.teaches = True
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        for method in methods:
            method.teaches = False


@dataclass(frozen=True)
class Step:
    """One step of `identify`: gates as used and as updated, their gradients, and the losses."""

    index: int
    rate: float
    distill: float
    penalty: float
    used: Tensor
    updated: Tensor
    gradient: Tensor


def rate_factor(step: int, steps: int) -> float:
    """Share of the learning rate at a step: a tenth, up to all of it over a fifth of the steps, flat, and back."""
    ramp = max(1, steps // 5)
    return min(1.0, max((step + 1) / ramp, 0.1), max((steps - step) / ramp, 0.1))


def distill_loss(teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
    """Mean squared difference of final states `[B, T, C]` on the labelled tokens (not -100)."""
    return (teacher.float() - student.float()).square().mean(dim=-1)[labels != -100].mean()


def identify(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    steps: int = 2000,
    rate: float = 0.02,
    penalty: float = 0.05,
    sink: int = 128,
    recent: int = 256,
    start: Any = 1.0,
    teacher_branch: bool = True,
    on_step: Callable[[Step], None] | None = None,
) -> Tensor:
    """Find the retrieval heads of a model: gate values `[layers, KV heads]`, near 1 where a head needs it all.

    The gates are trained so that the final hidden states stay those of full attention while an L1 penalty
    pulls every gate towards streaming. The model's own weights do not change, and it is unpatched at the end.

    Args:
        batches: pairs `(input_ids, labels)`, both `[B, T]` and without padding; labels are -100 on tokens whose
            states are not compared. `passkey_batches` makes them. Ends early when they run out.
        start: the gates' first value, or an array `[layers, KV heads]`.
        on_step: called after each step, for logging.
    """
    from . import attach, living, record

    method = HeadGates(sink=sink, recent=recent, teacher_branch=teacher_branch)
    root = record.root_of(model)
    learned = {name: parameter.requires_grad for name, parameter in root.named_parameters()}
    attach.patch(model, method)
    try:
        living.freeze_base(root)
        gates: list[Tensor] = list(living.patch_parameters(model).values())
        for index, gate in enumerate(gates):
            gate.data = gate.data.float()
            gate.data.copy_(
                torch.as_tensor(start)[index] if not isinstance(start, (int, float)) else torch.tensor(start)
            )
        base: Any = root.base_model
        optimizer = torch.optim.AdamW(gates, lr=rate, weight_decay=0.0)
        for index, (input_ids, labels) in zip(range(steps), batches, strict=False):
            optimizer.param_groups[0]["lr"] = rate * rate_factor(index, steps)
            with torch.no_grad():
                for gate in gates:
                    gate.clamp_(0, 1)
            used = torch.stack([gate.detach().clone() for gate in gates])
            device = gates[0].device
            input_ids, labels = input_ids.to(device), labels.to(device)
            with teaching(root):
                teacher = base(input_ids=input_ids, use_cache=False).last_hidden_state
            student = base(input_ids=input_ids, use_cache=False).last_hidden_state
            distill = distill_loss(teacher, student, labels)
            size = torch.cat(gates).abs().mean()
            optimizer.zero_grad()
            (distill + penalty * size).backward()
            gradient = torch.stack([gate.grad.clone() for gate in gates])  # type: ignore[union-attr]
            optimizer.step()
            if on_step is not None:
                updated = torch.stack([gate.detach().clone() for gate in gates])
                lr = optimizer.param_groups[0]["lr"]
                on_step(Step(index, lr, distill.item(), size.item(), used, updated, gradient))
        return torch.stack([gate.detach().cpu() for gate in gates])
    finally:
        attach.unpatch(model)
        for name, parameter in root.named_parameters():
            parameter.requires_grad_(learned[name])
            if not learned[name]:
                parameter.grad = None


# ---- data for identification: passkeys hidden in a long text -----------------------------------------------


@dataclass(frozen=True)
class PasskeyParts:
    """The token lists a multi-passkey sample is made of.

    `announcements[k]` comes before the k-th passkey in the text, `questions[k]` asks for it at the end.
    """

    haystack: Sequence[int]
    opening: Sequence[int]  # with the BOS token
    closing: Sequence[int]
    separator: Sequence[int]
    announcements: Sequence[Sequence[int]]
    questions: Sequence[Sequence[int]]


def passkey_sample(
    parts: PasskeyParts, passkeys: Sequence[Sequence[int]], depths: Sequence[float], length: int, multiple: int = 16
) -> tuple[list[int], list[int]]:
    """Token ids and labels of one sample: `length` tokens of text with passkeys at `depths`, then the questions.

    Labels are -100 over the text and the tokens' own ids over questions and answers. The sample is filled with
    the last tokens of the haystack to a multiple of `multiple`, by a whole `multiple` if it already is one.
    """
    haystack = list(parts.haystack)[:length]
    context: list[int] = []
    done = 0
    for announcement, passkey, depth in zip(parts.announcements, passkeys, depths, strict=False):
        place = int(len(haystack) * depth)
        context += haystack[done:place]
        context += [*parts.separator, *announcement, *passkey, *parts.separator]
        done = place
    context += haystack[done:]
    tail = [
        token
        for question, passkey in zip(parts.questions, passkeys, strict=False)
        for token in [*question, *passkey, *parts.separator]
    ]
    missing = multiple - (len(parts.opening) + len(context) + len(parts.closing) + len(tail)) % multiple
    text = [*parts.opening, *context, *parts.haystack[-missing:], *parts.closing]
    return text + tail, [-100] * len(text) + tail


# The words passkeys are made of, one for each letter.
ALPHABET = """
alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo
sierra tango uniform victor whiskey x-ray yankee zulu
""".split()  # noqa: SIM905
ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]


def passkey_batches(
    tokenizer: Any,
    text: str,
    *,
    shortest: int = 1000,
    longest: int = 32000,
    lengths: int = 50,
    passkeys: int = 10,
    words: int = 32,
    seed: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless multi-passkey batches of one sample each, for `identify`.

    Args:
        tokenizer: the model's tokenizer.
        text: any long text to hide the passkeys in; repeated where it is too short.
        shortest, longest, lengths: the text is cut to lengths from `shortest` to `longest` tokens, `lengths` of
            them in turn.
        passkeys, words: how many passkeys a sample has (10 at most), and of how many words each.
    """
    if not 1 <= passkeys <= len(ORDINALS):
        raise ValueError(f"passkey_batches: passkeys is {passkeys}; it must be 1 to {len(ORDINALS)}")

    def encode(piece: str) -> list[int]:
        return list(tokenizer.encode(piece, add_special_tokens=False))

    haystack = encode(text)
    if not haystack:
        raise ValueError("passkey_batches: the text has no tokens")
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    parts = PasskeyParts(
        haystack=(haystack * math.ceil(longest / len(haystack)))[:longest],
        opening=bos + encode("Below is a long text. Remember the passkeys that are hidden in it.\n\n"),
        closing=encode("\n\nNow repeat the passkeys.\n\n"),
        separator=encode("\n\n"),
        announcements=[encode(f"Remember: the {ordinal} passkey is ") for ordinal in ORDINALS[:passkeys]],
        questions=[encode(f"What is the {ordinal} passkey? It is ") for ordinal in ORDINALS[:passkeys]],
    )
    random = torch.Generator().manual_seed(seed)
    grid = torch.linspace(0.05, 0.95, 1000)
    steps = [int(value) for value in torch.linspace(shortest, longest, lengths)]
    while True:
        for length in steps:
            depths = grid[torch.randperm(len(grid), generator=random)[:passkeys]].sort().values.tolist()
            drawn = torch.randint(len(ALPHABET), (passkeys, words), generator=random).tolist()
            keys = [encode(" ".join(ALPHABET[index] for index in row)) for row in drawn]
            ids, labels = passkey_sample(parts, keys, depths, length)
            yield torch.tensor([ids]), torch.tensor([labels])
