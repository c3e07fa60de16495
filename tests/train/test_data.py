"""Sources become samples: what is read, how it is packed, what carries a loss, in which order; and what is refused."""

import errno
import json
import pickle
import re
import threading
from functools import partial
from itertools import islice, pairwise

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import patchattn
from patchattn.train import corpus as corpus_module
from patchattn.train import packing
from patchattn.train.corpus import Corpus, tokenized
from patchattn.train.data import Plan, collate, open_data
from patchattn.train.documents import Documents
from patchattn.train.encoding import ChatEncoder, Encoder, batches
from patchattn.train.files import fingerprint_file
from patchattn.train.schema import ChatSource, DataSpec, SyntheticSource, TextSource, TokenizerSpec
from patchattn.train.text import Layout, TextReader, TextStream
from patchattn.train.tokenizer import train_tokenizer, training_texts

WORDS = tuple("the cat sat on a mat while seven small dogs ran over hills and far away from home".split())  # noqa: SIM905
IGNORED = -100


def stories(count, seed=0, longest=40):
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(3, longest))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TokenizerSpec(vocab_size=300), stories(200))


def write_rows(path, values, column="text"):
    path.write_text("".join(json.dumps({column: value}) + "\n" for value in values))
    return path


def numbered(count):
    return [f"{number} {story}" for number, story in enumerate(stories(count))]


@pytest.fixture
def story_file(tmp_path):
    return write_rows(tmp_path / "stories.jsonl", stories(60))


def opened(source, tokenizer, tmp_path, *, samples=50, length=32, seed=3, **settings):
    sources = source if isinstance(source, list) else [source]
    spec = DataSpec(train=sources, length=length, **settings)
    return open_data(
        spec, task="causal-lm", processor=tokenizer, length=length, seed=seed, samples=samples, cache=tmp_path / "cache"
    )


def plain(sample):
    return {name: value.tolist() for name, value in sample.items()}


def documents_in(samples, tokenizer):
    """Packed rows taken apart again where positions restart."""
    pieces = []
    for sample in samples:
        starts = [*np.flatnonzero(sample["position_ids"] == 0), len(sample["input_ids"])]
        pieces += [sample["input_ids"][a:b].tolist() for a, b in pairwise(starts)]
    return [piece for piece in pieces if piece[0] != tokenizer.pad_token_id]


# ---- what is read --------------------------------------------------------------------------------------------------

ROWS = [{"text": "first é", "other": "x"}, {"text": 'second, "quoted"\nline', "other": "y"}]
EXPECTED = [row["text"] for row in ROWS]


def write_txt(folder):
    (folder / "a.txt").write_text('first é<|end|>\nsecond, "quoted"\nline\n', encoding="utf-8")


def write_jsonl(folder):
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n", encoding="utf-8-sig")


def write_json(folder):
    (folder / "a.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")


def write_json_lines(folder):
    (folder / "a.json").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")


def write_csv(folder):
    datasets.Dataset.from_list(ROWS).to_csv(folder / "a.csv")


def write_parquet(folder):
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "a.parquet")


FILES = {"txt": write_txt, "jsonl": write_jsonl, "json": write_json, "json of lines": write_json_lines,
         "csv": write_csv, "parquet": write_parquet}  # fmt: skip


@pytest.mark.parametrize("write", FILES.values(), ids=FILES)
def test_every_kind_of_file_gives_its_documents(write, tmp_path):
    write(tmp_path)
    (file,) = tmp_path.iterdir()
    assert list(Documents(TextSource(path=str(file), separator="<|end|>"))) == EXPECTED


def test_a_folder_a_glob_and_a_list_give_their_files_in_order(tmp_path):
    for name in ("b", "a", "c/d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "README.txt").write_text("about")
    assert list(Documents(TextSource(path=str(tmp_path)))) == ["a", "b", "c/d"]
    assert list(Documents(TextSource(path=f"{tmp_path}/?.txt"))) == ["a", "b"]
    assert list(Documents(TextSource(path=[f"{tmp_path}/b.txt", f"{tmp_path}/c"]))) == ["b", "c/d"]


def test_a_saved_data_set_is_read(tmp_path):
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved.select([1])}).save_to_disk(tmp_path / "many")
    one = Documents(TextSource(path=str(tmp_path / "one")))
    assert list(one) == EXPECTED
    assert one.fingerprint["parts"][0]["rows"] == 2
    assert list(Documents(TextSource(path=str(tmp_path / "many"), split="test"))) == EXPECTED[1:]
    with pytest.raises(ValueError, match="no split 'valid'; there: train, test"):
        list(Documents(TextSource(path=str(tmp_path / "many"), split="valid")))


@pytest.mark.parametrize("streaming", [False, True])
def test_the_copy_of_a_hub_repository_is_read_by_its_own_splits(tmp_path, streaming, monkeypatch):
    rows = datasets.Dataset.from_list(ROWS)
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    rows.select([0]).to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    (tmp_path / "LICENSE.txt").write_text("a licence is no document")
    source = partial(TextSource, path=str(tmp_path), streaming=streaming)
    assert list(Documents(source())) == EXPECTED
    assert list(Documents(source(split="test"))) == EXPECTED[:1]
    with pytest.raises(ValueError, match=r"is a folder that cannot be opened: .*valid"):
        list(Documents(source(split="valid")))


@pytest.mark.parametrize("streaming", [False, True])
def test_another_name_is_a_data_set_of_the_hub(monkeypatch, streaming):
    asked = []

    def load_dataset(path, name, **settings):
        asked.append((path, name, settings))
        rows = datasets.Dataset.from_list(ROWS)
        return rows.to_iterable_dataset() if settings["streaming"] else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = Documents(TextSource(path="someone/stories", name="small", split="test", streaming=streaming))
    assert list(documents) == EXPECTED
    assert json.loads(json.dumps(documents.fingerprint))["parts"][0]["path"] == "someone/stories"
    assert asked == [("someone/stories", "small", {"split": "test", "streaming": streaming})]


def test_empty_documents_are_left_out_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "a"}\n{"text": " \\n"}\n{"text": null}\n{"text": "b"}\n')
    documents = Documents(TextSource(path=str(tmp_path / "a.jsonl")))
    assert list(documents) == ["a", "b"]
    assert documents.missing == 3
    assert list(Documents(TextSource(path=str(tmp_path / "a.jsonl"), limit=1))) == ["a"]


def test_a_separator_is_found_across_the_blocks_of_a_large_file(tmp_path):
    wanted = [str(number) * 700_000 for number in range(1, 5)]
    (tmp_path / "a.txt").write_text("<|end|>".join(wanted))
    assert list(Documents(TextSource(path=str(tmp_path / "a.txt"), separator="<|end|>"))) == wanted


UNREADABLE = {
    "gone.txt": (None, "there is no file or folder .*gone.txt"),
    "no-such-set": (None, "'no-such-set' is no file or folder, and as a data set of the hub cannot be opened"),
    "*.parquet": (None, r"no file matches '.*\*.parquet'"),
    "a.pdf": (b"x", "ends in '.pdf'; readable are .txt, .jsonl"),
    "latin.txt": ("é".encode("latin1"), r"latin.txt is not UTF-8 .*0xe9.*iconv"),
    "empty.txt": (b" \n", "holds no text: 1 documents"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "broken.jsonl, line 2 is not JSON"),
    "column.jsonl": (b'{"body": "a", "title": "b"}\n', "line 1 has no column 'text'; there: 'body', 'title'"),
    "number.jsonl": (b'{"text": 5}\n', "line 1: column 'text' holds int, not text"),
    "list.jsonl": (b'{"text": [{"role": "user"}]}\n', "holds list, not text; for conversations use kind: chat"),
    "list.json": (b'["a"]', "row 0 holds str, not an object"),
    "broken.parquet": (b"PAR?", "is not a Parquet file"),
    "empty.csv": (b"", "is not a CSV table"),
    "column.csv": (b"body,title\na,b\n", "row 0 has no column 'text'; there: 'body', 'title'"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_named(name, tmp_path):
    content, message = UNREADABLE[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    path = name if name == "no-such-set" else str(tmp_path / name)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        list(Documents(TextSource(path=path)))


def test_a_folder_without_data_or_with_several_kinds_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"holds no \.txt, .*; there: notes\.md"):
        Documents(TextSource(path=str(tmp_path)))
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"several kinds: \.jsonl, \.txt"):
        Documents(TextSource(path=str(tmp_path)))


def test_a_large_files_fingerprint_is_of_its_ends_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("patchattn.train.files.WHOLE", 100)
    monkeypatch.setattr("patchattn.train.files.ENDS", 10)
    path = tmp_path / "a.txt"
    path.write_text("x" * 200)
    before = fingerprint_file(path)
    assert before["hashed"] == "first and last 10 bytes only"
    path.write_text("x" * 199 + "y")
    assert fingerprint_file(path)["sha256"] != before["sha256"]


# ---- packing -------------------------------------------------------------------------------------------------------


def segments_of(sizes):
    ends = np.cumsum(sizes)
    return np.stack([ends - sizes, ends], axis=1)


def test_packed_rows_hold_every_token_of_every_document_once_and_in_order():
    random = np.random.default_rng(0)
    sizes = random.integers(1, 90, size=200)
    rows = packing.stream(segments_of(sizes), 64)
    assert len(rows) == -(-sizes.sum() // 64)
    lengths = [int((rows[index][:, 1] - rows[index][:, 0]).sum()) for index in range(len(rows))]
    assert set(lengths[:-1]) == {64}
    covered = np.concatenate([np.arange(a, b) for a, b in rows.pieces])
    assert covered.tolist() == list(range(sizes.sum()))
    owners = np.repeat(np.arange(200), sizes)
    assert all(owners[a] == owners[b - 1] for a, b in rows.pieces), "a piece lies within one document"


def test_whole_documents_share_rows_and_are_cut_only_where_they_must_be():
    random = np.random.default_rng(0)
    sizes = random.integers(2, 90, size=300)
    segments = segments_of(sizes)
    rows = packing.whole(segments, 64)
    for index in range(len(rows)):
        assert (rows[index][:, 1] - rows[index][:, 0]).sum() <= 64
    fitting = {(int(a), int(b)) for a, b in segments if b - a <= 64}
    assert fitting <= {(int(a), int(b)) for a, b in rows.pieces}
    tokens = (rows.pieces[:, 1] - rows.pieces[:, 0]).sum()
    assert tokens >= sizes.sum() - 300  # single tokens left of long documents are dropped
    assert len(rows) <= 1.05 * tokens / 64, "little room is lost"


def test_without_packing_a_document_is_a_sample_of_its_own():
    rows = packing.alone(segments_of(np.array([5, 20, 9, 1])), 8)
    assert [(b - a).item() for a, b in rows.pieces] == [5, 8, 8, 4, 8]
    assert len(rows) == 5


def test_a_documents_first_token_is_never_predicted_and_padding_neither():
    tokens = np.arange(100, 120, dtype=np.uint16)
    sample = packing.fill(packing.row(tokens, None, np.array([[0, 3], [10, 14]])), 9, pad=1)
    assert plain(sample) == {
        "input_ids": [100, 101, 102, 110, 111, 112, 113, 1, 1],
        "labels": [IGNORED, 101, 102, IGNORED, 111, 112, 113, IGNORED, IGNORED],
        "position_ids": [0, 1, 2, 0, 1, 2, 3, 0, 1],
    }


PATCHES = {"unpatched": None, "dense": "dense", "gated": patchattn.GatedAttention(kind="headwise")}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES)
def test_a_packed_row_gives_each_document_the_logits_it_has_alone(
    implementation, patch, tokenizer, story_file, tmp_path
):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=len(tokenizer), attn_implementation=implementation,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4)  # attention that really tells tokens apart
    if patch is not None:
        patchattn.patch(model, patch)
        for parameter in patchattn.patch_parameters(model).values():
            parameter.data.normal_()
    data = opened(TextSource(path=str(story_file)), tokenizer, tmp_path, length=96)
    batch = data.collate([data.train[0], data.train[1]])
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    with torch.no_grad():
        packed = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        blind = model(batch["input_ids"], use_cache=False).logits
        documents = 0
        for row in range(2):
            starts = [*torch.nonzero(batch["position_ids"][row] == 0).flatten().tolist(), 96]
            for a, b in pairwise(starts):
                alone = model(batch["input_ids"][row : row + 1, a:b], use_cache=False).logits[0]
                torch.testing.assert_close(packed[row, a:b], alone, atol=2e-4, rtol=1e-4)
                documents += 1
    assert documents > 4
    assert (packed - blind).abs().max() > 0.05, "without the restarts the documents would see each other"


# ---- tokens --------------------------------------------------------------------------------------------------------


def test_documents_start_and_end_as_the_tokenizer_says(tokenizer):
    begin = end = tokenizer.eos_token_id
    (one,) = Encoder(tokenizer)(["a cat"])
    assert [one.ids[0], one.ids[-1]] == [begin, end]
    assert tokenizer.decode(one.ids[1:-1]) == "a cat"


@pytest.mark.parametrize("streaming", [False, True])
def test_every_document_comes_out_of_the_rows_again(tokenizer, story_file, tmp_path, streaming):
    source = TextSource(path=str(story_file), streaming=streaming)
    data = opened(source, tokenizer, tmp_path, length=512, held_out=0.0, samples=8)
    rows = -(-sum(len(tokenizer(story).input_ids) + 1 for story in stories(60)) // 512)
    found = documents_in([sample for _, sample in zip(range(rows), data.train)], tokenizer)
    whole = {tokenizer.decode(ids, skip_special_tokens=True) for ids in found}
    assert data.held_out is None
    assert len(whole & set(stories(60))) >= 60 - rows  # each row's end cuts one at most


def test_what_is_tokenized_once_is_not_tokenized_again(tokenizer, story_file, tmp_path, monkeypatch):
    source = TextSource(path=str(story_file))
    first = opened(source, tokenizer, tmp_path)
    monkeypatch.setattr(corpus_module, "_write", lambda *_: pytest.fail("tokenized again"))
    tokenizer(["a", "a b"], padding=True, truncation=True, max_length=2)  # which a tokenizer remembers
    again = opened(source, tokenizer, tmp_path)
    longer = opened(source, tokenizer, tmp_path, length=64)
    assert plain(first.train[5]) == plain(again.train[5])
    assert len(longer.train[0]["input_ids"]) == 64
    story_file.write_text(story_file.read_text().replace("cat", "dog"))
    with pytest.raises(pytest.fail.Exception, match="tokenized again"):
        opened(source, tokenizer, tmp_path)


def test_another_tokenizer_is_another_cache(tokenizer, story_file, tmp_path):
    other = train_tokenizer(TokenizerSpec(vocab_size=280), stories(200))
    source = TextSource(path=str(story_file))
    opened(source, tokenizer, tmp_path)
    opened(source, other, tmp_path)
    assert len(list((tmp_path / "cache").glob("tokens-*/corpus.json"))) == 2


def test_of_many_that_need_a_corpus_one_writes_it_and_the_others_wait(tokenizer, story_file, tmp_path, monkeypatch):
    written = []
    write, started = corpus_module._write, threading.Barrier(4)

    def slow(*arguments):
        written.append(arguments)
        write(*arguments)

    def read(results):
        started.wait()
        results.append(tokenized(Documents(TextSource(path=str(story_file))), Encoder(tokenizer), tmp_path))

    monkeypatch.setattr(corpus_module, "_write", slow)
    results = []
    threads = [threading.Thread(target=read, args=(results,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and len(written) == 1
    assert all(np.array_equal(one.tokens, results[0].tokens) for one in results)


def test_a_write_that_was_broken_off_leaves_nothing_and_a_full_disk_is_named(
    tokenizer, story_file, tmp_path, monkeypatch
):
    documents, write = Documents(TextSource(path=str(story_file))), corpus_module._write

    def killed(documents, encoder, folder, said):
        write(documents, encoder, folder, said)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(corpus_module, "_write", killed)
    with pytest.raises(OSError, match="no room for the token cache"):
        tokenized(documents, Encoder(tokenizer), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    monkeypatch.setattr(corpus_module, "_write", write)
    corpus = tokenized(documents, Encoder(tokenizer), tmp_path / "cache")
    unfinished = corpus.folder.with_name(corpus.folder.name + ".unfinished")
    corpus.folder.rename(unfinished)  # as kill -9 leaves it
    (unfinished / "tokens.bin").write_bytes(b"half")
    again = tokenized(documents, Encoder(tokenizer), tmp_path / "cache")
    assert len(again.segments) == 60 and not unfinished.exists()
    (again.folder / "tokens.bin").write_bytes(b"half")
    with pytest.raises(ValueError, match="is damaged; delete that folder"):
        Corpus.open(again.folder)


def test_a_reader_is_sent_to_a_worker_without_its_tokens(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(stories(2000)))
    corpus = tokenized(Documents(TextSource(path=str(tmp_path / "a.txt"))), Encoder(tokenizer), tmp_path)
    sent = pickle.dumps(corpus)
    assert len(sent) < 1000 < corpus.tokens.nbytes
    assert np.array_equal(pickle.loads(sent).tokens, corpus.tokens)


# ---- held out ------------------------------------------------------------------------------------------------------


def test_held_out_documents_are_whole_and_none_of_them_is_trained_on(tokenizer, story_file, tmp_path):
    path = write_rows(tmp_path / "numbered.jsonl", numbered(60))
    data = opened(TextSource(path=str(path)), tokenizer, tmp_path, held_out=0.2)
    train, held = data.train.readers[0], data.held_out.readers[0]

    def numbers(reader):
        pieces = [reader.corpus.tokens[a:b] for a, b in reader.segments]
        return {int(tokenizer.decode(piece, skip_special_tokens=True).split()[0]) for piece in pieces}

    assert len(numbers(held)) == 12
    assert numbers(train) | numbers(held) == set(range(60)) and not numbers(train) & numbers(held)
    same = opened(TextSource(path=str(path)), tokenizer, tmp_path, held_out=0.2)
    other = opened(TextSource(path=str(path)), tokenizer, tmp_path, held_out=0.2, seed=4)
    assert numbers(same.held_out.readers[0]) == numbers(held) != numbers(other.held_out.readers[0])


def test_of_a_single_document_the_end_is_held_out(tokenizer, tmp_path):
    (tmp_path / "book.txt").write_text(". ".join(stories(100)))
    data = opened(TextSource(path=str(tmp_path / "book.txt")), tokenizer, tmp_path, held_out=0.1)
    (train,), (held,) = data.train.readers[0].segments, data.held_out.readers[0].segments
    total = len(data.train.readers[0].corpus.tokens)
    assert train.tolist() == [0, held[0]] and held[1] == total
    assert total - held[0] == pytest.approx(0.1 * total, abs=1)
    assert data.fingerprints["held_out"][0]["held_out"]["by"] == "the end of each document"


def test_ends_that_are_held_out_lie_within_their_documents():
    corpus = Corpus(np.arange(24, dtype=np.uint16), None, np.array([1, 3, 24]))
    train, held = TextReader(corpus, Layout(8, True, cut=True, pad=0), {"path": "memory"}, seed=0).split(0.1)
    assert train.segments.tolist() == [[3, 21]]
    assert held.segments.tolist() == [[0, 1], [1, 3], [21, 24]]


def test_held_out_sources_of_their_own_are_used(tokenizer, story_file, tmp_path):
    (tmp_path / "other.txt").write_text("far away " * 50)
    other = TextSource(path=str(tmp_path / "other.txt"))
    data = opened(TextSource(path=str(story_file)), tokenizer, tmp_path, held_out=[other], held_out_samples=3)
    assert len(data.held_out) == 3
    assert "far away far away" in tokenizer.decode(data.held_out[0]["input_ids"])
    assert len(data.train.readers[0].segments) == 60


def test_evaluation_reads_no_sample_twice(tokenizer, story_file, tmp_path):
    sources = [TextSource(path=str(story_file)), SyntheticSource(generator="lookup", options={"length": 96})]
    data = opened(sources, tokenizer, tmp_path, held_out=0.5, held_out_samples=40, length=96)
    small = data.held_out.readers[0].size
    assert small < 20
    assert len(data.held_out) == small + 20
    samples = [tuple(data.held_out[index]["input_ids"]) for index in range(len(data.held_out))]
    assert len(set(samples)) == len(samples)


def test_too_little_to_hold_out_is_said(tokenizer, tmp_path):
    chats = write_rows(tmp_path / "one.jsonl", [CHAT], "messages")
    with pytest.raises(ValueError, match=r"too small to hold out 0.1 of it: 1 document\(s\)"):
        opened(ChatSource(path=str(chats)), tokenizer, tmp_path, held_out=0.1)


# ---- conversations -------------------------------------------------------------------------------------------------

CHAT = [
    {"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "sat on a mat"},
    {"role": "user", "content": "and dogs?"}, {"role": "assistant", "content": "ran"},
]  # fmt: skip
PREFIXED = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
FORGETFUL = (  # earlier answers are rendered otherwise than the last, as templates that drop old thinking do
    "{% for m in messages %}[{{ m.role }}]{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def with_template(tokenizer, template):
    copy = pickle.loads(pickle.dumps(tokenizer))
    copy.chat_template = template
    return copy


@pytest.mark.parametrize("template", [None, PREFIXED], ids=["marked by the template", "told by prefixes"])
def test_only_the_assistants_tokens_carry_a_loss(template, tokenizer):
    tokenizer = with_template(tokenizer, template or tokenizer.chat_template)
    (one,) = ChatEncoder(tokenizer, all_tokens=False)([CHAT])
    assert one.ids == tokenizer.apply_chat_template(CHAT)["input_ids"]
    answers = tokenizer.decode([token for token, mine in zip(one.ids, one.labelled) if mine])
    assert answers == "sat on a mat<|endoftext|>ran<|endoftext|>"
    (everything,) = ChatEncoder(tokenizer, all_tokens=True)([CHAT])
    assert everything.ids == one.ids and everything.labelled is None


def test_a_template_that_breaks_the_prefixes_is_refused(tokenizer):
    tokenizer = with_template(tokenizer, FORGETFUL)
    with pytest.raises(ValueError, match=r"does not render message 1 \('sat on a mat'\) as a continuation.*generation"):
        ChatEncoder(tokenizer, all_tokens=False)([CHAT])
    assert ChatEncoder(tokenizer, all_tokens=False)([CHAT[:2]])[0].labelled.any()


def test_conversations_are_packed_whole(tokenizer, tmp_path):
    random = np.random.default_rng(0)
    chats = []
    for number in range(40):
        answer = " ".join(random.choice(WORDS, 9))
        chats.append([{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": answer}])
    path = tmp_path / "chats.parquet"
    datasets.Dataset.from_list([{"messages": chat} for chat in chats]).to_parquet(path)
    data = opened(ChatSource(path=str(path)), tokenizer, tmp_path, length=128, held_out=0.1, samples=40)
    rows = [data.train.readers[0].sample(index, 0) for index in range(data.train.readers[0].size)]
    found = [tokenizer.decode(ids) for ids in documents_in(rows, tokenizer)]
    wanted = {tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats}
    assert len(found) == 36 and set(found) <= wanted
    for row in rows:
        asked = tokenizer.decode(row["input_ids"][row["labels"] == IGNORED]).replace("<|pad|>", "")
        answers = tokenizer.decode(row["input_ids"][row["labels"] != IGNORED])
        assert re.fullmatch(r"(<.endoftext.><.user.>\d+\?<.assistant.>)+", asked)
        assert asked.count("?") == answers.count("<|endoftext|>") > 1


WRONG_CHATS = {
    "text": ("hello", "holds str, not a list of messages"),
    "other keys": ([{"from": "human", "value": "hi"}], "has the keys from, value; it must have role and content"),
    "no assistant": ([{"role": "user", "content": "hi"}], "has no token of an assistant"),
}


@pytest.mark.parametrize("name", WRONG_CHATS)
def test_conversations_that_are_none_are_refused(name, tokenizer, tmp_path):
    value, message = WRONG_CHATS[name]
    path = write_rows(tmp_path / "a.jsonl", [value], "messages")
    with pytest.raises(ValueError, match=message):
        opened(ChatSource(path=str(path)), tokenizer, tmp_path)


def test_a_tokenizer_without_template_is_refused(tokenizer, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [CHAT], "messages")
    with pytest.raises(ValueError, match=r"needs a chat template.*has none"):
        opened(ChatSource(path=str(path)), with_template(tokenizer, None), tmp_path)


# ---- mixtures ------------------------------------------------------------------------------------------------------


def test_a_mixtures_items_follow_from_the_seed_alone(tokenizer, story_file, tmp_path):
    sources = [TextSource(path=str(story_file), weight=3), SyntheticSource(generator="lookup")]
    open_one = partial(opened, sources, tokenizer, tmp_path, length=96)
    data, again, longer, other = open_one(), open_one(), open_one(samples=80), open_one(seed=5)
    assert len(data.train) == 50 and len(longer.train) == 80
    backwards = {index: plain(again.train[index]) for index in reversed(range(50))}
    assert all(plain(data.train[index]) == backwards[index] == plain(longer.train[index]) for index in range(50))
    assert [plain(other.train[index]) for index in range(50)] != list(backwards.values())
    with pytest.raises(IndexError):
        data.train[50]


def test_worker_processes_give_the_same_batches(tokenizer, story_file, tmp_path):
    sources = [TextSource(path=str(story_file)), SyntheticSource(generator="lookup")]
    data = opened(sources, tokenizer, tmp_path, samples=12, length=96)
    batches = [
        list(DataLoader(data.train, batch_size=4, collate_fn=data.collate, num_workers=workers)) for workers in (0, 2)
    ]
    assert len(batches[0]) == len(batches[1]) == 3
    for one, two in zip(*batches):
        assert torch.equal(one["input_ids"], two["input_ids"])


def test_a_source_is_gone_through_in_another_order_each_time(tokenizer, story_file, tmp_path):
    data = opened(TextSource(path=str(story_file)), tokenizer, tmp_path, samples=1000)
    size = data.train.readers[0].size
    passes = [[tuple(data.train[p * size + index]["input_ids"]) for index in range(size)] for p in range(2)]
    assert passes[0] != passes[1] and sorted(passes[0]) == sorted(passes[1])
    assert len(set(passes[0])) == size


def test_weights_are_shares_of_the_samples():
    plan = Plan.by_weight([3.0, 1.0], 4000, seed=0)
    assert (plan.source == 0).mean() == pytest.approx(0.75, abs=0.03)
    assert plan.draw[plan.source == 1].tolist() == list(range((plan.source == 1).sum()))


@pytest.mark.parametrize("packed", [True, False])
def test_generated_samples_are_never_cut(tokenizer, tmp_path, packed):
    source = SyntheticSource(generator="lookup", options={"pairs": 2, "digits": 2})
    data = opened(source, tokenizer, tmp_path, length=200, packing=packed, samples=6)
    generator = data.train.readers[0].generator
    sample = data.train[2]
    assert sample["input_ids"][: len(generator.sample(400)["input_ids"])].tolist() == generator.sample(400)["input_ids"]
    if packed:
        found = documents_in([data.train[index] for index in range(6)], tokenizer)
        assert len(found) > 12
        assert all(
            ids in (generator.sample(200 * (i // 99) + i % 99)["input_ids"] for i in range(594)) for ids in found
        )
    else:
        assert set(sample) == {"input_ids", "labels"} and len(sample["input_ids"]) < 200
    held = [tuple(data.held_out[index]["input_ids"]) for index in range(6)]
    assert not set(held) & {tuple(data.train[index]["input_ids"]) for index in range(6)}


def test_unpacked_samples_are_padded_on_the_right():
    items = [{"input_ids": np.array([5, 6, 7]), "labels": np.array([-100, 6, 7])},
             {"input_ids": np.array([8]), "labels": np.array([8])}]  # fmt: skip
    batch = collate(items, pad=1)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 1, 1]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    assert collate(items[1:], pad=1, length=5)["input_ids"].tolist() == [[8, 1, 1, 1, 1]]


# ---- streaming -----------------------------------------------------------------------------------------------------


def test_a_stream_packs_as_the_whole_does(tokenizer, story_file):
    documents = Documents(TextSource(path=str(story_file)))
    layout = Layout(48, True, cut=True, pad=1)
    corpus = Corpus.of(Encoder(tokenizer)(list(documents)), np.uint16)
    reader = TextReader(corpus, layout, {"path": "memory"}, seed=0)
    stream = TextStream(documents, Encoder(tokenizer), layout, seed=0)
    for size in (1, 500, 10**6):
        rows = list(stream._samples(batches(documents, size)))
        assert [plain(row) for row in rows] == [plain(reader.sample(index, 0)) for index in range(reader.size)]


@pytest.mark.parametrize("packed", [True, False])
def test_a_streams_order_is_the_seeds_and_the_held_out_beginning_never_comes(tokenizer, tmp_path, packed):
    path = write_rows(tmp_path / "a.jsonl", numbered(300))
    source = TextSource(path=str(path), streaming=True)
    open_one = partial(opened, source, tokenizer, tmp_path, held_out_samples=4, samples=200, packing=packed, length=64)
    data, again, other = open_one(), open_one(), open_one(seed=9)
    first = [plain(sample) for sample in data.train]
    assert first == [plain(sample) for sample in again.train] == [plain(sample) for sample in data.train]
    assert first != [plain(sample) for sample in other.train]
    assert len(first) == len(data.train) == 200 and len(data.held_out) == 4
    used = data.fingerprints["held_out"][0]["documents"]
    held = {data.held_out[index]["input_ids"].tobytes() for index in range(4)}
    assert not held & {np.array(sample["input_ids"]).tobytes() for sample in first}
    read = list(islice(data.train.indexed.readers[0].documents, used, None))
    assert 0 < used < 30 and len(read) == 300 - used
    lengths = {data.collate([data.held_out[index]])["input_ids"].shape[1] for index in range(4)}
    assert lengths == {64}, "what several processes get of a stream must be equally long"
    loaded = DataLoader(data.train, batch_size=1, num_workers=2, collate_fn=lambda items: items[0])
    assert [plain(sample) for sample in loaded] == first


def test_streams_and_indexed_sources_mix(tokenizer, story_file, tmp_path):
    sources = [TextSource(path=str(story_file), streaming=True), SyntheticSource(generator="lookup")]
    data = opened(sources, tokenizer, tmp_path, samples=40, held_out_samples=6, length=96)
    samples = list(data.train)
    generated = [index for index, sample in enumerate(samples) if "Numbers" in tokenizer.decode(sample["input_ids"])]
    assert len(samples) == 40 and 10 < len(generated) < 30
    assert len(data.held_out) == 6


def test_a_stream_shorter_than_what_is_held_out_is_refused(tokenizer, story_file, tmp_path):
    source = TextSource(path=str(story_file), streaming=True)
    with pytest.raises(ValueError, match="ends within its first 256 samples, which are held out"):
        opened(source, tokenizer, tmp_path)


# ---- recipes that do not fit ---------------------------------------------------------------------------------------


def test_what_does_not_fit_the_task_is_refused(tokenizer, story_file, tmp_path):
    spec = DataSpec(train=[TextSource(path=str(story_file))])
    settings = dict(length=32, seed=0, samples=4, cache=tmp_path)
    with pytest.raises(ValueError, match="kind: text is for causal-lm; the model's task is denoising"):
        open_data(spec, task="denoising", processor=None, **settings)
    with pytest.raises(ValueError, match="kind: text needs a tokenizer"):
        open_data(spec, task="causal-lm", processor=None, **settings)
    with pytest.raises(ValueError, match=r"held_out is 1.5"):
        opened(TextSource(path=str(story_file)), tokenizer, tmp_path, held_out=1.5)


def test_fingerprints_say_what_was_read_and_are_json(tokenizer, story_file, tmp_path):
    said = opened(TextSource(path=str(story_file), limit=50), tokenizer, tmp_path, held_out=0.1).fingerprints
    assert json.loads(json.dumps(said)) == said
    (train,), (held,) = said["train"], said["held_out"]
    assert train["parts"][0]["sha256"] == fingerprint_file(story_file)["sha256"]
    assert train["documents"] + held["documents"] == 50
    assert train["tokens"] > held["tokens"] > 0 and train["rows"] > 0
    assert said["length"] == 32 and said["seed"] == 3


# ---- a tokenizer of one's own --------------------------------------------------------------------------------------

TEXTS = ["plain", " two  spaces\tand\n\nlines ", "1234567.89", "naïve 漢字 😀 ẞ", "\u0000\u200b\ufeff", "<|user|>", ""]


def test_any_text_comes_out_of_the_tokenizer_as_it_went_in(tokenizer):
    for line in TEXTS:
        assert tokenizer.decode(tokenizer(line).input_ids[1:]) == line
    assert len(tokenizer("1234567", add_special_tokens=False).input_ids) == 7


def test_a_trained_tokenizer_is_the_same_each_time_and_from_its_folder(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    again = train_tokenizer(TokenizerSpec(vocab_size=300), stories(200))
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert Encoder(tokenizer).fingerprint == Encoder(again).fingerprint == Encoder(loaded).fingerprint
    assert len(loaded) == 300 and loaded.pad_token_id != loaded.eos_token_id == loaded.bos_token_id
    assert loaded.apply_chat_template(CHAT, tokenize=False) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert set(loaded("a cat")) == {"input_ids", "attention_mask"}


def test_digits_may_stay_together():
    spec = TokenizerSpec(vocab_size=300, split_digits=False)
    tokenizer = train_tokenizer(spec, ["1234 " * 50])
    assert len(tokenizer("1234", add_special_tokens=False).input_ids) == 1


def test_a_tokenizer_trains_on_text_and_conversations(story_file, tmp_path):
    chats = write_rows(tmp_path / "a.jsonl", [CHAT], "messages")
    sources = [TextSource(path=str(story_file)), SyntheticSource(generator="mqar"), ChatSource(path=str(chats))]
    assert list(training_texts(sources)) == [*stories(60), *(message["content"] for message in CHAT)]
    with pytest.raises(ValueError, match="no source of the recipe has any"):
        list(training_texts(sources[1:2]))


def test_only_the_beginning_of_very_much_text_is_trained_on(story_file, monkeypatch):
    monkeypatch.setattr("patchattn.train.tokenizer.TRAINING_TEXT", 100)
    assert "".join(training_texts([TextSource(path=str(story_file))])) == "".join(stories(60))[:100]
