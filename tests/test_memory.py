"""memory.py: hand-worked bytes, what a layer really keeps, and the table of docs/recipes.md."""

import re
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from igpo_fast import config, doctor
from igpo_fast.run.memory import kv_bytes_per_token, training_bytes

RECIPES = Path(__file__).parents[1] / "docs" / "recipes.md"
TINY = dict(
    vocab_size=10, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1,
)  # fmt: skip
# From the published config.json files of Qwen2.5-3B and Qwen2.5-7B.
QWEN = {
    "3B": dict(
        vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "7B": dict(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_hand_worked(dtype, size, checkpointing):
    settings = config.load(
        None,
        [f"train.precision={dtype}", f"model.gradient_checkpointing={checkpointing}", "train.token_budget=100"],
    )
    lm = Qwen2Config(**TINY, tie_word_embeddings=False)
    # q with bias, k and v with bias, o, three feed-forward matrices, two norms; embeddings, LM head and a norm.
    layer = 8 * 8 + 8 + 2 * (8 * 4 + 4) + 8 * 8 + 3 * 8 * 12 + 2 * 8
    count = 3 * layer + 2 * 10 * 8 + 8
    inside = 100 * size * (12 * 8 + 6 * 12)
    assert training_bytes(settings, lm) == {
        "weights": count * size,
        "float32 masters": count * (4 if dtype == "bfloat16" else 0),
        "gradients": count * 4,
        "Adam states": count * 8,
        "reference": count * size,
        "activations of a pack": 3 * 100 * size * 8 + inside if checkpointing else 3 * inside,
        "LM head": 2 * 100 * size * 8 + 2**30,
    }
    without = config.load(None, ["algorithm.kl=0"])
    assert training_bytes(without, lm)["reference"] == 0
    assert kv_bytes_per_token(lm, getattr(torch, dtype)) == 2 * 3 * 1 * 4 * size


@pytest.mark.parametrize(("dtype", "per_hidden"), [(torch.float32, 9), (torch.bfloat16, 11)])
def test_what_a_layer_keeps_is_within_the_formula(dtype, per_hidden):
    """4 F + 9 H (11 H in bfloat16) numbers a token, and 2 F + H or more for gradients on the way: 6 F + 12 H."""
    hidden, ffn, tokens = 64, 344, 256
    lm = Qwen2ForCausalLM(Qwen2Config(**TINY | dict(hidden_size=hidden, intermediate_size=ffn, head_dim=16))).to(dtype)
    own = {parameter.untyped_storage().data_ptr() for parameter in lm.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    x = torch.randn(1, tokens, hidden, dtype=dtype, requires_grad=True)
    positions = torch.arange(tokens)[None]
    angles = lm.model.rotary_emb(x, positions)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lm.model.layers[0](x, attention_mask=None, position_ids=positions, position_embeddings=angles)
    numbers = sum(size for _, size in kept.values()) / (tokens * dtype.itemsize)
    assert numbers == pytest.approx(4 * ffn + per_hidden * hidden, rel=0.05)


@pytest.mark.parametrize("name", QWEN)
def test_the_table_of_the_recipes(name):
    settings = config.load(RECIPES.parents[1] / "configs" / f"qwen2.5-{name.lower()}-search.yaml")
    lm = Qwen2Config(**QWEN[name])
    found = {key: f"{size / 1e9:.1f}" for key, size in training_bytes(settings, lm).items()}
    found["**training**"] = f"**{sum(training_bytes(settings, lm).values()) / 1e9:.1f}**"
    found["keys and values of 1,000 tokens"] = f"{kv_bytes_per_token(lm, torch.bfloat16) / 1e6:.3f}"
    rows = re.findall(r"^\| (.+?) \| ([\d.*]+) \| ([\d.*]+) \|$", RECIPES.read_text(), re.MULTILINE)
    assert {row[0]: row[1 + list(QWEN).index(name)] for row in rows} == found


def test_doctor_says_it_before_it_loads_the_model(tmp_path):
    """A directory with a configuration and no weights is enough."""
    Qwen2Config(**TINY).save_pretrained(tmp_path)
    settings = config.load(None, [f"model.path={tmp_path}", "model.device=cpu", "train.token_budget=1000000"])
    first = next(doctor._configured(settings))
    assert first.name == "memory in training" and first.ok
    total = sum(training_bytes(settings, Qwen2Config(**TINY)).values())
    assert first.found.startswith(f"{total / 1e9:.1f} GB: weights 0.0, ")
