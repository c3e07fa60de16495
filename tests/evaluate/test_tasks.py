"""Tasks made up on the spot and on local files: what they ask, how it is scored, and that all that ship can be read."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks._yaml_loader import load_yaml

from patchattn.evaluate import folder, local, recall, suites, tasks
from patchattn.evaluate.run import _complete, _manager
from patchattn.loading import load_tokenizer

LLAMA = {"pretrained": "lab-llama"}
MADE = {"passkey": 16, "needle": 16, "variables": 48, "common_words": 48, "mqar": 0, "copy": 0}
CELLS = {"lengths": [256, 400], "depths": [0.0, 1.0], "samples": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("lab-llama")


def rows(generator, room=None, **options):
    room = MADE[generator] if room is None else room
    return list(recall.questions(generator, room=room, **{**LLAMA, **CELLS, **options})["test"])


@pytest.mark.parametrize("generator", MADE)
def test_prompt_and_answer_have_a_lengths_tokens_at_most_and_nearly_that_many(tokenizer, generator):
    for row in rows(generator):
        prompt = tokenizer(f"{row['prompt']} {row['lead']}".rstrip())["input_ids"]
        total = len(prompt) + max(MADE[generator], row["tokens"])
        least = row["length"] // 2 if generator == "mqar" else row["length"] - 24  # it ends where it asks last
        assert least <= total <= row["length"]


@pytest.mark.parametrize("generator", MADE)
def test_questions_are_the_same_each_time_and_others_with_another_seed(generator):
    assert rows(generator) == rows(generator)
    assert rows(generator) != rows(generator, task_seed=1)


def test_questions_take_turns_in_length_and_depth():
    found = rows("passkey")
    assert [(row["length"], row["depth"]) for row in found[:4]] == [(256, 0.0), (256, 1.0), (400, 0.0), (400, 1.0)]
    assert len(found) == 8 and len({row["answer"] for row in found if row["length"] == 256}) == 4
    assert [row["depth"] for row in rows("mqar")] == [-1.0] * 4
    assert [row["length"] for row in rows("mqar", lengths=300, samples=1)] == [300]


def test_a_line_stands_at_its_depth():
    for row in rows("passkey", lengths=600, samples=1):
        place = row["prompt"].index(f"The pass key is {row['answer'].strip()}.") / len(row["prompt"])
        assert place < 0.2 if row["depth"] == 0 else place > 0.7


def test_needles_answer_for_the_word_that_is_asked_for():
    for row in rows("needle", keys=4, values=3, lengths=500):
        asked = re.search(r"to (\w+)\?$", row["prompt"]).group(1)
        numbers = re.findall(rf"One number of {asked} is (\d+)\.", row["prompt"])
        assert row["answers"] == numbers and len(numbers) == 3
        assert len(re.findall(r"One number of \w+ is \d+\.", row["prompt"])) == 12


def test_variables_are_those_that_the_chain_reaches():
    for row in rows("variables", chains=3, hops=3, lengths=400):
        value = re.search(r"value (\d+) in", row["prompt"]).group(1)
        holds = set()
        for name, given in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", row["prompt"]):
            if given == value or given in holds:
                holds.add(name)
        assert set(row["answers"]) == holds and len(holds) == 4


def test_common_words_are_those_that_stand_most_often():
    for row in rows("common_words", lengths=400):
        listed = row["prompt"].splitlines()[1].split()
        counts = {word: listed.count(word) for word in set(listed)}
        most = sorted(counts, key=counts.get)[-4:]
        assert set(row["answers"]) == set(most)
        assert {counts[word] for word in most} == {12} and {counts[word] for word in set(counts) - set(most)} == {2}


def test_what_is_recalled_is_read_as_the_tokens_it_was_made_of(tokenizer):
    for generator in ("mqar", "copy"):
        made = recall.GENERATORS[generator](tokenizer=tokenizer, seed=recall.TASK_SEED)
        for index, row in enumerate(rows(generator, lengths=256)):
            prompt, answer = made.question(index, 256)
            assert tokenizer(row["prompt"] + row["answer"])["input_ids"] == prompt + answer


def test_stretches_cover_a_text_and_count_its_tokens(tokenizer):
    found = list(recall.stretches(lengths=256, buckets=4, samples=2, **LLAMA)["test"])
    assert [row["bucket"] for row in found[:4]] == ["0_64", "64_128", "128_192", "192_256"]
    for first in (0, 4):
        row = found[first : first + 4]
        for before, after in itertools.pairwise(row):
            assert after["context"] == before["context"] + before["target"]
            assert after["target"].startswith(" ")
        whole = row[-1]["context"] + row[-1]["target"]
        assert sum(part["tokens"] for part in row) == len(tokenizer(whole)["input_ids"]) - len(
            tokenizer(row[0]["context"])["input_ids"]
        )


WRONG = {
    "no tokenizer named": (recall.questions, dict(generator="passkey"), "need a tokenizer"),
    "no tokenizer there": (recall.questions, dict(generator="passkey", tokenizer="nowhere"), "at 'nowhere'"),
    "too short": (recall.questions, dict(generator="passkey", room=16, lengths=30, **LLAMA), "at least"),
    "buckets of nothing": (recall.stretches, dict(lengths=64, buckets=16, **LLAMA), "more than 8 tokens"),
    "no data": (local.rows, dict(task="local_piqa", pattern="piqa*"), "--metadata data=FOLDER"),
    "no folder": (local.rows, dict(task="local_piqa", pattern="piqa*", data="nowhere"), "no folder 'nowhere'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_missing_is_said(case):
    function, options, message = WRONG[case]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        function(**options)


def test_a_folder_without_the_file_says_which(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no file piqa\*\.jsonl"):
        local.rows("local_piqa", "piqa*.jsonl", str(tmp_path))
    (tmp_path / "blimp.jsonl").write_text('{"UID": "other"}\n')
    with pytest.raises(ValueError, match=r"has no row with .*adjunct_island"):
        local.rows("local_blimp", "blimp*.jsonl", str(tmp_path), where={"UID": "adjunct_island"})


# ---- local files -------------------------------------------------------------------------------------------


def test_winogrande_as_two_contexts_becomes_a_sentence_with_a_blank():
    row = {"context_options": ["the blanket hid, but the blanket", "the blanket hid, but the bed"],
           "continuation": "was not ruined.", "gold": 1}  # fmt: skip
    made = local._with_blank(row)
    assert made == {"sentence": "the blanket hid, but the _ was not ruined.", "option1": "blanket", "option2": "bed",
                    "answer": "2"}  # fmt: skip


def test_babi_gives_each_question_its_story_so_far(bench):
    first, second, *_ = list(local.babi("babi", "babi_qa1*.txt", str(bench))["test"])
    assert first["passage"] == "John travelled to the hallway.\nMary went to the garden.\n"
    assert second["passage"].endswith("John went to the kitchen.\n") and second["answer"] == "kitchen"


def test_babilong_spreads_the_facts_in_order(bench, tokenizer):
    found = local.babilong("babilong", "babi_qa1*.txt", "qa1", str(bench), lengths=[100, 200], samples=2, **LLAMA)[
        "qa1"
    ]
    for row in found:
        places = [row["input"].find(fact) for fact in ("John travelled", "Mary went")]
        assert 0 <= places[0] < places[1]
        assert len(tokenizer(row["input"])["input_ids"]) <= row["length"]
    assert found["length"] == [100, 200, 100, 200]


def test_wikitext_is_cut_at_its_articles(bench):
    pages = local.articles("wikitext", "wikitext*test*.txt", str(bench))["test"]["page"]
    assert len(pages) == 3 and all(page.startswith(" = The") and " = = More" in page for page in pages)


# ---- the files that ship -----------------------------------------------------------------------------------


def test_every_file_is_called_what_its_task_is_called_and_says_what_it_is():
    found = {**tasks(), **{f"suite_{name}": text for name, text in suites().items()}}
    assert {"recall_passkey", "text_by_position", "local_hellaswag", "suite_quick"} <= found.keys()
    for file in folder().rglob("*.yaml"):
        if file.name.startswith("_"):
            continue
        config = load_yaml(file, resolve_func=False)
        assert (config.get("group") or config["task"]) == file.stem
        assert file.read_text().startswith("# ") and found[file.stem]


def test_the_tasks_need_none_of_lm_evals_but_a_few_folders():
    names = [*tasks(), "suite_quick", "suite_recall", "suite_quality_local"]
    manager, found = _manager(list(names), None, dict(LLAMA), None)
    assert found == names and _complete(manager, names)


def test_suites_of_the_hub_name_tasks_that_lm_eval_has():
    shipped = {path.name for path in (Path(lm_eval.__file__).parent / "tasks").iterdir()}
    for name in ("quality", "long_context"):
        members = load_yaml(folder() / "suites" / f"suite_{name}.yaml", resolve_func=False)["task"]
        for member in members:
            task = member.get("group") or member["task"]
            assert task.partition("_")[0] in shipped, task


@pytest.mark.slow
def test_suites_consist_of_tasks_that_there_are():
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=[folder()])
    for name in suites():
        assert _complete(manager, [f"suite_{name}"]), name
