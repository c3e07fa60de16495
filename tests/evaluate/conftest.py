"""A folder of local data, a few rows of each kind."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from patchattn.evaluate import folder

TEXT = "the river runs past the mill and under the old bridge in the morning the bakers open their doors"


def text(index: int, words: int = 12) -> str:
    words_of = TEXT.split(" ")
    return " ".join(words_of[(index * 5 + place) % len(words_of)] for place in range(words))


def paradigms() -> list[str]:
    from lm_eval.tasks._yaml_loader import load_yaml

    group = load_yaml(folder() / "tasks" / "local" / "local_blimp.yaml", resolve_func=False)
    return [task["dataset_kwargs"]["where"]["UID"] for task in group["task"]]


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    place = tmp_path_factory.mktemp("bench")
    labels = ["A", "B", "C", "D"]
    rows = {
        "lambada_test.jsonl": [{"text": text(n)} for n in range(4)],
        "hellaswag_val.jsonl": [
            {"activity_label": "Baking", "ctx_a": text(n), "ctx_b": "and then", "label": n % 4,
             "endings": [text(n + 7 * k, 6) for k in range(4)]}
            for n in range(4)
        ],
        "piqa_valid.jsonl": [
            {"goal": text(n, 6), "sol1": text(n + 1, 5), "sol2": text(n + 3, 8), "label": n % 2} for n in range(4)
        ],
        "arc_easy_test.jsonl": [
            {"question": text(n), "choices": {"text": [text(n + k, 3) for k in range(4)], "label": labels},
             "answerKey": labels[n % 4]}
            for n in range(4)
        ],
        "winogrande_val.jsonl": [
            {"context_options": [f"{text(n)} the baker", f"{text(n)} the barge"], "continuation": "was late.",
             "gold": n % 2}
            for n in range(4)
        ],
        "blimp_few.jsonl": [
            {"sentence_good": text(n), "sentence_bad": text(n + 2), "UID": uid} for n, uid in enumerate(paradigms())
        ],
    }  # fmt: skip
    for name, lines in rows.items():
        (place / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    story = ("1 John travelled to the hallway.\n2 Mary went to the garden.\n3 Where is John? \thallway\t1\n"
             "4 John went to the kitchen.\n5 Where is John? \tkitchen\t4\n")  # fmt: skip
    for question in (1, 2, 3):
        (place / f"babi_qa{question}_test.txt").write_text(story * 2)
    page = " = The {} = \n\n {} \n\n = = More = = \n\n {} \n\n"
    (place / "wikitext_test.txt").write_text("".join(page.format(n, text(n, 60), text(n + 3, 40)) for n in range(3)))
    return place
