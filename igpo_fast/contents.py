"""What the files that a run reads hold, so that a file edited in place is not taken for the one of before."""

from __future__ import annotations

from pathlib import Path

from igpo_fast.config import Config
from igpo_fast.data import NAMED_SOURCE
from igpo_fast.files import sha256, storage


def sources(config: Config) -> dict[str, str]:
    """Key -> file, folder or hub name, of everything that a run reads: ``data.eval`` has a key for each set."""
    named: dict[str, str | None] = {"model.path": config.model.path}
    if config.model.path is None and config.model.tokenizer not in ("world", "bpe"):
        named["model.tokenizer"] = config.model.tokenizer
    if config.data.source == "files":
        sets = config.data.eval or []
        named |= {"data.train": config.data.train, "data.corpus": config.data.corpus}
        for number, entry in enumerate([sets] if isinstance(sets, str) else sets):
            named[f"data.eval[{number}]"] = NAMED_SOURCE.fullmatch(entry)[2]
    return {key: source for key, source in named.items() if source}


def contents(config: Config) -> dict[str, str]:
    """Key of ``sources`` -> a digest of what is there. A source that cannot be read has none: whoever loads it says
    why.

    Raises:
        StorageError: a file is there, but cannot be read.
    """
    found = {key: _content(key, source) for key, source in sources(config).items()}
    return {key: digest for key, digest in found.items() if digest is not None}


def _content(key: str, source: str) -> str | None:
    path = Path(source)
    if not path.exists():
        path = Path(source.partition(":")[0])  # a folder of the datasets library, with :split
    if path.exists():
        with storage(path, "read"):
            return sha256(path)
    return _model_on_hub(source) if key.startswith("model.") else _data_on_hub(source)


def _model_on_hub(name: str) -> str | None:
    """The commit of a model or tokenizer that was downloaded."""
    from huggingface_hub import try_to_load_from_cache

    try:
        known = [try_to_load_from_cache(name, file) for file in ("config.json", "tokenizer_config.json")]
    except ValueError:  # no name of a repository
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
