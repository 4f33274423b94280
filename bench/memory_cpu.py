"""Peak memory of the trainer's own updates on a CPU, against what run/memory.py computes.

    python -m bench.memory_cpu [CASE ...] [--results FILE]

Every case is a Qwen2 of 107M random weights that makes an update of one full pack and one of two, in processes of its
own: while the last pack is read, moments and the sum of gradients are there. The process first does the same with a
tiny model, so that libraries and code do not count; then what its resident memory rises by is compared with the parts
of training. glibc gives memory back at once (MALLOC_MMAP_THRESHOLD_), else what it keeps for later would count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from bench.timing import circumstances

SIZES = ["model.hidden_size=768", "model.layers=12", "model.heads=12", "model.kv_heads=4", "model.ffn_size=3072"]
TINY = ["model.hidden_size=32", "model.layers=2", "model.heads=2", "model.kv_heads=2", "model.ffn_size=64"]
VOCABULARY, TOKENS = 4096, 1024
NO_ENGINE = ["rollout.engine=vllm", "rollout.server=[http://nowhere]", f"train.token_budget={TOKENS}"]
CASES: dict[str, tuple[int, list[str]]] = {
    "float32": (1, []),
    "bfloat16": (1, ["train.precision=bfloat16"]),
    "float32, checkpointing": (1, ["model.gradient_checkpointing=true"]),
    "bfloat16, checkpointing": (1, ["train.precision=bfloat16", "model.gradient_checkpointing=true"]),
    "float32, no reference": (1, ["algorithm.kl=0"]),
    "float32, LoRA": (1, ["model.lora_rank=16"]),
    "bfloat16, LoRA": (1, ["model.lora_rank=16", "train.precision=bfloat16"]),
    "float32, ZeRO-2": (2, ["distributed.zero_stage=2"]),
    "float32, ZeRO-3": (2, ["distributed.zero_stage=3"]),
    "bfloat16, ZeRO-2": (2, ["train.precision=bfloat16", "distributed.zero_stage=2"]),
    "bfloat16, ZeRO-3": (2, ["train.precision=bfloat16", "distributed.zero_stage=3"]),
}
"""Ranks and settings."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 16), "DS_ACCELERATOR": "cpu"}


def compare(case: str) -> dict:
    """A row: predicted and measured bytes of the rank that took most."""
    from igpo_fast.run.launch import environments

    ranks, _ = CASES[case]
    each = environments(ranks) if ranks > 1 else [dict(os.environ)]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.memory_cpu", "--rank-of", case], env=env | ENVIRONMENT,
            stdout=subprocess.PIPE, text=True,
        )
        for env in each
    ]  # fmt: skip
    printed = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{case}: a process failed")
    rows = [json.loads(text.splitlines()[-1]) for text in printed]
    row = max(rows, key=lambda row: row["measured_bytes"])
    ratio = row["predicted_bytes"] / row["measured_bytes"]
    shape = {"model": "qwen2-107m", "case": case, "ranks": ranks, "tokens": TOKENS}
    return {"bench": "memory/update", **circumstances(), "shape": shape, **row, "ratio": round(ratio, 3)}


def measure(case: str) -> dict:
    """Predicted and measured bytes in this process, which is a rank of the case."""
    from igpo_fast.config import load
    from igpo_fast.ranks import Ranks
    from igpo_fast.run import memory

    ranks, settings = CASES[case]
    place = Ranks()
    update(load(None, [*TINY, *NO_ENGINE, *settings]), place)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    config = load(None, [*SIZES, *NO_ENGINE, *settings])
    update(config, place)
    shape = memory.shape_of(config, memory.decoder_config(config, VOCABULARY))
    parts = memory.parts_of(config, shape, memory.Place(ranks, gpu=False))
    training = max((memory.held(parts, phase) for phase in memory.TRAINING), key=memory.total)
    return {
        "parameters": shape.weights, "predicted_bytes": memory.total(training),
        "measured_bytes": _status("VmHWM") - before, "parts": {part.name: part.size for part in training},
    }  # fmt: skip


def update(config, ranks) -> None:
    """An update of one full pack and one of two, of a model with random weights."""
    import numpy as np
    import torch

    from igpo_fast import adapter, model
    from igpo_fast.setup import make_learner
    from igpo_fast.update.policy import LossInputs
    from igpo_kernels import RolloutTokens, Tree, pack

    m = config.model
    lm = model.build(
        VOCABULARY, hidden_size=m.hidden_size, layers=m.layers, heads=m.heads, kv_heads=m.kv_heads,
        ffn_size=m.ffn_size, max_tokens=TOKENS, tie_embeddings=m.tie_embeddings, seed=0,
    ).to(getattr(torch, config.train.precision))  # fmt: skip
    if m.gradient_checkpointing:
        model.recompute_layers(lm)
    if m.lora_rank:
        adapter.add(lm, m.lora_rank, m.lora_alpha, m.lora_targets)
    learner = make_learner(config, lm, ranks)
    draw = np.random.default_rng(ranks.number).integers
    length = TOKENS // 4 + 1  # a rollout's last token is a label only
    turn = np.repeat([-1, 0], [length // 8, length - length // 8])
    plan = pack([Tree([RolloutTokens(i, draw(0, VOCABULARY, length), turn)]) for i in range(4)])
    advantages = draw(-1, 2, plan.n_decisions).astype(np.float32)
    weights = np.full(plan.n_decisions, 1 / plan.n_decisions, np.float32)
    for packs in (1, 2):
        for _ in range(packs):
            inputs = LossInputs(weights, advantages, ref_logp=learner.reference(plan))
            learner.backward(learner(plan, inputs).loss)
        learner.step()


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--results", type=Path, help="append rows to this file")
    parser.add_argument("--rank-of", choices=CASES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank_of:
        print(json.dumps(measure(asked.rank_of)))
        return
    for case in asked.cases or CASES:
        row = compare(case)
        print(
            f"{case}: predicted {row['predicted_bytes'] / 1e9:.2f} GB, measured {row['measured_bytes'] / 1e9:.2f}, "
            f"ratio {row['ratio']:.2f}",
            flush=True,
        )
        if asked.results:
            with asked.results.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
