"""``logprobs`` against transformers' own logits; what ``use_tree_attention`` and the attention function refuse."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from igpo_kernels import pack
from igpo_kernels.huggingface import head_of, heads_of, logprobs, model_inputs, use_tree_attention
from igpo_kernels.huggingface.dispatch import attention
from tests.kernels.test_huggingface import SIZES, trees

EXPERTS = dict(num_experts=2, num_local_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)
MLA = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8)
FEW = dict(vocab_size=53, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)


def make(family, *, seed=0, **config):
    """A model whose norms, biases and logits are of a trained one's size."""
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config)).eval()
    with torch.no_grad():
        for p in lm.parameters():
            if p.ndim == 1:
                p += 0.3 * torch.randn_like(p)
        head = lm.get_output_embeddings().weight
        head *= 2 / head.std()
    return lm


READ = {
    "llama": dict(SIZES),
    "gemma2": dict(SIZES, head_dim=16, final_logit_softcapping=30.0),
    "gemma3_text": dict(SIZES, head_dim=16, final_logit_softcapping=20.0),
    "granite": dict(SIZES, logits_scaling=4.0),
    "cohere2": dict(SIZES, logit_scale=0.25),
    "phi": dict(SIZES),
    "minicpm3": dict(SIZES, **MLA, v_head_dim=16, dim_model_base=8),
}


@pytest.mark.parametrize("temperature", [1.0, torch.tensor(0.7)])
@pytest.mark.parametrize("family", READ)
def test_logprobs_are_those_of_the_models_own_logits(family, temperature):
    lm, plan = use_tree_attention(make(family, **READ[family])), pack(trees())
    inputs = model_inputs(plan)
    logits = lm(**inputs).logits[0, plan.tensor("row")]
    assert float(logits.detach().abs().max()) > 5
    log_p = (logits / temperature).log_softmax(-1)
    expected = log_p.gather(1, plan.tensor("label")[:, None])[:, 0]
    hidden = lm.base_model(**inputs).last_hidden_state
    logp, entropy = logprobs(lm, hidden, plan, temperature, entropy=True)
    of_rows = logprobs(lm, hidden[:, plan.tensor("rows_read")], plan, temperature, rows_read=True)
    torch.testing.assert_close(of_rows, logp, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logp, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1), atol=2e-5, rtol=1e-5)
    weight = lm.get_output_embeddings().weight
    torch.testing.assert_close(
        torch.autograd.grad(logp.sum(), weight, retain_graph=True)[0], torch.autograd.grad(expected.sum(), weight)[0],
        atol=1e-3, rtol=1e-3,
    )  # fmt: skip


def test_the_head_is_tried_once_and_its_weight_read_each_time():
    lm = make("granite", **READ["granite"])
    assert (head_of(lm).scale, head_of(lm).softcap) == (1 / 4, 0.0)
    forward, lm.forward = lm.forward, None  # not called again
    lm.lm_head.weight = torch.nn.Parameter(torch.randn(53, 32))
    assert head_of(lm).weight is lm.lm_head.weight
    lm.forward, lm.lm_head = forward, torch.nn.Linear(32, 53)
    assert head_of(lm).bias is lm.lm_head.bias


def test_a_head_that_does_more_is_refused():
    lm = make("llama", **SIZES)
    plain = lm.lm_head.forward
    lm.lm_head.forward = lambda x: plain(x).sin()
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: its logits are not softcap\(scale \*"):
        head_of(lm)


class LowRank(torch.nn.Linear):
    """A head with an adapter that adds nothing yet."""

    def __init__(self, head: torch.nn.Linear):
        super().__init__(head.in_features, head.out_features, bias=False)
        self.a, self.b = torch.nn.Linear(32, 2, bias=False), torch.nn.Linear(2, 53, bias=False)
        torch.nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return super().forward(x) + self.b(self.a(x))


def test_a_head_with_an_adapter_is_refused_even_while_it_adds_nothing():
    lm = make("llama", **SIZES)
    head_of(lm)
    lm.lm_head = LowRank(lm.lm_head)
    with pytest.raises(ValueError, match=r"has a\.weight, b\.weight beside weight and bias; merge the adapter"):
        head_of(lm)


def test_a_head_that_changed_after_it_was_tried_is_tried_again():
    lm = make("gemma2", **READ["gemma2"])
    assert head_of(lm).softcap == 30.0
    lm.config.final_logit_softcapping = 20.0
    assert head_of(lm).softcap == 20.0
    hook = lm.lm_head.register_forward_hook(lambda module, given, logits: logits.sin())
    with pytest.raises(ValueError, match=r"its logits are not softcap\(scale \*"):
        head_of(lm)
    hook.remove()
    assert head_of(lm).softcap == 20.0


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


CHANGES = {
    "the head's class": lambda lm: setattr(lm.lm_head, "__class__", Doubled),
    "the model's forward": lambda lm: setattr(lm, "forward", doubled(lm.forward)),
    "a hook of the model": lambda lm: lm.register_forward_hook(lambda module, given, out: halved(out)),
    "a number of the model": lambda lm: setattr(lm, "logit_scale", 2.0),
}


def doubled(forward):
    return lambda *args, **more: halved(forward(*args, **more), 2.0)


def halved(out, factor=0.5):
    out.logits = factor * out.logits
    return out


@pytest.mark.parametrize("change", CHANGES)
def test_code_that_changed_after_the_head_was_tried_is_seen(change):
    lm = make("cohere2", **READ["cohere2"])
    assert head_of(lm).scale == 0.25
    CHANGES[change](lm)
    with pytest.raises(ValueError, match=r"its logits are not softcap\(scale \*"):
        head_of(lm)


def test_a_head_with_buffers_of_its_own_is_refused():
    lm = make("llama", **SIZES)
    lm.lm_head.register_buffer("b", torch.zeros(53, 2))
    with pytest.raises(ValueError, match="its LM head has b beside weight and bias"):
        head_of(lm)


def test_layers_between_the_decoder_and_the_head_are_refused():
    with pytest.raises(ValueError, match=r"ElectraForCausalLM: its logits are not softcap\(scale \*"):
        head_of(make("electra", **FEW, intermediate_size=64, is_decoder=True))


@pytest.mark.parametrize("shape", [(3, 32), (2, 44, 32), (32,)])
def test_hidden_states_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"logprobs: hidden \(.*\) for a plan of \d+ tokens; give the decoder's last"):
        logprobs(make("llama", **SIZES), torch.zeros(shape), pack(trees()))


OUTSIDE = "do not go through transformers' AttentionInterface"
REFUSED = {
    "falcon": (FEW, OUTSIDE),
    "gptj": (dict(vocab_size=53, n_embd=32, n_layer=2, n_head=4, rotary_dim=4), OUTSIDE),
    "bloom": (dict(vocab_size=53, hidden_size=32, n_layer=2, n_head=4), OUTSIDE),
    "bart": (
        dict(vocab_size=53, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=32,
             is_decoder=True),
        r"a packed tree differs by .* from separate sequences",
    ),
    "bert-generation": (dict(FEW, intermediate_size=64), "BertGenerationSelfAttention asks for attention that is not"),
    "mamba": (dict(vocab_size=53, hidden_size=32, num_hidden_layers=2, state_size=4), "none of its layers called"),
    "qwen2_moe": (
        dict(SIZES, **EXPERTS, shared_expert_intermediate_size=16, use_sliding_window=True, sliding_window=40),
        r"the config has sliding_window=40, but Qwen2MoeAttention does not hand it",
    ),
    "phimoe": (dict(SIZES, **EXPERTS, sliding_window=40), "the config has sliding_window=40, but PhimoeAttention"),
    "llama4_text": (
        dict(SIZES, **EXPERTS, attention_chunk_size=40, head_dim=8, intermediate_size_mlp=32),
        "the config has attention_chunk_size=40, but Llama4TextAttention",
    ),
    "llama4_text tuned": (
        dict(SIZES, **EXPERTS, attention_chunk_size=None, head_dim=8, intermediate_size_mlp=32, no_rope_layers=[1, 0],
             attn_temperature_tuning=True),
        "the config has attn_temperature_tuning=True, but Llama4TextAttention",
    ),
    "deepseek_v3": (
        dict(SIZES, **MLA, v_head_dim=8, n_routed_experts=2, n_shared_experts=1, n_group=1, topk_group=1,
             num_experts_per_tok=1, moe_intermediate_size=16),
        r"DeepseekV3Attention has keys of 16 and values of 8 numbers per head \(MLA\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_cannot_run_packed_are_refused_in_one_line(family):
    config, message = REFUSED[family]
    with pytest.raises(ValueError, match=message) as error:
        use_tree_attention(make(family.split()[0], **config))
    assert "\n" not in str(error.value)


def test_a_model_whose_decoder_is_a_head_is_refused():
    ids = dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 1)
    lm = AutoModelForMaskedLM.from_config(AutoConfig.for_model("modernbert", **FEW, intermediate_size=64, **ids))
    with pytest.raises(ValueError, match="ModernBertForMaskedLM: it has no decoder of transformers' kind"):
        use_tree_attention(lm)


@pytest.mark.parametrize("family, config", [
    ("qwen2_moe", dict(SIZES, **EXPERTS, shared_expert_intermediate_size=16)),
    ("mistral", dict(SIZES, sliding_window=40)),
    ("mixtral", dict(SIZES, sliding_window=40, num_local_experts=2)),
])  # fmt: skip
def test_windows_that_reach_attention_or_are_off_are_taken(family, config):
    lm = make(family, **config).train()
    assert use_tree_attention(lm) is lm and lm.training


def test_heads_of_layers_that_differ():
    kinds = ["sliding_attention", "full_attention"]
    lm = make("gemma4_text", **SIZES, head_dim=8, global_head_dim=16, hidden_size_per_layer_input=0, layer_types=kinds)
    assert heads_of(lm) == (16, 2)
    use_tree_attention(lm)


def call(**keywords):
    q = torch.zeros(1, 4, pack(trees()).n_tokens, 8)
    layer = torch.nn.Module()
    layer.layer_idx = 0
    return attention(layer, q, q, q, None, plan=pack(trees()), **keywords)


@pytest.mark.parametrize("name", ["block_indices", "indices", "position_bias", "cu_seq_lens_q", "anything_new"])
def test_unknown_keywords_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"igpo_tree: Module got {name}, which packed attention would ignore"):
        call(**{name: torch.zeros(1)})
    call(**{name: None})


def test_harmless_keywords_are_taken():
    call(
        position_ids=torch.zeros(1), use_cache=False, output_attentions=False, output_router_logits=True, is_causal=True
    )
    with pytest.raises(ValueError, match="asks for attention that is not causal"):
        call(is_causal=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_models_in_half_precision_are_taken(family, dtype):
    use_tree_attention(make(family, **SIZES).to(dtype))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_grow_with_the_longest_sequence_are_refused(kind):
    rope = dict(rope_type=kind, rope_theta=1e4, factor=2.0, original_max_position_embeddings=4096)
    if kind == "longrope":
        head = SIZES["hidden_size"] // SIZES["num_attention_heads"] // 2
        rope |= dict(short_factor=[1.0] * head, long_factor=[4.0] * head)
    with pytest.raises(ValueError, match=f"{kind} RoPE, whose frequencies depend on a forward's"):
        use_tree_attention(make("llama", **SIZES, rope_parameters=rope))
