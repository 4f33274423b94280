"""Which architectures may run packed: shown by the probe on random weights, and refused by the layer's name."""

import json
import shutil
import time
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhimoeConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3NextConfig,
    StableLmConfig,
)

from igpo_fast import model
from igpo_fast.errors import InputError
from igpo_fast.pretrained import read_config
from igpo_kernels import Branch, RolloutTokens, Tree, huggingface, pack

SIZES = dict(
    vocab_size=97, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=96, max_position_embeddings=256, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
ROPE = {"rope_theta": 10000.0}


def make(config_class, **more):
    torch.manual_seed(0)
    config = config_class(**{**SIZES, **more})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


MOE = dict(
    num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
)  # fmt: skip
WINDOWED = dict(use_sliding_window=True, sliding_window=40)
LLAMA4 = dict(MOE, head_dim=16, intermediate_size_mlp=96, interleave_moe_layer_step=1)
GEMMA3 = dict(
    text_config=dict(SIZES, head_dim=16, sliding_window=40), image_token_index=90, boi_token_index=91,
    eoi_token_index=92, mm_tokens_per_image=4,
    vision_config=dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
    ),
)  # fmt: skip
OPT = dict(ffn_dim=96, word_embed_proj_dim=64)
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
    "qwen2-window-longer-than-the-paths": (Qwen2Config, dict(WINDOWED, max_window_layers=2)),
    "qwen2-window-of-no-layer": (Qwen2Config, dict(WINDOWED, max_window_layers=4)),
    "qwen2-moe": (Qwen2MoeConfig, MOE),
    "gemma3-multimodal": (Gemma3Config, GEMMA3),
    "gemma4-heads-of-two-sizes": (
        Gemma4TextConfig,
        {"num_hidden_layers": 6, "head_dim": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 0,
         "sliding_window": 40},
    ),
    "opt": (OPTConfig, OPT),
    "gpt2": (GPT2Config, {}),
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
    "cohere": (CohereConfig, {}, "LM head Linear does more"),
    "window-in-the-mask": (
        Qwen2MoeConfig,
        dict(MOE, **WINDOWED, max_window_layers=4),
        "sliding_window=40, but Qwen2MoeAttention does not hand",
    ),
    "window-in-the-mask-2": (
        PhimoeConfig,
        dict(MOE, sliding_window=40),
        "sliding_window=40, but PhimoeAttention does not hand",
    ),
    "chunks": (
        Llama4TextConfig,
        dict(LLAMA4, attention_chunk_size=40, attn_temperature_tuning=False),
        "attention_chunk_size=40, but Llama4TextAttention does not hand",
    ),
    "temperature-by-index": (
        Llama4TextConfig,
        dict(LLAMA4, layer_types=["full_attention"] * 4, no_rope_layers=[0] * 4, floor_scale=60),
        "attn_temperature_tuning=True, but Llama4TextAttention does not hand",
    ),
    "keys-and-values-of-two-sizes": (
        DeepseekV3Config,
        dict(
            q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, n_group=1,
            n_routed_experts=4, topk_group=1, moe_intermediate_size=16, num_key_value_heads=4, first_k_dense_replace=4,
        ),
        "DeepseekV3ForCausalLM cannot run packed: .* keys of 24 and values of 16 numbers",
    ),
    "no-plan": (StableLmConfig, {}, "StableLmForCausalLM cannot run packed: .*got no plan; .*use another model"),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name):
    config_class, more = ACCEPTED[name]
    lm = model.probe(make(config_class, **more))
    assert lm.config._attn_implementation == model.ATTENTION
    assert model.kernels_of(lm, "auto")["tree_attention"] == "torch"


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_the_name_of_the_layer(name):
    config_class, more, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as error:
        model.probe(make(config_class, **more))
    assert "\n" not in str(error.value)


def test_what_packed_attention_refuses_is_one_line_without_the_probe_too():
    ids = torch.arange(5)
    attend = huggingface.TreeAttend(pack([Tree([RolloutTokens(0, np.arange(6), np.arange(6) // 5 - 1)])]))
    lm = model.use_attend(make(Qwen2MoeConfig, **MOE, **WINDOWED, max_window_layers=4))
    with pytest.raises(InputError, match=r"^Qwen2MoeForCausalLM cannot run packed: .*sliding_window=40") as error:
        model.hidden_states(lm, ids, ids, attend)
    assert "\n" not in str(error.value)
    lm = model.use_attend(make(LlamaConfig))
    lm.model.forward = partial(lm.model.forward, block_table=3)
    with pytest.raises(InputError, match=r"^LlamaForCausalLM cannot run packed: .*LlamaAttention got block_table"):
        model.hidden_states(lm, ids, ids, attend)


@pytest.mark.parametrize("window", [7, 40, 1000])
def test_the_probe_sees_a_window_that_is_measured_in_packed_indices(monkeypatch, window):
    """Also one that is longer than the whole pack."""
    lm = make(MistralConfig, sliding_window=window)
    original = huggingface.dispatch.tree_attention

    def by_packed_index(q, k, v, plan, scale, softcap, window, backend, **rows):
        from dataclasses import replace

        wrong = replace(plan, position_ids=np.arange(plan.n_tokens))
        return original(q, k, v, wrong, scale, softcap, window, backend, **rows)

    monkeypatch.setattr(huggingface.dispatch, "tree_attention", by_packed_index)
    with pytest.raises(InputError, match=r"MistralAttention .*gives hidden states that differ"):
        model.probe(lm)


@pytest.mark.parametrize("raised", [AttributeError("no such"), IndexError(), RuntimeError("a\nb"), KeyError("x")])
def test_what_the_models_code_raises_is_one_line(monkeypatch, raised):
    def forward(*args, **more):
        raise raised

    lm = make(LlamaConfig)
    monkeypatch.setattr(lm.model, "forward", forward)
    with pytest.raises(InputError, match=f"LlamaForCausalLM .*{type(raised).__name__} in the probe") as error:
        model.probe(lm)
    assert "\n" not in str(error.value)


def test_the_probe_leaves_the_model_as_it_was():
    lm = make(Gemma2Config, head_dim=16, sliding_window=40)
    weights = {name: p.clone() for name, p in lm.named_parameters()}
    scaling = [m.scaling for m in lm.modules() if hasattr(m, "scaling")]
    model.probe(lm)
    assert scaling == [m.scaling for m in lm.modules() if hasattr(m, "scaling")]
    assert lm.config.sliding_window == 40
    assert [layer.self_attn.sliding_window for layer in lm.model.layers] == [40, None, 40, None]
    for name, p in lm.named_parameters():
        assert torch.equal(p, weights[name]) and p.grad is None


def gradients(lm, attend, rows=slice(None)):
    """Hidden states, and the gradients of the sum of squares of those of ``rows``."""
    plan, lm = attend.plan, lm.requires_grad_(True)
    lm.zero_grad()
    hidden = model.hidden_states(lm, plan.tensor("input_ids"), plan.tensor("position_ids"), attend)
    hidden[rows].square().sum().backward()
    return [hidden.detach(), *(p.grad.clone() for p in model._decoder(lm).parameters())]


class Noted(huggingface.TreeAttend):
    """Notes which layers attend."""

    def __call__(self, layer, *qkv, **options):
        calls.append(layer)
        return super().__call__(layer, *qkv, **options)


calls: list[int] = []


@pytest.mark.parametrize(("config_class", "alone"), [(LlamaConfig, True), (GPT2Config, False)])
def test_hidden_states_of_the_rows_that_are_read(config_class, alone):
    """Of a last layer that gives them alone, recomputed too, and of one that is whole."""
    ids = np.arange(40) % 31
    rollout = RolloutTokens(0, ids, np.where(ids == 7, 0, -1), np.array([12, 30]))
    plan = pack([Tree([rollout], [Branch(np.arange(5), 3, 5)])])
    lm, rows, fed = model.use_attend(make(config_class)), plan.tensor("rows_read"), []
    layers = next(m for m in lm.modules() if isinstance(m, torch.nn.ModuleList))
    expected, *grads = gradients(lm, huggingface.TreeAttend(plan), rows)
    layers[-1].mlp.register_forward_pre_hook(lambda module, args: fed.append(args[0].shape[1]))
    for times in (1, 2):
        found = gradients(lm, huggingface.TreeAttend(plan, rows_read=True))
        torch.testing.assert_close(found, [expected[rows], *grads], rtol=1e-5, atol=1e-4)  # of gradients up to 60
        assert fed == [len(rows) if alone else plan.n_tokens] * times
        fed.clear()
        model.recompute_layers(lm)


@pytest.mark.parametrize(
    ("config_class", "more"),
    [(LlamaConfig, {}), (OPTConfig, dict(OPT, dropout=0.5)), (GPT2Config, {})],
)
def test_recomputed_layers_run_twice_and_drop_nothing_out(config_class, more):
    lm = model.use_attend(make(config_class, **more))
    attend = Noted(pack([Tree([RolloutTokens(0, np.arange(9), np.where(np.arange(9) > 0, 0, -1))])]))
    calls.clear()
    kept = gradients(lm, attend)
    assert calls == [0, 1, 2, 3]
    model.recompute_layers(lm)
    calls.clear()
    for ours, expected in zip(gradients(lm, attend), kept, strict=True):
        assert torch.equal(ours, expected)
    assert calls == [0, 1, 2, 3, 3, 2, 1, 0]
    assert not any(m.training for m in lm.modules())
    model.probe(lm)
    with torch.no_grad():
        calls.clear()
        model.hidden_states(lm, *(attend.plan.tensor(n) for n in ("input_ids", "position_ids")), attend)
    assert calls == [0, 1, 2, 3]


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


@pytest.mark.parametrize(("hidden_size", "heads", "kv_heads"), [(6, 2, 1), (2, 2, 2), (10, 4, 4), (16, 4, 3)])
def test_heads_of_no_size_are_one_line(hidden_size, heads, kv_heads):
    sizes = dict(layers=1, ffn_size=8, max_tokens=32, tie_embeddings=True, seed=0)
    with pytest.raises(InputError, match=f"model.hidden_size={hidden_size}, model.heads={heads}.* even"):
        model.build(20, hidden_size=hidden_size, heads=heads, kv_heads=kv_heads, **sizes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny Qwen2 whose embeddings are tied."""
    folder = tmp_path_factory.mktemp("model") / "saved"
    lm = model.build(
        20, hidden_size=16, layers=2, heads=2, kv_heads=1, ffn_size=24, max_tokens=64, tie_embeddings=True, seed=0
    )
    lm.save_pretrained(folder)
    return folder


@pytest.fixture
def edited(saved, tmp_path):
    """A copy of ``saved`` after an edit of its tensors, or with other contents in its files."""

    def edit(tensors=None, **files):
        folder = shutil.copytree(saved, tmp_path / "edited")
        if tensors:
            changed = tensors(load_file(folder / "model.safetensors"))
            save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        for name, content in files.items():
            (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return str(folder)

    return edit


Q, EMBEDDING = "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"
without = lambda tensors, *names: {name: t for name, t in tensors.items() if name not in names}  # noqa: E731
TENSORS = {
    "one missing": (lambda t: without(t, Q), rf"1 missing \({Q}\)"),
    "tied ones missing": (lambda t: without(t, EMBEDDING), rf"2 missing \(lm_head.weight, {EMBEDDING}\)"),
    "renamed": (lambda t: {**without(t, Q), "other": t[Q]}, rf"1 missing \({Q}\); 1 unknown to the model \(other\)"),
    "a layer too many": (lambda t: {**t, Q.replace("1", "2"): t[Q].clone()}, "1 unknown to the model"),
    "of another shape": (lambda t: {**t, Q: t[Q][:3].contiguous()}, rf"1 of another shape \({Q}\)"),
    "NaN": (lambda t: {**t, Q: t[Q] * torch.nan}, rf"1 not finite \({Q}\)"),
    "one infinity": (
        lambda t: {**t, EMBEDDING: t[EMBEDDING].index_fill(0, torch.tensor([3]), torch.inf)},
        "not finite",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("check", [True, False])
def test_tensors_that_are_not_the_models_are_named(edited, name, check):
    edit, message = TENSORS[name]
    with pytest.raises(InputError, match=message) as error:
        model.load(edited(edit), check=check)
    assert "\n" not in str(error.value)


def test_a_head_that_is_saved_beside_the_embedding_it_is_tied_to_loads(edited):
    lm = model.load(edited(lambda t: {**t, "lm_head.weight": t[EMBEDDING].clone()}))
    assert lm.lm_head.weight is lm.model.embed_tokens.weight


GENERATION = [
    ({"temperature": 0.7, "top_p": 0.9, "top_k": 20, "eos_token_id": [3, 4]}, {"eos_token_id": [3, 4]}),
    ({"early_stopping": True, "length_penalty": 2.0, "pad_token_id": -1, "bos_token_id": 1}, {"bos_token_id": 1}),
    ({"output_scores": True, "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ({"do_sample": True, "temperature": 0.7}, {"do_sample": True, "temperature": 0.7}),
    ("not json", {}),
]


@pytest.mark.parametrize(("generation", "kept"), GENERATION)
def test_a_model_that_loads_can_be_saved(edited, tmp_path, generation, kept):
    lm = model.load(edited(generation_config=generation), check=False)
    lm.save_pretrained(tmp_path / "again")
    found = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    names = {"temperature", "top_p", "top_k", "length_penalty", "early_stopping", "output_scores", *kept}
    assert {name: value for name, value in found.items() if name in names and value} == kept
    model.load(str(tmp_path / "again"), check=False)


@pytest.mark.parametrize(
    "config",
    ["{", "[]", {"model_type": "qwen2", "num_attention_heads": "x"}, {"model_type": "qwen2", "num_attention_heads": 0},
     {"model_type": "qwen2", "hidden_act": "none"}, {"model_type": "qwen2", "rope_parameters": 3}],
)  # fmt: skip
def test_a_damaged_configuration_is_one_line(edited, config):
    folder = edited(config=config)
    with pytest.raises(InputError, match=r"model\.path=.*no causal LM loads") as error:
        model.load(folder)
    assert "\n" not in str(error.value)


def test_code_of_a_model_folder_is_neither_run_nor_asked_about(edited, monkeypatch, tmp_path):
    automap = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    folder = edited(config={"model_type": "evil", "auto_map": automap})
    (tmp_path / "edited" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    began = time.process_time()
    for read in (model.load, read_config):
        with pytest.raises(InputError, match="auto_map, which is never run"):
            read(folder)
    assert not (tmp_path / "ran").exists() and time.process_time() - began < 10


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert model.device_of("auto") == model.device_of("cpu") == "cpu"
    for name in ("cuda", "cuda:0", "gpu", "mps", "meta", "", "cpu:1", "cuda:-1"):
        with pytest.raises(
            InputError, match=f"^model.device={name}: no such device here; use model.device=auto or one of cpu$"
        ):
            model.device_of(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [model.device_of(name) for name in ("auto", "cpu", "cuda:1")] == ["cuda", "cpu", "cuda:1"]
    with pytest.raises(InputError, match=r"one of cpu, cuda, cuda:0, cuda:1$"):
        model.device_of("cuda:2")


def test_positions_learned_and_by_rope():
    learned, rope = make(GPT2Config, max_position_embeddings=64), make(LlamaConfig)
    assert model.check_positions(learned, 60, 4) is None
    with pytest.raises(InputError, match=r"rollout\.max_tokens=60: GPT2LMHeadModel has 64 positions.* use at most 59"):
        model.check_positions(learned, 60, 5)
    assert model.check_positions(rope, 256, 99) is None
    assert "LlamaForCausalLM has 256 positions" in model.check_positions(rope, 257)


def test_no_model_there_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"model\.path=.*no causal LM loads") as error:
        model.load(str(tmp_path))
    assert "\n" not in str(error.value)
