"""Rows of files and of the datasets hub, each with its place."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from json.decoder import WHITESPACE
from pathlib import Path
from typing import Any, NamedTuple

from igpo_fast.contents import parts_of
from igpo_fast.data.fields import encodable, kind_of
from igpo_fast.errors import InputError

JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_HALF_PAIR = re.compile(r"\\ud[89a-f]", re.IGNORECASE)
_BOM = b"\xef\xbb\xbf"
_DECODER = json.JSONDecoder()


class Row(NamedTuple):
    """A row of a source."""

    where: str
    """``FILE line 3``, for messages."""
    name: str
    """``FILE-3``, an id for a row that has none."""
    values: Mapping[str, Any]


def rows_of(source: str | Path) -> Iterator[Row]:
    """The rows of a source, in order.

    Args:
        source: ``.jsonl``, ``.json`` (an array of objects, or JSON lines), either with ``.gz``, or ``.parquet``; a
            pattern (``train-*.parquet``) takes all that match, by name; several are separated by commas. Else a
            datasets-hub name or folder: ``name:split`` or ``name:configuration:split``.
    Raises:
        InputError: nothing there, or not the format that the name says.
    """
    for part in parts_of(source):
        yield from _rows_of_part(part)


def stem_of(source: str | Path) -> str:
    """A source's name: the first file's, without endings and pattern."""
    name = re.sub(r"[-_.]*[*?\[].*", "", Path(str(source).partition(",")[0].removesuffix(".gz")).stem)
    return name or "questions"


def _rows_of_part(part: str) -> Iterator[Row]:
    path = Path(part)
    if part.endswith(JSON_SUFFIXES):
        return _json_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    name, *rest = part.split(":")
    if len(rest) in (1, 2):
        return _hub_rows(part, [name, *rest[:-1]], split=rest[-1])
    raise InputError(
        f"{part}: not a .jsonl, .json or .parquet file, nor a datasets-hub name with :split; give one of these"
    )


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            if path.name.removesuffix(".gz").endswith(".json"):
                content = file.read().removeprefix(_BOM)
                if content.lstrip().startswith(b"["):
                    yield from _array(content, path)
                    return
                yield from json_lines(content.split(b"\n"), path)
            else:
                yield from json_lines(file, path)
    except gzip.BadGzipFile:
        raise InputError(f"{path}: not gzip; give the file as it was compressed") from None
    except (EOFError, zlib.error):
        raise InputError(f"{path}: damaged gzip; fetch it again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror}); give an existing file") from None


def json_lines(lines: Iterable[bytes], path: str | Path) -> Iterator[Row]:
    """The objects of JSON lines; blank lines and the byte-order mark of Windows's editors are skipped.

    Raises:
        InputError: a line that is not UTF-8 or not an object.
    """
    stem = stem_of(path)
    for number, line in enumerate(lines, start=1):
        where = f"{path} line {number}"
        if number == 1:
            line = line.removeprefix(_BOM)
        try:
            text = line.decode()
        except UnicodeDecodeError:
            raise InputError(f"{where}: not UTF-8 text; give JSON lines") from None
        if text.strip():
            yield Row(where, f"{stem}-{number}", json_object(text, where))


def json_object(line: str, where: str) -> dict[str, Any]:
    """The object of a line of JSON lines.

    Raises:
        InputError: not JSON, or not an object, or with half a character, naming ``where``.
    """
    return _object(_parsed(json.loads, line, where, "write one object per line"), line, where)


def _array(content: bytes, path: Path) -> Iterator[Row]:
    """The objects of a JSON array, one at a time."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; give JSON") from None
    stem, number, at = stem_of(path), 0, _after_space(text, text.index("[") + 1)
    if text[at : at + 1] == "]":
        return
    while True:
        number += 1
        where = f"{path} entry {number}"
        value, end = _parsed(partial(_DECODER.raw_decode, idx=at), text, where, "write an array of objects")
        yield Row(where, f"{stem}-{number}", _object(value, text[at:end], where))
        at = _after_space(text, end)
        if text[at : at + 1] != ",":
            break
        at = _after_space(text, at + 1)
    if text[at:].strip() != "]":
        raise InputError(f"{where}: not followed by a comma or the end of the array; write an array of objects")


def _after_space(text: str, at: int) -> int:
    return WHITESPACE.match(text, at).end()


def _parsed(parse: Callable[[str], Any], text: str, where: str, remedy: str) -> Any:
    try:
        return parse(text)
    except json.JSONDecodeError as error:
        reason = error.msg
    except RecursionError:
        reason = "brackets nested too deeply"
    except ValueError:  # the error of int()
        reason = "a number of too many digits"
    raise InputError(f"{where}: not JSON ({reason}); {remedy}")


def _object(value: Any, text: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: {kind_of(value)}, not a JSON object; write one object per line")
    if _HALF_PAIR.search(text):  # perhaps half of it is missing
        written = _parsed(lambda _: json.dumps(value, ensure_ascii=False), text, where, "correct it")
        if not encodable(written):
            raise InputError(f"{where}: a text with half a character (a lone surrogate); correct it")
    return value


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number, stem = 0, stem_of(path)
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield Row(f"{path} row {number}", f"{stem}-{number}", row)
    except OSError as error:
        reason = " ".join((error.strerror or str(error)).split())
        raise InputError(f"{path}: cannot read it ({reason}); give an existing file") from None
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not parquet ({' '.join(str(error).split())}); give another file") from None
    except (ValueError, OverflowError) as error:  # half a character, a date that Python does not have
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: a value after row {number} cannot be read ({reason}); correct it") from None


def _hub_rows(source: str, name: Sequence[str], split: str) -> Iterator[Row]:
    """Rows of a split of the data set ``name`` (or ``name:configuration``)."""
    import datasets

    try:
        rows = datasets.load_dataset(*name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{source}: cannot load it ({reason}); give an existing name and split, or a file") from None
    for number, row in enumerate(rows, start=1):
        yield Row(f"{source} row {number}", f"{Path(source).stem}-{number}", row)
