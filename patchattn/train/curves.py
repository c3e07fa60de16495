"""A picture of metrics.jsonl: the loss and its terms over the steps, stage by stage, with the held-out loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .callbacks import METRICS, read_metrics

PICTURE = "curves.png"
_NOT_LOSSES = ("stage", "step", "epoch", "learning_rate", "grad_norm")


def draw(folder: Path) -> Path:
    """Write curves.png beside the metrics.jsonl in `folder`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(folder / METRICS)
    stages = sorted({(line["stage"], line["kind"]) for line in lines})
    figure = Figure(figsize=(5.5 * max(1, len(stages)), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (stage, kind) in enumerate(stages, start=1):
        axes = figure.add_subplot(1, len(stages), place)
        _draw_stage(axes, [line for line in lines if line["stage"] == stage])
        axes.set_title(f"{stage} {kind}")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(folder / PICTURE, dpi=120)
    return folder / PICTURE


def _draw_stage(axes: Any, lines: list[dict[str, Any]]) -> None:
    names = [name for line in lines for name, value in line.items() if isinstance(value, float)]
    for name in dict.fromkeys(names):
        if name in _NOT_LOSSES or name.endswith("_per_second"):
            continue
        points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), float)]
        axes.plot(*zip(*points), marker="o" if name.startswith("eval") else None, label=name, linewidth=1.2)
    values = [line["loss"] for line in lines if isinstance(line.get("loss"), float)]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
