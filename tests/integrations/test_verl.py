"""integrations/verl.py in the installed verl: advantages by hand and by verl's own estimators, gains by ``score``
and by plain forwards."""

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

pytest.importorskip("verl", reason="pip install --no-deps -r requirements/verl.txt")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about engines that are not installed
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.trainer.ppo import core_algos
    from verl.trainer.ppo.ray_trainer import compute_advantage
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from igpo_fast import config, model
from igpo_fast.data.load import Data
from igpo_fast.data.tokenizer import load_tokenizer
from igpo_fast.errors import InputError
from igpo_fast.integrations.verl import Gains, igpo_advantages, padded
from igpo_fast.rollouts.dialect import make_dialect
from igpo_fast.rollouts.tools.search import SEARCH_TOOL
from igpo_fast.score import Scorer, read_records
from igpo_fast.transcripts import make_writer
from igpo_fast.types import Group
from igpo_fast.update.advantages import Recipe, credit_rollouts
from tests.parity import naive
from tests.test_score import sharp_model

BARE = dict(ig_center=False, ig_min_std=0.0, outcome_min_std=0.0, min_var=0.0)
"""Statistics without floors, gains without their mean."""


def settings(**igpo):
    """verl's section ``algorithm``, as its trainer hands it on: struct, so that unknown keys raise."""
    made = OmegaConf.create({"gamma": 1.0, "adv_estimator": "igpo", "use_kl_in_reward": False, "igpo": igpo})
    OmegaConf.set_struct(made, True)
    return made


def objects(values):
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def of_verl(rewards, mask, uid, algorithm):
    """Advantages by the call that verl's trainer makes."""
    tensors = {"token_level_rewards": torch.tensor(rewards), "response_mask": torch.tensor(mask)}
    data = DataProto.from_dict(tensors=tensors, non_tensors={"uid": objects(uid)})
    return compute_advantage(data, adv_estimator="igpo", config=algorithm).batch["advantages"].numpy()


# --- the estimator ---

MASK = [
    [1, 1, 0, 1, 0, 0, 1, 0],  # three turns, then padding
    [1, 1, 1, 0, 0, 0, 0, 0],  # another group's
    [1, 0, 0, 1, 1, 0, 0, 0],  # two turns; ends in a response
    [0, 0, 0, 0, 0, 0, 0, 0],  # verl's padding
    [1, 0, 1, 0, 0, 0, 0, 0],  # the other group's
]
REWARDS = [
    [0.0, 3.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0],
    [0.0, 0.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [0.0, 0.0, 8.0, 0.0, 0.0, 0.0, 0.0, 0.0],
]
UID = ["a", "b", "a", "a", "b"]


def test_advantages_by_hand():
    """Group a: gains 3, 1 and 2 have a standard deviation of sqrt(2/3), so they are 3 s, s and 2 s with s = sqrt(3/2);
    outcomes 1 and 0 become 1 and -1. Group b: a gain of 0, and outcomes 4 and 8. A later turn counts half."""
    s = 1.5**0.5
    third, second = 1.0, s + 0.5
    first = 3 * s + second / 2
    expected = [
        [first, first, 0, second, 0, 0, third, 0],
        [-1, -1, -1, 0, 0, 0, 0, 0],
        [2 * s - 0.5, 0, 0, -1, -1, 0, 0, 0],
        [0] * 8,
        [0.5, 0, 1, 0, 0, 0, 0, 0],
    ]
    rewards = copy.deepcopy(REWARDS)
    found = of_verl(rewards, MASK, UID, settings(**BARE, gamma=0.5))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    rewards[0][3], rewards[0][4] = 0.25, 0.75  # a reward inside the response counts for the turn before it
    rewards[2][5] = 0.0
    np.testing.assert_allclose(of_verl(rewards, MASK, UID, settings(**BARE, gamma=0.5)), expected, atol=1e-6)


def test_an_outcome_at_a_response_in_the_end_is_the_last_turns():
    """verl puts the outcome at the last token, whoever wrote it."""
    mask, rewards = [[1, 0, 0], [1, 0, 1]], [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    found = of_verl(rewards, mask, ["a", "a"], settings(**BARE))
    np.testing.assert_allclose(found, [[1, 0, 0], [-1, 0, -1]], atol=1e-6)


def test_a_reward_before_the_first_turn_is_that_turns():
    """Gains 2 (half of it before the turn) and 1 are raw."""
    mask, rewards = [[0, 1, 0, 1], [1, 0, 1, 0]], [[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    found = of_verl(rewards, mask, ["a", "a"], settings(**BARE, pool="raw"))
    np.testing.assert_allclose(found, [[0, 2, 0, 0], [1, 0, 0, 0]], atol=1e-6)


def test_only_every_second_turn_earns_the_gains_of_both():
    """Gains 1, 2 and 4: turn 2 earns 3, turn 3 shares the last turn's outcome."""
    mask = [[1, 0, 1, 0, 1, 0, 1], [1, 0, 1, 0, 0, 0, 0]]
    rewards = [[1.0, 0, 2.0, 0, 4.0, 0, 1.0], [7.0, 0, 0.0, 0, 0, 0, 0]]
    found = of_verl(rewards, mask, ["a", "a"], settings(**BARE, ig_every=2, pool="raw"))
    np.testing.assert_allclose(found, [[4, 0, 4, 0, 1, 0, 1], [-1, 0, -1, 0, 0, 0, 0]], atol=1e-6)


def ragged(seed):
    """Rows of one to four turns in groups of two to five, outcomes at the last attended token, no gains."""
    rng = np.random.default_rng(seed)
    uid = np.repeat(["a", "b", "c"], rng.integers(2, 6, 3))
    rng.shuffle(uid)
    mask, rewards = np.zeros((len(uid), 40)), np.zeros((len(uid), 40), dtype=np.float32)
    for row in range(len(uid)):
        end = 0
        for _ in range(rng.integers(1, 5)):
            start = end + rng.integers(1, 4) * (end > 0)
            end = start + rng.integers(1, 6)
            mask[row, start:end] = 1
        rewards[row, end - 1] = rng.normal()
    return rewards, mask, uid


@pytest.mark.parametrize("seed", range(5))
def test_outcomes_alone_are_verls_own_estimators(seed):
    """verl divides by the sample's standard deviation, igpo-fast by the population's."""
    rewards, mask, uid = ragged(seed)
    size = np.array([(uid == name).sum() for name in uid])[:, None]
    on = dict(token_level_rewards=torch.tensor(rewards), response_mask=torch.tensor(mask), index=uid)
    grpo = core_algos.compute_grpo_outcome_advantage(**copy.deepcopy(on), epsilon=0.0)[0]
    centred = core_algos.compute_grpo_outcome_advantage(**copy.deepcopy(on), norm_adv_by_std_in_grpo=False)[0]
    rloo = core_algos.get_adv_estimator_fn("rloo")(**copy.deepcopy(on))[0]
    of = lambda name: of_verl(rewards, mask, uid, settings(name=name, **BARE))  # noqa: E731
    for name in ("grpo", "igpo"):  # without gains igpo is grpo
        np.testing.assert_allclose(of(name) * np.sqrt((size - 1) / size), grpo, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(of("dr_grpo"), centred, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(of("rloo"), rloo, rtol=2e-5, atol=2e-6)
    assert grpo.abs().max() > 0.1


def refused(match, call):
    with pytest.raises(InputError, match=match) as error:
        call()
    assert len(str(error.value).splitlines()) == 1


def test_batches_that_the_estimator_refuses():
    rewards, mask = torch.tensor(REWARDS), torch.tensor(MASK)
    refused(r"\[5, 8\] and response_mask \[5, 7\]", lambda: igpo_advantages(rewards, mask[:, 1:], UID))
    refused("same shape", lambda: igpo_advantages(rewards[0], mask[0], UID))
    refused("4 uids for 5 rows", lambda: igpo_advantages(rewards, mask, UID[1:]))
    refused("no uid", lambda: igpo_advantages(rewards, mask))
    rewards[2, 4] = torch.nan
    refused("row 2 .* not finite", lambda: igpo_advantages(rewards, mask, UID))


@pytest.mark.parametrize(
    ("igpo", "verls", "match"),
    [
        (dict(ig_gat=0.1), {}, r"algorithm\.igpo\.ig_gat: .*docs/config\.md"),
        (dict(ig_gate=-1.0), {}, r"algorithm\.igpo\.ig_gate: .*greater"),
        (dict(kl=0.1), {}, r"algorithm\.igpo\.kl: verl's own"),
        (dict(preset="ig_search"), {}, r"algorithm\.igpo\.credit=query \(preset ig_search\)"),
        (dict(preset="a2tgpo"), {}, r"igpo\.adaptive_clip=0\.3"),
        (dict(name="ppo"), {}, "adv_estimator=gae"),
        (dict(gamma=0.9), dict(gamma=0.5), r"algorithm\.gamma=0\.5"),
        ({}, dict(use_kl_in_reward=True), "use_kl_loss"),
        ({}, dict(rollout_correction=dict(rollout_rs="token_k1")), "rollout_rs"),
    ],
)
def test_settings_that_are_refused(igpo, verls, match):
    algorithm = OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(settings(**igpo))), verls)
    refused(match, lambda: of_verl(REWARDS, MASK, UID, algorithm))


def test_without_settings_of_ours_it_is_the_papers_preset():
    bare = OmegaConf.create({"gamma": 1.0})
    OmegaConf.set_struct(bare, True)
    papers = of_verl(REWARDS, MASK, UID, settings(preset="paper"))
    assert np.abs(papers).max() > 0.5
    for algorithm in (bare, settings(preset="a2tgpo", adaptive_clip=0.0, pool="separate", accumulate="sum")):
        found = of_verl(REWARDS, MASK, UID, algorithm)
        np.testing.assert_allclose(found, papers, atol=2e-3)  # the presets differ by their floors


# --- gains ---


@pytest.fixture(scope="module")
def policy():
    return random_policy()


def random_policy():
    """A sharp model and the made-up world's tokenizer."""
    words = load_tokenizer(config.load(), Data((), (), {}))
    lm = sharp_model(words)
    lm.set_attn_implementation("sdpa")
    return lm, words


def message(role, content):
    return {"role": role, "content": content}


def trajectories():
    """Two questions' rollouts, mixed; one answers at once."""
    search, answer = (message("assistant", f"<{tag}> buga tiza </{tag}>") for tag in ("search", "answer"))
    found, other = (message("tool", f"mavi fiti {word} buga .") for word in ("country", "birthplace"))
    rows = []
    for asked, answers, *turns in [
        ("buga tiza birthplace ?", ["mavi fiti", "tiza"], search, found, search, other, answer),
        ("fiti mavi country ?", ["tiza buga"], search, other, answer),
        ("buga tiza birthplace ?", ["mavi fiti", "tiza"], search, other, other, answer),
        ("fiti mavi country ?", ["tiza buga"], answer),
        ("buga tiza birthplace ?", ["mavi fiti", "tiza"], search, other, search, other, search, found, answer),
    ]:
        rows.append({"question": asked, "answers": answers, "messages": [message("user", asked), *turns]})
    return rows


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return written(tmp_path_factory.mktemp("trajectories"))


def written(folder):
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in trajectories()))
    return list(read_records(path))


def laid_out(records, words, left=True):
    """The trajectories as verl has them; prompts padded on the left as in its agent loop, or on the right as a padded
    nested tensor. Also the turns' ends."""
    budgets = dict(max_passage_tokens=128, max_answer_tokens=64, max_answers=4)
    writer = make_writer(make_dialect("tags", words, (SEARCH_TOOL,), **budgets))
    pieces = [writer.write(record, apart=True, last=True) for record in records]
    width = max(len(prompt) for prompt, _ in pieces) + 2
    lengths = [sum(len(part) for turn in turns for part in turn) for _, turns in pieces]
    n, most = len(pieces), max(lengths) + 3
    pad = words.pad_token_id or 0
    prompts, responses = torch.full((n, width), pad), torch.full((n, most), pad)
    attention, mask, ends = torch.zeros(n, width + most), torch.zeros(n, most), []
    for row, (prompt, turns) in enumerate(pieces):
        place = slice(width - len(prompt), width) if left else slice(len(prompt))
        prompts[row, place], attention[row, place] = torch.tensor(prompt).long(), 1
        attention[row, width : width + lengths[row]] = 1
        at, last = 0, []
        for ids, response in turns:
            responses[row, at : at + len(ids) + len(response)] = torch.tensor([*ids, *response])
            mask[row, at : at + len(ids)] = 1
            last.append(at + len(ids) - 1)
            at += len(ids) + len(response)
        ends.append(last)
    tensors = dict(prompts=prompts, responses=responses, attention_mask=attention.long(), response_mask=mask.long())
    truths = ["<|answer_split|>".join(record.question.answers) for record in records]
    told = [{"ground_truth": truth, "style": "rule"} for truth in truths]
    told[1] = {"ground_truth": {"target": np.array(records[1].question.answers)}}  # Search-R1's, from parquet
    uid = [record.question.question for record in records]
    return DataProto.from_dict(tensors=tensors, non_tensors={"reward_model": objects(told), "uid": objects(uid)}), ends


@pytest.mark.parametrize("left", [True, False], ids=["padded-left", "padded-right"])
@pytest.mark.parametrize(("basis", "answers", "error"), [("log_prob", "first", 1e-4), ("prob", "max", 1e-6)])
def test_gains_are_those_of_score(policy, records, basis, answers, error, left):
    lm, words = policy
    batch, ends = laid_out(records, words, left)
    gains = Gains(lm, words, settings(basis=basis, answers=answers), temperature=1.3)(batch)
    packed = model.use_attend(copy.deepcopy(lm))
    scorer = Scorer(packed, words, temperature=1.3, basis=basis, answers=answers)
    expected = np.zeros(gains.shape)
    for row, scored in enumerate(scorer.score(records)):
        expected[row, ends[row][:-1]] = scored.gains
    assert np.count_nonzero(expected) == 7 and np.abs(expected).max() > 100 * error
    np.testing.assert_allclose(gains, expected, atol=error)


def test_gains_are_those_of_plain_forwards(policy, records):
    """Each prefix with the forced answer in a forward of its own, from the batch's tokens."""
    lm, words = policy
    batch, ends = laid_out(records, words)
    gains = Gains(lm, words, settings())(batch)
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(lm.config), attn_implementation="eager").eval()
    plain.load_state_dict(lm.state_dict())
    row, answer = 4, "mavi fiti"
    wrapped = words(f"<answer> {answer} </answer>", add_special_tokens=False).input_ids
    known = {name: batch.batch[name][row] for name in ("prompts", "responses", "attention_mask", "response_mask")}
    width = len(known["prompts"])
    prefix = known["prompts"][known["attention_mask"][:width] == 1].tolist()
    response, mask = known["responses"].tolist(), known["response_mask"].tolist()
    starts = [i for i in range(1, len(mask)) if mask[i] and not mask[i - 1]]
    values = [naive.answer_value(plain, prefix + response[:at], wrapped, 1, 3) for at in (0, *starts)]
    np.testing.assert_allclose(gains[row, ends[row][:-1]], np.diff(values), atol=1e-4)


def test_groups_share_a_pass_and_small_packs_change_nothing(policy, records):
    lm, words = policy
    batch, _ = laid_out(records, words)
    before = lm.config._attn_implementation
    found = []
    for budget, passes in ((16384, 1), (40, 4)):  # one for all; one for each rollout that has gains
        gains, calls = Gains(lm, words, settings(), token_budget=budget), []
        gains._scorer.policy.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        found.append(gains(batch))
        assert len(calls) == passes
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)
    assert lm.config._attn_implementation == before == "sdpa"


def test_what_stands_before_the_first_turn_belongs_to_the_prompt(policy, records):
    """The prompts' last tokens as the responses' first."""
    lm, words = policy
    batch, _ = laid_out(records, words)
    prompts, responses, mask = (batch.batch[name] for name in ("prompts", "responses", "response_mask"))
    moved = DataProto.from_dict(
        tensors={
            "prompts": prompts[:, :-2],
            "responses": torch.cat([prompts[:, -2:], responses], dim=1),
            "response_mask": torch.cat([torch.zeros_like(mask[:, :2]), mask], dim=1),
            "attention_mask": batch.batch["attention_mask"],
        },
        non_tensors=batch.non_tensor_batch,
    )
    gains = Gains(lm, words, settings())
    expected = gains(batch)
    assert expected.any()
    np.testing.assert_allclose(gains(moved)[:, 2:], expected, atol=1e-5)


def test_rows_of_the_transfer_queue_have_the_same_gains(policy, records):
    """As verl's agent loop puts them into its queue, and a worker gets them: without padding."""
    lm, words = policy
    batch, _ = laid_out(records, words)
    width = batch.batch["prompts"].shape[1]
    rows = []
    for row in range(len(batch)):
        kept = batch.batch["attention_mask"][row] == 1
        tensors = {name: batch.batch[name][row, kept[width:]] for name in ("responses", "response_mask")}
        tensors["prompts"] = batch.batch["prompts"][row, kept[:width]]
        rows.append(tensors | {name: batch.non_tensor_batch[name][row] for name in ("reward_model", "uid")})
    queued = list_of_dict_to_tensordict(rows)
    assert queued["responses"].is_nested
    gains = Gains(lm, words, settings())
    found, expected = gains(padded(queued)), gains(batch)
    np.testing.assert_allclose(found, expected[:, : found.shape[1]], atol=1e-5)
    assert not expected[:, found.shape[1] :].any() and expected.any()


def test_the_advantages_are_a_runs_own(policy, records):
    """From tokens to advantages through verl's tensors, and through igpo-fast's types."""
    lm, words = policy
    batch, ends = laid_out(records, words)
    outcomes = [1.0, 0.25, 0.0, 0.75, 0.5]
    rewards = Gains(lm, words, settings())(batch)
    for row, outcome in enumerate(outcomes):
        rewards[row, ends[row][-1]] += outcome
    batch.batch["token_level_rewards"] = rewards
    found = compute_advantage(batch, adv_estimator="igpo", config=settings()).batch["advantages"]
    scorer = Scorer(model.use_attend(copy.deepcopy(lm)), words)
    values = [scored.values for scored in scorer.score(records)]
    rollouts = [scorer.tokenise(record).rollout for record in records]
    order = [0, 2, 4, 1, 3]
    groups = [Group(records[rows[0]].question, tuple(rollouts[row] for row in rows)) for rows in (order[:3], order[3:])]
    credits = credit_rollouts(groups, [values[row] for row in order], Recipe(), [outcomes[row] for row in order])
    for row, credit in zip(order, credits, strict=True):
        np.testing.assert_allclose(found[row, ends[row]], credit.advantages, atol=2e-3)


def changed(batch, **tensors):
    made = copy.deepcopy(batch)
    made.batch.update(tensors)
    return made


def test_batches_without_gains_are_refused(policy, records):
    lm, words = policy
    gains = Gains(lm, words, settings())
    batch, _ = laid_out(records, words)
    for column, match in [
        (None, r"no non_tensor_batch\[.reward_model.\]"),
        ({}, "row 1: reward_model has no ground_truth"),
        ({"ground_truth": " <|answer_split|> "}, "row 1: reward_model has no ground_truth"),
        ({"ground_truth": {"answer": "x"}}, "row 1: reward_model.ground_truth: an object without target"),
    ]:
        made = copy.deepcopy(batch)
        if column is None:
            del made.non_tensor_batch["reward_model"]
        else:
            made.non_tensor_batch["reward_model"][1] = column
        refused(match, lambda made=made: gains(made))
    mask, attention = batch.batch["response_mask"], batch.batch["attention_mask"]
    refused(r"response_mask \[5, \d+\]: expected", lambda: gains(changed(batch, response_mask=mask[:, 1:])))
    refused(r"attention_mask \[5, \d+\]: expected", lambda: gains(changed(batch, attention_mask=attention[:, 1:])))
    refused("row 0: response_mask marks", lambda: gains(changed(batch, response_mask=torch.ones_like(mask))))
    without = copy.deepcopy(batch)
    del without.batch["attention_mask"]
    refused("no attention_mask", lambda: gains(without))
    assert lm.config._attn_implementation == "sdpa"


@pytest.mark.slow
def test_verl_finds_the_estimator():
    """As docs/verl.md says: a variable of the environment, in a fresh process."""
    code = "import verl; from verl.trainer.ppo.core_algos import get_adv_estimator_fn as f; print(f('igpo').__module__)"
    environment = os.environ | {"VERL_USE_EXTERNAL_MODULES": "igpo_fast.integrations.verl"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["igpo_fast.integrations.verl"], done.stderr


@pytest.mark.slow
def test_sharded_weights(tmp_path):
    """Two processes under FSDP2, with two passes and one to take: the gains of whole weights, and no rank waits."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, __file__, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    passes, errors = zip(*(json.loads((tmp_path / f"{rank}" / "told").read_text()) for rank in (0, 1)), strict=True)
    assert passes == (2, 2) and max(errors) < 1e-5


def on_a_rank(folder):
    """One of the two processes: the first has three rollouts with gains, the second one."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    (folder / f"{rank}").mkdir()
    lm, words = random_policy()
    batch, _ = laid_out(written(folder / f"{rank}"), words)
    mine = slice(0, 3) if rank == 0 else slice(3, 5)
    expected = Gains(lm, words, settings())(batch)[mine]
    mesh = init_device_mesh("cpu", (2,))
    for layer in lm.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(lm, mesh=mesh)
    logits = lm(input_ids=torch.arange(8)[None]).logits
    gains, passes = Gains(lm, words, settings(), token_budget=40, sharers=dist.group.WORLD), []
    gains._scorer.policy.register_forward_hook(lambda *_: passes.append(1))
    found = gains(batch[mine])
    again = lm(input_ids=torch.arange(8)[None]).logits  # verl's own pass goes on as before
    error = max(float((found - expected).abs().max()), float((again - logits).abs().max()))
    (folder / f"{rank}" / "told").write_text(json.dumps([len(passes), error]))
    dist.destroy_process_group()


if __name__ == "__main__":
    on_a_rank(Path(sys.argv[1]))
