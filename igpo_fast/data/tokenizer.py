"""The tokenizer of a run: the policy's own, the made-up world's, or byte-level BPE trained on the corpus."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers import decoders as token_decoders
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file

from igpo_fast.config import Config
from igpo_fast.data.worlds import WORLDS
from igpo_fast.errors import InputError, reason_of

if TYPE_CHECKING:
    from igpo_fast.data.load import Data

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
SAMPLE = (
    "Who wrote Faust?  It's Goethe's (1808);\tsee https://example.org/x_y?z=1,234.50 \n\n  Łódź, naïve cafe\u0301,\r\n"
    "東京 はどこ? Москва العربية 🙂 ½ <b>TAGS</b> {'a': [1, 20, 300]} CamelCase   def f(x):\n    return -x  # end\n"
)
"""Text on which tokenizers that split, normalise or join differently disagree."""


def load_tokenizer(
    config: Config, data: Data, checkpoint: str | None = None, tags: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """The tokenizer that ``model.path``, or else ``model.tokenizer``, names.

    It gives character offsets; texts are encoded without added tokens by ``add_special_tokens=False``.

    Args:
        data: trains a ``bpe`` tokenizer; the same data give the same tokenizer.
        tags: words that the made-up world's needs besides its own.
        checkpoint: a run's checkpoint, whose own tokenizer is used, because its weights were trained with it.
    Raises:
        InputError: no tokenizer there, or one without offsets, or a vocabulary too small for all bytes.
    """
    if checkpoint is not None:
        return _pretrained(checkpoint, "checkpoint")
    if config.model.path is not None:
        return _pretrained(config.model.path, "model.path")
    if config.model.tokenizer == "world":
        return _words((*WORLDS[config.world.kind].vocabulary(), *tags))
    if config.model.tokenizer == "bpe":
        return _bpe(config.model.vocab_size, data)
    return _pretrained(config.model.tokenizer, "model.tokenizer")


def check_known(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], where: str) -> None:
    """Refuse texts with words that the tokenizer reads as its unknown token: all such words would be the same.

    Args:
        where: names the texts, for the message.
    Raises:
        InputError: the first unknown word.
    """
    unknown = tokenizer.unk_token_id
    texts = list(texts)
    if unknown is None or not texts:
        return
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    for text, ids, offsets in zip(texts, encoded.input_ids, encoded.offset_mapping, strict=True):
        for id, (start, end) in zip(ids, offsets, strict=True):
            if id == unknown and text[start:end] != tokenizer.unk_token:
                raise InputError(
                    f"{where}: the tokenizer does not know {text[start:end]!r} and would read it as "
                    f"{tokenizer.unk_token}; use a model or model.tokenizer whose vocabulary covers the texts"
                )


def _pretrained(path: str, key: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face directory or name, checked against its tokenizer.json if it has one: some classes
    replace the saved pre-tokeniser by their own."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        saved = _saved(path)
        if saved is not None and tokenizer.is_fast and not _same(tokenizer, saved):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        tokenizer.decode(tokenizer(SAMPLE, add_special_tokens=False).input_ids)  # a damaged configuration shows here
    except Exception as error:  # the files may hold anything, and other libraries read them
        if os.path.isabs(path) and not os.path.exists(path):
            raise InputError(f"{key}={path}: no such folder; give a Hugging Face directory or name") from error
        raise InputError(
            f"{key}={path}: no tokenizer can be loaded ({reason_of(error)}); give a Hugging Face directory or name"
        ) from error
    if not tokenizer.is_fast:
        raise InputError(f"{key}={path}: the tokenizer gives no offsets; use one with a tokenizer.json")
    if saved is not None and not _same(tokenizer, saved):
        raise InputError(
            f"{key}={path}: {type(tokenizer).__name__} does not encode as tokenizer.json does; correct "
            "tokenizer_config.json"
        )
    return tokenizer


def _saved(path: str) -> Tokenizer | None:
    """The tokenizer in tokenizer.json; None if there is none."""
    try:
        file = cached_file(path, "tokenizer.json")
    except OSError:
        return None
    return Tokenizer.from_file(file)


def _same(tokenizer: PreTrainedTokenizerFast, saved: Tokenizer) -> bool:
    return _encode(tokenizer.backend_tokenizer) == _encode(saved)


def _encode(tokenizer: Tokenizer) -> list[int] | str:
    try:
        return tokenizer.encode(SAMPLE, add_special_tokens=False).ids
    except Exception as error:  # tokenizers raises nothing narrower if a vocabulary lacks its own unknown token
        return str(error)


def _words(vocabulary: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token per word; words are separated by single spaces."""
    words = dict.fromkeys([PAD, EOS, UNK, *vocabulary])
    ids = {word: id for id, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(tokenizer, unk_token=UNK)


def _bpe(vocab_size: int, data: Data) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on passages and training questions. Tags are ordinary text in it."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 2
    if vocab_size < smallest:
        raise InputError(
            f"model.vocab_size={vocab_size}: a bpe tokenizer needs {smallest} for bytes and special tokens; raise it"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    passages = (f"{p.title}\n{p.text}" for passages in data.collections.values() for p in passages)
    questions = ("\n".join((q.question, *q.answers[:1])) for q in data.train)
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
