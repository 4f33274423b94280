"""liger.py under Triton's interpreter: the same hidden states and gradients, on the instance; refusals in one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from igpo_fast import liger
from igpo_fast.errors import InputError
from igpo_fast.model import build, hidden_states
from igpo_fast.update.policy import make_trees
from igpo_kernels import pack, triton_variants
from igpo_kernels.huggingface import TreeAttend
from tests.trees import VOCAB, random_branches, random_group

monkey_patch = pytest.importorskip("liger_kernel.transformers.monkey_patch")
interpreted = pytest.mark.skipif(not triton_variants.runs_on_cpu(), reason="needs Triton's interpreter")


def tiny():
    lm = build(
        VOCAB, hidden_size=32, layers=1, heads=4, kv_heads=2, ffn_size=48, max_tokens=256, tie_embeddings=True, seed=1
    )
    with torch.no_grad():
        for weight in lm.parameters():
            weight *= 3
    return lm


@triton.jit
def rsqrt(x):
    return tl.rsqrt(x)


@pytest.fixture
def on_cpu(monkeypatch):
    """Liger's kernels under the interpreter, and Qwen2's own RoPE again afterwards."""
    from liger_kernel.ops import rms_norm
    from transformers.models.qwen2 import modeling_qwen2
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def converted(argument):
        """Floats as compiled kernels have them; the interpreter hands them on as they are."""
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return convert(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(rms_norm, "rsqrt", rsqrt)  # the interpreter has no libdevice
    monkeypatch.setattr(modeling_qwen2, "apply_rotary_pos_emb", modeling_qwen2.apply_rotary_pos_emb)


def read(lm, plan):
    hidden = hidden_states(lm, plan.tensor("input_ids"), plan.tensor("position_ids"), TreeAttend(plan))
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    (hidden * direction).sum().backward()
    return hidden.detach(), {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}


@interpreted
def test_hidden_states_and_gradients_of_a_pack_stay(on_cpu):
    rng = np.random.default_rng(3)
    plan = pack(make_trees([random_group(rng, rollouts=2)], [random_branches(rng, 1)], [range(2)]))
    expected, gradients = read(tiny(), plan)
    lm = liger.use_liger(tiny(), "on")
    assert liger.has_liger(lm)
    found, ours = read(lm, plan)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
    assert lm.forward.__module__.startswith("transformers")  # its loss stays out
    assert not liger.has_liger(tiny())


@interpreted
def test_a_change_of_what_the_model_computes_is_refused(on_cpu, monkeypatch):
    kind = monkey_patch.LigerSwiGLUMLP
    monkeypatch.setattr(kind, "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    with pytest.raises(
        InputError, match=r"model.liger=on: the hidden states of Qwen2ForCausalLM change by .*; use model.liger=off"
    ):
        liger.use_liger(tiny(), "on")


def test_refusals_and_choices(monkeypatch):
    lm = tiny()
    assert not liger.has_liger(liger.use_liger(lm, "auto"))  # on a CPU
    lm.config.model_type = "strange"
    monkeypatch.setattr(triton_variants, "runs_on_cpu", lambda: True)
    with pytest.raises(InputError, match="no kernels for models of type strange"):
        liger.use_liger(lm, "on")
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="liger-kernel is not installed"):
        liger.use_liger(lm, "on")
    monkeypatch.setattr(triton_variants, "runs_on_cpu", lambda: False)
    with pytest.raises(InputError, match="needs a GPU"):
        liger.use_liger(lm, "on")
    assert liger.use_liger(lm, "off") is lm
