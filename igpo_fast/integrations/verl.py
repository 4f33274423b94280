"""IGPO inside verl 0.9 (docs/verl.md): ``Gains`` measures what the turns of a batch gain, and the advantage estimator
``igpo``, which importing this module registers, turns gains and outcomes into advantages.

Gains travel in verl's own token-level rewards, so its trainer needs no other field: the gain of a turn stands at the
turn's last token, and what verl's reward function gave at the last token of the response. A turn is a run of ones in
``response_mask``; the tokens from there to the next turn are its response.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pydantic import ValidationError
from tensordict import TensorDict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from verl import DataProto
from verl.trainer.ppo.core_algos import register_adv_est

from igpo_fast.config import CRITICS, Algorithm
from igpo_fast.data.fields import BadField
from igpo_fast.data.questions import accepted_answers
from igpo_fast.errors import InputError
from igpo_fast.model import use_attend
from igpo_fast.score import Scorer, Trajectory
from igpo_fast.trajectories import Record
from igpo_fast.types import Group, Question, Rollout, Turn
from igpo_fast.update.advantages import credit_rollouts, recipe_of
from igpo_fast.update.gains import information_gain
from igpo_fast.update.packs import FILLER

READ = frozenset(
    {
        "name", "preset", "basis", "answers", "wrapper", "gain", "pool", "ig_gate", "ig_center", "ig_min_std",
        "outcome_min_std", "min_var", "accumulate", "ig_weight", "ig_spread", "ig_every", "gamma",
    }
)  # fmt: skip
"""Keys of ``algorithm.igpo``: those of igpo-fast's section ``algorithm`` that shape gains and advantages."""
OUT_OF_REACH = (
    "ig_tools", "turn_format_penalty", "redundancy_penalty", "adaptive_clip", "credit", "baseline", "value_model",
    "ig_weight_end",
)  # fmt: skip
"""Keys that need the turns' texts, other models or the loss, which an estimator does not have: only their defaults
will do."""


def settings_of(algorithm: Mapping[str, Any] | None) -> Algorithm:
    """``algorithm.igpo`` of a verl configuration as igpo-fast's section ``algorithm``.

    Args:
        algorithm: verl's section ``algorithm`` (a DictConfig or an AlgoConfig); None is empty.
    Raises:
        InputError: an unknown key or value, one that verl decides itself, or one that an estimator cannot serve.
    """
    verls = {} if algorithm is None else algorithm
    given = dict(verls.get("igpo") or {})
    try:
        settings = Algorithm(**given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("igpo", *first["loc"])))
        raise InputError(f"algorithm.{key}: {first['msg']}; docs/config.md has the keys of section algorithm") from None
    if others := sorted(given.keys() - READ - {*OUT_OF_REACH}):
        raise InputError(
            f"algorithm.igpo.{others[0]}: verl's own settings and its reward function decide that; leave it out"
        )
    for key in OUT_OF_REACH:
        usual = Algorithm.model_fields[key].default
        if getattr(settings, key) != usual:
            raise InputError(
                f"algorithm.igpo.{key}={getattr(settings, key)} (preset {settings.preset}): an advantage estimator of "
                f"verl's cannot do that; set algorithm.igpo.{key}={usual}, or choose preset paper, paper_v1 or robust"
            )
    if settings.name in CRITICS:
        raise InputError(f"algorithm.igpo.name={settings.name} has a critic; use algorithm.adv_estimator=gae")
    if verls.get("gamma", 1.0) not in (1.0, settings.gamma):
        raise InputError(
            f"algorithm.gamma={verls['gamma']}: the estimator igpo discounts turns, not tokens; leave it at 1 and set "
            "algorithm.igpo.gamma"
        )
    if verls.get("use_kl_in_reward", False):
        raise InputError(
            "algorithm.use_kl_in_reward=true would be taken for gains of the turns; use actor.use_kl_loss=true instead"
        )
    if (verls.get("rollout_correction") or {}).get("rollout_rs") is not None:
        raise InputError(
            "algorithm.rollout_correction.rollout_rs changes response_mask, which tells turns apart; leave it out, or "
            "use rollout_is"
        )
    return settings


@register_adv_est("igpo")
def igpo_advantages(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray | None = None,
    config: Mapping[str, Any] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """verl's advantage estimator ``igpo``: every policy token of a turn gets the turn's advantage, others 0.

    A turn's reward is the sum over its tokens and its response. Rows without a policy token (verl's padding) count
    for nothing.

    Args:
        token_level_rewards: gains and outcomes, float [B, L].
        response_mask: 1 for the policy's tokens, 0 for tools' and padding, [B, L].
        index: the group of each row (``uid``), [B].
        config: verl's section ``algorithm``, whose ``igpo`` has the settings (``settings_of``).
    Returns:
        Advantages, in the rewards' dtype, [B, L]; twice, for verl also asks for returns.
    Raises:
        InputError: shapes that differ, no groups, a reward that is not finite; what ``settings_of`` refuses.
    """
    recipe = recipe_of(settings_of(config))
    shape = tuple(token_level_rewards.shape)
    if len(shape) != 2 or tuple(response_mask.shape) != shape:
        raise InputError(
            f"token_level_rewards {list(shape)} and response_mask {list(response_mask.shape)}: the estimator igpo "
            "takes two of the same shape, [rows, response length]"
        )
    if index is None or len(index) != shape[0]:
        raise InputError(
            f'{"no uid" if index is None else f"{len(index)} uids"} for {shape[0]} rows: fill non_tensor_batch["uid"], '
            "which tells the rollouts of a prompt"
        )
    rewards = token_level_rewards.detach().double().cpu().numpy()
    if not np.isfinite(rewards).all():
        raise InputError(
            f"token_level_rewards: row {np.flatnonzero(~np.isfinite(rewards).all(axis=1))[0]} has a number that is not "
            "finite; correct the reward function"
        )
    turns = [_turns(row) for row in response_mask.cpu().numpy()]
    groups = _groups(index, [row for row, found in enumerate(turns) if len(found)])
    advantages = np.zeros(shape)
    if groups:
        rows = [row for members in groups for row in members]
        earned = [np.add.reduceat(rewards[row], [0, *turns[row][1:, 0]]) for row in rows]
        made = [Group(_NOBODYS, tuple(_lengths_alone(turns[row]) for row in members)) for members in groups]
        # Gains of neighbouring turns add up (ig_every), as differences of values do.
        values = [np.cumsum([0.0, *rewards_T[:-1]]) for rewards_T in earned]
        credits = credit_rollouts(made, values, recipe, [rewards_T[-1] for rewards_T in earned])
        for row, credit in zip(rows, credits, strict=True):
            for (start, stop), advantage in zip(turns[row], credit.advantages, strict=True):
                advantages[row, start:stop] = advantage
    told = torch.as_tensor(advantages).to(token_level_rewards)
    return told, told.clone()


class Gains:
    """Information gains of the turns of a batch, under the policy: one packed pass per group of rollouts.

    >>> gains = Gains(lm, tokenizer, config.algorithm, temperature=1.0)  # doctest: +SKIP
    >>> batch.batch["token_level_scores"] += gains(batch)  # doctest: +SKIP

    Args:
        lm: the policy; ``igpo_fast.model.probe`` says once whether its architecture can run packed. Between the calls
            it keeps its own attention. FSDP2 may shard its weights (verl's ``strategy=fsdp2``), if it has run before.
        tokenizer: of the policy.
        algorithm: verl's section ``algorithm``; of its ``igpo``, ``basis``, ``answers`` and ``wrapper`` matter here.
        dialect: what a forced answer stands in: Search-R1's ``tags``, or ``chat`` for the model's own template.
        temperature: that of sampling; divides the logits.
        token_budget: most packed tokens of a pass; a larger group takes several, a larger rollout one of its own.
        sharers: the processes over which the weights are sharded. Each must call ``Gains`` equally often, with any
            batch: all take as many passes as the one with the most, because each pass gathers the weights.
    Raises:
        InputError: a model under FSDP1; what ``settings_of`` or the dialect refuses.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        algorithm: Mapping[str, Any] | None = None,
        *,
        dialect: str = "tags",
        temperature: float = 1.0,
        token_budget: int = 16384,
        sharers: dist.ProcessGroup | None = None,
    ):
        if isinstance(lm, FullyShardedDataParallel):
            raise InputError("the policy is sharded by FSDP1, which packed passes cannot gather; set strategy=fsdp2")
        settings = settings_of(algorithm)
        self._scorer = Scorer(
            lm, tokenizer, dialect=dialect, temperature=temperature, basis=settings.basis, answers=settings.answers,
            token_budget=token_budget, wrapper=settings.wrapper,
        )  # fmt: skip
        self._lm, self._sharers = lm, sharers

    def __call__(self, batch: DataProto) -> torch.Tensor:
        """The gains of a batch, each at its turn's last token, 0 elsewhere; a last turn has none, and an undefined
        gain is 0.

        Args:
            batch: ``prompts`` [B, P] and ``responses`` [B, L], token ids; ``attention_mask`` [B, P + L];
                ``response_mask`` [B, L]. Padding may lie on either side. ``non_tensor_batch["reward_model"]`` has the
                ``ground_truth`` of each row, several accepted answers joined by ``<|answer_split|>`` or as a list;
                ``uid``, where there is one, puts the rollouts of a group into one pass.
        Returns:
            float32 [B, L].
        Raises:
            InputError: a field that is missing or of another shape, a row without ground truth.
        """
        prompts, responses, attention, mask = _fields(batch)
        gains = np.zeros(responses.shape, dtype=np.float32)
        places, trajectories = [], []
        questions = _questions(batch)
        uid = batch.non_tensor_batch.get("uid", np.zeros(len(questions)))
        for row in (row for members in _groups(uid, range(len(questions))) for row in members):
            n_prompt = prompts.shape[1]
            kept = np.flatnonzero(attention[row, n_prompt:])
            turns = _turns(mask[row, kept])
            if len(turns) < 2:
                continue
            prompt = prompts[row, attention[row, :n_prompt]]
            rollout = _rollout(questions[row], prompt, responses[row, kept], turns)
            branches = tuple(self._scorer.scoring.branches_of(questions[row]))
            trajectories.append(Trajectory(Record(f"row {row}", {}, questions[row]), rollout, branches))
            places.append((row, kept[turns[:-1, 1] - 1]))
        packs = list(self._scorer.packs(trajectories))
        idle = self._most(len(packs)) - len(packs)
        with _packed(self._lm):
            values = [found for pack in packs for found in self._scorer.values(pack)]
            for _ in range(idle):
                self._scorer.policy(FILLER.plan)
        for (row, ends), found in zip(places, values, strict=True):
            gains[row, ends] = information_gain(found.values)[0]
        return torch.from_numpy(gains).to(batch.batch["responses"].device)

    def _most(self, passes: int) -> int:
        """The largest number of passes among the sharers."""
        if self._sharers is None:
            return passes
        most = torch.tensor(passes, device=self._lm.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self._sharers)
        return int(most)


def padded(data: TensorDict) -> DataProto:
    """What ``Gains`` reads of the rows that verl's transfer queue hands to a worker (tensors without padding), with
    padding on the right."""
    rows = {name: data[name].unbind() for name in ("prompts", "responses", "response_mask")}
    tensors = {name: pad_sequence(entries, batch_first=True) for name, entries in rows.items()}
    attended = [[torch.ones_like(row) for row in rows[name]] for name in ("prompts", "responses")]
    tensors["attention_mask"] = torch.cat([pad_sequence(ones, batch_first=True) for ones in attended], dim=1)
    others = {}
    for name in ("reward_model", "uid"):
        others[name] = np.empty(len(data), dtype=object)
        others[name][:] = list(data[name])
    return DataProto.from_dict(tensors=tensors, non_tensors=others)


@contextmanager
def _packed(lm: PreTrainedModel) -> Iterator[None]:
    """Let ``lm`` run packed passes; verl's own need the attention that it was loaded with. FSDP2 gathers embeddings
    and LM head in the whole model's forward alone, which packed passes go around."""
    before = lm.config._attn_implementation
    use_attend(lm)
    if isinstance(lm, FSDPModule):
        lm.unshard()
    try:
        yield
    finally:
        if isinstance(lm, FSDPModule):
            lm.reshard()
        lm.set_attn_implementation(before)


def _fields(batch: DataProto) -> list[np.ndarray]:
    """Prompts [B, P] and responses [B, L], int32; attention mask [B, P + L] and response mask [B, L], bool."""
    names = ("prompts", "responses", "attention_mask", "response_mask")
    if missing := sorted({*names} - {*batch.batch.keys()}):
        raise InputError(f"the batch has no {missing[0]}; gains need {', '.join(names)}")
    prompts, responses, attention, mask = (batch.batch[name].cpu().numpy() for name in names)
    shapes = {"attention_mask": (len(prompts), prompts.shape[1] + responses.shape[1]), "response_mask": responses.shape}
    for name, found in (("attention_mask", attention), ("response_mask", mask)):
        if found.shape != shapes[name]:
            raise InputError(
                f"{name} {list(found.shape)}: expected {list(shapes[name])} beside prompts {list(prompts.shape)} and "
                f"responses {list(responses.shape)}"
            )
    attention, mask = attention != 0, mask != 0
    if outside := np.flatnonzero((mask & ~attention[:, prompts.shape[1] :]).any(axis=1)).tolist():
        raise InputError(f"row {outside[0]}: response_mask marks tokens that attention_mask calls padding; correct it")
    return [prompts.astype(np.int32), responses.astype(np.int32), attention, mask]


def _questions(batch: DataProto) -> list[Question]:
    """Each row's question, of which only the accepted answers are known."""
    told = batch.non_tensor_batch.get("reward_model")
    if told is None:
        raise InputError(
            'the batch has no non_tensor_batch["reward_model"]; keep the column reward_model of the data, with its '
            "ground_truth"
        )
    found = []
    for row, entry in enumerate(told):
        truth = entry.get("ground_truth") if isinstance(entry, Mapping) else None
        try:
            answers = [answer for answer in accepted_answers(_plain(truth), "ground_truth") if answer.strip()]
        except BadField as error:
            raise InputError(f"row {row}: reward_model.{error}") from None
        if not answers:
            raise InputError(f"row {row}: reward_model has no ground_truth; give each row the right answer")
        found.append(Question(f"of row {row}", "", tuple(answers)))
    return found


def _plain(value: Any) -> Any:
    """Arrays, as parquet files have them, as lists."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def _turns(mask: np.ndarray) -> np.ndarray:
    """First token and one past the last of each run of marked tokens: int64 [T, 2]."""
    marked = np.concatenate([[False], mask != 0, [False]])
    return np.flatnonzero(marked[1:] != marked[:-1]).reshape(-1, 2)


def _groups(index: Sequence[Any], rows: Sequence[int]) -> list[list[int]]:
    """Those of the rows that belong together, in order of their first."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for row in rows:
        groups[index[row]].append(row)
    return list(groups.values())


_NOBODYS = Question("", "", ("",))
_NO_IDS = np.zeros(0, dtype=np.int32)


def _turn(ids: np.ndarray, response_ids: np.ndarray) -> Turn:
    return Turn(ids, np.zeros(len(ids), np.float32), "", (), response_ids)


def _lengths_alone(turns: np.ndarray) -> Rollout:
    """A rollout of which nothing but its turns' lengths matters."""
    return Rollout(_NOBODYS, 0, _NO_IDS, tuple(_turn(np.zeros(n, np.int32), _NO_IDS) for n in np.diff(turns)[:, 0]))


def _rollout(question: Question, prompt: np.ndarray, response: np.ndarray, turns: np.ndarray) -> Rollout:
    """A row's tokens without padding; what stands before its first turn belongs to the prompt."""
    starts = [*turns[:, 0], len(response)]
    parts = [
        _turn(response[start:stop], response[stop:following])
        for (start, stop), (_, following) in zip(turns, pairwise(starts), strict=True)
    ]
    return Rollout(question, 0, np.concatenate([prompt, response[: starts[0]]]), tuple(parts))
