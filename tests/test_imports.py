"""Imports go one way (pyproject.toml has the contracts), and the update runs without the trainer's dependencies."""

import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]
LIGHT = [
    "igpo_fast.model", "igpo_fast.update.learner", "igpo_fast.update.policy", "igpo_fast.update.packs",
    "igpo_fast.update.advantages", "igpo_fast.update.rewards", "igpo_fast.update.losses",
]  # fmt: skip


def test_imports_go_one_way(capsys):
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), cache_dir=None) == 0, capsys.readouterr().out


@pytest.mark.parametrize("modules", [LIGHT, ["igpo_kernels"]], ids=["igpo_fast", "igpo_kernels"])
def test_what_a_bare_gpu_image_can_import(modules):
    """With the trainer's other dependencies made unimportable, in a process of their own."""
    missing = ["pydantic", "bm25s", "datasets", "typer", "tensorboard", "orjson"]
    if modules == ["igpo_kernels"]:
        missing += ["transformers", "tokenizers", "rich", "httpx", "yaml"]
    code = f"import sys\nfor name in {missing}: sys.modules[name] = None\n" + "".join(f"import {m}\n" for m in modules)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
