"""IGPOTrainer beside TRL's GRPOTrainer and beside plain forwards of the model."""

import json
import logging
import math
import re
import subprocess
import sys
from functools import partial
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("trl", exc_type=ImportError)

from datasets import Dataset
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from igpo_fast import model
from igpo_fast.errors import InputError
from igpo_fast.integrations.trl import IGPOConfig, IGPOTrainer, rollout_of
from igpo_fast.run.records import record_of
from igpo_fast.score import load_scorer, score_file
from igpo_fast.types import Question
from tests.families import tokenizer_of
from tests.integrations.worlds import ARGS, World, f1, for_trl
from tests.tiny import settings

ROOT = Path(__file__).parents[2]
GROUPS, SIZE = 3, 4
PAPER = {"preset": "paper"}


@pytest.fixture(scope="module")
def world(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("trl")
    return World(settings(folder / "run", cache, "world.min_hops=2", "world.max_hops=3"), folder / "model")


@pytest.fixture(scope="module")
def recorded(world):
    """Rollouts of ``GROUPS`` questions, most of them of several turns."""
    asked = [q for q in world.setup.data.train[:GROUPS] for _ in range(SIZE)]
    rollouts = world.sample([q.question for q in asked], world.model())
    assert max(len(r.turns) for r in rollouts) > 2 and len({len(r.ids) for r in rollouts}) > 2
    return rollouts


def outcomes_of(rollouts):
    """Distinct outcomes, so that every group has a gradient."""
    return [round(math.sin(number), 3) for number in range(len(rollouts))]


def made(world, rollouts, folder, trainer=IGPOTrainer, lm=None, rewards=None, **options):
    """A trainer whose rollout_func returns ``rollouts``, and the rows of its batch."""
    rows = [{"prompt": r.question.question, "answers": list(r.question.answers)} for r in rollouts]
    options = {"per_device_train_batch_size": len(rows), "num_generations": SIZE} | ARGS | options
    config = IGPOConfig if issubclass(trainer, IGPOTrainer) else GRPOConfig
    if config is GRPOConfig:
        options.pop("dialect")
    args = config(output_dir=str(folder), **options)
    found = trainer(
        world.model() if lm is None else lm,
        lambda completions, **_: outcomes_of(rollouts) if rewards is None else rewards,
        args, train_dataset=Dataset.from_list(rows), processing_class=world.tokenizer,
        rollout_func=lambda prompts, _: for_trl(rollouts),
    )  # fmt: skip
    found.current_gradient_accumulation_steps = args.gradient_accumulation_steps  # as ``train`` sets it
    return found, rows


def gradients(trainer, rows):
    """Loss and gradients of a whole generation batch, its micro-batches added up."""
    torch.manual_seed(0)  # TRL shuffles
    loss = sum(trainer.training_step(trainer.model, rows, None) for _ in range(trainer.args.steps_per_generation))
    return loss, {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def close(ours, theirs):
    """Loss and gradients agree to 1e-4, of the largest gradient."""
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-4, rtol=1e-4)
    largest = max(float(gradient.abs().max()) for gradient in theirs[1].values())
    assert ours[1].keys() == theirs[1].keys() and largest > 1e-3
    for name, gradient in theirs[1].items():
        assert (ours[1][name] - gradient).abs().max() <= 1e-4 * largest, name


def test_gains_are_those_of_score(world, recorded, tmp_path):
    source, target = tmp_path / "rollouts.jsonl", tmp_path / "scored.jsonl"
    source.write_text("".join(json.dumps(record_of(rollout)) + "\n" for rollout in recorded))
    score_file(source, target, partial(load_scorer, str(world.folder)))
    scored = [json.loads(line) for line in target.read_text().splitlines()]
    assert max(abs(gain) for row in scored for gain in row["info_gain"]) > 0.1
    for packed in ("on", "off"):
        trainer, rows = made(world, recorded, tmp_path, packed=packed, algorithm=PAPER)
        rollouts = trainer._generate_and_score_completions(rows)["rollouts"]
        for row, values in zip(scored, trainer.values(rollouts), strict=True):
            np.testing.assert_allclose(values, row["values"], atol=1e-4)
        gradients(trainer, rows)  # logs the gains that it trains on, in one pass where it is packed
        logged = trainer._metrics["train"]["reward/ig_mean"][-1]
        assert logged == pytest.approx(np.mean([gain for row in scored for gain in row["info_gain"]]), abs=1e-4)


OPTIONS = {
    "one pass": {},
    "per sequence": {"loss_type": "grpo", "temperature": 0.7, "beta": 0.1},
    "two micro-batches": {"per_device_train_batch_size": GROUPS * SIZE // 2, "gradient_accumulation_steps": 2},
    "old log-probabilities": {"num_iterations": 2, "importance_sampling_level": "sequence"},
    "entropy": {"loss_type": "cispo", "entropy_coef": 0.1, "top_entropy_quantile": 0.5},
    "recomputed": {"gradient_checkpointing": False, "loss_type": "dr_grpo"},
}


@pytest.mark.parametrize("algorithm", [PAPER, {"preset": "paper_v1", "gamma": 0.9}, {"name": "ig_only"}], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_packed_trains_as_separate_sequences(world, recorded, tmp_path, algorithm, options):
    packed, separate = (
        gradients(*made(world, recorded, tmp_path, algorithm=algorithm, packed=packed, **options))
        for packed in ("on", "off")
    )
    close(packed, separate)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_packed_without_gains_trains_as_grpo_trainer(world, recorded, tmp_path, options):
    ours, rows = made(world, recorded, tmp_path, algorithm={"name": "grpo"}, packed="on", **options)
    assert ours.packed and not ours.one_pass
    theirs, _ = made(world, recorded, tmp_path, trainer=GRPOTrainer, **options)
    close(gradients(ours, rows), gradients(theirs, rows))


def plain_value(lm, tokenizer, ids, answer, temperature=1.0):
    """Mean log-probability of an answer's words in ``<answer> ... </answer>`` after a prefix, by a plain forward."""
    before, words = (tokenizer(text, add_special_tokens=False).input_ids for text in ("<answer>", answer))
    with torch.no_grad():
        logits = lm(torch.tensor([[*ids, *before, *words]])).logits[0] / temperature
    logp = logits.log_softmax(-1)[-len(words) - 1 : -1]
    return float(logp[range(len(words)), words].mean())


def test_advantages_by_hand_in_grpo_trainers_loss(world, recorded, tmp_path):
    """The paper's rule written out, fed to GRPOTrainer's own loss."""
    lm = world.model().eval()
    theirs, rows = made(world, recorded, tmp_path, trainer=GRPOTrainer)
    outcomes, advantages = outcomes_of(recorded), []
    for start in range(0, len(recorded), SIZE):
        group = recorded[start : start + SIZE]
        gains = []
        for rollout in group:
            prefix, values = rollout.prompt_ids.tolist(), []
            for turn in rollout.turns:
                values.append(plain_value(lm, world.tokenizer, prefix, rollout.question.answers[0]))
                prefix += [*turn.ids.tolist(), *turn.response_ids.tolist()]
            gains.append(np.diff(values))
        pool, last = np.concatenate(gains), np.array(outcomes[start : start + SIZE])
        z = lambda x, pool: (x - pool.mean()) / (np.sqrt(pool.var() + 1e-8) + 1e-6)  # noqa: E731
        for gain, outcome in zip(gains, last, strict=True):
            rewards = [*(z(gain, pool) if len(pool) > 1 else gain * 0), z(outcome, last)]
            advantages.append(np.cumsum(rewards[::-1])[::-1])
    inputs = theirs._generate_and_score_completions(rows)
    inputs["advantages"] = torch.zeros(inputs["completion_ids"].shape)
    for row, rollout, of_turns in zip(inputs["advantages"], recorded, advantages, strict=True):
        at = 0
        for turn, advantage in zip(rollout.turns, of_turns, strict=True):
            row[at : at + len(turn.ids)] = advantage
            at += len(turn.ids) + len(turn.response_ids)
    loss = theirs._compute_loss(theirs.model, inputs)
    loss.backward()
    reference = loss.detach(), {name: p.grad for name, p in theirs.model.named_parameters()}
    ours, rows = made(world, recorded, tmp_path, packed="on", algorithm={"preset": "paper"})
    assert ours.one_pass
    close(gradients(ours, rows), reference)


def test_masked_truncated_rollouts_teach_nothing(world, recorded, tmp_path):
    options = dict(algorithm=PAPER, mask_truncated_completions=True)
    packed, separate = (made(world, recorded, tmp_path, packed=packed, **options) for packed in ("on", "off"))
    ended = recorded[0].ids[-1].item()
    for trainer, _ in (packed, separate):
        trainer.eos_token_ids = [ended]
    assert len({rollout.ids[-1].item() for rollout in recorded}) > 1
    close(gradients(*packed), gradients(*separate))


def test_tokens_that_were_not_read_cannot_overflow(world, recorded, tmp_path):
    """A tool's tokens may be so unlikely that a ratio to nothing read would be infinite, and 0 * inf is NaN."""
    trainer, rows = made(world, recorded, tmp_path, packed="on", algorithm=PAPER, num_iterations=2)
    inputs = trainer._generate_and_score_completions(rows)
    tools = (inputs["completion_mask"] * (1 - inputs["tool_mask"])).bool()
    assert tools.any()
    inputs["old_per_token_logps"] = torch.where(tools, -500.0, inputs["old_per_token_logps"])
    assert trainer._compute_loss(trainer.model, inputs).isfinite()


def test_the_model_still_samples_and_evaluates_as_it_did(world, recorded, tmp_path):
    trainer, rows = made(world, recorded, tmp_path, packed="on", algorithm=PAPER)
    assert trainer.model.config._attn_implementation != trainer._packed.config._attn_implementation
    theirs = {name: p.data_ptr() for name, p in trainer.model.named_parameters()}
    assert theirs == {name: p.data_ptr() for name, p in trainer._packed.named_parameters()}
    trainer.model.eval()
    loss, _, _ = trainer.prediction_step(trainer.model, rows, True)
    assert loss.isfinite() and "reward/ig_mean" in trainer._metrics["eval"]


def test_the_choice_is_made_once_and_logged(world, recorded, tmp_path, caplog):
    bloom = BloomForCausalLM(BloomConfig(vocab_size=len(world.tokenizer), hidden_size=32, n_layer=1, n_head=2))
    with caplog.at_level(logging.INFO, logger="igpo_fast.integrations.trl"):
        trainer, rows = made(world, recorded, tmp_path, lm=bloom, algorithm=PAPER)
    assert not trainer.packed and "separate sequences, because of BloomForCausalLM" in caplog.text
    loss, found = gradients(trainer, rows)
    assert loss.isfinite() and any(gradient.any() for gradient in found.values())
    with pytest.raises(InputError, match=r"packed=on: BloomForCausalLM cannot run packed.*use packed=auto"):
        made(world, recorded, tmp_path, lm=bloom, algorithm=PAPER, packed="on")
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="igpo_fast.integrations.trl"):
        made(world, recorded, tmp_path, algorithm=PAPER)
        made(world, recorded, tmp_path, algorithm=PAPER, num_iterations=2)
        made(world, recorded, tmp_path, algorithm=PAPER, cast_lm_head_to_fp32=True)
    assert [record.getMessage() for record in caplog.records] == [
        "IGPOTrainer: packed trees, one pass per update",
        "IGPOTrainer: packed trees, answers in a pass before per update",
        "IGPOTrainer: separate sequences, because of cast_lm_head_to_fp32",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": {"presett": "robust"}}, "unknown key algorithm.presett; did you mean algorithm.preset"),
        ({"algorithm": {"name": "ppo"}}, "algorithm.name=ppo: choose igpo, ig_only, grpo"),
        ({"algorithm": {"kl": 0.1}}, "algorithm.kl: beta decides that in TRL; leave it out"),
        ({"algorithm": {"preset": "ig_search"}}, "algorithm.credit=query .preset ig_search.: TRL does not tell"),
        ({"packed": "yes"}, "packed='yes': choose auto, on or off"),
        ({"scale_rewards": "none"}, "scale_rewards=none does nothing with algorithm.name=igpo"),
    ],
)
def test_settings_that_cannot_be_honoured(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        IGPOConfig(output_dir=str(tmp_path), **(ARGS | options))


def test_rows_and_rollouts_that_cannot_be_scored(world, recorded, tmp_path):
    trainer, rows = made(world, recorded, tmp_path, algorithm=PAPER)
    for row, message in (
        ({"prompt": "x"}, "a row without an accepted answer .none of answers"),
        ({"prompt": "x", "answers": [" "]}, "a row without an accepted answer"),
        ({"prompt": "x", "answers": 1.5j}, "answers"),
    ):
        with pytest.raises(InputError, match=message):
            trainer._generate_and_score_completions([row, *rows[1:]])
    with pytest.raises(InputError, match="0 of them the policy's"):
        rollout_of(Question("q", "", ()), 0, [1], [2, 3], [0, 0])
    with pytest.raises(InputError, match="a completion of 2 tokens with a mask of 1"):
        rollout_of(Question("q", "", ()), 0, [1], [2, 3], [1])
    trainer, rows = made(world, recorded, tmp_path, algorithm=PAPER, rewards=[None] + [1.0] * (len(rows) - 1))
    with pytest.raises(InputError, match="no reward function scored rollout 0"):
        trainer._generate_and_score_completions(rows)


def test_turns_are_runs_of_the_mask():
    question = Question("q", "", ())
    rollout = rollout_of(question, 2, [1, 2], [3, 4, 5, 6, 7, 8, 9], [0, 1, 1, 0, 0, 1, 0])
    assert rollout.prompt_ids.tolist() == [1, 2, 3]
    assert [(t.ids.tolist(), t.response_ids.tolist()) for t in rollout.turns] == [([4, 5], [6, 7]), ([8], [])]
    assert rollout.boundaries.tolist() == [3, 7] and rollout.index == 2
    whole = rollout_of(question, 0, [1, 2], [3, 4])
    assert [t.ids.tolist() for t in whole.turns] == [[3, 4]]


class Lookup:
    """An environment of TRL's."""

    def reset(self, **_) -> str | None:
        return None

    def look(self, word: str) -> str:
        """Look a word up.

        Args:
            word: The word.
        """
        return f"{word} is blue"


class Scripted(IGPOTrainer):
    """What is sampled is given: every other rollout calls the tool, then answers; the others answer at once."""

    CALL = '<tool_call>\n{"name": "look", "arguments": {"word": "sky"}}\n</tool_call><|im_end|>'
    ANSWER = "<answer>blue</answer><|im_end|>"

    def _generate_single_turn(self, prompt_ids, *_, **__):
        first = len(prompt_ids) == self.args.per_device_train_batch_size
        said = [self.CALL if first and i % 2 == 0 else self.ANSWER for i in range(len(prompt_ids))]
        return [self._tokenizer(text, add_special_tokens=False).input_ids for text in said], None


@pytest.fixture
def tokenizer():
    """Small, with Qwen3's template, whose tool calls TRL reads."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of("qwen3").backend_tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template=files("trl").joinpath("chat_templates/qwen3.jinja").read_text(),
    )  # fmt: skip


def small(tokenizer):
    """A model for a tokenizer, as transformers would load it."""
    lm = model.build(
        len(tokenizer), hidden_size=32, layers=2, heads=2, kv_heads=1, ffn_size=32, max_tokens=4096,
        tie_embeddings=False, seed=0,
    )  # fmt: skip
    lm.set_attn_implementation("sdpa")
    return lm


def test_environments_of_trl(tokenizer, tmp_path):
    """TRL's own tool loop, in a chat template: turns are what was sampled, and answers stand in the next turn."""
    rows = [{"prompt": [{"role": "user", "content": "The sky?"}], "answer": "blue"}] * 4
    found = []
    for packed in ("on", "off"):
        args = IGPOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, packed=packed, algorithm=PAPER,
            **(ARGS | {"dialect": "chat"}),
        )  # fmt: skip
        trainer = Scripted(
            small(tokenizer), lambda completions, **_: outcomes_of(completions), args,
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer, environment_factory=Lookup,
        )  # fmt: skip
        trainer.current_gradient_accumulation_steps = 1
        rollouts = trainer._generate_and_score_completions(rows)["rollouts"]
        assert [[tokenizer.decode(turn.ids) for turn in r.turns] for r in rollouts] == [
            [Scripted.CALL, Scripted.ANSWER], [Scripted.ANSWER]
        ] * 2  # fmt: skip
        response = tokenizer.decode(rollouts[0].turns[0].response_ids)
        assert "sky is blue" in response and response.endswith("<|im_start|>assistant\n")
        found.append(gradients(trainer, rows))
    close(*found)


def written(number):
    """The programs in docs/trl.md."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs/trl.md").read_text(), re.DOTALL)[number]


def test_the_program_in_the_docs_runs(tokenizer, tmp_path, monkeypatch):
    small(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    program = written(0)
    smaller = {
        "Qwen/Qwen3-0.6B": str(tmp_path / "model"),
        "max_completion_length=1024": "max_completion_length=16",
        "max_steps=100": "max_steps=2, bf16=False, use_cpu=True, report_to='none', save_steps=2",
    }
    for text, instead in smaller.items():
        assert program.count(text) == 1
        program = program.replace(text, instead)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(program, found)
    assert found["trainer"].one_pass and found["trainer"].state.global_step == 2
    assert (tmp_path / "library/checkpoint-2/model.safetensors").exists()


@pytest.mark.parametrize("corrected", [False, True])
def test_the_fused_loss_in_the_docs_is_grpo_trainers(world, recorded, tmp_path, corrected):
    found = {}
    exec(written(1), found)
    options = dict(loss_type="grpo", temperature=0.8, beta=0.1, use_bias_correction_kl=corrected)
    theirs = made(world, recorded, tmp_path, trainer=GRPOTrainer, **options)
    ours = made(world, recorded, tmp_path, trainer=found["FusedGRPOTrainer"], **options)
    close(gradients(*ours), gradients(*theirs))


def test_adapters_are_trained_through_packed_trees(world, recorded, tmp_path):
    peft = pytest.importorskip("peft")

    def adapted():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")
        return peft.get_peft_model(world.model(), config)

    found = [
        gradients(*made(world, recorded, tmp_path, lm=adapted(), packed=packed, algorithm=PAPER, beta=0.1))
        for packed in ("on", "off")
    ]
    assert all("lora" in name for name in found[0][1])
    close(*found)


def test_mixed_precision(world, recorded, tmp_path):
    """TRL's default: float32 weights under bfloat16's autocast."""
    options = dict(algorithm=PAPER, bf16=True)
    on, off = (gradients(*made(world, recorded, tmp_path, packed=packed, **options)) for packed in ("on", "off"))
    theirs = torch.cat([gradient.flatten() for gradient in off[1].values()])
    ours = torch.cat([on[1][name].flatten() for name in off[1]])
    assert (ours - theirs).norm() <= 0.1 * theirs.norm()


@pytest.mark.slow
def test_groups_may_span_processes(world, recorded, tmp_path):
    alone = gradients(*made(world, recorded, tmp_path, packed="off", algorithm=PAPER))[1]
    torch.save((recorded, world.tokenizer, alone), tmp_path / "recorded.pt")
    (tmp_path / "model").symlink_to(world.folder)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, "-m", "tests.integrations.two_ranks", str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_forty_steps_on_the_quickstart_improve_f1(tmp_path):
    """The quickstart's warm start of 0.4M parameters, GRPOTrainer's loop, information gain."""
    from igpo_fast import config

    folders = [f"run.dir={tmp_path}", f"run.cache={tmp_path}"]
    quick = config.load(ROOT / "configs/quickstart.yaml", ["train.seed=101", *folders])
    world = World(quick, tmp_path / "model")

    def score(model):
        asked = world.setup.data.eval[:256]
        return float(np.mean(for_trl(world.sample([q.question for q in asked], model))["f1"]))

    args = IGPOConfig(
        output_dir=str(tmp_path), max_steps=40, per_device_train_batch_size=128, num_generations=8, loss_type="grpo",
        learning_rate=3e-4, warmup_steps=10, lr_scheduler_type="constant_with_warmup", gradient_checkpointing=False,
        algorithm={"preset": "robust"}, **ARGS,
    )  # fmt: skip
    trainer = IGPOTrainer(
        world.model(), f1, args, train_dataset=world.dataset(), processing_class=world.tokenizer, rollout_func=world
    )
    assert trainer.one_pass
    before = score(trainer.model)
    trainer.train()
    after = score(trainer.model)
    print(f"F1 {before:.3f} -> {after:.3f}")
    assert after > before + 0.1, (before, after)  # standard errors are 0.02
