"""The documents say what is so: their code runs, prints what they show, and their tables are the registry's."""

import io
import re
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from patchattn import catalog, cli, method
from patchattn.method import builtin_names, method_class

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Python in a fence, or in a comment where the reader has the objects already; with what it prints, if that is shown.
BLOCK = re.compile(r"^(?:```|<!-- )python\n(.*?)^(?:```|-->)\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
INCLUDED = re.compile(r"<!-- include: (\S+) -->\n```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMANDS = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)")


@pytest.fixture(autouse=True)
def shipped_methods_only(monkeypatch):
    """What other tests register does not count here."""
    monkeypatch.setattr(method, "_REGISTERED", {name: method_class(name) for name in builtin_names()})


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def blocks(document):
    return [(match.group(1), match.group(2)) for match in BLOCK.finditer(document.read_text(encoding="utf-8"))]


def tidy(text):
    return [line.rstrip() for line in text.strip().splitlines()]


WITH_CODE = [document for document in DOCUMENTS if blocks(document)]
WITH_COMMANDS = [document for document in DOCUMENTS if COMMANDS.search(document.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("document", WITH_CODE, ids=names(WITH_CODE))
def test_every_block_runs_and_prints_what_the_document_shows(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "__main__"}
    for code, shown in blocks(document):
        out = io.StringIO()
        with redirect_stdout(out):
            exec(compile(code, str(document), "exec"), scope)
        if shown is not None:
            assert tidy(out.getvalue()) == tidy(shown), f"after\n{code}"


@pytest.mark.parametrize("document", WITH_COMMANDS, ids=names(WITH_COMMANDS))
def test_every_command_runs(document, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for code, _ in blocks(document):
        exec(compile(code, str(document), "exec"), {"__name__": "__main__"})
    for line in "".join(COMMANDS.findall(document.read_text(encoding="utf-8"))).splitlines():
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        try:
            cli.main()
        except SystemExit as stop:
            assert not stop.code, f"{line}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(DOCUMENTS))
def test_links_between_documents_lead_somewhere(document):
    for target in LINK.findall(document.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(DOCUMENTS))
def test_included_code_is_the_code_of_the_file(document):
    for file, code in INCLUDED.findall(document.read_text(encoding="utf-8")):
        assert code == (document.parent / file).read_text(encoding="utf-8")


def test_the_tutorial_shows_its_method():
    assert INCLUDED.findall((ROOT / "docs/add-a-method.md").read_text(encoding="utf-8"))


def test_the_tutorials_method_has_at_most_100_lines():
    assert len((ROOT / "docs/tutorial_method.py").read_text(encoding="utf-8").splitlines()) <= 100


def test_the_readmes_table_of_methods_is_the_registrys():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("<!-- methods:start -->\n")[2].partition("<!-- methods:end -->")[0]
    assert table.strip() == catalog.markdown(), "run: patchattn methods --markdown"


@pytest.mark.parametrize("name", builtin_names())
def test_every_method_has_a_page_that_names_all_its_settings(name):
    page = (ROOT / "docs/methods" / f"{name}.md").read_text(encoding="utf-8")
    for setting in catalog.settings(method_class(name)):
        assert f"`{setting}`" in page


def test_a_document_that_prints_something_else_is_noticed(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match="after"):
        test_every_block_runs_and_prints_what_the_document_shows(page, tmp_path, monkeypatch)
