"""Local files in the place of the hub's data sets, for the harness's own tasks: its prompts and its metrics stay.

The YAML files under `evals/tasks/local/` name these functions as the data of the harness's tasks. Columns are those of
the hub's data sets; WinoGrande may also come as contexts and a continuation, bAbI as its authors' text files.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..train import synthetic
from .library import as_list, data_files
from .recall import tokenizer_of

HEADING = re.compile(r"^ = [^=].* = \n", re.MULTILINE)


def rows(
    task: str, pattern: str, data: str | None = None, where: dict[str, Any] | None = None, **metadata: Any
) -> dict[str, datasets.Dataset]:
    """The lines of a JSON lines file, as every split: these tasks are run without examples.

    Args:
        task: for errors.
        pattern: of the file's name.
        data: the folder.
        where: columns and the values that they must have.
    """
    found = []
    for file in data_files(data, pattern, task):
        with file.open(encoding="utf-8") as lines:
            found += [json.loads(line) for line in lines if line.strip()]
    found = [row for row in found if all(row.get(key) == value for key, value in (where or {}).items())]
    if not found:
        raise ValueError(f"{task}: {pattern} in {data} has no row" + (f" with {where}" if where else ""))
    if "context_options" in found[0]:
        found = [_with_blank(row) for row in found]
    return _splits(found)


def _with_blank(row: dict[str, Any]) -> dict[str, Any]:
    """A row of WinoGrande with a blank again, from two contexts and how they go on."""
    first, second = row["context_options"]
    same = next((place for place, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
    shared = first[: first.rfind(" ", 0, same) + 1]
    return {
        "sentence": f"{shared}_ {row['continuation']}",
        "option1": first[len(shared) :],
        "option2": second[len(shared) :],
        "answer": str(row["gold"] + 1),
    }


def _splits(found: list[dict[str, Any]]) -> dict[str, datasets.Dataset]:
    made = datasets.Dataset.from_list(found)
    return {"train": made, "validation": made, "test": made}


def articles(task: str, pattern: str, data: str | None = None, **metadata: Any) -> dict[str, datasets.Dataset]:
    """The articles of WikiText as one raw file."""
    pages = []
    for file in data_files(data, pattern, task):
        text = file.read_text(encoding="utf-8")
        starts = [match.start() for match in HEADING.finditer(text)] or [0]
        pages += [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)])]
    return _splits([{"page": page} for page in pages if page.strip()])


def babi(task: str, pattern: str, data: str | None = None, **metadata: Any) -> dict[str, datasets.Dataset]:
    """The questions of bAbI, each after all of its story so far."""
    found = [
        {"passage": "".join(f"{fact}\n" for fact in facts), "question": question, "answer": answer}
        for file in data_files(data, pattern, task)
        for facts, question, answer in stories(file)
    ]
    return _splits(found)


def stories(file: Path) -> Iterator[tuple[list[str], str, str]]:
    """Facts so far, question and answer of every question in a file as bAbI's authors give them."""
    facts: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        number, _, text = line.partition(" ")
        if number == "1":
            facts = []
        if "\t" in text or "|" in text:
            question, answer, *_ = re.split(r"[\t|]", text)
            yield list(facts), question.strip(), answer.strip()
        else:
            facts.append(text.strip())


def babilong(
    task: str,
    pattern: str,
    split: str,
    data: str | None = None,
    lengths: Any = 1024,
    samples: int = 100,
    task_seed: int = 0,
    text: str | None = None,
    **metadata: Any,
) -> dict[str, datasets.Dataset]:
    """Questions of bAbI whose facts are spread, in order, over a long text (BABILong).

    Args:
        lengths: tokens of text, facts and question, one or several; the task's instructions come on top.
        samples: questions of each length.
        text: file, folder or glob of books to take the text from; without it, it is made of plain sentences.
    """
    tokenizer = tokenizer_of(metadata)
    asked = [entry for file in data_files(data, pattern, task) for entry in stories(file)]
    source = synthetic.Passkey(tokenizer=tokenizer, seed=0, text=text)
    found = []
    for index in range(min(samples, len(asked))):
        facts, question, answer = asked[index * len(asked) // min(samples, len(asked))]
        for length in as_list(lengths):
            random = np.random.default_rng([task_seed, index])
            own = tokenizer(" ".join([*facts, question]), add_special_tokens=False, verbose=False)["input_ids"]
            needed = len(own) + 2 * len(facts)
            if needed >= length:
                raise ValueError(f"{task}: lengths is {length}; the facts of some questions alone have {needed} tokens")
            filler = source.filler(random, int(length) - needed)
            cuts = sorted(random.integers(0, len(filler), size=len(facts), endpoint=True).tolist())
            edges = [0, *cuts, len(filler)]
            pieces = [tokenizer.decode(filler[low:high]).strip() for low, high in itertools.pairwise(edges)]
            passage = pieces[0]
            for fact, piece in zip(facts, pieces[1:], strict=True):
                passage += f" {fact} {piece}"
            found.append({"input": passage.strip(), "question": question, "target": answer, "length": int(length)})
    return {split: datasets.Dataset.from_list(found)}
