"""Which architectures may run packed: shown by the probe on random weights, and refused by the layer's name."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

from igpo_fast import model
from igpo_fast.errors import InputError
from igpo_kernels import RolloutTokens, Tree, huggingface, pack

SIZES = dict(
    vocab_size=97, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=96, max_position_embeddings=256, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
ROPE = {"rope_theta": 10000.0}


def make(config_class, **more):
    torch.manual_seed(0)
    config = config_class(**{**SIZES, **more})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


ACCEPTED = {
    "llama": (LlamaConfig, {}),
    "llama3-rope": (
        LlamaConfig,
        {"rope_parameters": {
            **ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }},
    ),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "mistral-window": (MistralConfig, {"sliding_window": 7}),
    "gemma2-softcap-windows": (Gemma2Config, {"head_dim": 16, "sliding_window": 7}),
    "gemma3-windows": (Gemma3TextConfig, {"head_dim": 16, "sliding_window": 7}),
}  # fmt: skip
REFUSED = {
    "qwen3-next": (
        Qwen3NextConfig,
        {
            "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        },
        "Qwen3NextGatedDeltaNet does not attend",
    ),
    "gpt-oss": (
        GptOssConfig,
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7},
        "GptOssAttention .*differ by",
    ),
    "bloom": (BloomConfig, {"n_layer": 2, "n_head": 4}, "BloomAttention does not go through"),
    "dynamic-ntk": (
        LlamaConfig,
        {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}},
        "LlamaAttention with dynamic RoPE .*differ by",
    ),
    "granite": (GraniteConfig, {"logits_scaling": 4.0}, "LM head Linear does more"),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name):
    config_class, more = ACCEPTED[name]
    lm = model.probe(make(config_class, **more))
    assert lm.config._attn_implementation == model.ATTENTION


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_the_name_of_the_layer(name):
    config_class, more, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as error:
        model.probe(make(config_class, **more))
    assert "\n" not in str(error.value)


def test_the_probe_sees_a_window_that_is_measured_in_packed_indices(monkeypatch):
    lm = make(MistralConfig, sliding_window=7)
    original = huggingface.dispatch.tree_attention

    def by_packed_index(q, k, v, plan, scale, softcap, window, backend):
        from dataclasses import replace

        wrong = replace(plan, position_ids=np.arange(plan.n_tokens))
        return original(q, k, v, wrong, scale, softcap, window, backend)

    monkeypatch.setattr(huggingface.dispatch, "tree_attention", by_packed_index)
    with pytest.raises(InputError, match="MistralAttention gives hidden states that differ"):
        model.probe(lm)


def test_the_probe_leaves_the_model_as_it_was():
    lm = make(Gemma2Config, head_dim=16, sliding_window=7)
    weights = {name: p.clone() for name, p in lm.named_parameters()}
    scaling = [m.scaling for m in lm.modules() if hasattr(m, "scaling")]
    model.probe(lm)
    assert scaling == [m.scaling for m in lm.modules() if hasattr(m, "scaling")]
    for name, p in lm.named_parameters():
        assert torch.equal(p, weights[name]) and p.grad is None


def test_recomputed_layers_run_twice_and_drop_nothing_out():
    lm = model.use_attend(make(LlamaConfig))
    calls, plan = [], pack([Tree([RolloutTokens(0, np.arange(9), np.where(np.arange(9) > 0, 0, -1))])])

    def attend(layer, *qkv, **options):
        calls.append(layer)
        return huggingface.TreeAttend(plan)(layer, *qkv, **options)

    def gradients():
        lm.zero_grad()
        model.hidden_states(lm, plan.tensor("input_ids"), plan.tensor("position_ids"), attend).square().sum().backward()
        return [p.grad for p in lm.model.parameters()]

    kept = gradients()
    assert calls == [0, 1, 2, 3]
    model.recompute_layers(lm)
    calls.clear()
    torch.testing.assert_close(gradients(), kept)
    assert calls == [0, 1, 2, 3, 3, 2, 1, 0]
    assert not any(m.training for layer in lm.model.layers for m in layer.modules() if m is not layer)


def test_a_model_that_was_not_prepared_is_refused():
    ids = torch.arange(3)
    with pytest.raises(ValueError, match="use_attend"):
        model.hidden_states(make(Qwen2Config), ids, ids, None)


def test_build_depends_on_its_seed_alone():
    sizes = dict(hidden_size=16, layers=1, heads=2, kv_heads=1, ffn_size=24, max_tokens=32, tie_embeddings=True)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = model.build(20, seed=3, **sizes)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second, other = model.build(20, seed=3, **sizes), model.build(20, seed=4, **sizes)
    one, two, three = (m.model.embed_tokens.weight for m in (first, second, other))
    assert torch.equal(one, two) and not torch.equal(one, three)


def test_no_model_there_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"model\.path=.*no causal LM loads") as error:
        model.load(str(tmp_path))
    assert "\n" not in str(error.value)
