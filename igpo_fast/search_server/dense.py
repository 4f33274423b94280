"""Dense retrieval: texts as vectors of a local sentence-transformer, compared by FAISS."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from igpo_fast.data.bm25 import Hits
from igpo_fast.errors import InputError
from igpo_fast.search_server.index import Bar, Documents, digest_of_file


class Encoder(Protocol):
    """Texts to vectors."""

    settings: dict[str, object]
    """Settings on which the vectors depend."""

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, dimensions], rows of length 1."""
        ...

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, dimensions], rows of length 1."""
        ...


class Dense:
    """Cosine similarity of vectors, exact: FAISS compares a query with every vector."""

    kind = "dense"
    BATCH = 256
    """Passages encoded at a time."""

    def __init__(self, encoder: Encoder):
        try:
            import faiss
        except ImportError as error:
            raise InputError(f"--dense: {error}; pip install 'igpo-fast[dense]'") from None
        self._faiss = faiss
        self._encoder = encoder
        self.settings = {"encoder": encoder.settings}
        self._alone = threading.Lock()  # tokenizers and models are not thread-safe

    def build(self, documents: Documents, folder: Path, bar: Bar) -> None:
        """Encode all passages into ``folder/vectors.npy``: float32 [passages, dimensions]."""
        vectors = None
        with bar("vectors") as progress:
            for start in range(0, len(documents), self.BATCH):
                passages = [documents.passage(i) for i in range(start, min(start + self.BATCH, len(documents)))]
                found = self._encoder.passages([f"{p.title}\n{p.text}".strip() for p in passages])
                if vectors is None:
                    shape = (len(documents), found.shape[1])
                    vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, shape)
                vectors[start : start + len(found)] = found
                progress(start + len(found), len(documents))
        vectors.flush()

    def open(self, folder: Path) -> None:
        """Map ``vectors.npy``."""
        self._vectors = np.load(folder / "vectors.npy", mmap_mode="r")

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """The ``min(k, passages)`` nearest passages of each query, scores being cosines."""
        if not queries:
            return []
        with self._alone:
            vectors = np.ascontiguousarray(self._encoder.queries(queries), dtype=np.float32)
        k = min(k, len(self._vectors))
        scores, numbers = self._faiss.knn(vectors, self._vectors, k, metric=self._faiss.METRIC_INNER_PRODUCT)
        return [list(zip(n.tolist(), s.tolist(), strict=True)) for n, s in zip(numbers, scores, strict=True)]


class SentenceEncoder:
    """A sentence-transformer of a local directory.

    Args:
        prompts: prefixes of queries and passages ("query: ", "passage: " for E5); None takes the model's own
            configuration.
    Raises:
        InputError: no model loads from there.
    """

    def __init__(self, folder: Path, prompts: tuple[str | None, str | None] = (None, None)):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise InputError(f"--dense: {error}; pip install 'igpo-fast[dense]'") from None
        if not folder.is_dir():
            raise InputError(f"--dense {folder}: no such directory; give a sentence-transformer's")
        try:
            self._model = SentenceTransformer(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"--dense {folder}: no sentence-transformer loads from there ({reason}); give another folder"
            ) from None
        self._prompts = prompts
        self.settings = {"model": _digest_of_folder(folder), "prompts": prompts}

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        return self._encode(self._model.encode_query, texts, self._prompts[0])

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        return self._encode(self._model.encode_document, texts, self._prompts[1])

    @staticmethod
    def _encode(encode: Callable, texts: Sequence[str], prompt: str | None) -> np.ndarray:
        return encode(list(texts), prompt=prompt, normalize_embeddings=True, show_progress_bar=False)


def _digest_of_folder(folder: Path) -> str:
    """A digest of the names and contents of a folder's files."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {digest_of_file(path)}\n".encode())
    return digest.hexdigest()
