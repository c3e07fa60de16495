"""Recall tasks made up on the spot, with any tokenizer: `make("passkey", tokenizer, seed=0).sample(0, length=512)`.

| name            | what is asked                                                                                     |
| --------------- | ------------------------------------------------------------------------------------------------- |
| `passkey`       | the number that one line of a long text gives (Mohtashami and Jaggi, 2023, arXiv 2305.16300)       |
| `needle`        | the number, or all numbers, of one of several words that the text gives numbers to                 |
| `mqar`          | multi-query associative recall: the value of each key seen before (Arora et al., 2023, 2312.04927) |
| `copy`          | the whole text again                                                                              |
| `echo`          | of every two words the first one again: what looking one token back gives                          |
| `lookup`        | the value of one key in a list that fills the context (Liu et al., 2023, arXiv 2307.03172)         |
| `multi_passkey` | several passkeys in turn, DuoAttention's identification data (Xiao et al., 2024, 2410.10819)       |

A sample depends on the generator's options, its seed and the sample's index alone. It has as many tokens as
`length` says, or fewer by less than what would be the next thing to fit; labels stand on the answers only.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import numpy as np

from ..duo import ALPHABET, ORDINALS, PasskeyParts, passkey_sample

Range = float | Sequence[float]
IGNORED = -100
TRIALS = 32  # samples, since how long one must be depends on the words that it draws
DEFAULT_LENGTH = 1024
HAYSTACK_CHARACTERS = 1_000_000

FILLER = (
    "The river runs past the mill and under the old bridge.",
    "In the morning the bakers open their doors.",
    "A cart stood in the yard, and nobody knew whose it was.",
    "It rained for three days, and then the sun came out.",
    "The children walked home along the wall.",
    "Somebody had left a lamp burning in the window.",
    "The road to the harbour is long and not very steep.",
    "They talked about the weather and about the price of corn.",
    "The garden was full of beans, onions and a few roses.",
    "A dog barked twice and was quiet again.",
    "The clock in the hall had stopped many years ago.",
    "We sat by the fire and listened to the wind.",
    "Two boats came in late, with little to sell.",
    "The teacher wrote a word on the board and wiped it off.",
    "Snow lay on the hills until the end of April.",
    "The letter was short, and it was not signed.",
    "There were apples on the table and bread in the basket.",
    "The market closes early on the day before a feast.",
    "Her brother kept bees behind the house.",
    "At night the square is empty but for the cats.",
    "The train was full, so they waited for the next one.",
    "Nothing much happened, and everyone was glad of it.",
    "The carpenter mended the door and asked for nothing.",
    "From the tower one can see as far as the sea.",
)


class Sample(TypedDict):
    """Token ids, and the same ids as labels on the answers, -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Drawn:
    """A sample before it is labelled: its tokens, and where its answers stand."""

    ids: list[int]
    answers: list[slice]


@dataclass(frozen=True, kw_only=True)
class Generator:
    """A task: `sample` for training, `question` for evaluation. The fields after `seed` are its options.

    `length` is a number of tokens or a pair `[low, high]` to draw from. A length given to `sample` or `question`
    is the most the sample may have, and what it has where the option is not set.
    """

    name: ClassVar[str]

    tokenizer: Any = dataclasses.field(repr=False)
    seed: int = 0
    length: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.length is not None:
            bounds(self.length, f"{self.name}: length", least=1)

    def draw(self, random: np.random.Generator, length: int) -> Drawn:
        """One sample of `length` tokens."""
        raise NotImplementedError

    def sample(self, index: int, length: int | None = None) -> Sample:
        """The sample with this number."""
        drawn = self._drawn(index, length)
        labels = [IGNORED] * len(drawn.ids)
        for place in drawn.answers:
            labels[place] = drawn.ids[place]
        return {"input_ids": drawn.ids, "labels": labels}

    def question(self, index: int, length: int | None = None) -> tuple[list[int], list[int]]:
        """The same sample as a prompt, which ends where its last answer starts, and that answer."""
        drawn = self._drawn(index, length)
        last = drawn.answers[-1]
        return drawn.ids[: last.start], drawn.ids[last]

    def try_out(self, length: int) -> None:
        """Raise if some of the shortest samples do not fit their lengths, or `length`."""
        if self.length is not None:
            length = min(length, int(bounds(self.length, f"{self.name}: length", least=1)[0]))
        for index in range(TRIALS):
            self.draw(np.random.default_rng([self.seed, index]), length)

    def _drawn(self, index: int, length: int | None) -> Drawn:
        random = np.random.default_rng([self.seed, index])
        if self.length is None:
            return self.draw(random, DEFAULT_LENGTH if length is None else length)
        low, high = bounds(self.length, f"{self.name}: length", least=1)
        drawn = int(random.integers(int(low), int(high), endpoint=True))
        return self.draw(random, drawn if length is None else min(drawn, length))

    def check(self, field: str, *, least: float, most: float = math.inf) -> None:
        """Refuse an option outside of what it may be."""
        bounds(getattr(self, field), f"{self.name}: {field}", least=least, most=most)

    def room(self, needed: int, length: int) -> int:
        """Tokens of filler that fit beside the `needed` ones."""
        if needed > length:
            raise ValueError(f"{self.name}: length is {length}; with these options and this tokenizer it must be at "
                             f"least {needed}")  # fmt: skip
        return length - needed

    # ---- tokens

    @functools.cached_property
    def opening(self) -> list[int]:
        """What every sample starts with: the BOS token, if there is one."""
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]

    @functools.cached_property
    def newline(self) -> list[int]:
        """A line end inside a text."""
        return self.encode("\n", after="a")

    @functools.cached_property
    def encode(self) -> Any:
        """Tokens of a text that stands after another one: `encode(text, after="\\n")`; remembers what it encoded."""

        def plain(text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

        before = functools.lru_cache(plain)

        @functools.lru_cache(maxsize=100_000)
        def encode(text: str, after: str = "\n") -> list[int]:
            # Many tokenizers add a space at the start of what they are given: take the tokens from inside a text.
            context, whole = before(after), plain(after + text)
            return whole[len(context) :] if whole[: len(context)] == context else plain(text)

        return encode

    @functools.cached_property
    def words(self) -> list[int]:
        """Single tokens that are words, in the vocabulary's order; in a tiny one letters, or whatever there is."""
        special = set(self.tokenizer.all_special_ids)
        ids = [index for index in range(len(self.tokenizer)) if index not in special]
        pieces = self.tokenizer.convert_ids_to_tokens(ids)
        words, letters = [], []
        for index, piece in zip(ids, pieces, strict=True):
            text = piece[1:] if piece[:1] in ("Ġ", "▁") else ""
            if len(text) > 1 and text.isascii() and text.isalpha():
                words.append(index)
            elif len(piece) == 1 and piece.isascii() and piece.isalpha():
                letters.append(index)
        return next((pool[:MOST_WORDS] for pool in (words, letters) if len(pool) >= FEWEST_WORDS), ids)


MOST_WORDS = 4096
FEWEST_WORDS = 48


def bounds(value: Range, name: str, *, least: float = 0, most: float = math.inf) -> tuple[float, float]:
    """A number, or a pair, as the lowest and highest value."""
    pair = [value, value] if isinstance(value, (int, float)) else list(value)
    if (
        len(pair) != 2
        or not all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in pair)
        or not least <= pair[0] <= pair[1] <= most
    ):
        limit = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise ValueError(f"{name} is {value!r}; it must be a number {limit}, or [low, high] of such numbers")
    return pair[0], pair[1]


# ---- tasks in a haystack -----------------------------------------------------------------------------------


def read_haystack(path: str) -> list[str]:
    """The texts of a file, a folder of .txt files or a glob: an equal share of each, up to a million characters."""
    folder = Path(path).expanduser()
    names = sorted(folder.rglob("*.txt")) if folder.is_dir() else sorted(map(Path, glob.glob(str(folder))))
    if not names:
        raise FileNotFoundError(f"no text at {path}; give a .txt file, a folder of them, or a glob")
    share = HAYSTACK_CHARACTERS // len(names)
    texts = []
    for name in names:
        with name.open(encoding="utf-8") as file:
            texts.append(file.read(share))
    return texts


@dataclass(frozen=True, kw_only=True)
class Haystack(Generator):
    """What tasks that hide lines in a long text share.

    `text` is a file, folder or glob to take the long text from; without it, it is made of plain sentences.
    `depth` says where the lines that are asked for stand: 0 is the start of the text, 1 its end.
    """

    depth: Range = (0.0, 1.0)
    text: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("depth", least=0, most=1)

    @functools.cached_property
    def haystack(self) -> list[int]:
        if self.text is not None:
            texts = read_haystack(self.text)
        else:
            order = np.random.default_rng(0).integers(len(FILLER), size=2000).tolist()
            texts = [" ".join(FILLER[index] for index in order)]
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        ids = [token for text in encoded for token in text]
        if not ids:
            raise ValueError(f"{self.name}: the text at {self.text} is empty")
        return ids

    def filler(self, random: np.random.Generator, count: int) -> list[int]:
        """`count` tokens of the long text from a random place on."""
        start = int(random.integers(len(self.haystack)))
        ids = self.haystack[start : start + count]
        while len(ids) < count:
            ids += self.haystack[: count - len(ids)]
        return ids

    def depths(self, random: np.random.Generator, count: int) -> list[float]:
        low, high = bounds(self.depth, "depth")
        return [float(depth) for depth in random.uniform(low, high, size=count)]

    def line(self, text: str) -> list[int]:
        """A line of its own, between the tokens of a text."""
        return [*self.newline, *self.encode(text), *self.newline]

    def hide(
        self, random: np.random.Generator, opening: str, lines: Sequence[tuple[float, list[int]]], length: int,
        question: str, answer: str,
    ) -> Drawn:  # fmt: skip
        """The whole sample: opening, long text with each line at its depth, question and answer."""
        head = [*self.opening, *self.encode(opening), *self.newline]
        asked, answered = [*self.newline, *self.encode(question)], self.encode(answer, after=question)
        needed = len(head) + len(asked) + len(answered) + sum(len(ids) for _, ids in lines)
        text = self.filler(random, self.room(needed, length))
        ids, done = head, 0
        for depth, hidden in sorted(lines, key=lambda line: line[0]):
            place = round(depth * len(text))
            ids += text[done:place]
            ids += hidden
            done = place
        ids += text[done:]
        ids += asked
        return Drawn(ids + answered, [slice(len(ids), len(ids) + len(answered))])


def number(random: np.random.Generator, digits: int) -> str:
    """A number of so many digits, the first one not 0."""
    return str(random.integers(10 ** (digits - 1), 10**digits))


@dataclass(frozen=True, kw_only=True)
class Passkey(Haystack):
    """One line gives a number of `digits` digits; the question asks for it."""

    name = "passkey"
    digits: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("digits", least=1, most=18)

    def draw(self, random: np.random.Generator, length: int) -> Drawn:
        key = number(random, self.digits)
        line = self.line(f"The pass key is {key}. Remember it. {key} is the pass key.")
        return self.hide(
            random, "There is a pass key hidden in this text. Find it and remember it.",
            [(self.depths(random, 1)[0], line)], length,
            question="What is the pass key? The pass key is", answer=f" {key}",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Needle(Haystack):
    """Lines give numbers to `keys` different words, `values` numbers to each; the question asks for one word's.

    Several numbers are answered in the order of the text.
    """

    name = "needle"
    keys: int = 1
    values: int = 1
    digits: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("keys", least=1, most=len(ALPHABET))
        self.check("values", least=1)
        self.check("digits", least=1, most=18)

    def draw(self, random: np.random.Generator, length: int) -> Drawn:
        asked, *others = (ALPHABET[index] for index in random.permutation(len(ALPHABET))[: self.keys])
        answers = [number(random, self.digits) for _ in range(self.values)]
        lines = [
            (depth, self.line(f"One number of {asked} is {value}."))
            for depth, value in zip(sorted(self.depths(random, self.values)), answers, strict=True)
        ]
        lines += [
            (float(random.random()), self.line(f"One number of {other} is {number(random, self.digits)}."))
            for other in others
            for _ in range(self.values)
        ]
        return self.hide(
            random, "This text gives numbers to some words. Remember them.", lines, length,
            question=f"Which number does the text give to {asked}? One number of {asked} is",
            answer=" " + ", ".join(answers),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MultiPasskey(Haystack):
    """`passkeys` passkeys of `words` words each, all asked for in turn; labels as published, on the questions too."""

    name = "multi_passkey"
    passkeys: int = 10
    words_each: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("passkeys", least=1, most=len(ORDINALS))
        self.check("words_each", least=1)

    @functools.cached_property
    def parts(self) -> PasskeyParts:
        ordinals = ORDINALS[: self.passkeys]
        return PasskeyParts(
            haystack=self.haystack[:1],
            opening=[*self.opening, *self.encode("Below is a long text. Remember the passkeys in it."), *self.newline],
            closing=self.line("Now repeat the passkeys."),
            separator=self.newline,
            announcements=[self.encode(f"Remember: the {ordinal} passkey is ") for ordinal in ordinals],
            questions=[self.encode(f"What is the {ordinal} passkey? It is ") for ordinal in ordinals],
        )

    def draw(self, random: np.random.Generator, length: int) -> Drawn:
        picks = random.integers(len(ALPHABET), size=(self.passkeys, self.words_each)).tolist()
        keys = [self.encode(" ".join(ALPHABET[pick] for pick in row), after=" ") for row in picks]
        depths = sorted(self.depths(random, self.passkeys))
        # With multiple=1 one token of the haystack is added, so that this counts a sample without text.
        needed = len(passkey_sample(self.parts, keys, depths, 0, multiple=1)[0])
        text = self.filler(random, self.room(needed, length) + 1)
        parts = dataclasses.replace(self.parts, haystack=text)
        ids, labels = passkey_sample(parts, keys, depths, len(text) - 1, multiple=1)
        tail = next(index for index, label in enumerate(labels) if label != IGNORED)
        last = len(ids) - len(self.newline) - len(keys[-1])
        return Drawn(ids, [slice(tail, last), slice(last, last + len(keys[-1]))])


# ---- tasks without one -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AssociativeRecall(Generator):
    """`pairs` of a key and its value, then keys again among noise: each one's value is asked for.

    Keys, values and noise are single tokens of three separate thirds of the vocabulary's words, or of its first
    `vocabulary` words: few are learned sooner. `queries` is how often a key comes again, in all, each time any of them
    (default: each key once). `power` spreads the queries: 1 is evenly over the rest of the sample; towards 0, as in
    the paper (0.01), most follow soon after the pairs.
    """

    name = "mqar"
    pairs: int = 8
    queries: int | None = None
    vocabulary: int | None = None
    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocabulary is not None:
            self.check("vocabulary", least=3, most=len(self.words))
        self.check("pairs", least=1, most=(self.vocabulary or len(self.words)) // 3)
        self.check("power", least=0.001, most=1)
        if self.queries is not None:
            self.check("queries", least=1)

    @functools.cached_property
    def pools(self) -> list[np.ndarray[Any, Any]]:
        """Keys, values, noise."""
        return [np.array(self.words[: self.vocabulary][third::3]) for third in range(3)]

    def draw(self, random: np.random.Generator, length: int) -> Drawn:
        keys, values, noise = self.pools
        keys = keys[random.permutation(len(keys))[: self.pairs]]
        values = values[random.integers(len(values), size=self.pairs)]
        queries = self.queries or self.pairs
        start = len(self.opening) + 2 * self.pairs
        places = self.room(start + 2 * queries, length) // 2 + queries  # pairs of tokens after the key-value pairs
        odds = np.arange(1, places + 1) ** (self.power - 1)
        chosen = np.sort(random.choice(places, size=queries, replace=False, p=odds / odds.sum(), shuffle=False))
        asked = random.permutation(self.pairs) if self.queries is None else random.integers(self.pairs, size=queries)
        ids = noise[random.integers(len(noise), size=length)]
        ids[: len(self.opening)] = self.opening
        ids[len(self.opening) : start : 2] = keys
        ids[len(self.opening) + 1 : start : 2] = values
        ids[start + 2 * chosen] = keys[asked]
        ids[start + 2 * chosen + 1] = values[asked]
        return Drawn(ids.tolist(), [slice(place, place + 1) for place in (start + 2 * chosen + 1).tolist()])


@dataclass(frozen=True, kw_only=True)
class Copy(Haystack):
    """A passage, then the same passage again. It is random words, or with `text` a piece of a text.

    With `span`, a number of tokens or `[low, high]`, the passage is so short and comes again and again.
    """

    name = "copy"
    span: Range | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.span is not None:
            self.check("span", least=1)

    def draw(self, random: np.random.Generator, length: int) -> Drawn:
        middle = [] if self.span else self.line("Again:")
        count = (self.room(len(self.opening) + len(middle) + 2, length) + 2) // 2
        if self.span is not None:
            low, high = bounds(self.span, "span")
            count = min(count, int(random.integers(int(low), int(high), endpoint=True)))
        passage = self.filler(random, count) if self.text is not None else self._words(random, count)
        ids = [*self.opening, *passage, *middle]
        again = (passage * (length // count))[: length - len(ids)] if self.span else passage
        return Drawn(ids + again, [slice(len(ids), len(ids) + len(again))])

    def _words(self, random: np.random.Generator, count: int) -> list[int]:
        words: list[int] = np.array(self.words)[random.integers(len(self.words), size=count)].tolist()
        return words


@dataclass(frozen=True, kw_only=True)
class Echo(Generator):
    """Random words in threes: any two, and the first of them again, which is asked for.

    A head that looks one token back solves it; recall is built on such heads, and is learned late without them.
    `vocabulary` is how many of the vocabulary's words are used (default: all): few are learned sooner.
    """

    name = "echo"
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocabulary is not None:
            self.check("vocabulary", least=2, most=len(self.words))

    def draw(self, random: np.random.Generator, length: int) -> Drawn:
        threes = self.room(len(self.opening) + 3, length) // 3 + 1
        pool = np.array(self.words[: self.vocabulary])
        words = pool[random.integers(len(pool), size=(threes, 2))]
        ids = [*self.opening, *words[:, [0, 1, 0]].ravel().tolist()]
        return Drawn(ids, [slice(place, place + 1) for place in range(len(self.opening) + 2, len(ids), 3)])


@dataclass(frozen=True, kw_only=True)
class Lookup(Generator):
    """Lines `key: value`, then one of the keys again: its value is asked for.

    `pairs` is the number of lines (default: as many as fit); the values are numbers of `digits` digits. `depth`
    says which line is asked for: 0 is the first one, 1 the last.
    """

    name = "lookup"
    pairs: int | None = None
    digits: int = 4
    depth: Range = (0.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("digits", least=1, most=18)
        self.check("depth", least=0, most=1)
        if self.pairs is not None:
            self.check("pairs", least=1, most=100 * len(ALPHABET))

    def draw(self, random: np.random.Generator, length: int) -> Drawn:
        ids = [*self.opening, *self.encode("Numbers of some names:"), *self.newline]
        lines: list[tuple[list[int], list[int]]] = []
        size, longest = len(ids), 0
        for key, value in itertools.islice(self._lines(random), self.pairs):
            line = len(key) + len(value)
            # Any of the lines may be asked for, so that the longest one must fit once more.
            if self.pairs is None and lines and size + line + max(longest, line) > length:
                break
            lines.append((key, value))
            size, longest = size + line, max(longest, line)
        self.room(size + longest, length)
        for key, value in lines:
            ids += key
            ids += value
        key, value = lines[round(float(random.uniform(*bounds(self.depth, "depth"))) * (len(lines) - 1))]
        ids += key
        value = value[: len(value) - len(self.newline)]
        return Drawn(ids + value, [slice(len(ids), len(ids) + len(value))])

    def _lines(self, random: np.random.Generator) -> Iterator[tuple[list[int], list[int]]]:
        """Tokens of a key and of its value with the line's end, for all different keys in random order."""
        low, high = 10 ** (self.digits - 1), 10**self.digits
        for key in random.permutation(100 * len(ALPHABET)).tolist():
            value = str(random.integers(low, high))
            name = f"{ALPHABET[key // 100]} {key % 100:02d}:"
            yield self.encode(name), [*self.encode(" " + value, after=":"), *self.newline]


GENERATORS: dict[str, type[Generator]] = {
    generator.name: generator for generator in (Passkey, Needle, AssociativeRecall, Copy, Echo, Lookup, MultiPasskey)
}


def make(name: str, tokenizer: Any, seed: int = 0, **options: Any) -> Generator:
    """The generator of this name, with its options."""
    if name not in GENERATORS:
        raise ValueError(f"no generator is called {name!r}; there are {', '.join(GENERATORS)}")
    known = [field.name for field in dataclasses.fields(GENERATORS[name]) if field.name not in ("tokenizer", "seed")]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(f"{name}: unknown option {', '.join(unknown)}; it may have {', '.join(known)}")
    return GENERATORS[name](tokenizer=tokenizer, seed=seed, **options)
