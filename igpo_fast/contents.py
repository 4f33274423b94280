"""Digests of the files that a run reads, so that a file edited in place is noticed."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from pathlib import Path

from igpo_fast.config import Config
from igpo_fast.errors import InputError
from igpo_fast.extend import file_of
from igpo_fast.files import sha256, storage

NAMED_SOURCE = re.compile(r"(?:([\w.+-]+)=)?(.*)", re.DOTALL)
"""Matches a source of evaluation questions, with the name that may stand before it."""
OWN_PARAGRAPHS = "contexts"
"""Value of ``data.corpus`` for the paragraphs that come with the questions."""


def parts_of(source: str | Path) -> list[str]:
    """The files of a source, patterns and commas resolved; a hub's name as it is.

    Raises:
        InputError: no file named, or a pattern that matches nothing.
    """
    source = str(source)
    if "\0" in source:
        raise InputError(f"{source!r}: not a file name; give an existing file")
    if os.path.isfile(source):
        return [source]
    found = []
    for part in filter(None, map(str.strip, source.split(","))):
        if part.endswith(".parquet") and os.path.isdir(part):  # a folder of parts, as Spark writes a table
            part = f"{glob.escape(part)}/**/*.parquet"
        if not glob.has_magic(part) or os.path.isfile(part):
            found.append(part)
            continue
        matches = sorted(glob.glob(part, recursive=True))
        if not matches:
            raise InputError(f"{part}: no file matches; give an existing file or another pattern")
        found += matches
    if not found:
        raise InputError(f"{source!r}: no file named; give an existing file")
    return found


def sources(config: Config) -> dict[str, str]:
    """Key -> file, folder or hub name of everything that a run reads; each data set of ``data.eval`` has its own
    key."""
    named: dict[str, str | None] = {
        "model.path": config.model.path,
        "algorithm.outcome": file_of(config.algorithm.outcome),
        "algorithm.gain": file_of(config.algorithm.gain),
        "rollout.dialect": file_of(config.rollout.dialect),
        "rollout.engine": file_of(config.rollout.engine),
        "sft.demonstrations": config.sft.demonstrations,
        "rollout.system_file": config.rollout.system_file,
    }
    if config.model.path is None and config.model.tokenizer not in ("world", "bpe"):
        named["model.tokenizer"] = config.model.tokenizer
    for tool in config.rollout.tools:
        named[f"rollout.tools: {tool}"] = file_of(tool)
    named["data.environment"] = _code_of(config.data.environment or "")
    if config.data.source == "files":
        sets = config.data.eval or []
        corpus = None if config.data.corpus == OWN_PARAGRAPHS else config.data.corpus
        named |= {"data.train": config.data.train, "data.corpus": corpus, "tools.table": config.tools.table}
        for number, entry in enumerate([sets] if isinstance(sets, str) else sets):
            named[f"data.eval[{number}]"] = NAMED_SOURCE.fullmatch(entry)[2]
    return {key: source for key, source in named.items() if source}


def _code_of(environment: str) -> str:
    """The code of an environment: its file, or all of its package's."""
    file = file_of(environment) or file_of(f"{environment.replace('-', '_')}:taskset")
    folder, name = os.path.split(file)
    return f"{glob.escape(folder)}/**/*.py" if name == "__init__.py" else file


def contents(config: Config) -> dict[str, str]:
    """Key of ``sources`` -> a digest of its content. A source that cannot be read has none: loading it says why.

    Raises:
        StorageError: a file is there, but cannot be read.
    """
    found = {key: _content(key, source) for key, source in sources(config).items()}
    return {key: digest for key, digest in found.items() if digest is not None}


def _content(key: str, source: str) -> str | None:
    if key.startswith("model."):
        return _digest(Path(source)) if Path(source).exists() else _model_on_hub(source)
    try:
        parts = parts_of(source)
    except InputError:
        return None
    digests = [_digest(path) if (path := _local(part)) else _data_on_hub(part) for part in parts]
    if None in digests:
        return None
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _local(source: str) -> Path | None:
    """The file, or the folder of the datasets library that stands before ``:split``."""
    return next((path for path in map(Path, (source, source.partition(":")[0])) if path.exists()), None)


def _digest(path: Path) -> str:
    with storage(path, "read"):
        return sha256(path)


def _model_on_hub(name: str) -> str | None:
    """The commit of a downloaded model or tokenizer."""
    from huggingface_hub import try_to_load_from_cache

    try:
        known = [try_to_load_from_cache(name, file) for file in ("config.json", "tokenizer_config.json")]
    except ValueError:  # not a repository's name
        return None
    return next((Path(path).parent.name for path in known if isinstance(path, str)), None)


def _data_on_hub(source: str) -> str | None:
    """The datasets library's fingerprint of a split: made from the data set's commit, not from its rows."""
    name, *rest = source.split(":")
    if len(rest) not in (1, 2):
        return None
    import datasets

    try:
        return datasets.load_dataset(name, *rest[:-1], split=rest[-1])._fingerprint
    except (OSError, ValueError, datasets.exceptions.DatasetsError):
        return None
