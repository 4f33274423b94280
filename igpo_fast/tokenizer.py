"""The tokenizer of a run: the policy's own, the made-up world's, or byte-level BPE trained on the corpus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers import decoders as token_decoders
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from igpo_fast.config import Config
from igpo_fast.errors import InputError
from igpo_fast.world import vocabulary

if TYPE_CHECKING:
    from igpo_fast.data import Data

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"


def load_tokenizer(config: Config, data: Data, checkpoint: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer that ``model.path``, or else ``model.tokenizer``, names.

    It gives character offsets; texts are encoded without added tokens by ``add_special_tokens=False``.

    Args:
        data: what a ``bpe`` tokenizer is trained on; the same data, the same tokenizer.
        checkpoint: a run's checkpoint, whose own tokenizer is taken: its weights know no other.
    Raises:
        InputError: no tokenizer there, or one without offsets, or a vocabulary too small for all bytes.
    """
    if checkpoint is not None:
        return _pretrained(checkpoint, "checkpoint")
    if config.model.path is not None:
        return _pretrained(config.model.path, "model.path")
    if config.model.tokenizer == "world":
        return _words()
    if config.model.tokenizer == "bpe":
        return _bpe(config.model.vocab_size, data)
    return _pretrained(config.model.tokenizer, "model.tokenizer")


def _pretrained(path: str, key: str) -> PreTrainedTokenizerFast:
    try:
        # Where config.json says qwen2, AutoTokenizer puts Qwen2's own splitting in place of what was saved.
        generic = get_tokenizer_config(path).get("tokenizer_class") == "TokenizersBackend"
        tokenizer = (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{key}={path}: no tokenizer can be loaded ({reason}); give a Hugging Face directory or name"
        ) from None
    if not tokenizer.is_fast:
        raise InputError(f"{key}={path}: the tokenizer gives no offsets; use one with a tokenizer.json")
    return tokenizer


def _words() -> PreTrainedTokenizerFast:
    """One token a word, the words separated by single spaces."""
    ids = {word: id for id, word in enumerate([PAD, EOS, UNK, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(tokenizer, unk_token=UNK)


def _bpe(vocab_size: int, data: Data) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on passages and training questions. Tags are ordinary text in it."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 2
    if vocab_size < smallest:
        raise InputError(f"model.vocab_size={vocab_size}: a bpe tokenizer needs {smallest} for bytes and ends")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    passages = (f"{p.title}\n{p.text}" for passages in data.collections.values() for p in passages)
    questions = (f"{q.question}\n{q.answers[0]}" for q in data.train)
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for texts in (passages, questions) for text in texts), trainer)
    return _wrap(tokenizer)


def _wrap(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        **special,
    )
