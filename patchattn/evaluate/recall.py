"""Tasks for lm-eval that are made up on the spot, of any length, with the tokenizer of the model; no network.

The YAML files under `evals/tasks/` name `questions` as their data and `RecallTask` as their class. Settings come by
lm-eval's `--metadata`, each as it is described at `questions`.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from lm_eval.api.metrics import mean, weighted_perplexity
from lm_eval.api.task import ConfigurableTask

from ..lab.text import TASK_SEED
from ..loading import load_tokenizer
from ..train import synthetic
from ..train.synthetic import Drawn, Generator, Haystack, Range, number
from .library import as_list

LENGTHS = (512, 1024)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SAMPLES = 4  # of each length and depth
MARGIN = 8  # tokens that may be added where a text is cut into tokens again


@dataclass(frozen=True, kw_only=True)
class Variables(Haystack):
    """Variable tracking (RULER): chains of assignments; which variables have the value that one chain starts with?

    `chains` chains of `hops` assignments after the first: `VAR A = 12345`, `VAR B = VAR A`, ...
    """

    name = "variables"
    chains: int = 1
    hops: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("chains", least=1, most=10)
        self.check("hops", least=1, most=20)

    def draw(self, random: np.random.Generator, length: int) -> Drawn:
        count = self.hops + 1
        names = [_letters(pick) for pick in random.choice(26**3, size=self.chains * count, replace=False).tolist()]
        lines, values = [], [number(random, 5) for _ in range(self.chains)]
        for chain, value in enumerate(values):
            own = names[chain * count : (chain + 1) * count]
            texts = [f"VAR {own[0]} = {value}"] + [f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(own)]
            places = sorted(random.random(count).tolist())
            lines += [(place, self.line(text)) for place, text in zip(places, texts, strict=True)]
        return self.hide(
            random, "Variables are assigned values in this text. Remember them.", lines, length,
            question=f"Which variables have the value {values[0]} in the text? They are",
            answer=" " + ", ".join(names[:count]),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CommonWords(Generator):
    """Common words (RULER): a list of words; which are the `common` ones that stand in it `often` times?

    The others stand in it `seldom` times each, as many of them as fit.
    """

    name = "common_words"
    common: int = 4
    often: int = 12
    seldom: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("common", least=1, most=100)
        self.check("seldom", least=1)
        self.check("often", least=self.seldom + 1)

    def draw(self, random: np.random.Generator, length: int) -> Drawn:
        picks = np.array(self.words)[random.permutation(len(self.words))].tolist()
        words, others = picks[: self.common], picks[self.common :]
        head = [*self.opening, *self.encode("Some words stand in this list more often than others:"), *self.newline]
        question = f"Which {self.common} words stand in the list most often? They are"
        asked = [*self.newline, *self.encode(question)]
        answer = self.encode(" " + ", ".join(self.tokenizer.decode([word]).strip() for word in words), after=question)
        room = self.room(len(head) + self.common * self.often + len(asked) + len(answer), length)
        body = np.array(words * self.often + (others * self.seldom)[: room // self.seldom * self.seldom])
        if len(others) * self.seldom > room:
            body = np.array(words * self.often + others[: room // self.seldom] * self.seldom)
        ids = head + random.permutation(body).tolist() + asked
        return Drawn(ids + answer, [slice(len(ids), len(ids) + len(answer))])


GENERATORS: dict[str, type[Generator]] = {
    **synthetic.GENERATORS, Variables.name: Variables, CommonWords.name: CommonWords,
}  # fmt: skip


def _letters(index: int) -> str:
    return "".join(chr(65 + index // 26**place % 26) for place in (2, 1, 0))


# ---- what the tasks read -----------------------------------------------------------------------------------


def questions(
    generator: str,
    room: int = 0,
    lengths: Range = LENGTHS,
    depths: Range | None = None,
    samples: int = SAMPLES,
    task_seed: int = 0,
    **metadata: Any,
) -> dict[str, datasets.Dataset]:
    """The documents of a task, the same each time.

    Args:
        generator: which of `GENERATORS`.
        room: tokens that the model may write; prompt and answer together have at most a length's tokens.
        lengths: in tokens, one or several.
        depths: where what is asked for stands, from 0, the start, to 1, the end; one or several. Default: five.
        samples: of each length and depth, or of each length where nothing has a depth.
        task_seed: another number, other questions.
        metadata: settings of the generator (`keys`, `values`, `digits`, `text`, ...), the tokenizer or the model whose
            tokenizer it is, and whatever else lm-eval hands on, which is left alone.
    """
    kind = GENERATORS[generator]
    fields = {field.name for field in dataclasses.fields(kind)} - {"tokenizer", "seed", "length", "depth"}
    options = {name: metadata[name] for name in sorted(fields & metadata.keys())}
    tokenizer = tokenizer_of(metadata)
    has_depth = any(field.name == "depth" for field in dataclasses.fields(kind)) and generator not in (
        Variables.name, "copy",
    )  # fmt: skip
    chosen = as_list(DEPTHS if depths is None else depths) if has_depth else [None]
    options |= {"tokenizer": tokenizer, "seed": TASK_SEED + task_seed}
    made = {depth: kind(**options, **({} if depth is None else {"depth": depth})) for depth in chosen}
    if isinstance(first := made[chosen[0]], Haystack):
        for other in made.values():
            other.__dict__["haystack"] = first.haystack  # the same for all, and slow to cut into tokens
    rows = []
    for index in range(samples):
        for length in as_list(lengths):
            for place, depth in enumerate(chosen):
                rows.append(_row(made[depth], index * len(chosen) + place, int(length), room))
                rows[-1]["depth"] = -1.0 if depth is None else float(depth)
    return {"test": datasets.Dataset.from_list(rows)}


def _row(generator: Generator, index: int, length: int, room: int) -> dict[str, Any]:
    """A question as text. Cut into tokens again it may be longer: then it is made shorter."""
    wanted = length - room
    for _ in range(4):
        prompt_ids, answer_ids = generator.question(index, wanted)
        prompt = generator.tokenizer.decode(prompt_ids[len(generator.opening) :])
        answer = generator.tokenizer.decode(answer_ids)
        again = generator.tokenizer(prompt, verbose=False)["input_ids"]
        excess = len(again) + max(room, len(answer_ids)) - length
        if excess <= 0:
            break
        wanted -= excess
    question, mark, lead = prompt.rpartition("? ") if room else (prompt, "", "")
    return {
        "prompt": question + mark.rstrip() if mark else prompt,
        "lead": lead if mark else "",
        "answer": answer,
        "answers": [part.strip() for part in answer.split(",")],
        "tokens": len(answer_ids),
        "length": length,
    }


def stretches(
    lengths: Range = 1024, buckets: int = 4, samples: int = SAMPLES, text: str | None = None, **metadata: Any
) -> dict[str, datasets.Dataset]:
    """Pieces of long texts, each to be foreseen from all of its text before it.

    Args:
        lengths: tokens of a text; of several the longest.
        buckets: pieces of equal length that a text is cut into.
        samples: texts.
        text: file, folder or glob to take them from; without it they are made of plain sentences.
        metadata: the tokenizer, as for `questions`.
    """
    tokenizer, length = tokenizer_of(metadata), int(max(as_list(lengths)))
    source = synthetic.Passkey(tokenizer=tokenizer, seed=0, text=text)
    ids, wanted = source.haystack, length - MARGIN
    edges = [START, *(round(wanted * bucket / buckets) for bucket in range(1, buckets + 1))]
    if edges[1] <= START:
        raise ValueError(f"text_by_position: lengths is {length} and buckets {buckets}; the first bucket must have "
                         f"more than {START} tokens")  # fmt: skip
    if len(ids) < wanted:
        raise ValueError(f"text_by_position: the text has {len(ids)} tokens; lengths {length} needs as many")
    rows = []
    for start in np.linspace(0, len(ids) - wanted, samples).astype(int).tolist():
        row = ids[start : start + wanted]
        places = [_word_end(tokenizer.decode(row[:edge]), tokenizer.decode(row)) for edge in edges[:-1]]
        whole = tokenizer.decode(row)
        places.append(len(whole))
        for bucket, (low, high) in enumerate(itertools.pairwise(places)):
            context, target = whole[:low], whole[low:high]
            both, before = (len(tokenizer(part, verbose=False)["input_ids"]) for part in (whole[:high], context))
            first = 0 if not bucket else round(length * bucket / buckets)
            rows.append({"context": context, "target": target, "tokens": both - before, "length": length,
                         "bucket": f"{first}_{round(length * (bucket + 1) / buckets)}"})  # fmt: skip
    return {"test": datasets.Dataset.from_list(rows)}


START = 8  # tokens at the start of a text that are given


def _word_end(prefix: str, whole: str) -> int:
    """Where the word ends that a prefix of a text ends in."""
    place = min(len(prefix), len(whole))
    while place < len(whole) and not whole[place].isspace():
        place += 1
    return place


def tokenizer_of(metadata: dict[str, Any]) -> Any:
    """The tokenizer that the metadata or the model's arguments name."""
    name = metadata.get("tokenizer") or metadata.get("pretrained")
    if not name:
        raise ValueError("tasks made up on the spot need a tokenizer: --metadata tokenizer=NAME, or pretrained=NAME "
                         "among the model's arguments")  # fmt: skip
    if not isinstance(name, str):
        return name
    tokenizer = load_tokenizer(name, bool(metadata.get("trust_remote_code", False)), metadata.get("revision"))
    if tokenizer is None:
        raise ValueError(f"there is no tokenizer at {name!r}; name one by --metadata tokenizer=NAME")
    return tokenizer


# ---- how they are scored -----------------------------------------------------------------------------------


class RecallTask(ConfigurableTask):
    """A task of `questions`: the share of answers found, in all and for each length.

    Generating, an answer counts as far as its parts stand in what was written; by likelihood, if it is the likeliest
    text, token by token. Likelihoods also give the perplexity of the answers.
    """

    def __init__(self, data_dir: Any = None, cache_dir: Any = None, download_mode: Any = None, config: Any = None):
        config = {key: value for key, value in config.items() if key != "class"}
        writes = (config.get("generation_kwargs") or {}).get("max_gen_toks", 0)
        config["dataset_kwargs"] = {**(config.get("dataset_kwargs") or {}), "room": writes}
        super().__init__(config=config)
        lengths = sorted(set(self.task_docs["length"]))
        self._several = len(lengths) > 1
        for length in lengths if self._several else ():
            self._aggregation_list[f"acc_{length}"] = mean
            self._higher_is_better[f"acc_{length}"] = True

    def process_results(self, doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
        (result,) = results
        scores: dict[str, Any] = {}
        if isinstance(result, str):
            found = [part for part in doc["answers"] if part.lower() in result.lower()]
            right = len(found) / len(doc["answers"])
        else:
            likelihood, best = result
            right = float(best)
            scores["perplexity"] = (likelihood, doc["tokens"])
        scores["acc"] = right
        if self._several:
            scores[f"acc_{doc['length']}"] = right
        return scores


class PositionTask(ConfigurableTask):
    """A task of `stretches`: perplexity, in all and of each bucket of positions."""

    def __init__(self, data_dir: Any = None, cache_dir: Any = None, download_mode: Any = None, config: Any = None):
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
        for bucket in dict.fromkeys(self.task_docs["bucket"]):
            self._aggregation_list[f"perplexity_{bucket}"] = weighted_perplexity
            self._higher_is_better[f"perplexity_{bucket}"] = False

    def process_results(self, doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
        ((likelihood, _),) = results
        pair = (likelihood, doc["tokens"])
        return {"perplexity": pair, f"perplexity_{doc['bucket']}": pair}
