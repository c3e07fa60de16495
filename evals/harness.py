"""Scores of a model on real benchmark rows, through lm-eval and without the hub: as it is, and with patches on it.

    python evals/harness.py --model FOLDER --data BENCH --output evals/results/harness-smollm2.json

BENCH is a folder of local files as docs/evaluate.md describes it. Each task takes its first rows, as many as `LIMITS`
says: a run of minutes, not a leaderboard. Patches are written as after `patch=`; the first run is without one.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from patchattn.evaluate import Results, evaluate

LIMITS = {
    "lambada_openai": 60, "hellaswag": 80, "piqa": 80, "arc_easy": 80, "winogrande": 80, "blimp": 3, "babi": 20,
    "babilong_qa1": 10,
}  # fmt: skip
SHORT_ANSWERS = ("babi",)  # which may otherwise go on for 256 tokens


def run(model: str, data: str, text: str | None, patch: str | None, share: float, tasks: list[str]) -> dict[str, Any]:
    """Scores of all tasks, with the seconds they took."""
    scores, seconds, facts = {}, {}, {}
    for task in tasks:
        limit = LIMITS[task]
        started = time.perf_counter()
        found = evaluate(
            model, task if task != "babilong_qa1" else "local_babilong_qa1", patch=patch, data=data,
            model_args={"dtype": "float32"}, limit=max(1, round(limit * share)), batch_size=8,
            gen_kwargs={"max_gen_toks": 8} if task in SHORT_ANSWERS else None,
            metadata={"lengths": 1024, **({} if text is None else {"text": text})},
        )  # fmt: skip
        assert isinstance(found, Results)
        kept = found.scores()
        scores[task] = kept.get(task) or kept[f"local_{task}"]
        counts = [entry["effective"] for entry in found.raw["n-samples"].values()]
        scores[task]["samples"] = sum(counts)
        seconds[task] = round(time.perf_counter() - started, 1)
        facts = found.raw["config"]["patchattn"]
        print(f"{patch or 'as it is':<20} {task:<16} {scores[task]} {seconds[task]} s", flush=True)
    return {"patch": patch, "plan": facts["plan"], "scores": scores, "seconds": seconds, "machine": facts["machine"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or repository")
    parser.add_argument("--data", required=True, help="folder of local files")
    parser.add_argument("--text", help="a book for the long texts of BABILong; default: plain sentences")
    parser.add_argument("--patch", action="append", help="as after patch=; may be given again; default: dense")
    parser.add_argument("--share", type=float, default=1.0, help="of the rows, for a quick look")
    parser.add_argument("--tasks", default=",".join(LIMITS), help="some of them, with commas between")
    parser.add_argument("--output", metavar="FILE", help="write the numbers there as JSON")
    given = parser.parse_args()
    runs = []
    for patch in [None, *(given.patch or ["dense"])]:
        runs.append(run(given.model, given.data, given.text, patch, given.share, given.tasks.split(",")))
        same = [task for task, scores in runs[-1]["scores"].items() if scores == runs[0]["scores"][task]]
        runs[-1]["tasks_equal_to_the_model_as_it_is"] = same
        if given.output:
            result = {"model": Path(given.model).name, "dtype": "float32", "rows": LIMITS, "share": given.share,
                      "runs": runs}  # fmt: skip
            Path(given.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
