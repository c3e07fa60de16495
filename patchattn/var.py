"""VAR's tools: find the dimensions in which sinks show, and say and draw what was moved."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patchattn_kernels.grouped import IMAGE, IMAGE_SINK, TEXT_SINK, redistribute

from .tables import Report, add_row, note, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .context import AttentionContext

PROMPTS, LENGTH = 4, 32  # of made-up text, where none is given


# ---- sink dimensions -----------------------------------------------------------------------------------------


@torch.no_grad()
def find_sink_dims(
    model: nn.Module, prompts: Sequence[Tensor] | None = None, *, threshold: float = 20.0
) -> tuple[int, ...]:
    """The dimensions in which the first token of a text, which always is a sink, stands out: usually one to three.

    Those where it exceeds `threshold` times the root mean square of its residual stream in all prompts, and in all
    layers of the middle third; the largest first. A warning, and none, if there are none.

    Args:
        prompts: texts as token ids `[T]`, begun as the tokenizer begins them. Default: a few of tokens drawn at
            random, after the beginning-of-text token: what a text says hardly matters to its first token.
    """
    from . import living
    from .record import patch_of, root_of
    from .sites import default_sites, find_sites

    root: Any = root_of(model)
    if patch_of(model) is not None:
        with living.disabled(model):
            values = _first_tokens(root, default_sites(find_sites(root)), prompts)
    else:
        values = _first_tokens(root, default_sites(find_sites(root)), prompts)
    least = values.amin(dim=0)  # [C], over layers and prompts
    dims = [int(dim) for dim in least.argsort(descending=True) if least[dim] > threshold]
    if not dims:
        warnings.warn(f"find_sink_dims: no dimension of the first token exceeds {threshold} times its root mean square "
                      f"everywhere; the largest such factor is {float(least.max()):.1f}", stacklevel=2)  # fmt: skip
    return tuple(dims)


def _first_tokens(root: Any, sites: Sequence[Any], prompts: Sequence[Tensor] | None) -> Tensor:
    """`|x_d| / rms(x)` of the first token of each prompt, entering each layer of the middle third: `[n, C]`."""
    layers = [root.get_submodule(site.name.rpartition(".")[0]) for site in sites if site.causal]
    third = len(layers) // 3
    noted: list[Tensor] = []

    def note_first(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        first = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])[0, 0].float()
        noted.append(first.abs() / first.square().mean().add(1e-6).sqrt())

    hooks = [layer.register_forward_pre_hook(note_first, with_kwargs=True)
             for layer in layers[third : max(third + 1, len(layers) - third)]]  # fmt: skip
    training = root.training
    root.eval()
    try:
        for prompt in _made_up(root) if prompts is None else prompts:
            root(input_ids=torch.as_tensor(prompt, device=root.device).reshape(1, -1), use_cache=False)
    finally:
        root.train(training)
        for hook in hooks:
            hook.remove()
    return torch.stack([row.to(noted[0].device) for row in noted])


def _made_up(root: Any) -> list[Tensor]:
    from .context import visual_tokens

    config = root.config.get_text_config()
    allowed = torch.ones(config.vocab_size, dtype=torch.bool)
    begin = config.bos_token_id
    special = [*visual_tokens(root.config), begin, config.pad_token_id, config.eos_token_id]
    for token in (value for value in special if isinstance(value, int)):
        allowed[token % config.vocab_size] = False
    ids = allowed.nonzero()[:, 0]
    generator = torch.Generator().manual_seed(0)
    texts = [ids[torch.randint(len(ids), (LENGTH,), generator=generator)] for _ in range(PROMPTS)]
    return texts if not isinstance(begin, int) else [torch.cat([torch.tensor([begin]), text]) for text in texts]


# ---- what was moved ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """What VAR did on one layer in the last call of each kind.

    Attributes:
        image_sinks, other_sinks: places of the sink tokens, of each row of the prompt, padding counted.
        moved: the share of (head, query) rows of the last prompt whose weights were changed.
        moved_step: the same in the last call of a single token.
    """

    name: str
    layer: int | None
    image_sinks: list[list[int]]
    other_sinks: list[list[int]]
    moved: float
    moved_step: float | None


@dataclass(frozen=True)
class Moved(Report):
    """What `report` found."""

    model: str
    layers: list[Layer]
    notes: list[str]

    def parts(self) -> list[RenderableType]:
        rows = table("attention", "image sinks", "other sinks", "rows moved", "in the last step", title=self.model)
        for layer in self.layers:
            step = None if layer.moved_step is None else f"{layer.moved_step:.1%}"
            add_row(
                rows, layer.name, _places(layer.image_sinks), _places(layer.other_sinks), f"{layer.moved:.1%}", step
            )
        return [rows, *map(note, self.notes)]


def report(model: nn.Module) -> Moved:
    """Sink tokens and moved rows of every layer that VAR changed in its last prompt."""
    layers = []
    for site, method in _sites(model):
        if "prompt" not in method.last:
            continue
        kinds, moved = method.last["prompt"]
        step = method.last.get("step")
        layers.append(Layer(
            name=site.name,
            layer=site.layer_idx,
            image_sinks=[row.nonzero()[:, 0].tolist() for row in kinds == IMAGE_SINK],
            other_sinks=[row.nonzero()[:, 0].tolist() for row in kinds == TEXT_SINK],
            moved=float(moved.float().mean()),
            moved_step=None if step is None else float(step[1].float().mean()),
        ))  # fmt: skip
    notes = [] if layers else ["nothing was moved: no prompt had an image with a sink in it"]
    return Moved(type(model).__name__, layers, notes)


def _sites(model: nn.Module) -> list[tuple[Any, Any]]:
    """The layers with VAR on them, those it leaves alone included."""
    from .record import attachment_of, record_of

    found = [(site, method) for site in record_of(model).patched for method in attachment_of(site.module).methods
             if method.name == "var"]  # fmt: skip
    if not found:
        raise ValueError(f"no layer of this {type(model).__name__} has VAR on it; patchattn.patch(model, "
                         "patchattn.VAR(...)) puts it there")  # fmt: skip
    return found


def _places(rows: list[list[int]]) -> str:
    return "; ".join(", ".join(map(str, row)) or "none" for row in rows)


# ---- a picture -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageWeights:
    """The weight of the last token of a prompt on the tokens of its image, on one layer: `[H, n]` each.

    Attributes:
        before, after: in the model's own softmax, and as VAR moves it.
        sinks: which of the n are sinks `[n]`.
        moved: which heads were changed `[H]`.
    """

    name: str
    before: Tensor
    after: Tensor
    sinks: Tensor
    moved: Tensor


@torch.no_grad()
def image_weights(model: nn.Module, row: int = 0, **inputs: Any) -> list[ImageWeights]:
    """Run a patched model once on a prompt with an image, and note the weights on it where VAR moves some."""
    from .living import watching

    found: list[ImageWeights] = []

    def watch(ctx: AttentionContext) -> Tensor:
        methods: list[Any] = [method for method in ctx.attachment.methods if method.name == "var"]
        for method in methods:
            method.last.clear()
        out = ctx.attend()
        for method in methods:
            if "prompt" in method.last:
                kinds = method.last["prompt"][0][row : row + 1]
                image = (kinds == IMAGE) | (kinds == IMAGE_SINK)
                last = ctx.q.shape[2] - 1
                before = ctx.softmax_weights(last, last + 1)[row : row + 1]
                count = image.sum(dim=1, keepdim=True).where((kinds == IMAGE_SINK).any(dim=1, keepdim=True), 0)
                after, moved = redistribute(before, kinds, count, method.config.rule)
                found.append(ImageWeights(ctx.attachment.site.name, before[0, :, 0, image[0]], after[0, :, 0, image[0]],
                                          (kinds == IMAGE_SINK)[0, image[0]], moved[0, :, 0]))  # fmt: skip
        return out

    _sites(model)
    with watching(model, watch):
        model(**inputs)
    if not found:
        raise ValueError("image_weights: VAR moved nothing on any layer: this prompt has no image with a sink in it")
    return found


def picture(
    model: nn.Module, file: str | os.PathLike[str], *, grid: tuple[int, int] | None = None, row: int = 0, **inputs: Any
) -> Path:
    """Write a picture of the attention over an image, before and after, as the last token of the prompt sees it.

    One line a layer, the mean over the heads that were changed (over all where none was); sinks are framed.

    Args:
        grid: rows and columns of the image's tokens; default: a square.
        row: which row of the batch.
        inputs: of the model: `input_ids`, `pixel_values`, ...
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    layers, file = image_weights(model, row, **inputs), Path(file)
    count = len(layers[0].sinks)
    side = round(count**0.5)
    height, width = grid or (side, side)
    if height * width != count:
        given = "is no square" if grid is None else f"is not {height} x {width}"
        raise ValueError(f"picture: the image has {count} tokens, which {given}; give grid=(rows, columns)")
    figure = Figure(figsize=(8.5, 2.6 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    lines = figure.subplots(len(layers), 3, squeeze=False)
    for axes, layer in zip(lines, layers, strict=True):
        heads = layer.moved if bool(layer.moved.any()) else torch.ones_like(layer.moved)
        before, after = (x[heads].mean(dim=0).float().cpu().reshape(height, width) for x in (layer.before, layer.after))
        most, change = float(torch.maximum(before, after).max()), after - before
        for axis, values, title, style in (
            (axes[0], before, "before", dict(vmin=0, vmax=most, cmap="viridis")),
            (axes[1], after, "after", dict(vmin=0, vmax=most, cmap="viridis")),
            (axes[2], change, "after - before", dict(vmin=-float(change.abs().max()), vmax=float(change.abs().max()),
                                                     cmap="RdBu_r")),
        ):  # fmt: skip
            shown = axis.imshow(values.numpy(), **style)
            figure.colorbar(shown, ax=axis, shrink=0.8)
            axis.set_title(title, fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
            for place in layer.sinks.nonzero()[:, 0].tolist():
                corner = (place % width - 0.5, place // width - 0.5)
                axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="red"))
        axes[0].set_ylabel(f"{layer.name}\n{int(layer.moved.sum())} of {len(layer.moved)} heads moved", fontsize=7)
    figure.savefig(file, dpi=110)
    return file
