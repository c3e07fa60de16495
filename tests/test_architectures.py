"""The sweep of `tests/architectures.py`, held against the table that `docs/architectures.md` shows.

By default a third of the architectures is swept; all of them are with the slow tests.
"""

from pathlib import Path

import pytest
import transformers

from tests.architectures import KINDS, read, sweep

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
TABLE = read(PAGE)
INSTALLED = [(kind, model_type) for kind, names in KINDS.items() for model_type in names]
GOAL = 150
SAME_VERSION = f"on transformers {transformers.__version__} and" in PAGE.read_text(encoding="utf-8")


def cases():
    for index, case in enumerate(INSTALLED):
        yield pytest.param(*case, id="-".join(case).replace(" ", "_"), marks=[pytest.mark.slow] if index % 3 else [])


def test_at_least_150_architectures_work():
    working = {model_type for (_, model_type), cells in TABLE.items() if cells["works"] == "yes"}
    assert len(working) >= GOAL


@pytest.mark.skipif(not SAME_VERSION, reason="the table was written with another release of transformers")
def test_the_table_names_every_architecture_of_the_installed_transformers():
    assert list(TABLE) == INSTALLED


@pytest.mark.parametrize(("kind", "model_type"), cases())
def test_what_the_table_says_works_still_works(kind, model_type):
    row, told = sweep(kind, model_type), TABLE.get((kind, model_type), {})
    assert row.works or told.get("works") != "yes", f"{row.result}: {row.reason}"
    assert row.works or row.reason
    if SAME_VERSION:
        assert (row.result, row.duo == "yes", row.gated == "yes") == (
            told["works"], told["DuoAttention"] == "yes", told["GatedAttention"] == "yes",
        )  # fmt: skip
