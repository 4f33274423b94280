"""A hook of mkdocs, for pages that are read in the repository, too: the same links and lists are right in both places.

``../bench/results/study.jsonl`` is right where docs/study.md is read as a file. In the site the file it names stands
under ``source/``, and the link is rewritten. A Markdown file becomes a page, whose own links are treated alike.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()[^)\s#]+")
FENCED = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)
LIST = re.compile(r"^(?!(?:-|\d+\.) |[|#])(.+)\n(?=(?:-|\d+\.) )", re.MULTILINE)
"""A line of prose that an item of a list follows at once, which Python's Markdown may read on as prose."""
INDENTED = re.compile(r"^ {2}(?=\S)", re.MULTILINE)
"""What goes on in an item of a list, for which Python's Markdown wants four spaces."""


def place(path: Path) -> str:
    """Where a file of the repository stands among the site's sources."""
    inside = path.is_relative_to(DOCS)
    return path.relative_to(DOCS).as_posix() if inside else f"source/{path.relative_to(ROOT).as_posix()}"


def target(page: Path, link: str) -> Path | None:
    """The file of the repository that a page links to; None if it is none."""
    path = (page.parent / link).resolve()
    return path if path.is_relative_to(ROOT) and path.is_file() else None


def targets(page: Path) -> Iterator[Path]:
    """The files that a page links to."""
    found = (target(page, link) for link in LINK.findall(page.read_text(encoding="utf-8")))
    return (path for path in found if path)


def relinked(page: Path, text: str) -> str:
    """The text of a page with its links as they are in the site."""

    def link(found: re.Match) -> str:
        path = target(page, found[0])
        return posixpath.relpath(place(path), posixpath.dirname(place(page))) if path else found[0]

    return LINK.sub(link, text)


def with_lists(text: str) -> str:
    """The text of a page with lists as Python's Markdown reads them; code stays as it is."""
    parts = FENCED.split(text)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            parts[i] = INDENTED.sub("    ", LIST.sub(r"\1\n\n", part))
        elif part.startswith("  ```"):
            parts[i] = re.sub(r"^(?=.)", "  ", part, flags=re.MULTILINE)
    return "".join(parts)


def on_files(files, config):
    from mkdocs.structure.files import File

    todo = [Path(file.abs_src_path) for file in files.documentation_pages()]
    while todo:
        for path in targets(todo.pop()):
            if files.get_file_from_path(place(path)) is None:
                files.append(File.generated(config, place(path), abs_src_path=str(path)))
                todo += [path] * (path.suffix == ".md")
    return files


def on_page_markdown(markdown, page, config, files):
    return with_lists(relinked(Path(page.file.abs_src_path), markdown))
