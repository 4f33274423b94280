"""Traps that no single op's test covers: sources and launches are held to what README.md's table says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import igpo_kernels
from tests.kernels.triton.test_inspect import compiled

pytest.importorskip("triton")

from igpo_kernels.linear_policy_loss.triton_kernels import row_loss_kernel

SOURCES = sorted(Path(igpo_kernels.__file__).parent.glob("**/triton_*.py"))
ROWS = "n_rows n_tokens n_cells groups_per_pool splits first first_row columns heads kv_heads group window"
"""What changes from step to step, or from one model's layer to the next, by argument name; ``n`` is policy_loss's."""
BARRED = (
    (r"program_id\((?:axis=)?[12]\)", "grid.y and grid.z end at 65,535"),
    (r"autotune", "no autotuning inside a step: tables"),
    (r"warp_specialize", "ignored in silence with 8 warps on sm_90"),
    (r"set_allocator|make_tensor_descriptor", "allocator hooks are lost in worker threads: host descriptors only"),
)

LIST = """
import json
from igpo_kernels.inspect import shipped
print(json.dumps([[v.kernel, list(v.constexprs), [p.name for p in v.fn.params],
                   [p.name for p in v.fn.params if p.do_not_specialize]] for v in shipped()]))
"""


def test_every_test_that_the_table_names_exists():
    folder = Path(__file__).parent
    sources = "".join(path.read_text() for path in folder.parent.rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)", (folder / "README.md").read_text())
    assert len(named) > 20 and [name for name in named if f"def {name}" not in sources] == []


def test_a_length_is_no_constexpr_and_never_specialised():
    run = compiled("-c", LIST)
    assert run.returncode == 0, run.stderr
    lengths = {"n", *ROWS.split()}
    for kernel, constexprs, names, free in json.loads(run.stdout.splitlines()[-1]):
        assert not lengths & set(constexprs), kernel
        assert lengths & set(names) <= set(free), kernel


def test_barred_constructs():
    assert len(SOURCES) >= 10
    found = [
        f"{path.parent.name}/{path.name}: {why}"
        for path in SOURCES for barred, why in BARRED if re.search(barred, path.read_text())
    ]  # fmt: skip
    assert found == []


def test_offsets_past_2_to_the_31_elements(device):
    # Three rows of logits 2^30 elements apart, of which only the first 32 columns are ever touched.
    stride, vocab, n = 1 << 30, 20, 3
    logits = torch.empty(2 * stride + 32, device=device)
    rows = torch.as_strided(logits, (n, vocab), (stride, 1))
    rows.copy_(torch.arange(n * vocab, device=device).view(n, vocab).sin())
    expected = rows.log_softmax(1)
    offsets, ones = torch.arange(n + 1, device=device), torch.ones(n, device=device)
    ids = offsets[:n]
    logp, slope, partials = (torch.empty(*shape, device=device) for shape in ((n,), (n,), (9, n)))
    row_loss_kernel[(n,)](
        logits, logits, None, ids, ids, offsets, None, ones, ones, None, None, None, None, logp, slope, partials,
        0, n, vocab, stride, stride, 1.0, 0.0, 0.8, 1.2, None, 0.0, 0.0, CAPPED=False, BLOCK=32, PAIRS=16,
    )  # fmt: skip
    torch.testing.assert_close(logp, expected[ids, ids])
    torch.testing.assert_close(rows, expected.exp() - torch.eye(n, vocab, device=device))


def test_triton_is_imported_only_by_an_op_that_runs_on_it():
    code = "import sys; sys.modules['triton'] = None; import igpo_kernels"
    subprocess.run([sys.executable, "-c", code], check=True)
