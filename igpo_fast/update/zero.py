"""A learner over several processes: DeepSpeed's ZeRO shares out optimiser states (stage 1), gradients (2), weights (3).

The loss weights are global numbers and packs only add, so an update is the same whoever reads which pack. DeepSpeed
averages gradients over the ranks; ``backward`` undoes that. Under stage 3 a weight is whole only inside the forward of
the module that owns it, so one module owns the model and all use of the LM head.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters, register_external_parameter
from deepspeed.utils import (
    logger,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from igpo_fast import adapter
from igpo_fast.ranks import Ranks
from igpo_fast.update.learner import CRITIC, Learner, trained_weights
from igpo_fast.update.policy import PackResult, Policy
from igpo_fast.update.states import Write, read_states, read_weights, write_states, write_teacher, write_weights
from igpo_kernels import TreePlan

# An op that only inference uses. Building it takes a C++ compiler, and a run that is killed meanwhile leaves a lock at
# which all later runs wait.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logger.setLevel(logging.ERROR)  # it warns of optimisers that it has not tested, ours among them
warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)  # its calls of torch
WHOLE = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a weight, but for its count of steps."""


class _Pass(torch.nn.Module):
    """The module that DeepSpeed trains: a pass of the policy, whose only output is the loss.

    DeepSpeed hooks onto the tensors that a module returns, and looks for them in plain containers only.
    """

    def __init__(self, policy: Policy):
        super().__init__()
        self.lm, self.critic = policy.lm, policy.critic
        self._policy = [policy]  # in a list: a submodule would have hooks of its own
        self.result: PackResult | None = None
        head = policy.lm.get_output_embeddings()
        for parameter in filter(lambda p: p is not None, (head.weight, head.bias)):
            register_external_parameter(self, parameter)

    def forward(self, *arguments: Any) -> torch.Tensor | None:
        self.result = self._policy[0](*arguments)
        return self.result.loss


class _AdamW(torch.optim.AdamW):
    """AdamW that may be told to do nothing. ZeRO has then summed the gradients and clears them, as after any update."""

    def allowed(self) -> bool:
        return True

    def step(self, closure=None):
        return super().step(closure) if self.allowed() else None


class ZeroLearner(Learner):
    """A Learner whose states are shared out over ``ranks``; every rank calls every method equally often.

    Args:
        lm: whole, and the same on every rank.
        stage: 1, 2 or 3.
        offload: ``none``, ``optimizer`` (its states live on the CPU) or ``all`` (weights, too; stage 3).
    """

    def __init__(self, lm, *, ranks: Ranks, stage: int, offload: str = "none", **options):
        self._ranks, self._stage, self._offload = ranks, stage, offload
        super().__init__(lm, **options)
        self.alone = stage < 3 or ranks.size == 1
        self.policy.in_parts = self.alone

    def _optimise(self, betas, weight_decay) -> None:
        inner = _AdamW(self._groups(self._trained()), lr=self._lr, betas=betas, weight_decay=weight_decay)
        self._pass = _Pass(self.policy)
        self._engine, *_ = deepspeed.initialize(
            model=self._pass, optimizer=inner, config=self._config(), dist_init_required=False
        )
        self.optimizer = inner
        inner.allowed = lambda: self._sound and math.isfinite(float(self._engine.optimizer._global_grad_norm))
        self._sound, self._applied = True, 0

    def _freeze(self, reference: Policy) -> Callable[[TreePlan], PackResult]:
        """Under stage 3 the reference is shared out, too."""
        if self._stage < 3:
            return reference
        module = _Pass(reference)
        engine, *_ = deepspeed.initialize(model=module, config=self._config(), dist_init_required=False)

        def read(plan: TreePlan) -> PackResult:
            engine(plan)
            result, module.result = module.result, None
            return result

        return read

    def _config(self) -> dict[str, Any]:
        half = self.lm.dtype == torch.bfloat16
        # DeepSpeed's optimiser for stage 1 in bfloat16 asserts a gradient norm above 0, which no batch owes us.
        zero: dict[str, Any] = {"stage": 2 if half and self._stage == 1 else self._stage, "overlap_comm": False}
        if self._offload != "none":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if self._offload == "all":
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "managed_gradient_accumulation": False,  # any number of backwards, then one update
            "gradient_clipping": self._max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": half, "check_grad_overflow": False},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "zero_optimization": zero,
            "steps_per_print": None,
        }

    def __call__(self, plan, inputs=None, advantages_of=None) -> PackResult:
        loss = self._engine(plan, inputs, advantages_of)  # with ZeRO's hooks, which the result's own loss lacks
        result, self._pass.result = self._pass.result, None
        return replace(result, loss=loss)

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss * self._ranks.size, scale_wrt_gas=False)

    def forget(self) -> bool:
        return False  # a backward that raised leaves DeepSpeed's buckets half full, and other ranks waiting

    def _step(self, sound: bool) -> float | None:
        self._sound = sound
        self._engine.step()
        norm = float(self._engine.optimizer._global_grad_norm)
        if not (sound and math.isfinite(norm)):
            return None
        self._applied += 1
        if self._applied == 1:
            self._link()
        return norm

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight by its name, in the model's order, whole while it is the iterator's turn."""
        if self._adapted:
            yield from adapter.merged(self.lm, self._gathered)
            return
        for name, weight in self.lm.state_dict(keep_vars=True).items():
            with self._gathered([weight]):
                yield name, weight.detach()

    @staticmethod
    def _gathered(weights: list[torch.Tensor], **options):
        """A context in which weights are whole; no more than that under stages 1 and 2."""
        return GatheredParameters(weights, enabled=hasattr(weights[0], "ds_id"), **options)

    def _saved(self) -> dict[str, torch.Tensor]:
        """The weights that a checkpoint holds, by name."""
        named = self.lm.state_dict(keep_vars=True)
        return {n: p for n, p in named.items() if adapter.is_adapter(n)} if self._adapted else named

    def snapshot(self) -> Write:
        """The state now, in the CPU's memory, for a checkpoint (states.py): each rank's part of it."""
        whole: dict[int, torch.Tensor] = {}  # a tied weight once: transformers writes it once, too
        for weight in self._saved().values():
            with self._gathered([weight]):
                if self._ranks.first and id(weight) not in whole:
                    whole[id(weight)] = weight.detach().to("cpu", copy=True)
        weights = {name: whole[id(weight)] for name, weight in self._saved().items()} if self._ranks.first else {}
        teacher = self._teacher_copies() if self._ranks.first else None
        states, counts = {}, {"number": self._number}
        for number, (name, p) in enumerate(self._trained().items()):
            own = self.lm.dtype != torch.float32 or name.startswith(CRITIC)
            state = {"master": safe_get_full_fp32_param(p)} if own else {}
            if self._applied:
                state |= {key: safe_get_full_optimizer_state(p, key) for key in WHOLE}
                state["step"] = torch.tensor(float(self._applied))
            if number % self._ranks.size == self._ranks.number:
                states[name] = {key: value.to("cpu", copy=True) for key, value in state.items()}

        def write(folder: Path) -> None:
            if self._ranks.first:
                write_weights(self.lm, folder, weights)
                write_teacher(folder, teacher)
            write_states(folder, states, counts, self._ranks.number, self._ranks.size)

        return write

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        weights, trained = read_weights(self.lm, folder), self._trained()
        states, counts = read_states(folder, trained)
        for name, p in self._saved().items():
            with self._gathered([p], modifier_rank=0):
                p.data.copy_(weights[name])
        self._applied = int(max((state["step"] for state in states.values() if "step" in state), default=0))
        if self._applied:
            self._make_moments()
        for name, p in trained.items():
            state = states[name]
            master = state["master"] if "master" in state else weights[name]
            if name.startswith(CRITIC):
                with self._gathered([p], modifier_rank=0):
                    p.data.copy_(master)
            self._set(p, master)
            for key in WHOLE if self._applied else ():
                self._set(p, state[key], key)
        self._load_teacher(folder)
        self._number = counts["number"]

    def _set(self, p: torch.nn.Parameter, value: torch.Tensor, key: str | None = None) -> None:
        """Set a weight's master, or its state ``key``, from the whole tensor. Under stage 3 DeepSpeed itself only sets
        weights whose numbers the ranks share out evenly."""
        of_master, of_state = safe_set_full_fp32_param, safe_set_full_optimizer_state
        if self._stage == 3:
            of_master, of_state = safe_set_local_fp32_param, safe_set_local_optimizer_state
            size = p.ds_tensor.numel()
            mine = value.flatten()[size * self._ranks.number :][:size]
            value = torch.nn.functional.pad(mine, (0, size - len(mine)))
        value = value.to(p.device)
        of_master(p, value) if key is None else of_state(p, value, key)

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return trained_weights(self.lm, self.policy.critic)

    def _make_moments(self) -> None:
        """Give the optimiser the states that its first step would make, so that they can be set."""
        zero = self._engine.optimizer
        flat = (
            zero.fp32_partitioned_groups_flat
            if self._stage == 3
            else [p for group in self.optimizer.param_groups for p in group["params"]]
        )
        for p in flat:
            moments = {key: torch.zeros_like(p) for key in WHOLE}
            self.optimizer.state[p] = {"step": torch.tensor(float(self._applied)), **moments}
        self._link()

    def _link(self) -> None:
        """Let DeepSpeed's stages 1 and 2 find the optimiser's states, now that all exist. By itself it looks for them
        once, after the first group's first step, when the others have none."""
        zero = self._engine.optimizer
        if self._stage < 3:
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
