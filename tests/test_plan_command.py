"""`igpo-fast plan` and its arithmetic (estimate.py): hand-worked tokens and FLOPs, measured rows, the table of docs."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import Qwen2Config
from typer.testing import CliRunner

from bench import memory_cpu, predicted
from igpo_fast import config, doctor
from igpo_fast.cli import app
from igpo_fast.errors import InputError
from igpo_fast.estimate import GPUS, Assumed, Work, estimate, forward_flops, group_tree, training_flops
from igpo_fast.run import memory
from igpo_kernels import pack
from igpo_kernels.tree_attention.blocks import visible_area
from tests.test_memory import COUNT, MATRICES, QWEN, TINY, tiny

ROOT = Path(__file__).parents[1]
RUN = [
    "train.questions=4", "rollout.group_size=3", "rollout.max_turns=4", "rollout.max_tokens=100",
    "rollout.max_turn_tokens=20", "search.top_k=1", "search.max_passage_tokens=6", "train.token_budget=4096",
    "distributed.zero_stage=3", "train.precision=bfloat16",
]  # fmt: skip
ASSUMED = Assumed(tokens=40, turns=3, prompt=10, answer=4)


def step(overrides=(), gpus=2, lm=None, gpu="h100", assumed=ASSUMED):
    settings = config.load(None, [*RUN, *overrides])
    return estimate(settings, memory.shape_of(settings, lm or tiny()), gpus, GPUS[gpu], assumed)


def test_tokens_by_hand():
    """3 rollouts of 40 tokens share a prompt of 10; each of 3 turns takes 10 tokens, of which the first two end with a
    response of 6. An answer of 4 tokens follows each prefix; the last token of a path is not read."""
    found = step()
    assert found.passes == "one"
    trunk = 10 + 3 * (30 - 1)
    branches = (1 + 3 * 2) * (4 - 1)
    assert found.tokens == {
        "of rollouts": 4 * 3 * 40, "sampled": 4 * 3 * (4 + 4 + 10), "trunk, prompts shared": 4 * trunk,
        "branches": 4 * branches, "read in all passes": 4 * (trunk + branches),
    }  # fmt: skip
    two = step(["algorithm.passes=two"])
    assert two.tokens["read in all passes"] == 4 * (trunk + branches + trunk)


def test_flops_by_hand():
    """Two per weight and token; four per visible pair, query head and head size; the backward is twice that,
    attention's 2.5 times; frozen weights have no gradient."""
    settings = config.load(None, RUN)
    shape = memory.shape_of(settings, tiny())
    tree = group_tree(settings, ASSUMED, scored=False)
    plan = pack([tree])
    pairs = 55 + 3 * (39 * 40 / 2 - 55)
    assert visible_area(plan) == pairs
    work = Work(97, pairs, 54, 0)
    decoder, attention, head = 2 * 3 * MATRICES * 97, 4 * 8 * 3 * pairs, 2 * 80 * 54
    assert forward_flops(shape, work) == decoder + attention + head
    assert training_flops(shape, work, False) == 3 * decoder + 3.5 * attention + 3 * head
    assert training_flops(shape, work, True) == 4 * decoder + 3.5 * attention + 3 * head
    lora = memory.shape_of(config.load(None, ["model.lora_rank=1"]), tiny())
    adapters = 2 * lora.adapters * 97
    assert training_flops(lora, work, False) == 2 * decoder + 3 * adapters + 3.5 * attention + 2 * head


def test_a_step_is_the_sum_of_its_phases():
    found = step()
    assert found.seconds["score"] == 0 and found.traffic["rollouts to every rank"] == 4 * 3 * 40 * 12 / 2
    assert found.seconds["step"] == pytest.approx(sum(found.seconds.values()) / 2)
    # Two ranks, one pack each: gradients once, weights in two forwards (the reference's) and a backward.
    assert found.traffic["gradients reduced"] == 4 * COUNT / 2
    assert found.traffic["weights gathered"] == 3 * 2 * COUNT / 2
    assert step(["distributed.zero_stage=2"]).traffic["weights gathered"] == 2 * COUNT / 2


def test_more_gpus_take_less_time_until_groups_run_out():
    seconds = [step(gpus=n, lm=Qwen2Config(**QWEN["3B"])).seconds for n in (1, 2, 4, 8)]
    train = [found["train"] - found["sync"] for found in seconds]
    assert seconds[0]["rollout"] > seconds[1]["rollout"] > seconds[2]["rollout"] == seconds[3]["rollout"]
    assert train[0] > train[1]


def test_a_faster_gpu_is_faster():
    lm = Qwen2Config(**QWEN["3B"])
    times = [step(gpu=gpu, lm=lm).seconds["step"] for gpu in ("h200", "h100", "a100", "l40s", "4090")]
    assert times == sorted(times)


@pytest.mark.parametrize(("tokens", "turns"), [(101, 3), (40, 5), (12, 3)])
def test_rollouts_that_cannot_be(tokens, turns):
    with pytest.raises(InputError, match=r"^--tokens-per-rollout="):
        step(assumed=Assumed(tokens, turns, prompt=10))


def test_a_run_without_deepspeed_has_one_process():
    with pytest.raises(InputError, match=r"distributed\.engine=none trains in one process, not on 2 GPUs"):
        step(["distributed.engine=none"])


# Measured ratios of times against predicted ratios of FLOPs. A key-value cache costs copies that are not
# counted.
WITHIN = {"trunk_only": 0.10, "last_hidden": 0.35, "full_logits": 0.35, "kv_reuse": 0.40}


def test_the_measured_rows_of_scoring():
    rows = predicted._rows("scoring_cpu.jsonl")
    assert len(rows) > 20
    for row in rows:
        assert predicted.scoring_ratio(row) == pytest.approx(row["ratio"], rel=WITHIN[row["peer"]]), row["peer"]


def test_the_measured_rows_of_memory():
    """Resident memory of 107M parameters' updates, dated rows of bench/memory_cpu.py."""
    rows = predicted._rows("memory_cpu.jsonl")
    assert {row["shape"]["case"] for row in rows} >= {"float32", "bfloat16", "float32, LoRA"}
    for row in rows:
        assert row["predicted_bytes"] == pytest.approx(row["measured_bytes"], rel=0.15), row["shape"]["case"]


def test_the_memory_table_of_the_docs_is_the_rows():
    text = (ROOT / "docs" / "measured.md").read_text()
    for row in predicted._rows("memory_cpu.jsonl"):
        sizes = (f"{row[key] / 1e9:.2f}" for key in ("predicted_bytes", "measured_bytes"))
        cells = [row["shape"]["case"], str(row["shape"]["ranks"]), *sizes, f"{row['ratio']:.2f}"]
        assert f"| {' | '.join(cells)} |" in text


def test_the_rows_were_computed_by_todays_arithmetic():
    for row in predicted._rows("memory_cpu.jsonl"):
        ranks, settings = memory_cpu.CASES[row["shape"]["case"]]
        of = config.load(None, [*memory_cpu.SIZES, *memory_cpu.NO_ENGINE, *settings])
        shape = memory.shape_of(of, memory.decoder_config(of, memory_cpu.VOCABULARY))
        parts = memory.parts_of(of, shape, memory.Place(ranks, gpu=False))
        training = max((memory.held(parts, phase) for phase in memory.TRAINING), key=memory.total)
        assert memory.total(training) == row["predicted_bytes"], row["shape"]["case"]


def command(*arguments):
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def qwen(tmp_path):
    """Folders with a published config.json and no weights."""
    for name, sizes in QWEN.items():
        Qwen2Config(**sizes).save_pretrained(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("size", QWEN)
def test_plan_and_doctor_agree(qwen, size, monkeypatch):
    """The same parts and bytes, for the recipe on the GPU that it names."""
    file = ROOT / "configs" / f"qwen2.5-{size.lower()}-search.yaml"
    printed = command("--config", file, "--gpus", 1, "--gpu", "h200", "--json", f"model.path={qwen / size}")
    (planned,) = json.loads(printed.stdout)["steps"]
    monkeypatch.setattr(doctor, "device_of", lambda name: "cuda")
    monkeypatch.setattr(memory, "place_of", lambda device, ranks: memory.Place(ranks, True, 141e9, 1e12))
    settings = config.load(file, [f"model.path={qwen / size}"])
    said = {check.name: check for check in doctor._memory(settings, 0, 1)}
    training = said["memory in training"]
    assert training.ok and planned["fits"]
    packs = [part for part in planned["parts"] if "packs" in part["phases"] and not part["host"]]
    for part in packs:
        assert f"{part['name']} {part['size'] / 1e9:.1f}" in training.found
    assert training.found.startswith(f"{sum(part['size'] for part in packs) / 1e9:.1f} of 141.0 GB per rank: ")
    host = sum(part["size"] for part in planned["parts"] if part["host"]) / 1e9
    assert (size == "3B") == (host == 0)
    assert size == "3B" or said["memory on the CPU"].found.startswith(f"{host:.1f} of ")


def test_the_table_of_the_docs_is_the_commands_output(qwen):
    """docs/scale.md holds the table that the command in it prints."""
    text = (ROOT / "docs" / "scale.md").read_text()
    written = text.split("```\nigpo-fast plan ")[1].split("\n```")[0].replace("\\\n", " ").split()
    arguments = [ROOT / word if word.startswith("configs/") else word for word in written]
    printed = command(*arguments, f"model.path={qwen / '7B'}").stdout
    rows = [line.rstrip() for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) > 25
    assert "\n".join(rows) in text


def test_what_is_printed(qwen):
    file = ROOT / "configs" / "qwen2.5-3b-search.yaml"
    printed = command("--config", file, f"model.path={qwen / '3B'}", "--gpus", "1,8").stdout
    assert "| 1 GPU | 8 GPUs |" in " ".join(printed.split()) and "\nassumed: " in printed
    assert "--mfu" in printed and "data sheets" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--gpu", "abacus"], "--gpu=abacus: not known; give one of h200, "), (["--gpus", "0"], "--gpus=0: give a number"),
     (["--gpus", "8,x"], "--gpus=8,x: give a number"), (["model.path=/nowhere"], "model.path=/nowhere: no config"),
     (["rollout.max_tokens=20000", "train.token_budget=1000"], "train.token_budget=1000: a rollout")],
)  # fmt: skip
def test_refusals_are_one_line(arguments, said):
    result = command(*arguments)
    assert result.exit_code == 2 and not result.stdout
    assert result.stderr.startswith(f"error: {said}") and result.stderr.count("\n") == 1


def test_questions_per_gpu():
    found = json.loads(command("--questions-per-gpu", 3, "--gpus", "2,4", "--json", *RUN, "--prompt-tokens", 8).stdout)
    assert [each["rollouts"] for each in found["steps"]] == [2 * 3 * 3, 4 * 3 * 3]


def test_a_group_shares_its_prompt_alone():
    tree = group_tree(config.load(None, RUN), ASSUMED, scored=True)
    first, second = (rollout.ids for rollout in tree.rollouts[:2])
    assert np.array_equal(first[:10], second[:10]) and not (first[10:] == second[10:]).any()
    assert TINY["num_hidden_layers"] == 3 and len(tree.branches) == 1
