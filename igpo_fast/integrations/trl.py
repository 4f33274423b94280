"""IGPO inside TRL 1.16 (docs/trl.md): ``IGPOTrainer`` is its ``GRPOTrainer`` with an advantage per turn.

TRL's mask of tool tokens tells turns: a run of the policy's tokens is a turn, what follows it up to the next turn is
the response. Completion ids are used as they were sampled. TRL's own loss takes the advantages, one per token, so its
options hold. What differs is what reads the tokens:

    packed      one tree per group of rollouts: the prompt once, answers as branches behind every boundary, and the LM
                head on the policy's tokens and the answers alone. If a micro-batch holds whole groups, the values come
                from the pass that trains; else from a pass before it.
    separate    TRL's padded sequences, and another for each prefix and answer.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, is_peft_model
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import pad

from igpo_fast.config import Algorithm, Config
from igpo_fast.config_load import validated
from igpo_fast.data.fields import BadField
from igpo_fast.data.questions import ANSWER_KEYS, accepted_answers
from igpo_fast.errors import InputError
from igpo_fast.model import hidden_states_of_loss, lm_head, probe, recompute_layers
from igpo_fast.rollouts.dialect import make_dialect
from igpo_fast.rollouts.tools.search import SEARCH_TOOL
from igpo_fast.types import Credit, Group, Question, Rollout, Turn
from igpo_fast.update.advantages import credit_rollouts, recipe_of, reward_metrics
from igpo_fast.update.gains import values_of
from igpo_fast.update.packs import means_of
from igpo_fast.update.policy import make_trees
from igpo_kernels import ANSWER, TreePlan, linear_logprob, pack

logger = logging.getLogger(__name__)

NAMES = ("igpo", "ig_only", "grpo")
READ = frozenset(
    {
        "name", "preset", "basis", "answers", "wrapper", "gain", "pool", "ig_gate", "ig_center", "ig_min_std",
        "outcome_min_std", "min_var", "accumulate", "ig_weight", "ig_weight_end", "ig_spread", "ig_every", "gamma",
    }
)  # fmt: skip
"""Keys of section ``algorithm`` that shape gains and advantages."""
OUT_OF_REACH = (
    "ig_tools", "turn_format_penalty", "redundancy_penalty", "adaptive_clip", "credit", "baseline", "value_model",
)  # fmt: skip
"""Keys that need the turns' calls, other models or another loss: only their defaults will do."""
INSTEAD = {
    "clip_low": "epsilon", "clip_high": "epsilon_high", "dual_clip": "delta", "kl": "beta", "entropy": "entropy_coef",
    "aggregation": "loss_type", "surrogate": "loss_type", "ratio": "importance_sampling_level",
    "outcome": "reward_funcs", "format_penalty": "reward_funcs", "f1_normalisation": "reward_funcs",
    "passes": "packed", "pseudo_answer": "answer_column",
}  # fmt: skip
"""What of TRL's or of ``IGPOConfig`` decides in place of a key."""
LOGGED = ("reward/ig_", "value/", "turns/mean", "group/collapsed")
"""Metrics of ``reward_metrics`` that TRL's log gets; the others are about what TRL's reward functions measure."""


@dataclass
class IGPOConfig(GRPOConfig):
    """``GRPOConfig`` with the settings of information gain. GRPOConfig's own keys rule sampling and the loss.

    Raises:
        InputError: a key that is unknown, that TRL decides, or that the trainer cannot honour.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "algorithm"]  # noqa: RUF012 (TrainingArguments reads it so)

    algorithm: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keys of igpo-fast's section algorithm about gains, like {'preset': 'robust'}."},
    )
    dialect: str = field(
        default="chat",
        metadata={
            "help": "What a forced answer stands in: a turn of the tokenizer's chat template (chat), or the tags of "
            "Search-R1 (tags). algorithm.wrapper sets another text."
        },
    )
    answer_column: str | None = field(
        default=None,
        metadata={"help": "Column with the accepted answers, a text or a list; None takes answers, answer, ..."},
    )
    max_answer_tokens: int = field(default=64, metadata={"help": "Longest answer; longer ones are cut for scoring."})
    max_answers: int = field(default=4, metadata={"help": "Most accepted answers that algorithm.answers looks at."})
    packed: str = field(
        default="auto",
        metadata={"help": "Whether to read groups as packed trees: on, off, or where it is possible (auto)."},
    )

    def __post_init__(self):
        super().__post_init__()
        settings_of(self)


def settings_of(args: IGPOConfig) -> Algorithm:
    """Section ``algorithm`` of a trainer.

    Raises:
        InputError: as ``IGPOConfig``.
    """
    given = args.algorithm or {}
    settings = validated(Config, {"algorithm": given}, "IGPOConfig").algorithm
    if settings.name not in NAMES:
        raise InputError(
            f"IGPOConfig: algorithm.name={settings.name}: choose {', '.join(NAMES)}; other algorithms without gains "
            "are TRL's own settings with name=grpo"
        )
    for key in given:
        if key not in READ and key not in OUT_OF_REACH:
            raise InputError(
                f"IGPOConfig: algorithm.{key}: {INSTEAD.get(key, 'GRPOConfig')} decides that in TRL; leave it out"
            )
    for key in OUT_OF_REACH:
        usual = Algorithm.model_fields[key].default
        if (got := getattr(settings, key)) != usual:
            raise InputError(
                f"IGPOConfig: algorithm.{key}={got} (preset {settings.preset}): TRL does not tell what that needs; set "
                f"algorithm.{key}={usual}, or choose preset paper, paper_v1 or robust"
            )
    if args.packed not in ("auto", "on", "off"):
        raise InputError(f"IGPOConfig: packed={args.packed!r}: choose auto, on or off")
    for key, usual in (("scale_rewards", "group"), ("multi_objective_aggregation", "sum_then_normalize")):
        if settings.name != "grpo" and (got := getattr(args, key)) != usual:
            raise InputError(
                f"IGPOConfig: {key}={got} does nothing with algorithm.name={settings.name}, whose normaliser is "
                "algorithm.pool; leave it out"
            )
    return settings


class IGPOTrainer(GRPOTrainer):
    """TRL's ``GRPOTrainer`` whose turns earn information gain.

    Takes what GRPOTrainer takes, with an ``IGPOConfig``. The data set has a column of accepted answers; reward
    functions give each rollout's outcome, which its last turn earns. With ``algorithm.name=grpo`` there are no gains,
    and advantages are TRL's own.

    Raises:
        InputError: ``packed=on`` and something hinders it; a tokenizer without the dialect; in a step, rows without
            answers, a rollout without a token of the policy's or without a reward.
    """

    _tag_names = ("trl", "igpo")
    _name = "IGPO"
    _paper = {  # noqa: RUF012 (as TRL's trainers have it)
        "title": "Information Gain-based Policy Optimization: A Simple and Effective Approach for Multi-Turn LLM "
        "Agents",
        "id": "2510.14967",
    }

    def __init__(self, model, reward_funcs=None, args: IGPOConfig | None = None, *others, **options):
        args = IGPOConfig() if args is None else args
        if not isinstance(args, IGPOConfig):
            raise InputError(f"IGPOTrainer: args is a {type(args).__name__}; give an IGPOConfig")
        algorithm = settings_of(args)
        self._recipe = recipe_of(algorithm)
        self._reading: dict[str, Any] | None = None
        super().__init__(model, reward_funcs, args, *others, **options)
        if self._recipe.needs_values:
            self._dialect = make_dialect(
                args.dialect, self._tokenizer, (SEARCH_TOOL,), wrapper=algorithm.wrapper, max_passage_tokens=1,
                max_answer_tokens=args.max_answer_tokens, max_answers=args.max_answers,
            )  # fmt: skip
        self._packed: PreTrainedModel | None = None
        hindrance = "packed=off" if args.packed == "off" else self._hindrance()
        if hindrance is None:
            try:
                self._packed = packed_view(self.model, recompute=args.gradient_checkpointing)
            except InputError as error:
                hindrance = str(error)
        if hindrance and args.packed == "on":
            raise InputError(f"IGPOTrainer: packed=on: {hindrance}; use packed=auto")
        whole = args.steps_per_generation == args.num_iterations == 1
        self.one_pass = bool(self._packed and whole and self._recipe.needs_values)
        """Whether values come from the pass that trains."""
        logger.log(
            logging.WARNING if hindrance and args.packed == "auto" else logging.INFO,
            "IGPOTrainer: %s",
            f"separate sequences, because of {hindrance}"
            if hindrance
            else f"packed trees, {'one pass' if self.one_pass else 'answers in a pass before'} per update",
        )

    @property
    def packed(self) -> bool:
        """Whether rollouts are read as packed trees; fixed when the trainer is made."""
        return self._packed is not None

    def _hindrance(self) -> str | None:
        """What speaks against packed trees, beside the model's layers; None if nothing does."""
        if self.accelerator.num_processes > 1 or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return "several processes or a sharded model, whose gradients are exchanged by TRL's own forward"
        if len(set(getattr(self.model, "hf_device_map", {}).values())) > 1:
            return "a model on several devices"
        if self._is_vlm:
            return "a processor of images"
        if self.aux_loss_enabled:
            return "router_aux_loss_coef"
        if self.args.cast_lm_head_to_fp32:
            return "cast_lm_head_to_fp32"
        return None

    def _generate(self, prompts):
        generated = super()._generate(prompts)
        self._sampled = generated[:3]  # ids of prompts and completions, and the mask of tools
        return generated

    def _calculate_rewards(self, *args):
        self._rewards = super()._calculate_rewards(*args)
        return self._rewards

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        prompts, completions, masks = self._sampled
        size = self.num_generations if self.model.training else self.num_generations_eval
        first = self.accelerator.process_index * len(inputs)
        rollouts = []
        for i, sampled in enumerate(zip(prompts, completions, masks or repeat(None), strict=masks is not None)):
            number, index = divmod(first + i, size)
            answers = self._answers(inputs[i]) if self._recipe.needs_values else ()
            rollouts.append(rollout_of(Question(str(number), "", answers), index, *sampled))
        output["rollouts"] = rollouts  # TRL shuffles and splits lists, too
        if not self._recipe.needs_values:
            return output
        if bad := self._rewards.isnan().all(1).nonzero().flatten().tolist():
            raise InputError(f"IGPOTrainer: no reward function scored rollout {bad[0]}; return a number for each")
        outcomes = (self._rewards * self.reward_weights.to(self._rewards.device)).nansum(1)
        mine = slice(first, first + len(rollouts))
        output["outcomes"] = outcomes[mine]
        if not self.one_pass:
            values = self.values(rollouts)
            everyones, values = zip(*gather_object(list(zip(rollouts, values, strict=True))), strict=True)
            credits = self._credits(everyones, values, outcomes.tolist())[mine]
            output["advantages"] = self._per_token(output, rollouts, credits)
        return output

    def _answers(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The accepted answers of a row of the data set."""
        given = self.args.answer_column
        column = given or next((key for key in ANSWER_KEYS if row.get(key) is not None), None)
        try:
            found = accepted_answers(row.get(column), column) if column else []
        except BadField as error:
            raise InputError(f"IGPOTrainer: {error}") from None
        found = [answer for answer in found if answer.strip()]
        if not found:
            where = f"column {given}" if given else "none of " + ", ".join(ANSWER_KEYS)
            raise InputError(
                f"IGPOTrainer: a row without an accepted answer ({where}); give every row one, and name the column by "
                "answer_column, or use algorithm={'name': 'grpo'}"
            )
        return tuple(found)

    def _branches(self, question: Question):
        return self._dialect.branches(question)[: self._recipe.scored_answers]

    def _plan(self, rollouts: Sequence[Rollout], scored: bool) -> TreePlan:
        """A pack of rollouts, a tree for each question; their numbers are their places here."""
        groups, places = grouped(rollouts)
        return pack(make_trees(groups, [self._branches(g.question) for g in groups] if scored else None, places))

    def _logp(self, hidden: torch.Tensor, plan: TreePlan, part: slice, entropy: bool = False):
        head = lm_head(self._packed)
        return linear_logprob(
            hidden, head.weight, plan.pairs(part, rows_read=True), bias=head.bias, temperature=self.temperature,
            softcap=head.softcap, entropy=entropy,
        )  # fmt: skip

    def _hidden(self, plan: TreePlan) -> tuple[torch.Tensor, torch.Tensor, TreePlan]:
        """``hidden_states_of_loss`` of a pack, in the LM head's dtype."""
        with self.accelerator.autocast():
            hidden, every, trained = hidden_states_of_loss(self._packed, plan)
        dtype = lm_head(self._packed).weight.dtype
        return hidden.to(dtype), every.to(dtype), trained

    @torch.no_grad()
    def _values_of(self, plan: TreePlan, hidden: torch.Tensor, count: int) -> list[np.ndarray]:
        """v_t of a pack's ``count`` rollouts: float64 [T] each."""
        logp = self._logp(hidden, plan, slice(plan.n_decisions, None)).double().cpu().numpy()
        means = means_of(plan, logp, ANSWER)
        return [values_of(means[i], self._recipe.basis, self._recipe.answers) for i in range(count)]

    def values(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """v_t of each rollout, float64 [T], from passes of their own over as many rollouts as TRL reads at once. All
        processes call it together."""
        return self._values_packed(rollouts) if self.packed else self._values_separate(rollouts)

    @torch.no_grad()
    def _values_packed(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        found, size = [], self._rollouts_at_once
        for start in range(0, len(rollouts), size):
            several = rollouts[start : start + size]
            plan = self._plan(several, scored=True)
            _, every, _ = self._hidden(plan)
            found += self._values_of(plan, every, len(several))
        return found

    @torch.no_grad()
    def _values_separate(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """One sequence for each prefix and answer; all processes run equally many batches."""
        means, texts = [], []
        for rollout in rollouts:
            branches = self._branches(rollout.question)
            means.append(np.zeros((len(branches), len(rollout.boundaries))))
            for t, end in enumerate(rollout.boundaries):
                for a, branch in enumerate(branches):
                    ids = np.concatenate([rollout.ids[:end], branch.ids[: branch.stop]])
                    texts.append((ids, branch.stop - branch.start, means[-1][a, t : t + 1]))
        texts.sort(key=lambda text: len(text[0]))
        size = self._rollouts_at_once
        batches = [texts[start : start + size] for start in range(0, len(texts), size)]
        batches += batches[-1:] * (max(gather_object([len(batches)])) - len(batches))
        for batch in batches:
            ids = [torch.from_numpy(ids).long() for ids, _, _ in batch]
            ids, seen = (
                pad(rows, padding_value=value, padding_side="left").to(self.accelerator.device)
                for rows, value in ((ids, self._tokenizer.pad_token_id), ([torch.ones_like(x) for x in ids], 0))
            )
            widest = max(scored for _, scored, _ in batch)
            logp, _, _ = super()._get_per_token_logps_and_entropies(self.model, ids, seen, widest)
            for row, (_, scored, cell) in zip(logp.double().cpu().numpy(), batch, strict=True):
                cell[:] = row[-scored:].mean()
        return [values_of(found, self._recipe.basis, self._recipe.answers) for found in means]

    @property
    def _rollouts_at_once(self) -> int:
        args = self.args
        return args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size

    def _credits(
        self, rollouts: Sequence[Rollout], values: Sequence[np.ndarray], outcomes: Sequence[float]
    ) -> list[Credit]:
        """Gains and advantages of whole groups' rollouts, in their order, into TRL's log."""
        groups, places = grouped(rollouts)
        order = [i for members in places for i in members]
        recipe = replace(self._recipe, steps=self.state.max_steps).at(self.state.global_step + 1)
        found = credit_rollouts(groups, [values[i] for i in order], recipe, [outcomes[i] for i in order])
        metrics = self._metrics["train" if self.model.training else "eval"]
        for key, value in reward_metrics(groups, found, recipe.gate).items():
            if key.startswith(LOGGED):
                metrics[key].append(value)
        return [found[place] for place in np.argsort(order)]

    def _per_token(
        self, inputs: Mapping[str, Any], rollouts: Sequence[Rollout], credits: Sequence[Credit]
    ) -> torch.Tensor:
        """Advantages of completions' tokens, 0 where the policy wrote none: float32 [B, C]."""
        completion = inputs["completion_ids"]
        made = np.zeros(completion.shape, np.float32)
        starts = inputs["prompt_mask"].sum(1).tolist()
        for row, rollout, credit, start in zip(made, rollouts, credits, starts, strict=True):
            turn = rollout.turn_of_token[start:]
            row[: len(turn)] = np.where(turn >= 0, credit.advantages[turn], 0.0)
        return torch.from_numpy(made).to(completion.device)

    def _compute_loss(self, model, inputs):
        # TRL's loss asks for log-probabilities first, then for advantages.
        self._reading = inputs if self.packed else None
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._reading = None

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *others, **options):
        if self._reading is None:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *others, **options
            )
        inputs = self._reading
        rollouts = inputs["rollouts"]
        plan = self._plan(rollouts, scored=self.one_pass)
        (hidden, every, trained), n = self._hidden(plan), plan.n_decisions
        if self.one_pass:
            values = self._values_of(plan, every, len(rollouts))
            credits = self._credits(rollouts, values, inputs["outcomes"].tolist())
            inputs["advantages"] = self._per_token(inputs, rollouts, credits)
        read = self._logp(hidden, trained, slice(0, n), entropy=True)
        place, token = (plan.tensor(name, hidden.device)[:n] for name in ("rollout", "token"))
        column = token - inputs["prompt_mask"].sum(1)[place]
        # The loss masks tokens that were not read, whose ratio is 1.
        blank = read[0].new_zeros(inputs["completion_ids"].shape)
        unread = inputs.get("old_per_token_logps", blank), blank
        logp, entropy = (rest.index_put((place, column), x) for rest, x in zip(unread, read, strict=True))
        return logp, entropy, None


def packed_view(model: torch.nn.Module, recompute: bool) -> PreTrainedModel:
    """A causal LM with ``model``'s own parameters and buffers that reads packed trees, never in training mode, while
    ``model`` itself keeps its attention for sampling and for TRL's passes.

    Args:
        recompute: whether layers run again in the backward pass (gradient checkpointing).
    Raises:
        InputError: the model's layers cannot read packed trees (``probe``).
    """
    base = model.get_base_model() if is_peft_model(model) else model
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    view = copy.deepcopy(base, shared)
    vars(view).pop("forward", None)  # TRL's, which is bound to the original
    probe(view.eval())
    if recompute:
        recompute_layers(view)
    return view


def rollout_of(
    question: Question, index: int, prompt: Sequence[int], completion: Sequence[int], mask: Sequence[int] | None = None
) -> Rollout:
    """A rollout from TRL's ids.

    Args:
        mask: 1 for the policy's tokens, as many as the completion has; None is all. Others before its first turn belong
            to the prompt; after its last turn they are left out, for nothing follows them.
    Raises:
        InputError: no token is the policy's, or the mask has another length.

    >>> rollout = rollout_of(Question("q", "", ()), 0, [1, 2], [3, 4, 5, 6], [1, 0, 0, 1])
    >>> [(turn.ids.tolist(), turn.response_ids.tolist()) for turn in rollout.turns]
    [([3], [4, 5]), ([6], [])]
    """
    ids = np.asarray(completion, dtype=np.int32)
    own = np.ones(len(ids), bool) if mask is None else np.asarray(mask, dtype=bool)
    if len(own) != len(ids) or not own.any():
        raise InputError(
            f"IGPOTrainer: a completion of {len(ids)} tokens with a mask of {len(own)}, {int(own.sum())} of them the "
            "policy's; give env_mask as many numbers as completion_ids has, 1 for what the policy wrote"
        )
    starts, ends = np.flatnonzero(np.diff(own, prepend=False, append=False)).reshape(-1, 2).T
    nexts = [*starts[1:], ends[-1]]
    turns = (
        # What a turn did is not told; only its tokens count here.
        Turn(ids[a:b], np.zeros(b - a, np.float32), "", (), ids[b:c])
        for a, b, c in zip(starts, ends, nexts, strict=True)
    )
    return Rollout(question, index, np.concatenate([prompt, ids[: starts[0]]]).astype(np.int32), tuple(turns))


def grouped(rollouts: Sequence[Rollout]) -> tuple[list[Group], list[list[int]]]:
    """Rollouts by question, and the places here of each group's."""
    places: dict[str, list[int]] = {}
    for place, rollout in enumerate(rollouts):
        places.setdefault(rollout.question.id, []).append(place)
    groups = [Group(rollouts[p[0]].question, tuple(rollouts[i] for i in p)) for p in places.values()]
    return groups, list(places.values())
