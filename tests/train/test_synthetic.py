"""Recall tasks: every generator with every kind of tokenizer gives exact, seeded samples whose answers are right."""

import re

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from patchattn.train.synthetic import FILLER, GENERATORS, IGNORED, make

SPECIAL = ["<|endoftext|>", "<|pad|>"]
TEXT = [
    *FILLER, "The pass key is 0123456789. Remember it. What is the pass key? What number does the text give to alpha?",
    "Find it and remember it. There is a pass key hidden in this text.", "bravo charlie delta echo foxtrot golf hotel",
]  # fmt: skip
SMALL = {"multi_passkey": {"passkeys": 2, "words_each": 2}, "mqar": {"pairs": 8}}
CASES = [
    *((name, SMALL.get(name, {})) for name in GENERATORS), ("needle", {"keys": 3}), ("needle", {"values": 3}),
    ("mqar", {"pairs": 5, "queries": 20, "power": 0.01}), ("lookup", {"pairs": 4, "digits": 2}),
    ("copy", {"span": [2, 9]}), ("mqar", {"vocabulary": 24}), ("echo", {"vocabulary": 24}),
]  # fmt: skip


def finished(tokenizer, **special):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", **special)


def byte_level(vocab_size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return finished(tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def llama():
    """Spaces are `▁`, one is put before the text, and unknown characters become bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", "<|pad|>", *byte_tokens])
    )
    tokenizer.pre_tokenizer = None
    return finished(tokenizer, bos_token="<s>", unk_token="<unk>")


TOKENIZERS = {"bytes": lambda: byte_level(258), "bpe": lambda: byte_level(700), "llama": llama}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def bpe():
    return byte_level(700)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_samples_have_the_asked_length_and_labels_on_their_answers(tokenizer, name, options):
    generator = make(name, tokenizer, seed=3, **options)
    for index, length in enumerate((700, 701, 938)):
        sample = generator.sample(index, length)
        ids, labels = sample["input_ids"], sample["labels"]
        slack = {"copy": 1, "echo": 2, "lookup": length if options else 60}.get(name, 0)
        assert length - slack <= len(ids) == len(labels) <= length
        assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
        assert ids[0] == tokenizer.bos_token_id
        assert any(label != IGNORED for label in labels)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_question_and_its_answer_are_the_start_of_the_same_sample(tokenizer, name, options):
    generator = make(name, tokenizer, seed=3, **options)
    prompt, answer = generator.question(5, 800)
    sample = generator.sample(5, 800)
    whole = [*prompt, *answer]
    assert sample["input_ids"][: len(whole)] == whole
    assert sample["labels"][len(prompt) : len(whole)] == answer


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_sample_depends_on_its_seed_and_index_alone(bpe, name, options):
    first, again = (make(name, bpe, seed=1, **options) for _ in range(2))
    again.sample(7, 640)
    assert first.sample(2, 640) == again.sample(2, 640)
    assert first.sample(2, 640) != first.sample(3, 640)
    assert first.sample(2, 640) != make(name, bpe, seed=2, **options).sample(2, 640)


def test_the_passkey_asked_for_stands_in_the_text(tokenizer):
    prompt, answer = make("passkey", tokenizer, digits=7).question(0, 600)
    key = re.search(r"The pass key is (\d{7})\. Remember", tokenizer.decode(prompt)).group(1)
    assert tokenizer.decode(answer).strip() == key


def test_a_needle_is_found_by_its_word_among_others(tokenizer):
    prompt, answer = make("needle", tokenizer, keys=5).question(1, 700)
    text = tokenizer.decode(prompt)
    asked = re.search(r"give to (\S+)\?", text).group(1)
    assert len(re.findall(r"One number of \S+ is \d", text)) == 5
    assert re.findall(rf"One number of {asked} is (\d+)\.", text) == [tokenizer.decode(answer).strip()]


def test_all_values_of_a_needle_are_asked_for_in_the_order_of_the_text(tokenizer):
    prompt, answer = make("needle", tokenizer, values=3).question(1, 700)
    found = re.findall(r"One number of \S+ is (\d+)\.", tokenizer.decode(prompt))
    assert len(found) == 3
    assert ", ".join(found) == tokenizer.decode(answer).strip()


def test_every_query_of_mqar_has_the_value_that_followed_its_key(tokenizer):
    sample = make("mqar", tokenizer, pairs=6, queries=15).sample(0, 200)
    ids, labels = sample["input_ids"], sample["labels"]
    value_of = dict(zip(ids[1:13:2], ids[2:13:2], strict=True))
    places = [place for place, label in enumerate(labels) if label != IGNORED]
    assert len(value_of) == 6 and len(places) == 15
    assert {ids[place - 1] for place in places} <= set(value_of)
    assert all(value_of[ids[place - 1]] == ids[place] for place in places)
    assert sum(token in value_of for token in ids[13:]) == 15  # no key among the noise


def test_a_small_power_brings_the_queries_close_to_the_pairs(bpe):
    def middle(power):
        samples = [make("mqar", bpe, power=power).sample(index, 512)["labels"] for index in range(30)]
        return sum(place for labels in samples for place, label in enumerate(labels) if label != IGNORED) / (30 * 8)

    assert middle(0.01) < 0.7 * middle(1.0)


def test_a_copy_repeats_its_passage(tokenizer):
    prompt, answer = make("copy", tokenizer).question(0, 301)
    assert prompt[1 : 1 + len(answer)] == answer
    assert len(answer) > 100


def test_a_short_span_comes_again_and_again(bpe):
    generator = make("copy", bpe, span=[2, 5])
    spans = set()
    for index in range(20):
        sample = generator.sample(index, 40)
        ids = sample["input_ids"][1:]
        span = next(span for span in range(1, 6) if ids[span:] == ids[:-span])
        assert sample["labels"][1 + span :] == ids[span:] or span < 2  # a word drawn twice may look like a shorter span
        spans.add(span)
    assert {2, 3, 4, 5} <= spans


def test_an_echo_gives_the_first_of_two_words_again(bpe):
    sample = make("echo", bpe, vocabulary=24).sample(0, 91)
    ids, labels = sample["input_ids"], sample["labels"]
    assert len(ids) == 91
    assert ids[3::3] == ids[1::3] == labels[3::3]
    assert [place for place, label in enumerate(labels) if label != IGNORED] == list(range(3, 91, 3))
    assert len(set(ids[1:])) <= 24


def test_a_lookup_asks_for_a_line_of_its_list(tokenizer):
    prompt, answer = make("lookup", tokenizer).question(0, 500)
    *lines, asked = tokenizer.decode(prompt).removeprefix(tokenizer.bos_token).strip().split("\n")[1:]
    assert len(lines) > 10
    assert len({line.partition(":")[0] for line in lines}) == len(lines)
    assert f"{asked} {tokenizer.decode(answer).strip()}" in lines


def test_as_many_lines_are_looked_up_in_as_fit_whatever_the_numbers(tokenizer):
    generator = make("lookup", tokenizer)
    for length in range(100, 140):
        assert all(length // 2 < len(generator.sample(index, length)["input_ids"]) <= length for index in range(20))


def test_passkeys_are_asked_for_in_turn(tokenizer):
    generator = make("multi_passkey", tokenizer, passkeys=3, words_each=4)
    text = tokenizer.decode(generator.sample(0, 900)["input_ids"])
    told = re.findall(r"Remember: the (\S+) passkey is +(.*)", text)
    asked = re.findall(r"What is the (\S+) passkey\? It is +(.*)", text)
    assert len(told) == 3 and told == asked
    prompt, answer = generator.question(0, 900)
    assert tokenizer.decode(prompt).rstrip().endswith("What is the third passkey? It is")
    assert tokenizer.decode(answer).split() == told[-1][1].split()


@pytest.mark.parametrize(("depth", "low", "high"), [(0, 0.0, 0.1), (0.5, 0.45, 0.55), ([0.8, 1.0], 0.75, 1.0)])
def test_a_line_stands_at_the_asked_depth(bpe, depth, low, high):
    for index in range(5):
        prompt, answer = make("passkey", bpe, depth=depth).question(index, 2000)
        key = bpe.decode(answer).strip()
        text = bpe.decode(prompt)
        assert low <= text.index(key) / len(text) <= high


def test_lengths_are_drawn_from_a_range_and_never_pass_what_is_asked(bpe):
    generator = make("mqar", bpe, length=[64, 256])
    lengths = [len(generator.sample(index)["input_ids"]) for index in range(200)]
    assert min(lengths) >= 64 and max(lengths) <= 256 and len(set(lengths)) > 50
    assert max(len(generator.sample(index, 100)["input_ids"]) for index in range(50)) == 100
    assert len(make("mqar", bpe, length=77).sample(0)["input_ids"]) == 77


def test_the_haystack_may_be_a_file_a_folder_or_a_glob(bpe, tmp_path):
    for name, word in (("a.txt", "violet "), ("b.txt", "orchid ")):
        (tmp_path / name).write_text(word * 200, encoding="utf-8")
    texts = {
        str(tmp_path / "a.txt"): {"violet"}, str(tmp_path): {"violet", "orchid"}, str(tmp_path / "b*"): {"orchid"},
    }  # fmt: skip
    for path, words in texts.items():
        prompts = [bpe.decode(make("passkey", bpe, text=path).question(index, 1000)[0]) for index in range(8)]
        assert {word for word in ("violet", "orchid") if any(word in prompt for prompt in prompts)} == words


WRONG = [
    ("passkeys", {}, "no generator is called 'passkeys'; there are passkey, needle"),
    ("passkey", {"digit": 5}, "passkey: unknown option digit; it may have length, depth, text, digits"),
    ("passkey", {"depth": 2}, "passkey: depth is 2; it must be a number from 0 to 1"),
    ("passkey", {"depth": [0.8, 0.2]}, r"passkey: depth is \[0.8, 0.2\]"),
    ("needle", {"keys": 0}, "needle: keys is 0"),
    ("mqar", {"pairs": 1000}, "mqar: pairs is 1000"),
    ("mqar", {"length": "long"}, "mqar: length is 'long'"),
    ("mqar", {"vocabulary": 9}, "mqar: pairs is 8; it must be a number from 1 to 3"),
    ("echo", {"vocabulary": 1}, "echo: vocabulary is 1"),
    ("lookup", {"digits": 0}, "lookup: digits is 0"),
]


@pytest.mark.parametrize(("name", "options", "text"), WRONG)
def test_a_wrong_option_is_an_error_that_says_what_is_allowed(bpe, name, options, text):
    with pytest.raises(ValueError, match=text):
        make(name, bpe, **options)


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_a_length_that_cannot_hold_the_task_is_an_error_that_says_the_least(bpe, name):
    with pytest.raises(ValueError, match=rf"{name}: length is 2; .* must be at least \d+"):
        make(name, bpe, **SMALL.get(name, {})).sample(0, 2)


def test_a_missing_haystack_is_an_error_that_names_it(bpe, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no text at .*nothing\.txt"):
        make("passkey", bpe, text=str(tmp_path / "nothing.txt")).sample(0, 500)
