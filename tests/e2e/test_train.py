"""Whole runs of every algorithm and mode on a tiny world: what they write, count and compute."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from igpo_fast.data.tokenizer import load_tokenizer
from igpo_fast.model import hidden_states, lm_head
from igpo_fast.model import load as load_model
from igpo_fast.rollouts.tools.search import FOUND
from igpo_fast.run.checkpoint import RunFolder
from igpo_fast.run.metrics import KEYS
from igpo_fast.train import train
from igpo_fast.update.advantages import ALGORITHMS
from tests.tiny import STEPS, Recorder, rows, settings

GAIN_KEYS = {
    "reward/ig_mean", "reward/ig_abs", "reward/ig_zero", "reward/ig_cum_negative", "reward/ig_nan",
    "value/first", "value/last",
}  # fmt: skip
CRITIC_KEYS = {"critic/loss", "critic/clipped", "critic/value_mean"}
EVAL_KEYS = {"eval/f1", "eval/f1_se", "eval/em", "eval/turns"}
OPTIONAL_KEYS = {"loss/kl", "mismatch/capped", "mismatch/masked", "importance/ess", "reward/ig_gated",
    "critic/explained_variance"}  # fmt: skip
"""Written where there is something to measure."""
SERVER_KEYS = {"tool/", "eval/search_failures"}
"""Only where search can fail: these runs search in process."""
RUNS = {
    **{
        name: ("algorithm.passes=one", f"algorithm.name={name}")
        for name, a in ALGORITHMS.items()
        if name != "reinforce_pp" and not a.critic
    },
    "reinforce_pp": ("algorithm.name=reinforce_pp",),
    "ppo": ("algorithm.name=ppo",),
    "ppo_ig": ("algorithm.name=ppo_ig", "critic.level=turn", "critic.gae_lambda=0.9", "train.updates=2"),
    "two passes": ("algorithm.passes=two",),
    "two updates": ("train.updates=2", "algorithm.answers=mean"),
    "token importance": ("algorithm.importance=token",),
    "sequence importance": ("algorithm.importance=sequence", "algorithm.importance_mode=mask", "train.updates=2"),
    "ratios of turns": ("algorithm.ratio=turn", "algorithm.importance=geometric", "train.updates=2"),
    "robust": ("algorithm.preset=robust",),
    "paper_v1": ("algorithm.preset=paper_v1",),
    "a2tgpo": ("algorithm.preset=a2tgpo", "train.updates=2"),
    "dr_venus": ("algorithm.preset=dr_venus", "algorithm.ig_weight_end=0.5"),
    "small packs": ("algorithm.passes=two", "train.token_budget=150"),
    "no evaluation": ("eval.every=0",),
    "evaluation every step": ("eval.every=1",),
}


@pytest.fixture(scope="session")
def run_of(tmp_path_factory, cache):
    """A finished run of ``RUNS`` by name, made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("e2e") / name.replace(" ", "_")
            display = Recorder()
            config = settings(folder, cache, *RUNS[name])
            train(config, display)
            raw = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            made[name] = SimpleNamespace(name=name, folder=folder, config=config, text=display.text, raw=raw)
        return made[name]

    return get


def records(run, step):
    return [json.loads(line) for line in (run.folder / f"rollouts/step_{step:06d}.jsonl").read_text().splitlines()]


def passes_of(run):
    return "two" if {"algorithm.passes=two", "train.updates=2", "algorithm.name=ppo"} & set(RUNS[run.name]) else "one"


def has_critic(run):
    return ALGORITHMS[run.config.algorithm.name].critic


def scores_values(run):
    return ALGORITHMS[run.config.algorithm.name].needs_values


# --- what a run writes ---


@pytest.mark.parametrize("name", RUNS)
def test_every_promised_metric_is_there(run_of, name):
    run = run_of(name)
    assert [row["step"] for row in run.raw] == list(range(STEPS + 1))
    assert set(run.raw[0]) == {"step"} | EVAL_KEYS
    every = run.config.eval.every
    wanted = (set(KEYS) | GAIN_KEYS | {f"tool/{name}" for name in FOUND}) - SERVER_KEYS - OPTIONAL_KEYS
    wanted -= set() if scores_values(run) else GAIN_KEYS
    wanted -= set() if has_critic(run) else CRITIC_KEYS
    wanted -= {"time/score"} if passes_of(run) == "one" else set()  # not measured
    for row in run.raw[1:]:
        evaluated = row["step"] == STEPS or (every and row["step"] % every == 0)
        assert set(row) - OPTIONAL_KEYS == (wanted if evaluated else wanted - EVAL_KEYS - {"time/eval"})
        assert ("loss/kl" in row) == (run.config.algorithm.kl > 0)
        assert ("mismatch/masked" in row) == (name == "sequence importance")
        assert ("mismatch/capped" in row) == (name in ("token importance", "ratios of turns"))
        assert ("importance/ess" in row) == ("mismatch/masked" in row or "mismatch/capped" in row)
        assert 0.99 < row.get("importance/ess", 1.0) <= 1.0001  # the engine is the trainer itself
        assert [key for key in row if key in KEYS] == [key for key in KEYS if key in row]
        assert all(isinstance(value, (int, float)) for value in row.values()), row
    assert (run.folder / "config.yaml").exists() and list(RunFolder(run.folder).saved()) == [4, 6]


@pytest.mark.parametrize("name", RUNS)
def test_every_rollout_is_on_record(run_of, name):
    run = run_of(name)
    searches = 0
    for step in range(1, STEPS + 1):
        found = records(run, step)
        groups = [found[i : i + 4] for i in range(0, 16, 4)]
        assert len(found) == 16 and len({group[0]["id"] for group in groups}) == 4
        for group in groups:
            assert [r["index"] for r in group] == [0, 1, 2, 3]
            assert len({(r["id"], r["question"], *r["answers"], *r["prompt_ids"]) for r in group}) == 1
        for record in found:
            searches += check_record(record, run)
        row = run.raw[step]
        lengths = [sum(len(t["ids"]) + len(t["response_ids"]) for t in r["turns"]) for r in found]
        assert row["tokens/rollout"] == sum(lengths) + sum(len(r["prompt_ids"]) for r in found)
        assert row["turns/mean"] == sum(len(r["turns"]) for r in found) / 16
        assert row["reward/outcome"] == pytest.approx(sum(r["outcome"] for r in found) / 16)
        assert row["turns/format_error"] == sum(r["answer"] is None for r in found) / 16
    assert searches > 20


def check_record(record, run):
    """One rollout's record against itself; returns how many searches found passages."""
    *middle, last = record["turns"]
    scored = scores_values(run)
    assert (record["answer"] is None) == (last["action"] != "answer")
    assert last["response"] == "" and last["response_ids"] == [] and last["info_gain"] is None
    assert len(record["values"]) == len(record["turns"]) and (record["values"][0] is not None) == scored
    for turn in record["turns"]:
        assert 1 <= turn["tokens"] == len(turn["ids"]) == len(turn["logp"]) <= 8
        assert max(turn["logp"]) <= 0 and isinstance(turn["advantage"], float)
    for t, turn in enumerate(middle):
        assert turn["response"] and turn["response_ids"]
        assert (turn["action"] == "search") == bool(turn["argument"])
        assert turn["action"] == "search" or not turn["passages"]
        if scored:
            assert turn["value"] == record["values"][t + 1]
            assert turn["info_gain"] == pytest.approx(turn["value"] - record["values"][t], abs=1e-12)
        else:
            assert turn["info_gain"] is None
    return sum(bool(turn["passages"]) for turn in middle)


# --- what it counts ---


@pytest.mark.parametrize("name", RUNS)
def test_tokens_are_read_as_often_as_the_mode_says(run_of, name):
    run = run_of(name)
    assert f", {passes_of(run)} pass" in run.text
    answer = max(len(a.split()) for step in range(1, STEPS + 1) for r in records(run, step) for a in r["answers"])
    for step, row in enumerate(run.raw[1:], start=1):
        prefixes = sum(len(r["turns"]) for r in records(run, step))
        if scores_values(run):
            assert prefixes <= row["tokens/scored"] <= prefixes * answer
        else:
            assert row["tokens/scored"] == 0
        # Prompts are shared, and nothing predicts from a rollout's last token; branches add: the words before a forced
        # answer, a token each, and the answer.
        branches = prefixes * (1 + answer) if scores_values(run) else 0
        once = row["tokens/rollout"] + branches
        assert row["tokens/packed"] < (once if passes_of(run) == "one" else once + row["tokens/rollout"])


def test_an_update_in_one_pass_reads_what_the_scoring_pass_of_two_reads(run_of):
    """At step 1 both see the same rollouts; the second pass reads them once more, without answers."""
    one, two = run_of("igpo").raw[1], run_of("two passes").raw[1]
    assert one["tokens/rollout"] == two["tokens/rollout"]
    assert one["tokens/packed"] < two["tokens/packed"] < 2 * one["tokens/packed"]
    assert one["tokens/scored"] == two["tokens/scored"]
    assert "time/score" not in one and two["time/score"] > 0


# --- what it computes ---


@pytest.mark.parametrize("name", RUNS)
def test_the_engine_sampled_from_the_trained_policy(run_of, name):
    run = run_of(name)
    for row in run.raw[1:]:
        assert row["mismatch/logp_abs_diff"] < 1e-5
        # Without advantages the entropy bonus alone, or a KL term that has left 0, moves the weights.
        others = run.config.algorithm.entropy > 0 or row.get("loss/kl", 0) > 0
        assert (row["loss/grad_norm"] > 0) == (row["group/collapsed"] < 1 or others)
        assert "loss/skipped" not in row


def weights_after_one_step(folder, cache, *overrides):
    run = train(settings(folder, cache, "train.steps=1", "eval.every=0", *overrides), Recorder())
    return AutoModelForCausalLM.from_pretrained(run.saved()[1]).state_dict(), run


@pytest.mark.parametrize("preset", ["paper", "robust"])
def test_one_pass_and_two_give_the_same_weights(tmp_path, cache, preset):
    """Adam makes each weight's first step as long as the learning rate: 1e-5 is a hundredth of it."""
    options = (f"algorithm.preset={preset}", "algorithm.entropy=0.01", "algorithm.kl=0.05", "train.lr=1e-3")
    one, run_one = weights_after_one_step(tmp_path / "1", cache, *options, "algorithm.passes=one")
    two, run_two = weights_after_one_step(tmp_path / "2", cache, *options, "algorithm.passes=two")
    packs, _ = weights_after_one_step(tmp_path / "3", cache, *options, "algorithm.passes=two", "train.token_budget=150")
    start = load_model(next(cache.glob("sft-*")).as_posix(), check=False).state_dict()
    assert max((one[name] - start[name]).abs().max() for name in one) > 5e-4
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0)
        torch.testing.assert_close(packs[name], one[name], atol=1e-5, rtol=0)
    ours, theirs = rows(run_one.path)[1], rows(run_two.path)[1]
    for key in set(ours) - {"tokens/packed", "sharing/ratio"}:
        assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("name", ["igpo", "reinforce_pp", "gspo", "ppo"])
def test_packs_only_add(tmp_path, cache, name):
    """Statistics and weights are the batch's, however many packs it takes."""
    options = (f"algorithm.name={name}", "train.questions=8", "algorithm.passes=auto")
    whole, run = weights_after_one_step(tmp_path / "1", cache, *options)
    parts, run_parts = weights_after_one_step(tmp_path / "2", cache, *options, "train.token_budget=500")
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-5, rtol=0)
    assert rows(run.path)[1]["tokens/packed"] > 2 * 500
    for key, value in rows(run.path)[1].items():
        assert rows(run_parts.path)[1][key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


def test_evaluation_does_not_change_training(run_of):
    never, always = run_of("no evaluation"), run_of("evaluation every step")
    for ours, theirs in zip(rows(never.folder)[1:], rows(always.folder)[1:], strict=True):
        assert {k: v for k, v in theirs.items() if k not in EVAL_KEYS} == {
            k: v for k, v in ours.items() if k not in EVAL_KEYS
        }
    assert all(records(never, step) == records(always, step) for step in range(1, STEPS + 1))


def test_a_checkpoint_is_a_transformers_model(run_of):
    """Its logits on a rollout are those that the rollout was sampled from, and ours."""
    run = run_of("igpo")
    folder = RunFolder(run.folder).saved()[STEPS]
    lm = AutoModelForCausalLM.from_pretrained(folder)
    ours = load_model(str(folder))
    tokenizer = load_tokenizer(settings(run.folder, run.folder, f"model.path={folder}"), data=None)
    record = records(run, STEPS)[0]
    assert tokenizer(record["question"], add_special_tokens=False).input_ids == record["prompt_ids"]
    ids = torch.tensor(record["prompt_ids"] + record["turns"][0]["ids"])
    attend = Plain()
    with torch.no_grad():
        hidden = hidden_states(ours, ids, torch.arange(len(ids)), attend)
        torch.testing.assert_close(hidden @ lm_head(ours).weight.T, lm(ids[None]).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["ppo", "ppo_ig"])
def test_a_critic_resumes_exactly_and_is_no_part_of_the_model(run_of, tmp_path, cache, name):
    whole = run_of(name)
    folder = tmp_path / "run"
    for steps in (4, STEPS):
        train(settings(folder, cache, *RUNS[name], f"train.steps={steps}"), Recorder())
    assert rows(folder) == rows(whole.folder)
    ours, theirs = (RunFolder(path).saved()[STEPS] for path in (folder, whole.folder))
    states = [torch.load(path / "learner-00000-of-00001.pt")["states"] for path in (ours, theirs)]
    assert states[0].keys() == states[1].keys()
    for weight, kinds in states[1].items():
        assert all(torch.equal(states[0][weight][kind], tensor) for kind, tensor in kinds.items()), weight
    head = states[1]["critic.weight"]
    assert head["master"].abs().max() > 0 and head["exp_avg"].shape == head["master"].shape == (48,)
    _, about = AutoModelForCausalLM.from_pretrained(theirs, output_loading_info=True)
    assert not any(about.values())
    assert whole.raw[1]["critic/value_mean"] == 0 and whole.raw[-1]["critic/value_mean"] != 0


class Plain:
    """Causal attention of one sequence."""

    def __call__(self, layer, q, k, v, *, scale, softcap, window):
        heads = [x.transpose(0, 1) for x in (q, k, v)]
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(*heads, is_causal=True, scale=scale, enable_gqa=True).transpose(0, 1)


def test_with_one_turn_per_rollout_igpo_is_grpo(tmp_path, cache):
    """No turn earns a gain, so advantages, losses and weights are GRPO's; the answers are read all the same."""
    (tmp_path / "judge.py").write_text("def reward(rollout):\n    return int(rollout.ids.sum()) % 5\n")
    one = ("rollout.max_turns=1", "train.steps=2", "eval.every=0", f"algorithm.outcome={tmp_path}/judge.py:reward")
    runs = {
        name: train(settings(tmp_path / name, cache, f"algorithm.name={name}", *one), Recorder())
        for name in ("igpo", "grpo")
    }
    for row, other in zip(*(rows(run.path)[1:] for run in runs.values()), strict=True):
        shared = {key for key in other if key.startswith(("reward/", "loss/", "group/", "turns/", "mismatch/"))}
        assert {"loss/policy", "loss/grad_norm", "reward/outcome", "group/collapsed"} <= shared
        assert {key: row[key] for key in shared} == pytest.approx({key: other[key] for key in shared}, abs=1e-6)
        assert row["tokens/scored"] > other["tokens/scored"] == 0 and other["group/collapsed"] < 1
    advantages = [[credit.advantages.item() for _, credit in run.read_rollouts("step_000002")] for run in runs.values()]
    assert advantages[0] == pytest.approx(advantages[1], abs=1e-6) and any(advantages[0])
