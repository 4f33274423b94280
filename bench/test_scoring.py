"""Answer values of every turn prefix: one packed pass against common ways.

    trunk_only    the rollout's tokens once, no answers: the floor, a cost that training has anyway
    full_logits   T separate passes with logits of every token (the released IGPO code)
    last_hidden   T separate passes, LM head on the answer's rows only
    kv_reuse      prefixes extend one key-value cache; each answer is fed on a copy of it (a long-horizon port)

All ways but the first give the same values, which is checked before anything is timed.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from bench.scoring import full_logits, kv_reuse, mean_logp
from bench.timing import DEVICE
from igpo_fast.model import TreeAttend, hidden_states, use_attend
from igpo_kernels import ANSWER, Branch, RolloutTokens, Tree, linear_logprob, pack

MODEL = "qwen2-1b-bf16" if DEVICE == "cuda" else "qwen2-40m"
SHAPES = {"8x256": dict(turns=8, tokens_a_turn=256, wrapper=0, answer=8)}
FULL = {"16x256+16": dict(turns=16, tokens_a_turn=256, wrapper=16, answer=8)}
PEERS = {"near": (("trunk_only", "kv_reuse"), 15), "far": (("last_hidden", "full_logits"), 3)}
"""Sides and rounds: rounds differ by a tenth, which matters only between close sides."""


VOCAB = 32_768
AGREE = dict(atol=5e-2, rtol=1e-2) if DEVICE == "cuda" else dict(atol=1e-3, rtol=1e-4)


def model():
    """Random weights: on a GPU 1.0e9 in bf16, with heads of 128 as models of that size have."""
    torch.manual_seed(0)
    if DEVICE == "cuda":
        size, layers, heads, ffn = 2048, 16, (16, 4), 8192
    else:
        size, layers, heads, ffn = 512, 8, (8, 4), 1408
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=size, num_hidden_layers=layers, num_attention_heads=heads[0],
        num_key_value_heads=heads[1], intermediate_size=ffn, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(DEVICE):
        lm = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return lm.to(torch.bfloat16 if DEVICE == "cuda" else torch.float32).eval()


def ways(turns: int, tokens_a_turn: int, wrapper: int, answer: int):
    """The sides to time, each returning the values [T], and the number of packed tokens."""
    plain = model()
    ours = use_attend(copy.deepcopy(plain))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB, turns * tokens_a_turn)
    boundaries = np.arange(1, turns + 1) * tokens_a_turn
    branch = Branch(rng.integers(0, VOCAB, wrapper + answer), wrapper, wrapper + answer)
    rollout = RolloutTokens(0, ids, np.full(len(ids), -1), boundaries)
    alone = RolloutTokens(0, np.append(ids, 0), np.append(np.full(len(ids), -1), 0))  # the last is a label
    head = plain.get_output_embeddings().weight

    def run(plan):
        of = lambda name: plan.tensor(name, DEVICE)  # noqa: E731
        hidden = hidden_states(ours, of("input_ids"), of("position_ids"), TreeAttend(plan, rows_read=True))
        return linear_logprob(hidden, head, plan.pairs(rows_read=True))

    def trunk_only():
        run(pack([Tree([alone])]))

    def packed():
        plan = pack([Tree([rollout], [branch])])
        return run(plan)[plan.tensor("kind", DEVICE) == ANSWER].view(turns, answer).mean(1)

    def last_hidden():
        fed = [torch.as_tensor(np.append(ids[:b], branch.ids[:-1]), device=DEVICE) for b in boundaries]
        kept = (plain(text[None], use_cache=False, logits_to_keep=answer).logits[0] for text in fed)
        return torch.stack([mean_logp(logits, branch) for logits in kept])

    sides = {
        "ours": packed, "trunk_only": trunk_only, "last_hidden": last_hidden,
        "kv_reuse": lambda: kv_reuse(plain, rollout, [branch])[0],
        "full_logits": lambda: full_logits(plain, [rollout], lambda _: [branch], at_once=1)[0][0],
    }  # fmt: skip
    return sides, pack([Tree([rollout], [branch])]).n_tokens


@pytest.mark.parametrize("peers", PEERS)
@pytest.mark.parametrize("name", [*SHAPES, *FULL])
@torch.no_grad()
def test_scoring(name, peers, compare, request):
    if name in FULL and not request.config.getoption("--full"):
        pytest.skip("with --full")
    shape = {**SHAPES, **FULL}[name]
    sides, packed_tokens = ways(**shape)
    about = {"model": MODEL, **shape, "packed_tokens": packed_tokens}
    names, rounds = PEERS[peers]
    compare("scoring", about, {name: sides[name] for name in ("ours", *names)}, rounds, agree=AGREE)
