"""Imports go one way, so that a machine without the trainer's dependencies can build batches and time updates."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIGHT = ("model", "scoring", "rewards", "advantages", "losses", "types", "errors")
ORDER = [
    {"types", "errors", "config", "config_types", "yaml12", "crash", "interrupt", "files"},
    {"world", "data", "dialect", "rewards", "advantages", "losses", "tokenizer"},
    {"engines", "tools", "rollout", "model", "scoring", "checkpoint", "metrics", "display", "memory"},
    {"evaluate", "packs", "passes", "sft", "parts", "distributed"},
    {"train", "score", "doctor", "summary"},
    {"cli"},
]


def imported(path: Path) -> set[str]:
    """Modules of igpo_fast that a file imports when run (not those for type checkers only)."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "igpo_fast":
            parts = node.module.split(".")[1:]
            names |= {parts[0]} if parts else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("igpo_fast.")}
    return names - {"__version__"}


def level(module: str) -> int:
    return next(i for i, modules in enumerate(ORDER) if module in modules)


@pytest.mark.parametrize("path", sorted((ROOT / "igpo_fast").rglob("*.py")), ids=lambda p: p.stem)
def test_imports_go_one_way(path):
    module = path.relative_to(ROOT / "igpo_fast").parts[0].removesuffix(".py")
    if module in {"__init__", "__main__", "config_docs"}:
        return
    # tools knows passages as data does: base.py's contracts stand below everything that uses them.
    late = {m for m in imported(path) if level(m) > level(module)} - (
        {"tools"} if module in {"data", "world", "dialect"} else set()
    )
    assert not late, f"{module} imports {late}, which come after it"


def test_kernels_import_nothing_of_the_trainer():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not imported(path), path


@pytest.mark.parametrize(
    "modules", [[f"igpo_fast.{m}" for m in LIGHT], ["igpo_kernels"]], ids=["igpo_fast", "igpo_kernels"]
)
def test_what_a_bare_gpu_image_can_import(modules):
    """With the trainer's other dependencies made unimportable, in a process of their own."""
    missing = ["pydantic", "bm25s", "datasets", "typer", "tensorboard"]
    if modules == ["igpo_kernels"]:
        missing += ["transformers", "tokenizers", "rich", "httpx", "yaml"]
    code = f"import sys\nfor name in {missing}: sys.modules[name] = None\n" + "".join(f"import {m}\n" for m in modules)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
