"""A search index over a corpus file: built once, kept on disk, memory-mapped by every process that serves it.

DIR/CORPUS-KIND-KEY/    a complete index; the name of one in the making begins with a dot
  documents.jsonl       one {"id", "contents"} per passage, in the corpus's order
  offsets.npy           offset of each passage, and the end of the last: int64 [passages + 1]
  ...                   the retriever's files
  manifest.json         the corpus, the settings, and the size of each file
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import bm25s
import numpy as np
from bm25s.tokenization import Tokenized

from igpo_fast.data.bm25 import Hits, best, indexed_words
from igpo_fast.data.fields import BadField
from igpo_fast.data.passages import passage_of
from igpo_fast.data.rows import json_lines
from igpo_fast.errors import InputError
from igpo_fast.files import atomic, lock, sync
from igpo_fast.types import Passage

FORMAT = 2
"""Version of the files; increased when their format or the splitting into words changes."""

Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""``with bar("reading") as progress: progress(done, total)``."""


class Documents:
    """The passages of an index in their served form: a mapped file, without a copy in memory."""

    def __init__(self, folder: Path):
        """Raises ValueError if the two files do not fit together."""
        self._offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        with open(folder / "documents.jsonl", "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        ends = self._offsets[1:]
        if self._offsets[0] != 0 or ends[-1] != len(self._bytes) or not (ends > self._offsets[:-1]).all():
            raise ValueError("offsets.npy does not divide documents.jsonl")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: int) -> bytes:
        """A passage's JSON object."""
        return self._bytes[self._offsets[number] : self._offsets[number + 1] - 1]

    def passage(self, number: int) -> Passage:
        return passage_of(json.loads(self[number]))


class Retriever(Protocol):
    """One way to rank passages."""

    kind: str
    settings: dict[str, object]
    """Settings, besides the corpus, on which its files depend."""

    def build(self, documents: Documents, folder: Path, bar: Bar) -> None:
        """Write the retriever's files."""
        ...

    def open(self, folder: Path) -> None:
        """Map the retriever's files."""
        ...

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """At most ``k`` passages for each query. Called from several threads."""
        ...


class Bm25:
    """BM25 (Lucene's variant), with the ranking of ``Bm25Search``."""

    kind = "bm25"

    def __init__(self):
        self.settings = {"bm25s": bm25s.__version__}

    def build(self, documents: Documents, folder: Path, bar: Bar) -> None:
        """Write bm25s's own index to ``folder/bm25``; takes memory for the int32 numbers of all words."""
        vocabulary: dict[str, int] = {}
        ids = []
        with bar("words") as progress:
            for number in range(len(documents)):
                found = indexed_words(documents.passage(number))
                ids.append(array("i", [vocabulary.setdefault(word, len(vocabulary)) for word in found]))
                progress(number + 1, len(documents))
        index = bm25s.BM25()
        # bm25s's own bars follow.
        index.index(Tokenized(ids, vocabulary), show_progress=sys.stderr.isatty(), create_empty_token=False)
        index.save(folder / "bm25", show_progress=False)

    def open(self, folder: Path) -> None:
        """Map the index."""
        self._index = bm25s.BM25.load(folder / "bm25", mmap=True, show_progress=False)

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """At most ``k`` passages per query, ranked by ``best``."""
        return [best(self._index, query, k) for query in queries]


class Index:
    """A corpus's passages and one way to search them."""

    def __init__(self, folder: Path, retriever: Retriever):
        self.folder, self.retriever = folder, retriever
        self.documents = Documents(folder)
        retriever.open(folder)

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """At most ``k`` of ``documents`` for each query, by number, with scores, best first. Called from several
        threads."""
        return self.retriever.search(queries, k)


def open_index(corpus: Path, retriever: Retriever, root: Path, bar: Bar | None = None) -> Index:
    """The index of a corpus file: the one in ``root`` for this content and these settings, or a new one. A second
    process that needs it meanwhile waits.

    A corpus with the path, size and time recorded in the index is taken to be unchanged; if only its size is the same,
    it is compared by content.

    Args:
        corpus: JSON lines as ``passages.load_corpus`` takes them.
        bar: shows progress.
    Raises:
        InputError: missing or malformed corpus, naming the line; a damaged index, naming the folder to delete; ``root``
            cannot be written.
    """
    stat = _stat(corpus)
    settings = json.loads(json.dumps({"format": FORMAT, "kind": retriever.kind, **retriever.settings}))
    with _locked(root):
        folder = _find(corpus, stat, settings, root)
        if folder is None:
            folder = _build(corpus, stat, settings, retriever, root, bar or (lambda name: nullcontext(_ignore)))
    try:
        return Index(folder, retriever)
    except Exception as error:  # numpy, bm25s and JSON may raise anything for our own files once they have changed
        raise _damaged(folder, " ".join(f"{type(error).__name__}: {error}".split())[:200]) from error


def _damaged(folder: Path, what: str) -> InputError:
    return InputError(f"{folder}: this search index is damaged ({what}); delete the folder, and it is built again")


def _ignore(done: int, total: int) -> None:
    pass


def _stat(corpus: Path) -> dict[str, object]:
    """Path, size and time of a file, which identify it without reading."""
    try:
        with open(corpus, "rb") as file:
            found = os.fstat(file.fileno())
    except OSError as error:
        raise InputError(f"{corpus}: cannot read it ({error.strerror}); give an existing file") from None
    return {"path": str(corpus.resolve()), "size": found.st_size, "mtime_ns": found.st_mtime_ns}


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    try:
        root.mkdir(parents=True, exist_ok=True)
        held = open(root / ".lock", "a+")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise InputError(f"{root}: cannot keep an index there ({error.strerror}); give another --index") from None
    with held:
        lock(held, wait=True)
        yield


def _find(corpus: Path, stat: dict, settings: dict, root: Path) -> Path | None:
    """The complete index of this corpus with these settings."""
    digest = None
    for path in sorted(root.glob("*/manifest.json")):
        manifest = _read_manifest(path)
        known = manifest["corpus"]
        if manifest["settings"] != settings or known["size"] != stat["size"]:
            continue
        same = {key: known[key] for key in stat} == stat
        if not same:
            digest = digest or digest_of_file(corpus)
        if same or digest == known["digest"]:
            _check(path.parent, manifest)
            if not same:
                _write_manifest(path.parent, {**manifest, "corpus": {**stat, "digest": digest}})
            return path.parent
    return None


def _read_manifest(path: Path) -> dict:
    """Raises InputError if ``_build`` did not write it."""
    try:
        manifest = json.loads(path.read_bytes())
        known, sizes = manifest["corpus"], manifest["files"]
        whole = {"path", "size", "mtime_ns", "digest"} <= known.keys() and "settings" in manifest
        if whole and sizes and all(isinstance(size, int) for size in sizes.values()):
            return manifest
        reason = "fields are missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = type(error).__name__
    raise _damaged(path.parent, f"manifest.json: {reason}")


def _check(folder: Path, manifest: dict) -> None:
    for name, size in manifest["files"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise _damaged(folder, f"{name} is missing or of another size")


def _build(corpus: Path, stat: dict, settings: dict, retriever: Retriever, root: Path, bar: Bar) -> Path:
    for leftover in root.glob(".*.tmp"):
        shutil.rmtree(leftover)
    temporary = root / f".{retriever.kind}.tmp"
    temporary.mkdir()
    try:
        digest = _write_documents(corpus, temporary, bar)
        if _stat(corpus) != stat:
            raise InputError(f"{corpus}: changed while it was read; start again when it is complete")
        retriever.build(Documents(temporary), temporary, bar)
        files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
        sizes = {path.relative_to(temporary).as_posix(): path.stat().st_size for path in files}
        manifest = {"settings": settings, "corpus": {**stat, "digest": digest}, "files": sizes}
        _write_manifest(temporary, manifest)
        for path in temporary.rglob("*"):
            sync(path)
        key = hashlib.blake2b(json.dumps([settings, digest]).encode(), digest_size=6).hexdigest()
        folder = root / f"{corpus.stem}-{retriever.kind}-{key}"
        os.replace(temporary, folder)
    except OSError as error:
        raise InputError(f"{root}: cannot write the index ({error.strerror or error}); give another --index") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(root)
    return folder


def _write_documents(corpus: Path, folder: Path, bar: Bar) -> str:
    """documents.jsonl and offsets.npy; returns the corpus's digest."""
    digest, seen, offsets, size = hashlib.blake2b(digest_size=16), set(), array("q", [0]), corpus.stat().st_size
    read = 0

    def lines(source: BinaryIO) -> Iterator[bytes]:
        nonlocal read
        for line in source:
            digest.update(line)
            read += len(line)
            yield line

    with open(corpus, "rb") as source, open(folder / "documents.jsonl", "wb") as out, bar("corpus") as progress:
        for row in json_lines(lines(source), corpus):
            try:
                passage = passage_of(row.values)
            except BadField as error:
                raise InputError(f"{row.where}: {error}") from None
            if passage.id in seen:
                raise InputError(f"{row.where}: id {passage.id!r} occurs twice; make ids unique")
            seen.add(passage.id)
            offsets.append(offsets[-1] + out.write(_document(passage, row.values)))
            progress(read, size)
    if not seen:
        raise InputError(f"{corpus}: no passages; give at least one line")
    np.save(folder / "offsets.npy", np.array(offsets, dtype=np.int64))
    return digest.hexdigest()


def _document(passage: Passage, row: Mapping[str, Any]) -> bytes:
    """A passage in its served form: contents if given, else title and text."""
    given = "contents" in row and "text" not in row
    title = " ".join(passage.title.split())
    contents = str(row["contents"]) if given else f"{title}\n{passage.text}"
    return json.dumps({"id": passage.id, "contents": contents}, ensure_ascii=False).encode() + b"\n"


def _write_manifest(folder: Path, manifest: dict) -> None:
    with atomic(folder / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=1).encode())


def digest_of_file(path: Path) -> str:
    """The blake2b digest of a file's content: 32 hexadecimal characters."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
