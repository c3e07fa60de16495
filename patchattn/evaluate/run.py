"""Run tasks of lm-eval on a model with a patch, and say what came out with all that is needed to run it again."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from ..tables import Report, add_row, table
from .library import LOCAL, folder
from .patches import read_patch

if TYPE_CHECKING:
    from rich.console import RenderableType

SEEDS = (0, 1234, 1234, 1234)  # of random, numpy, torch and the choice of examples: lm-eval's own
# Folders of the harness whose tasks ours refer to: to read all of its tasks takes a while.
FAMILIES = ("arc", "babi", "babilong", "blimp", "hellaswag", "lambada", "piqa", "wikitext", "winogrande")


@dataclass(frozen=True)
class Results(Report):
    """What lm-eval found.

    Attributes:
        raw: its results as it gives them, JSON-ready. Under `config.patchattn` stand the patch, versions and machine,
            under `cells` the scores of tasks made up on the spot by length and depth.
        samples: what was asked and answered, by task.
    """

    raw: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]

    def to_dict(self) -> dict[str, Any]:
        return self.raw

    def scores(self) -> dict[str, dict[str, float]]:
        """The numbers alone: `{task: {metric: value}}`, without their errors."""
        found: dict[str, dict[str, float]] = {}
        for task, metrics in self.raw["results"].items():
            for key, value in metrics.items():
                metric = key.partition(",")[0]
                if isinstance(value, (int, float)) and "," in key and not metric.endswith("_stderr"):
                    found.setdefault(task, {})[metric] = float(value)
        return found

    def parts(self) -> list[RenderableType]:
        rows = table("task", "metric", "score", "±", "samples")
        for task, scores in self.scores().items():
            metrics = self.raw["results"][task]
            count = self.raw["n-samples"].get(task, {}).get("effective")
            for index, (metric, value) in enumerate(scores.items()):
                error = next((found for key, found in metrics.items() if key.startswith(f"{metric}_stderr,")), None)
                shown = f"{error:.4f}" if isinstance(error, float) else None
                add_row(rows, task, metric, f"{value:.4f}", shown, None if index else count)
        return [rows]


def evaluate(
    model: Any,
    tasks: str | Sequence[str],
    *,
    patch: Any = None,
    layers: Any = None,
    kind: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    data: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    include_path: str | Sequence[str] | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 1,
    device: str | None = None,
    seed: int | Sequence[int | None] | None = None,
    apply_chat_template: bool = False,
    gen_kwargs: Mapping[str, Any] | None = None,
    output_path: str | None = None,
    log_samples: bool = False,
    bootstrap_iters: int = 1000,
) -> Results | None:
    """Run tasks of lm-eval on a model.

    Args:
        model: folder, repository, lab checkpoint, or an open model, patched or not.
        tasks: names of tasks or groups, of lm-eval or ours, globs, or files; of a suite `suite_` and its name.
        patch: what to put on the model: as after `patch=`, or as for `patchattn.patch`.
        layers: which layers, where the patch is methods.
        kind: lm-eval's name of the model's class. Default: `patchattn`, or for image and text `patchattn-multimodal`.
        model_args: further arguments of that class, such as `dtype`, `max_length` or `trust_remote_code`.
        data: folder of local files; tasks that can be read from there are.
        metadata: settings of tasks: `lengths`, `depths`, `samples`, `text`, ...
        include_path: folders with further tasks.
        limit: samples of each task, or a share of them if less than 1.
        seed: one, or four: of random, numpy, torch, and the choice of examples.
        output_path: where lm-eval writes its results and, with `log_samples`, what was asked and answered.
        bootstrap_iters: for the errors of scores that are no means.

    Returns:
        The results; None in all but the first of several processes.
    """
    from lm_eval.loggers import EvaluationTracker

    wanted = read_patch(patch, layers)
    names = [name.strip() for given in ([tasks] if isinstance(tasks, str) else tasks) for name in given.split(",")]
    arguments = dict(model_args or {})
    chosen = kind or _kind(model, arguments)
    if chosen.startswith("patchattn") and wanted is not None:
        arguments |= {"patch": wanted.text} | ({} if wanted.layers is None else {"layers": wanted.layers})
    elif wanted is not None:
        raise ValueError(f"lm-eval's model {chosen!r} takes no patch; leave it out, or use the model patchattn")
    if isinstance(model, str):
        from .. import lab
        from ..environment import default_device

        arguments = {"pretrained": lab.resolve(model), **arguments}
        handed, lm, device = arguments, chosen, device or default_device()
    else:
        lm = _opened(model, chosen, arguments, batch_size)
        handed, arguments = {**arguments, "pretrained": lm.tokenizer.name_or_path}, {}
    settings = {**handed, **({} if data is None else {"data": data}), **(metadata or {})}
    tracker = EvaluationTracker(output_path=output_path) if output_path else None
    seeds = list(SEEDS) if seed is None else [seed] * 4 if isinstance(seed, int) else list(seed)
    if len(seeds) != 4:
        raise ValueError(f"seed is {seed!r}; it must be one number, or four: of random, numpy, torch and the examples")
    with _quiet():
        manager, names = _manager(names, include_path, settings, data)
        found = lm_eval.simple_evaluate(
            model=lm,
            model_args=arguments if isinstance(lm, str) else None,
            tasks=names,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            device=device,
            limit=limit,
            bootstrap_iters=bootstrap_iters,
            log_samples=True,
            evaluation_tracker=tracker,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
            gen_kwargs=None if gen_kwargs is None else dict(gen_kwargs),
            task_manager=manager,
            random_seed=seeds[0],
            numpy_random_seed=seeds[1],
            torch_random_seed=seeds[2],
            fewshot_random_seed=seeds[3],
            metadata=settings,
        )
    if found is None:
        return None
    samples = found.pop("samples", {})
    found["cells"] = {task: cells for task, rows in samples.items() if (cells := _cells(rows))}
    found["config"].setdefault("patchattn", {"patch": None, "plan": []})
    if tracker is not None:
        tracker.save_results_aggregated(results=found, samples=samples if log_samples else None)
        for task in found["configs"] if log_samples else ():
            tracker.save_results_samples(task_name=task, samples=samples[task])
    return Results(_plain(found), samples)


def _kind(model: Any, arguments: Mapping[str, Any]) -> str:
    """The class for a model, by its config: the multimodal one where a model reads images and text."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    from .. import lab

    if isinstance(model, str):
        options = {key: arguments[key] for key in ("revision", "trust_remote_code") if key in arguments}
        config = AutoConfig.from_pretrained(lab.resolve(model), **options)
    else:
        config = model.config
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    return "patchattn-multimodal" if sees and type(config) not in AutoModelForCausalLM._model_mapping else "patchattn"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval says only what is wrong, unless its own variable asks for more."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    if "LMEVAL_LOG_LEVEL" not in os.environ:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _opened(model: Any, kind: str, arguments: dict[str, Any], batch_size: int | str) -> Any:
    """lm-eval's object for a model that is open already."""
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import get_model

    with _quiet():  # it warns of what is meant here
        return get_model(kind)(pretrained=model, batch_size=batch_size, **arguments)


def _manager(
    names: list[str], include_path: str | Sequence[str] | None, settings: dict[str, Any], data: str | None
) -> tuple[Any, list[str]]:
    """lm-eval's manager with the tasks that are named, and their full names."""
    ours: list[Any] = [folder(), *([include_path] if isinstance(include_path, str) else include_path or ())]
    for place in ours:
        if not Path(place).is_dir():
            raise FileNotFoundError(f"include_path: there is no folder {str(place)!r}")
    base = Path(lm_eval.__file__).parent / "tasks"
    near = [base / family for family in FAMILIES if (base / family).is_dir()]
    manager = TaskManager(include_path=[*near, *ours], include_defaults=False, metadata=settings)
    if not all(name.endswith(".yaml") or _complete(manager, _matches(manager, name, data)) for name in names):
        manager = TaskManager(include_path=ours, metadata=settings)
    found = []
    for name in names:
        matches = [name] if name.endswith(".yaml") else _matches(manager, name, data)
        if not matches:
            raise ValueError(f"no task is called {name!r}; `patchattn tasks` lists ours, `lm_eval ls tasks` the others")
        found += matches
    return manager, list(dict.fromkeys(found))


def _matches(manager: Any, name: str, data: str | None) -> list[str]:
    """The tasks of a name or glob; with local data those on local files, where there are such."""
    known = manager.task_index
    if data is not None and f"{LOCAL}{name}" in known:
        return [f"{LOCAL}{name}"]
    return [name] if name in known else manager.match_tasks([name])


def _complete(manager: Any, names: Sequence[str]) -> bool:
    """Whether these tasks and, if they are groups, all that they consist of are known to the manager."""
    members: list[str] = []
    for name in names:
        entry = manager.task_index.get(name)
        if entry is None:
            return False
        parts = (entry.cfg or {}).get("task") if "group" in (entry.cfg or {}) else None
        members += [part if isinstance(part, str) else part.get("group") or part["task"] for part in parts or ()]
    return bool(names) and (not members or _complete(manager, members))


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Scores by length and depth, of a task whose questions have these."""
    groups: dict[tuple[int, float], list[float]] = defaultdict(list)
    for row in rows:
        doc = row["doc"]
        if not {"length", "depth", "acc"} <= {*doc, *row}:
            return []
        groups[doc["length"], doc["depth"]].append(float(row["acc"]))
    return [
        {"length": length, "depth": None if depth < 0 else depth, "acc": sum(hits) / len(hits), "samples": len(hits)}
        for (length, depth), hits in sorted(groups.items())
    ]


def _plain(found: Any) -> Any:
    return json.loads(json.dumps(found, default=handle_non_serializable, ensure_ascii=False))
