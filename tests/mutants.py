"""Plant faults and see which test notices: ``python tests/mutants.py [--list] [--only NAME] [--why]``.

Each fault is one edit of a private copy of the sources. The tests named beside it must fail on the copy; all of them
must pass on an unmutated one. Fails if a fault survives, if a named test is missing, or if a fault no longer fits.
"""

from __future__ import annotations

import argparse
import collections
import gc
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("igpo_fast", "kernels", "tests", "pyproject.toml")
WORKERS = 2
TIMEOUT = 600.0
"""Seconds that the tests of one fault may take, on a machine with other work."""


@dataclass(frozen=True)
class Mutant:
    """In ``file``, ``old`` (which occurs once) becomes ``new``; one of ``tests`` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def misfit(self, root: Path) -> str | None:
        """Why the fault does not fit the sources at ``root``, if it does not."""
        count = (root / self.file).read_text(encoding="utf-8").count(self.old)
        return None if count == 1 else f"{self.name}: {self.file} holds {self.old!r} {count} times, not once"

    def apply(self, root: Path) -> None:
        path = root / self.file
        path.write_text(path.read_text(encoding="utf-8").replace(self.old, self.new), encoding="utf-8")


def faults(file: str, *table: tuple[str, str, str, str]) -> list[Mutant]:
    """Mutants of one file; a row is name, old, new and tests separated by spaces, without ``tests/``."""
    return [
        Mutant(name, file, old, new, tuple(f"tests/{test}" for test in tests.split()))
        for name, old, new, tests in table
    ]


KERNELS = "kernels/igpo_kernels"
COMB = "kernels/test_plan.py::test_a_comb_by_hand"
PATHS = "kernels/test_plan.py::test_the_visible_path_of_every_pair_is_its_rollouts_prefix"
TREES = "kernels/test_tree_attention.py::test_random_trees"
VISITED = "kernels/test_blocks.py::test_visited_are_exactly_the_blocks_with_a_visible_pair"
SOFTCAP = "kernels/test_tree_attention.py::test_softcapped"
BLOCKS = "kernels/test_linear_logprob.py::test_blocks_of_any_width_give_the_same"
REPEATED = "kernels/test_linear_logprob.py::test_repeated_rows_accumulate"
FORKS = "kernels/test_forks.py::test_a_fork_by_hand"
COST = "test_balance.py::test_the_cost_is_that_of_the_packed_tree"
LOSS = "kernels/test_policy_loss.py"
COMPAT = "kernels/test_compat.py"
SCALED = f"{LOSS}::test_a_scaled_clip_range_by_hand"
BOUNDED = f"{LOSS}::test_bounded_importance_weights_by_hand"
BOTH = f"{LOSS}::test_ratios_of_turns_with_weights_of_rollouts_by_hand"
FUSED = f"{LOSS}::test_fused_equals_its_definition"
PANELS = f"{LOSS}::test_chunks_and_panels_add_up"
TURNS = "kernels/test_turn_advantages.py"
WORKED = f"{TURNS}::test_hand_worked"
CRITIC = "test_critic.py"
BORROWED = "test_counterfactuals.py::test_a_random_fork_has_another_questions_response_then_an_answer"
DRAWN = "test_counterfactuals.py::test_random_forks_depend_on_step_and_seed_but_not_on_who_else_is_asked_first"
TOO_LONG = "test_counterfactuals.py::test_responses_that_are_too_long_or_found_nothing_are_not_lent"
REAL_SIDE = "test_counterfactuals.py::test_the_real_side_of_a_masked_response_adds_no_token"
BESIDE_TRL = "integrations/test_trl.py::test_packed_trains_as_separate_sequences"
BY_HAND_IN_TRL = "integrations/test_trl.py::test_advantages_by_hand_in_grpo_trainers_loss"
FORKED = "test_counterfactuals.py::test_gains_and_gradients_are_those_of_separate_passes"
BOUND = "test_counterfactuals.py::test_no_rollout_takes_more_than_its_bound"
SEPARATE = "test_counterfactuals.py::test_separate_tokens_are_those_of_a_pass_per_prefix_and_fork"
UNSEARCHED = "test_counterfactuals.py::test_turns_that_did_not_search_have_no_random_fork_and_earn_nothing"
VALUE_MODELS = "test_value_models.py::test_values_are_the_other_models_and_gradients_the_policys"
PPO = "parity/test_parity.py::test_values_and_gradients_of_a_critic"
VALUES = "parity/test_parity.py::test_answer_values_and_sampled_logprobs"
SEGMENTS = "parity/test_parity.py::test_the_packed_gradient_of_ratios_over_tokens"
EFFECTIVE = "test_losses.py::test_the_effective_sample_size_by_hand"
GPU_GAPS = "kernels/triton/test_gaps.py"
CHUNKS = f"{GPU_GAPS}::test_a_vocabulary_in_chunks"
GROUPS = f"{GPU_GAPS}::test_groups_of_heads"
LOGPROB_GPU = "kernels/triton/test_linear_logprob_triton.py"
FUSED_GPU = "kernels/triton/test_linear_policy_loss.py"
VLLM = "test_engine_vllm.py"
LOSS_GPU = "kernels/triton/test_policy_loss.py"
STRIDED_GPU = f"{LOSS_GPU}::test_strided_inputs"
TURNS_GPU = "kernels/triton/test_turn_advantages_triton.py"
ATTENTION_GPU = "kernels/triton/test_tree_attention_triton.py"
GAPS = "test_mutant_gaps.py"
AUTOGRAD = "kernels/test_autograd.py"
HEADS = "kernels/test_huggingface_head.py"
ONE_PASS = f"{GAPS}::test_a_one_pass_update_has_the_naive_gradient"
TWO_PASSES = f"{GAPS}::test_a_two_pass_step_has_the_naive_gradient_of_each_share"
SCALE = f"{GAPS}::test_a_given_scale_multiplies_the_queries"
HEAD = f"{GAPS}::test_gradients_of_the_lm_head_equal_finite_differences"
ENGINE = "test_engine_torch.py"
ENGINE_LOGP = f"{ENGINE}::test_logp_of_multi_turn_rollouts_equals_plain_forwards"
FIRST_STEP = f"{GAPS}::test_the_first_step_stands_where_the_reference_and_the_engine_do"
ROLLOUT = "test_rollout.py::TestOneRollout::test_is_prompt_turns_and_responses_token_for_token"

FAMILY, OWED = "test_dialect_families.py", "test_contracts.py"
TEXT, INPUTS, SCORED = "test_dialect_text.py", "test_score_inputs.py", "test_score_baselines.py"
GIVEN = "test_demonstrations.py"

# fmt: off
MUTANTS = [
    *faults(f"{KERNELS}/plan.py",
        ("decision row off by one", "path[token - 1], rollout", "path[np.maximum(token - 2, 0)], rollout", COMB),
        ("answer row off by one", "np.concatenate([[-1], path])[tokens]", "np.concatenate([[-1, -1], path])[tokens]",
         COMB),
        ("branch seen by the next rollout", "block.subtree_end + size))", "block.subtree_end + size + 1))", PATHS),
        ("branch sees its sibling", "ends[path[max(after, 0) :]] = size", "ends[path[max(after, 0) :]] = len(ends)",
         PATHS),
        ("branch sees the trunk's continuation", "closings.append((path[boundary:top], size))",
         "closings.append((path[boundary:top], size + width))", COMB),
        ("rollout sees its sibling", "closings.append((path[max(after, 0) : top], size))",
         "closings.append((path[max(after, 0) : top], size + 1))", PATHS),
        ("branch positions start at 0", "positions.append(block.depth + boundary)", "positions.append(block.depth)",
         COMB),
        ("branch positions follow the trunk's end", "positions.append(block.depth + boundary)",
         "positions.append(block.depth + length)", COMB),
        ("trunk positions start anew", "positions.append(np.arange(before, length))",
         "positions.append(np.arange(length - before))", PATHS),
        ("the answer's last token is fed", "branch.ids[: branch.stop - 1]", "branch.ids[: branch.stop]", COMB),
        ("the trunk's last label is fed", "last = int(trained[-1]) if", "last = int(trained[-1]) + 1 if", COMB),
        ("answers of the first owner only", "for index, turn in owners\n", "for index, turn in owners[:1]\n",
         "kernels/test_plan.py::test_shared_tokens_have_an_owner_each"),
        ("answer pairs by turn, not by rollout", "(answers[:, 6], answers[:, 5], answers[:, 4], answers[:, 3])",
         "(answers[:, 6], answers[:, 5], answers[:, 3], answers[:, 4])",
         f"{GAPS}::test_pairs_come_in_the_documented_order"),
        ("a trained first token passes", "if rollout.turn[0] >= 0:", "if rollout.turn[0] > 0:",
         "kernels/test_plan.py::test_what_cannot_be_packed_is_named"),
        ("every tree starts at 0", "np.repeat(starts, sizes)", "np.repeat(0 * starts, sizes)",
         f"{GAPS}::test_every_token_knows_where_its_tree_starts"),
        ("a pack over the budget", "if size <= free:", "if size <= free + 1:",
         f"{GAPS}::test_no_pack_exceeds_the_budget"),
    ),
    *faults(f"{KERNELS}/tree_attention/torch_path.py",
        ("scale dropped in the forward", "attn_mask=bias, scale=scale)\n                    lse",
         "attn_mask=bias)\n                    lse", SCALE),
        ("scale dropped in the backward", "attn_mask=bias, scale=scale\n", "attn_mask=bias\n", SCALE),
        ("scale dropped with a soft cap", ".mul_(scale)\n    capped", "\n    capped", SOFTCAP),
        ("soft cap ignored", "capped = scores.div_(softcap).tanh_()", "capped = scores.div_(softcap)", SOFTCAP),
        ("key gradients assigned, not added", "grad[run, self.of_keys] +=", "grad[run, self.of_keys] =",
         "kernels/test_tree_attention.py::test_trunks_longer_than_a_tile"),
        ("every run's gradient from the first", "first += count", "first += 0", TREES),
        ("gradient of a group's first query head only", "grad.sum(1, dtype=dtype)", "grad[:, 0]", TREES),
        ("keys copied to the path's start",
         "stop = tile.n_keys\n", "stop = sum(run.stop - run.start for run in tile.fresh)\n",
         TREES),
    ),
    *faults(f"{KERNELS}/tree_attention/schedule.py",
        ("mask one query too long", "(query >= end[first:])", "(query > end[first:])", TREES),
        ("no mask where a subtree ends inside", "(end[:before] < tile.stop)", "(end[:before] < tile.start)", TREES),
        ("window in packed indices", "position[tile.start : tile.stop, None] - tile.keys_of(position) >= window",
         "query - index >= window", TREES),
        ("window one key too wide", "keys_of(position) >= window", "keys_of(position) > window", TREES),
        ("a tile lacks keys of some of its queries", "plan.subtree_end[root:start] > start",
         "plan.subtree_end[root:start] >= stop", TREES),
        ("a tile's window starts at its last query", "int(plan.position_ids[start:stop].min())",
         "int(plan.position_ids[start:stop].max())", TREES),
        ("windows share a mask", '("mask", number, window, dtype', '("mask", number, dtype',
         f"{GAPS}::test_one_plan_serves_several_windows"),
        ("windows share tiles", '("tiles", window)', '("tiles",)', f"{GAPS}::test_one_plan_serves_several_windows"),
        ("keys stay that the tile before had elsewhere", "before[:shared] != keys[:shared]",
         "before[:shared] > keys[:shared]", TREES),
        ("a fork is a path", "plan.subtree_end[keys] >= stop", "plan.subtree_end[keys] > start", TREES),
        ("a path is longer than the window", "length <= window", "length <= window + 1",
         "kernels/test_tree_attention.py::test_a_path_as_long_as_the_window"),
        ("a shorter path's mask from the mask's start", "most + rows - tile.n_keys : most + rows", ": tile.n_keys",
         "kernels/test_tree_attention.py::test_trunks_longer_than_a_tile"),
    ),
    *faults(f"{KERNELS}/tree_attention/blocks.py",
        ("a block of later keys is full", "start + keys - 1) // queries)", "start) // queries)", VISITED),
        ("a block skipped before its last descendant", "-(-end.max(1) // queries)", "end.max(1) // queries", VISITED),
        ("a block full beyond a subtree's end", "earliest // queries)", "-(-earliest // queries))", VISITED),
        ("a full block beyond the window", "lowest_of_key[block] < window", "lowest_of_key[block] <= window", VISITED),
        ("a block's nearest query is the tile's first", "np.maximum(reach, 1) - 1]", "0 * reach]", VISITED),
        ("runs stop where they start", "_differences(ranges[:-1], ranges[1:])", "_differences(ranges[1:], ranges[:-1])",
         VISITED),
        ("a full run is masked", "2 * row + ~full", "2 * row + full", VISITED),
        ("short rows start first", "np.argsort(-visits", "np.argsort(visits",
         "kernels/test_blocks.py::test_long_rows_start_first"),
        ("lists of one window serve another", '("blocks", window,', '("blocks",',
         "kernels/test_blocks.py::test_lists_are_made_once_a_plan"),
    ),
    *faults(f"{KERNELS}/tree_attention/__init__.py",
        ("a given scale is ignored", "d**-0.5 if scale is None else scale", "d**-0.5", SCALE),
    ),
    *faults(f"{KERNELS}/linear_logprob/torch_path.py",
        ("repeated row assigned, not added", "zeros_like(top).index_add_(0, pair_row, d_logp)",
         "zeros_like(top).index_copy_(0, pair_row, d_logp)", REPEATED),
        ("repeated label assigned, not added", "d_logp[pairs], accumulate=True", "d_logp[pairs], accumulate=False",
         REPEATED),
        ("temperature ignored in the backward", "return 1 / temperature", "return 1.0", HEAD),
        ("slope of the soft cap dropped", "t.square_().sub_(1)", "t.zero_().sub_(1)", HEAD),
        ("largest logit begins at 0", '(n_rows,), float("-inf"), ', "(n_rows,), 0.0, ",
         "kernels/test_linear_logprob.py::test_all_negative_logits_keep_their_mass"),
        ("sign of the entropy", "log_mass - self.moment / self.mass", "log_mass + self.moment / self.mass", BLOCKS),
        ("sign of the entropy's gradient", ".mul_(d_entropy[:, None])", ".mul_(-d_entropy[:, None])", BLOCKS),
        ("workspace ignored", "height = max(1, min(n_rows, BLOCK_LOGITS // width, budget // row_bytes))",
         "height = max(1, n_rows)", "kernels/test_linear_logprob.py::test_never_more_than_the_workspace"),
    ),
    *faults(f"{KERNELS}/policy_loss/reference.py",
        ("clip sides swapped", "1 - settings.clip_low * scale, 1 + settings.clip_high * scale",
         "1 - settings.clip_high * scale, 1 + settings.clip_low * scale",
         f"{LOSS}::test_asymmetric_clip_and_dual_clip"),
        ("the lower bound is not scaled", "1 - settings.clip_low * scale", "1 - settings.clip_low", SCALED),
        ("the upper bound is not scaled", "1 + settings.clip_high * scale", "1 + settings.clip_high", SCALED),
        ("the better of both surrogates", "torch.maximum(-ratio", "torch.minimum(-ratio",
         f"{LOSS}::test_clipping_by_hand"),
        ("dual clip on positive advantages", "advantages < 0, torch", "advantages > 0, torch",
         f"{LOSS}::test_asymmetric_clip_and_dual_clip"),
        ("cispo's weight has a gradient", "_range_of(ratio.detach(), clip_scale", "_range_of(ratio, clip_scale",
         f"{LOSS}::test_cispo_by_hand"),
        ("sapo's temperature of the other sign", "_either(advantages > 0,", "_either(advantages < 0,",
         f"{LOSS}::test_sapo_by_hand"),
        ("vespo's k of the other sign", "k = _either(advantages >= 0,", "k = _either(advantages < 0,",
         f"{LOSS}::test_vespo_by_hand"),
        ("vespo's weight is a mean", '"segment", segment, "sum")', '"segment", segment, "mean")',
         f"{LOSS}::test_vespo_by_hand"),
        ("vespo's ratios have no bound", ".clamp(-LOG_RATIO, LOG_RATIO)", "",
         f"{LOSS}::test_vespo_bounds_what_it_adds_up_by_hand"),
        ("a rollout's weight counts once per token for vespo", 'settings.importance == "token", correction.log()',
         'settings.importance != "none", correction.log()', f"{LOSS}::test_vespo_by_hand"),
        ("the unbiased KL has no ratio", "k3 * kl_log_ratio.exp() if", "k3 if",
         f"{LOSS}::test_k3_times_the_ratio_by_hand"),
        ("the unbiased KL's ratio has no gradient", "k3 * kl_log_ratio.exp() if", "k3 * kl_log_ratio.detach().exp() if",
         f"{LOSS}::test_k3_times_the_ratio_by_hand"),
        ("k3 without its - 1", "(ref_logp - logp) - 1", "(ref_logp - logp)", f"{LOSS}::test_k3_by_hand"),
        ("importance cap ignored", "correction.clamp(floor, cap)", "correction.clamp(min=floor)",
         f"{LOSS}::test_importance_weights_by_hand"),
        ("importance floor ignored", "correction.clamp(floor, cap)", "correction.clamp(max=cap)", BOUNDED),
        ("weights below the floor are not masked", "((correction < floor) | (correction > cap))", "(correction > cap)",
         BOUNDED),
        ("gspo sums log-ratios", 'segment, "mean")', 'segment, "sum")',
         f"{LOSS}::test_gspo_ratio_is_the_geometric_mean_by_hand"),
        ("sequence importance is a mean", '"mean" if settings.importance == "geometric" else "sum"', '"mean"',
         f"{LOSS}::test_importance_of_a_sequence_is_the_product_of_its_tokens"),
        ("geometric importance is a product", '"mean" if settings.importance == "geometric" else "sum"', '"sum"',
         BOUNDED),
        ("ratios of rollouts in place of turns", '"segment", segment, "mean"', '"segment", sequence, "mean"', BOTH),
        ("importance weights of turns", '"sequence", sequence, reduce', '"sequence", segment, reduce', BOTH),
        ("gspo keeps masked tokens in its mean", "active * ~dropped", "active",
         f"{LOSS}::test_gspo_drops_masked_tokens_from_its_mean_by_hand"),
        ("weights ignored", "return (weights * per_pair).sum(), metrics", "return per_pair.sum(), metrics",
         f"{LOSS}::test_weights_are_the_aggregation_and_zero_weight_counts_nowhere"),
        ("entropy raises the loss", "per_pair - settings.entropy * entropy", "per_pair + settings.entropy * entropy",
         f"{LOSS}::test_entropy_bonus_lowers_the_loss"),
    ),
    *faults(f"{KERNELS}/policy_loss/settings.py",
        ("vespo of single tokens", 'if self.surrogate == "vespo" and', "if False and",
         f"{LOSS}::test_settings_that_mean_nothing_are_refused"),
        ("geometric importance without rollouts", 'in ("sequence", "geometric")', '== "sequence"', BOUNDED),
        ("a floor above the cap is taken", "0 <= self.importance_floor <= self.importance_cap",
         "0 <= self.importance_floor", f"{LOSS}::test_settings_that_mean_nothing_are_refused"),
    ),
    *faults(f"{KERNELS}/policy_loss/__init__.py",
        ("a missing segment is not named", '"segment": settings.needs_segment, ', "",
         f"{LOSS}::test_a_missing_input_is_named"),
    ),
    *faults(f"{KERNELS}/linear_policy_loss/__init__.py",
        ("the LM head's loss takes ratios of turns", "if settings.needs_segment or settings.needs_sequence:",
         "if settings.needs_sequence:", f"{LOSS}::test_what_needs_whole_turns_or_rollouts_is_refused"),
        ("the LM head's loss scales no range", "clip_scale=clip_scale,", "clip_scale=None,",
         f"{LOSS}::test_the_lm_heads_loss_scales_the_clip_range_by_hand"),
    ),
    *faults(f"{KERNELS}/tree_attention/torch_path.py",
        ("strided heads read as dense", "(x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))",
         "(x for x in (q, k, v))", "kernels/test_layouts.py::test_tree_attention"),
    ),
    *faults(f"{KERNELS}/linear_policy_loss/torch_path.py",
        ("a chunk loses its last row", "[start, start + len(rows)]", "[start, start + len(rows) - 1]", FUSED),
        ("logits' gradient without its slope", "dz.mul_(slope) if", "dz if", FUSED),
        ("a panel's gradient by the row's last base", "in zip(chunk.panels, factor,",
         "in zip(chunk.panels, factor[-1:].expand_as(factor),", PANELS),
        ("entropy's gradient dropped", "if settings.entropy else None", "if False else None", FUSED),
        ("upstream gradient dropped", "gradient *= d_loss", "gradient *= 1", FUSED),
        ("all logits at once", "return max(1, min(rows, max(workspace // 2, workspace - fixed) // row_bytes)), panel",
         "return max(1, rows), panel", f"{GAPS}::test_the_fused_loss_makes_no_tensor_of_all_logits"),
    ),
    *faults(f"{KERNELS}/turn_advantages/torch_path.py",
        ("discount before normalising", "z = normalised_rewards_torch(rewards,",
         "rewards, gamma = _accumulate(rewards.double(), rollout_offsets, gamma, 'sum'), 0.0; "
         "z = normalised_rewards_torch(rewards,",
         f"{TURNS}::test_normalises_before_discounting"),
        ("gate not applied", "r = r.masked_fill(gain & (r.abs() < n.gate), 0.0)", "", WORKED),
        ("gate on centred gains", "gain & (r.abs() < n.gate)", "gain & ((r - r[gain].mean()).abs() < n.gate)", WORKED),
        ("standard deviation of a sample", 'torch.segment_reduce((x - mean).square(), "mean", lengths=lengths)',
         'torch.segment_reduce((x - mean).square(), "sum", lengths=lengths) / (lengths - 1).clamp(min=1)', WORKED),
        ("gains' floor on outcomes", "torch.where(gain, std + n.min_std, std + n.outcome_floor)", "(std + n.min_std)",
         WORKED),
        ("variance without its floor", "(variance + n.min_var).sqrt()", "variance.sqrt()", WORKED),
        ("equal rewards told by their std", "(spread == 0) | (variance == 0)", "variance == 0",
         f"{TURNS}::test_equal_rewards_give_exact_zeros"),
        ("advantage runs across rollouts", "padded[:, t] += gamma * padded[:, t + 1]",
         "padded[:, t] += gamma * padded.roll(1, 0)[:, t + 1]", WORKED),
        ("sums over the root of all turns", "(lengths[rollout] - 1 - turn)", "(lengths[rollout] - 1)", WORKED),
        ("turns of any number in one pool", "pool * int(lengths.max()) + number", "pool * int(lengths.max())", WORKED),
        ("an outcome beside gains is discounted", "return own + outcome", "return own + gamma * outcome", WORKED),
        ("raw gains are gated away", "z = torch.where(gain, r, z)", "z = torch.where(gain, 0 * r, z)", WORKED),
    ),
    *faults(f"{KERNELS}/linear_logprob/triton_kernels.py",
        ("Triton: phantom vocabulary mass", 'right = tl.where((columns < n_vocab)[None, :], right, float("-inf"))',
         "right += 0", f"{LOGPROB_GPU}::test_all_negative_logits_keep_their_mass"),
        ("Triton: largest logit begins at 0", 'top = tl.full((BLOCK_ROWS,), float("-inf"), dtype=tl.float32)',
         "top = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)",
         f"{LOGPROB_GPU}::test_all_negative_logits_keep_their_mass"),
        ("Triton: moments stay at their own tile's maximum", "(tile_moment + tile_fall * tile_mass)", "tile_moment",
         f"{LOGPROB_GPU}::test_all_negative_logits_keep_their_mass"),
        ("Triton: the last band of tiles as high as the others",
         "tl.minimum(row_tiles - band * GROUP_ROWS, GROUP_ROWS)", "GROUP_ROWS", CHUNKS),
        ("Triton: slope of the logits' soft cap dropped", "dz *= 1 - t * t", "dz *= 1.0", CHUNKS),
        ("Triton: sign of the entropy's gradient", "pull = (d_logp + d_entropy * entropy) +",
         "pull = (d_logp + d_entropy * entropy) -", f"{LOGPROB_GPU}::test_gradients_of_one_output_only"),
    ),
    *faults(f"{KERNELS}/linear_logprob/triton_path.py",
        ("Triton: labels have no gradient of their own",
         "head.cell_gradients(dz_rows, cells, logit, cell_d_logp, row_values, first, c)", "pass", CHUNKS),
        ("Triton: pairs of a row averaged", 'segment_reduce(values, "sum"', 'segment_reduce(values, "mean"',
         f"{LOGPROB_GPU}::test_repeated_rows_and_cells_accumulate"),
        ("Triton: the weight's gradient is the last row block's", "d_weight[c], accumulate=True)",
         "d_weight[c])", f"{LOGPROB_GPU}::test_row_blocks_add_up_in_float32"),
        ("Triton: the weight's gradient summed in its dtype", "weight.dtype if one_block else torch.float32",
         "weight.dtype", f"{LOGPROB_GPU}::test_row_blocks_add_up_in_float32"),
        ("Triton: dx is the last vocabulary chunk's", "dx, accumulate=start > 0)", "dx)", CHUNKS),
        ("Triton: a strided weight read as contiguous", "if not aligned(weight):", "if False:",
         f"{LOGPROB_GPU}::test_strided_upstream_and_inputs"),
        ("Triton: descriptors of unaligned rows", "== 1 and all(size % ALIGNMENT == 0 for size in sizes)", "== 1",
         f"{LOGPROB_GPU}::test_what_is_launched_is_what_the_gate_compiles"),
    ),
    *faults(f"{KERNELS}/linear_policy_loss/triton_kernels.py",
        ("Triton: phantom vocabulary mass in the fused loss", 'z = tl.where(mask, z, float("-inf"))', "z += 0",
         f"{FUSED_GPU}::test_vocabularies_beside_a_tile_have_no_phantom_mass"),
        ("Triton: largest logit of the fused loss begins at 0", 'tops = tl.full([BLOCK], float("-inf"), tl.float32)',
         "tops = tl.zeros([BLOCK], tl.float32)",
         f"{FUSED_GPU}::test_vocabularies_beside_a_tile_have_no_phantom_mass"),
        ("Triton: a shared label's sum stays within a block", "unfinished = tl.sum(", "unfinished = 0 * tl.sum(",
         f"{FUSED_GPU}::test_rows_with_many_pairs_and_shared_labels"),
        ("Triton: a label's sum runs on into the next", "tl.where(begins_b != 0, sum_b, sum_a + sum_b)",
         "sum_a + sum_b", f"{FUSED_GPU}::test_rows_with_many_pairs_and_shared_labels"),
        ("Triton: the fused loss scales another pair's range", "load(clip_scale_ptr, pair, mask)",
         "load(clip_scale_ptr, at, mask)", f"{FUSED_GPU}::test_rows_with_many_pairs_and_shared_labels"),
        ("Triton: slope of a row's last pairs only", "logp_slope += tl.sum(", "logp_slope = tl.sum(",
         f"{FUSED_GPU}::test_rows_with_many_pairs_and_shared_labels"),
    ),
    *faults(f"{KERNELS}/linear_policy_loss/triton_path.py",
        ("Triton: importance floor of the fused loss ignored", "floor, cap = importance_bounds(settings) if",
         "floor, cap = (None, importance_bounds(settings)[1]) if", f"{FUSED_GPU}::test_importance_weights_of_tokens"),
        ("Triton: strided pairs of the fused loss read as contiguous", "x.detach().contiguous()", "x.detach()",
         f"{FUSED_GPU}::test_strided_inputs"),
        ("Triton: the weight's gradient is the last chunk's", "accumulate=first > 0", "accumulate=False",
         f"{FUSED_GPU}::test_chunks_add_up"),
    ),
    *faults(f"{KERNELS}/policy_loss/triton_kernels.py",
        ("Triton: sums of the fused loss's last rows only", "else total + part", "else part",
         f"{FUSED_GPU}::test_half_precision_errs_no_more_than_plain_torch"),
        ("Triton: sums of the last partial only", "nan_max(total, part), total + part)", "nan_max(total, part), part)",
         f"{LOSS_GPU}::test_half_precision_inputs"),
        ("Triton: cispo has the clip's slope", "slope = -bounded(ratio, low, high) * advantage", "slope = free",
         f"{LOSS}::test_cispo_by_hand"),
        ("Triton: sapo's temperature of the other sign", "advantage > 0, rate_pos", "advantage < 0, rate_pos",
         f"{LOSS}::test_sapo_by_hand"),
        ("Triton: sapo's slope overflows", "tl.where(e == 0, 0.0, 4 * e", "tl.where(e < 0, 0.0, 4 * e",
         f"{LOSS_GPU}::test_a_bounded_ratio_may_overflow"),
        ("Triton: vespo's weight is a mean", 'if SURROGATE != "vespo":\n        log_ratio /=',
         "if True:\n        log_ratio /=", f"{LOSS}::test_vespo_by_hand"),
        ("Triton: vespo's weights are factors, too", "tl.where((correction == 0) & MASKED, 0.0, 1.0)", "correction",
         f"{LOSS}::test_vespo_by_hand"),
        ("Triton: the unbiased KL's ratio has no gradient", "if shared is None:\n                slope += k3",
         "if False:\n                slope += k3", f"{LOSS}::test_k3_times_the_ratio_by_hand"),
        ("Triton: a segment's slope lacks the unbiased KL's", "if kl_ref_ptr is not None:", "if False:",
         f"{LOSS_GPU}::test_every_setting_equals_its_definition"),
        ("Triton: the counter is not set back", "tl.store(counter_ptr, 0)", "tl.store(counter_ptr, 1)",
         f"{LOSS_GPU}::test_the_last_program_leaves_the_counter_at_zero"),
        ("Triton: the last program but one adds the partial sums", "tl.atomic_add(counter_ptr, 1) == programs - 1",
         "tl.atomic_add(counter_ptr, 1) == programs - 2", f"{LOSS_GPU}::test_lengths_around_a_tile"),
        ("Triton: slopes of a segment summed", "tl.sum(slopes, 0) / count)", "tl.sum(slopes, 0))",
         f"{LOSS_GPU}::test_half_precision_inputs"),
        ("Triton: a segment keeps masked tokens in its mean", "kept & (correction != 0)", "kept", STRIDED_GPU),
        ("Triton: a pair of weight 0 in its segment's slope", "old - load(engine_ptr, pair, kept)",
         "old - load(engine_ptr, pair, mask)", f"{LOSS_GPU}::test_a_pair_of_weight_0_adds_nothing"),
        ("Triton: masked weights are capped", "0.0 if MASKED else cap", "cap", STRIDED_GPU),
        ("Triton: masked weights are lifted to the floor", "0.0 if MASKED else floor", "floor", STRIDED_GPU),
        ("Triton: importance floor ignored", "if floor is not None:", "if False:", BOUNDED),
        ("Triton: weights of rollouts ignored", "gap = load(gap_ptr, load_number(sequence_ptr, at, mask), mask)",
         "gap += 0", STRIDED_GPU),
        ("Triton: a segment's weights of other pairs", "sequence_ptr, gap_ptr, pair, kept, floor",
         "sequence_ptr, gap_ptr, at, kept, floor", STRIDED_GPU),
        ("Triton: geometric importance is a product", "if MEAN:", "if False:", BOUNDED),
        ("Triton: the lower bound is not scaled", "1 + (low - 1) * scale", "low", SCALED),
        ("Triton: the upper bound is not scaled", "1 + (high - 1) * scale", "high", SCALED),
        ("Triton: a NaN scale is hidden", "tl.where(scale == scale, advantage, scale)", "advantage",
         f"{LOSS_GPU}::test_nan_is_never_hidden"),
        ("Triton: the pass over tokens scales no range", "if clip_scale_ptr is not None:\n        low, high",
         "if False:\n        low, high", SCALED),
        ("Triton: a segment's slope scales other pairs' ranges", "load(clip_scale_ptr, pair, kept)",
         "load(clip_scale_ptr, at, kept)", STRIDED_GPU),
    ),
    *faults(f"{KERNELS}/policy_loss/triton_path.py",
        ("Triton: one counter for all streams", "torch.cuda.current_stream(device).cuda_stream)", "0)",
         f"{LOSS_GPU}::test_streams_and_launches_in_a_graph_have_counters_of_their_own"),
        ("Triton: launches in a graph share a counter", "if torch.cuda.is_current_stream_capturing():", "if False:",
         f"{LOSS_GPU}::test_streams_and_launches_in_a_graph_have_counters_of_their_own"),
        ("Triton: geometric weights are asked for as products", 'MEAN=settings.importance == "geometric"', "MEAN=False",
         BOUNDED),
        ("Triton: strided pairs read as contiguous", "x.detach().contiguous()", "x.detach()", STRIDED_GPU),
    ),
    *faults(f"{KERNELS}/turn_advantages/triton_kernels.py",
        ("Triton: gate not applied", "gain & (tl.abs(x.to(tl.float64)) < gate)", "gain & (gate < 0)",
         f"{TURNS_GPU}::test_hand_worked"),
        ("Triton: advantage runs across rollouts", "tl.where(outcome, 0.0, 1.0).to(tl.float64) * gamma",
         "tl.where(outcome, 1.0, 1.0).to(tl.float64) * gamma", f"{TURNS_GPU}::test_hand_worked"),
        ("Triton: variance without its floor", "tl.sqrt(variance + min_var)", "tl.sqrt(variance)",
         f"{TURNS_GPU}::test_hand_worked"),
        ("Triton: gains' floor on outcomes", "others, min_var, outcome_floor, scale_std",
         "others, min_var, min_std, scale_std", f"{TURNS_GPU}::test_hand_worked"),
        ("Triton: sums stay within a tile", "after = tl.sum(", "after = 0 * tl.sum(",
         f"{TURNS_GPU}::test_groups_of_several_tiles"),
    ),
    *faults(f"{KERNELS}/tree_attention/triton_kernels.py",
        ("Triton: later keys are seen", "(key[None, :] <= query[:, None]) & (query[:, None] < end[None, :])",
         "query[:, None] < end[None, :]", GROUPS),
        ("Triton: keys have gradients of earlier queries",
         "(key[:, None] <= query[None, :]) & (query[None, :] < end[:, None])", "query[None, :] < end[:, None]",
         GROUPS),
        ("Triton: keys outside the window are seen", "query_position[:, None] - position[None, :] < window",
         "window > 0", GROUPS),
        ("Triton: keys' gradients from outside the window", "query_position[None, :] - position[:, None] < window",
         "window > 0", GROUPS),
        ("Triton: largest score begins at 0", 'top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)',
         "top = tl.zeros((BLOCK_M,), dtype=tl.float32)", f"{ATTENTION_GPU}::test_large_scores_keep_their_mass"),
        ("Triton: query heads of the wrong group", "head * group + row % group", "head + row % group",
         GROUPS),
        ("Triton: keys' gradients of the wrong group", "tile, q_head = start, head * group",
         "tile, q_head = start, head", GROUPS),
        ("Triton: keys' gradients from a group's first head", "q_head += wraps.to(tl.int32)", "q_head += 0",
         GROUPS),
        ("Triton: queries' gradient without the scale", "d_q * scale", "d_q", GROUPS),
        ("Triton: slope of the scores' soft cap dropped", "d_s *= 1 - t * t", "d_s *= 1.0",
         GROUPS),
    ),
    *faults(f"{KERNELS}/tree_attention/triton_path.py",
        ("Triton: scores scaled twice under a soft cap", "(1.0 if self.capped else scale)", "scale",
         GROUPS),
        ("Triton: a strided upstream read as contiguous",
         "return x if x.stride(2) == 1 and all(x.stride()) else", "return x if True else",
         f"{ATTENTION_GPU}::test_strided_inputs_and_upstream"),
    ),
    *faults(f"{KERNELS}/backend.py",
        ("Triton: launched on the current device", "with torch.cuda.device_of(first):", "if True:",
         "kernels/test_backend.py::test_kernels_are_launched_on_the_device_of_their_tensors"),
        ("what runs told without the head's dtype", "head = model if head is None else head", "head = model",
         "kernels/test_backend.py::test_what_is_said_to_run_depends_on_the_models_dtypes"),
    ),
    *faults(f"{KERNELS}/triton_variants.py",
        ("Triton: CPU tensors taken beside a GPU", "not isinstance(driver.active, GPUDriver)",
         "driver.active is not None",
         "kernels/triton/test_tune.py::test_tensors_on_the_cpu_are_refused_beside_a_gpu"),
    ),
    *faults("igpo_fast/update/losses.py",
        ("token mean over rollouts", "1 / lengths.sum()", "1 / len(lengths)", "test_losses.py::test_weights"),
        ("sequence sum over tokens", "1 / len(lengths))\n", "1 / lengths.sum())\n", "test_losses.py::test_weights"),
        ("the metrics' geometric importance is a product",
         'total / np.bincount(number) if settings.importance == "geometric" else total', "total", EFFECTIVE),
        ("the metrics' weights are not bounded", "else weight.clip(floor, cap)", "else weight", EFFECTIVE),
        ("masked weights count in the effective sample size", "np.where(outside, 0.0, weight)", "weight", EFFECTIVE),
        ("weights below the floor are not counted", "(weight < floor) | (weight > cap)", "(weight > cap)",
         "test_losses.py::test_tokens_outside_the_bounds_are_counted"),
        ("Dr. GRPO's constant is the batch's longest", "(len(lengths) * most_tokens)", "(len(lengths) * lengths.max())",
         "test_losses.py::test_weights"),
    ),
    *faults("igpo_fast/config.py",
        ("dr_grpo keeps the mean over tokens", 'dict(aggregation="seq_mean_token_sum_norm")', "dict()",
         "test_config.py::test_a_names_own_loss_comes_with_it_unless_given"),
        ("gspo has ratios of tokens", 'dict(ratio="sequence")', "dict()",
         "test_config.py::test_a_names_own_loss_comes_with_it_unless_given"),
        ("a ratio's clips win over what is given",
         "return {**(CLIP_OF_RATIO.get(ratio, {}) if isinstance(ratio, str) else {}), **values}",
         "return {**values, **CLIP_OF_RATIO.get(ratio, {})}",
         "test_config.py::test_a_names_own_loss_comes_with_it_unless_given"),
        ("a name's own loss wins over what is given", "**own, **values}", "**values, **own}",
         "test_config.py::test_a_names_own_loss_comes_with_it_unless_given"),
    ),
    *faults("igpo_fast/update/schedule.py",
        ("a warm-up begins at 0", "(update + 1) / warmup", "update / warmup", "test_schedule.py::test_factors"),
    ),
    *faults("igpo_fast/run/signatures.py",
        ("drift judged before the policy changes", "max(EARLY, _unchanged(", "max(EARLY, 0 * _unchanged(",
         "test_signatures.py::test_nothing_drifts_before_the_policy_changes"),
    ),
    *faults("igpo_fast/run/metrics.py",
        ("the effective sample size is no share", "(tokens * sums", "(1 * sums", EFFECTIVE),
        ("weights of 0 have no effective sample size", '["squared_importance"] or 1.0', '["squared_importance"]',
         EFFECTIVE),
        ("a step's time with its evaluation", ' - self._times.get(f"time/{EVALUATION}", 0.0)', "",
         "test_metrics.py::test_a_steps_time_is_without_its_evaluation"),
    ),
    *faults("igpo_fast/update/packs.py",
        ("an answer's sum for its mean", "total / np.maximum(count, 1)", "total", VALUES),
        ("advantage of the turn after", "{i: credits[i].advantages for i",
         "{i: np.roll(credits[i].advantages, -1) for i", ONE_PASS),
        ("advantages of a rollout's first turn", " + plan.turn[:n]", "",
         "test_packs.py::test_advantages_are_each_turns_or_each_tokens"),
        ("answers' means over all turns", "(number, answer, turn), shape", "(number, answer, 0 * turn), shape",
         "test_packs.py::test_means_are_over_each_answers_tokens"),
    ),
    *faults("igpo_fast/update/critic.py",
        ("lambda is 1", "+ gamma * gae_lambda * behind", "+ gamma * behind",
         f"{CRITIC}::test_lambda_discounts_later_errors"),
        ("the next value is not discounted", "rewards[:, s] + gamma * after", "rewards[:, s] + after",
         f"{CRITIC}::test_steps_of_turns_by_hand"),
        ("a turn's reward at its first token", "np.cumsum(n) - 1 for n in lengths", "np.cumsum(n) - n for n in lengths",
         f"{CRITIC}::test_steps_of_tokens_by_hand"),
        ("a turn's value is its last token's", "[v[place] if by_turn", "[v[[*place[1:] - 1, -1]] if by_turn",
         f"{CRITIC}::test_steps_of_turns_by_hand"),
        ("a turn's first token has a token's weight", "share[place] = n", "share[place] = 1",
         f"{CRITIC}::test_steps_of_turns_by_hand {PPO}"),
        ("targets are whitened", "returns = advantages + filled_values", "returns = _white(advantages) + filled_values",
         f"{CRITIC}::test_steps_of_tokens_by_hand"),
        ("advantages of the rollout before", "for row, n in zip(filled, steps, strict=True)]",
         "for row, n in zip(np.roll(filled, 1, 0), steps, strict=True)]",
         f"{CRITIC}::test_ragged_batches_follow_the_definition"),
        ("noise of equal advantages", "if advantages.min() == advantages.max():", "if False:",
         f"{CRITIC}::test_equal_advantages_are_whitened_to_exact_zeros"),
        ("noise of rounding", "np.sqrt(advantages.var() + 1e-8)", "advantages.std()",
         f"{CRITIC}::test_rounding_is_not_brought_to_unit_size"),
        ("a share of rounding is explained", "> ROUNDING", "> 0",
         f"{CRITIC}::test_equal_advantages_are_whitened_to_exact_zeros"),
        ("the gate does not gate", "< recipe.gate] = 0.0", "< 0] = 0.0", f"{CRITIC}::test_what_turns_earn"),
        ("gains of full weight", "= recipe.ig_weight * earned", "= earned", f"{CRITIC}::test_what_turns_earn"),
        ("a potential that is kept", "            rewards[-1] -= ", "            rewards[-1] -= 0 * ",
         f"{CRITIC}::test_tips_by_hand"),
        ("values clipped around their targets", "(old + (values - old)", "(returns + (values - old)",
         f"{CRITIC}::test_the_clipped_value_loss_by_hand {PPO}"),
        ("the smaller of two value losses", "torch.maximum(loss, near)", "torch.minimum(loss, near)",
         f"{CRITIC}::test_the_clipped_value_loss_by_hand {PPO}"),
        ("the whole value loss reaches the model", "self._coefficient * gradient)", "gradient)",
         f"{CRITIC}::test_the_coefficient_scales_what_reaches_the_model_and_nothing_else {PPO}"),
    ),
    *faults("igpo_fast/update/scoring.py",
        ("responses of the question itself", "np.flatnonzero(lent.owners != rollout.question.id)",
         "np.flatnonzero(lent.owners == lent.owners)", BORROWED),
        ("one response per question and rollout", "(rollout.question.id, turn.response_ids.tobytes()): turn",
         "(rollout.question.id, rollout.index): turn",
         "test_counterfactuals.py::test_every_response_of_another_question_is_lent_sooner_or_later"),
        ("the same responses in every step", "[self.seed, batch.step,", "[self.seed, 0,",
         DRAWN),
        ("the same responses for every seed", "[self.seed, batch.step,", "[0, batch.step,",
         DRAWN),
        ("long responses are lent", "if turn.found and len(turn.response_ids) <= self.longest_response",
         "if turn.found", TOO_LONG),
        ("empty responses are lent", "if turn.found and len", "if len",
         TOO_LONG),
        ("a malformed turn's hint is masked", "if turn.calls and len(", "if len(",
         "test_counterfactuals.py::test_a_malformed_turns_hint_is_not_masked"),
        ("malformed turns have a random fork", "if not rollout.turns[t - 1].calls:", "if False:",
         UNSEARCHED),
        ("a fork behind the real response", "np.cumsum(lengths)[1::2]", "np.cumsum(lengths)[2::2]",
         REAL_SIDE),
        ("what no response has is masked", "if turn.calls and len(turn.response_ids):", "if True:",
         "test_score_baselines.py::TestEqualsPlainForwards::test_masked"),
        ("the real side is masked, too", "[(REAL, turn.response_ids)]", "[(REAL, self.masked_response)]",
         REAL_SIDE),
        ("one of the samples", "np.mean([value_of(sample) for sample in samples], axis=0)", "value_of(samples[0])",
         FORKED),
        ("sides exchanged", "Values(value_of(compared[[REAL]]), value_of(compared[[MASKED]])",
         "Values(value_of(compared[[MASKED]]), value_of(compared[[REAL]])", FORKED),
        ("a bound without samples", "searching * self.samples * (", "searching * (", BOUND),
        ("a bound without the turns", "self.response_tokens + decision_tokens", "self.response_tokens",
         BOUND),
        ("the real side costs a pass", "if self.baseline != \"masked\" or f.answer == MASKED", "if True",
         SEPARATE),
    ),
    *faults("igpo_fast/update/packs.py",
        ("the reference's values for the policy's", "self._read(new, self._learner.value, mine",
         "self._read(new, self._learner, mine", VALUE_MODELS),
        ("answers in the policy's pass, too", "of_policy=True, scored=not apart", "of_policy=True, scored=True",
         VALUE_MODELS),
    ),
    *faults("igpo_fast/update/learner.py",
        ("the teacher follows the policy", "self._teacher = frozen()",
         "self._teacher = Policy(lm, temperature, self.settings, backend)", VALUE_MODELS),
        ("a teacher that is never refreshed", "self._teacher.lm.load_state_dict(self.lm.state_dict())", "pass",
         "test_value_models.py::test_a_teacher_stands_still_between_refreshes"),
        ("a resumed teacher is the first model", "        self._load_teacher(folder)\n", "",
         "e2e/test_family.py::test_a_resumed_run_goes_on_as_if_it_had_not_stopped"),
    ),
    *faults("igpo_fast/update/update.py",
        ("the reference runs twice", "if self.recipe.value_source == \"reference\":", "if False:", VALUE_MODELS),
    ),
    *faults("igpo_fast/update/advantages.py",
        ("a population's spread", "np.std(outcomes, ddof=1)", "np.std(outcomes)", "test_gains.py::test_infopo_by_hand"),
        ("gains count more where outcomes spread", "(1 - np.tanh(np.array(spread)", "(1 + np.tanh(np.array(spread)",
         "test_gains.py::test_infopo_by_hand"),
        ("outcomes are gated, too", "of_outcomes + np.repeat(gate, np.diff(offsets[sizes])) * (total - of_outcomes)",
         "np.repeat(gate, np.diff(offsets[sizes])) * total", "test_gains.py::test_infopo_by_hand"),
        ("the gate of the group before", "np.repeat(gate, np.diff", "np.repeat(np.roll(gate, 1), np.diff",
         "test_gains.py::test_each_group_has_its_own_gate"),
        ("a call's share is all of the gain", "gain / (len(turn.ids) - turn.call)", "gain",
         "test_gains.py::test_ig_search_by_hand"),
        ("the whole turn for the call", "row[turn.call :] +=", "row[:] +=", "test_gains.py::test_ig_search_by_hand"),
        ("a call gets the next turn's gain", "own * (advantages[i] - others)", "advantages[i] - others",
         "test_gains.py::test_a_call_gets_no_gain_of_another_turn"),
    ),
    *faults("igpo_fast/rollouts/dialect/base.py",
        ("a call is the whole turn", "first, behind = 0, len(ids)", "first, behind = 0, 1",
         "test_contracts.py::TestTagsDialectOfWords::test_a_call_is_the_shortest_end_that_reads_alike"),
    ),
    *faults("igpo_fast/integrations/trl.py",
        ("a response is the next turn's", "nexts = [*starts[1:], ends[-1]]", "nexts = [*ends[1:], ends[-1]]",
         "integrations/test_trl.py::test_turns_are_runs_of_the_mask"),
        ("advantages of another rollout", "for place in np.argsort(order)]", "for place in order]", BESIDE_TRL),
        ("outcomes are lost", "[outcomes[i] for i in order]", "[0.0 for i in order]", BY_HAND_IN_TRL),
        ("unread tokens have probability 1", 'unread = inputs.get("old_per_token_logps", blank), blank',
         "unread = blank, blank", "integrations/test_trl.py::test_tokens_that_were_not_read_cannot_overflow"),
        ("packed logits are not tempered", "head.bias, temperature=self.temperature", "head.bias, temperature=1.0",
         BESIDE_TRL),
        ("answers are not at the end of their sequences", 'padding_side="left"', 'padding_side="right"',
         "integrations/test_trl.py::test_gains_are_those_of_score"),
        ("weights of its own", "shared = {id(tensor)", "shared = {0 * id(tensor)",
         "integrations/test_trl.py::test_the_model_still_samples_and_evaluates_as_it_did"),
    ),
    *faults("igpo_fast/update/gains.py",
        ("the sum of log-probabilities", "np.logaddexp.reduce(values, axis=0)", "values.sum(axis=0)",
         "test_gains.py::test_the_sum_of_answers_by_hand"),
        ("the baseline of the turn before", "dtype=np.float64)[turns - 1]", "dtype=np.float64)[turns - 2]",
         FORKED),
    ),
    *faults("igpo_fast/update/advantages.py",
        ("gain credited to the next turn", "earned = gains[earning] if", "earned = np.roll(gains[earning], 1) if",
         "test_advantages.py::test_paper"),
        ("REINFORCE++ over rollouts", "[rollout.decision_tokens for rollout in rollouts]", "[1] * len(rollouts)",
         "test_advantages.py::test_reinforce_pp_normalises_over_the_batch"),
        ("gamma discounts outcome-only algorithms", "return self.gamma if self.needs_values or self.critic else 1.0",
         "return self.gamma", "test_advantages.py::test_gamma_discounts_igpo_but_not_outcome_only"),
    ),
    *faults("igpo_fast/update/advantages.py",
        ("a filtered turn shares the one before", "np.searchsorted(end, np.arange(len(r.turns)))",
         'np.maximum(np.searchsorted(end, np.arange(n), "right") - 1, 0)',
         "test_gains.py::test_turns_that_earn_nothing_share_the_next_ones_advantage"),
        ("a malformed turn keeps its gain", "np.where(malformed, -recipe.turn_format_penalty, earned)", "earned",
         "test_gains.py::test_a_malformed_turn_pays_in_place_of_its_gain"),
        ("clip ranges narrow with the gain", "1 + recipe.adaptive_clip * np.tanh", "1 - recipe.adaptive_clip * np.tanh",
         "test_gains.py::test_a2tgpo_by_hand"),
        ("the last turn's clip range follows its reward", "np.tanh(z / 2), 1.0)", "np.tanh(z / 2), 1 + np.tanh(z / 2))",
         "test_gains.py::test_a2tgpo_by_hand"),
        ("repeats cost their own turn alone", "costs[t] += recipe.discount * costs[t + 1]", "pass",
         "test_gains.py::test_repeated_passages_cost_their_share"),
        ("the weight of gains begins a step late", "(step - 1) / (self.steps - 1)", "step / self.steps",
         "test_gains.py::test_the_weight_of_gains_goes_in_equal_parts"),
    ),
    *faults("igpo_fast/update/rewards.py",
        ("F1 of sets of words", "Counter(said.split())", "Counter(set(said.split()))",
         "test_rewards.py::test_f1_and_exact_match"),
        ("yes shares words with yes they are", "and (said in _CLOSED or right in _CLOSED)", "and False",
         "test_rewards.py::test_f1_and_exact_match"),
    ),
    *faults("igpo_fast/update/gains.py",
        ("sign of the gain", "between = np.diff(", "between = -np.diff(", "test_rewards.py::test_information_gain"),
        ("undefined gains kept", "np.where(defined, between, 0.0)", "between",
         "test_rewards.py::test_information_gain"),
        ("exp of the mean over answers", 'values = np.exp(logp) if basis == "prob" else logp',
         'values = np.exp(np.tile(logp.mean(0), (len(logp), 1))) if basis == "prob" else logp',
         "test_rewards.py::test_values_of"),
        ("gains of filtered turns are lost", "values[[0, *turns]]", "values[[0, *(turns - 1)]]",
         "test_gains.py::test_turns_that_earn_nothing_share_the_next_ones_advantage"),
        ("every other turn counted from 0", "enumerate(rollout.turns[:-1], start=1)", "enumerate(rollout.turns[:-1])",
         "test_gains.py::test_turns_that_earn"),
        ("repeats inside one response are free", "            seen.add(passage)", "        seen.update(turn.passages)",
         "test_gains.py::test_repeated_passages_by_hand"),
    ),
    *faults("igpo_fast/update/policy.py",
        ("values of other pairs' states", '"row", hidden.device)[: plan.n_decisions]])',
         '"label", hidden.device)[: plan.n_decisions]])', PPO),
        ("no value loss", "loss, sums = loss + of_critic", "loss, sums = loss + 0 * of_critic", PPO),
        ("values of the prefix after", "rollout.turn_of_token, rollout.boundaries,",
         "rollout.turn_of_token, np.append(rollout.boundaries[1:], len(rollout.ids)),", VALUES),
        ("temperature not passed", "temperature=self.temperature, backend", "temperature=1.0, backend", VALUES),
        ("gradient through the answers", "return loss, sums, sums.pop(\"logp\")",
         "return loss - self._logp(hidden, plan, slice(plan.n_decisions, None)).sum(), sums, sums.pop(\"logp\")",
         ONE_PASS),
        ("sequences numbered across rollouts", "for key in (rollout, turn)", "for key in (0 * rollout, turn)",
         SEGMENTS),
        ("turns numbered across rollouts", "turn = rollout * (turn.max() + 1) + turn", "turn = turn * 1", SEGMENTS),
        ("a turn's ratio is its rollout's", 'segment=turn if settings.ratio == "turn" else sequence',
         "segment=sequence", SEGMENTS),
    ),
    *faults(f"{KERNELS}/plan.py",
        ("a fork begins a token late", "path[fork.at + token - 1]", "path[fork.at + token]", FORKS),
        ("a fork's label is its input", "fork.ids[token], np.full(m, FORK)",
         "fork.ids[np.maximum(token - 1, 0)], np.full(m, FORK)", FORKS),
        ("a tree's size forgets shared turns", "pairs += (length * (length + 1) - before * (before + 1)) // 2",
         "pairs += length * (length + 1) // 2", COST),
        ("a tree's size counts a shared boundary twice", "met = {boundary for boundary in met if boundary <= before}",
         "met = set()", COST),
        ("a replaced plan keeps its cache", "default_factory=dict, init=False,", "default_factory=dict,",
         f"{AUTOGRAD}::test_a_copy_of_a_used_plan_has_no_cache"),
        ("a pickled plan keeps its cache", '{**self.__dict__, "cache": {}}', "self.__dict__",
         f"{AUTOGRAD}::test_a_copy_of_a_used_plan_has_no_cache"),
        ("inference tensors in a plan's cache", "torch.inference_mode(False)", "torch.no_grad()",
         f"{AUTOGRAD}::test_a_plan_scored_under_inference_mode_can_be_trained_with"),
        ("ids that are no whole numbers are cut", 'x.dtype.kind not in "iu" or', 'x.dtype.kind not in "iuf" or',
         "kernels/test_plan.py::test_lists_are_packed_and_other_numbers_refused"),
    ),
    *faults(f"{KERNELS}/autograd.py",
        ("second derivatives vanish", "_Constant.apply(op, x.requires_grad_())", "x",
         f"{AUTOGRAD}::test_a_second_derivative_is_refused_not_lost"),
        ("autocast reaches a backward", "torch.no_grad(), no_autocast(given[0].device) if given else nullcontext()",
         "torch.no_grad()", f"{AUTOGRAD}::test_a_backward_under_autocast_is_as_exact_as_its_forward"),
    ),
    *faults(f"{KERNELS}/tree_attention/__init__.py",
        ("attention is not cast under autocast", "q, k, v = _autocast(q, k, v)", "_autocast(q, k, v)",
         f"{AUTOGRAD}::test_attention_under_autocast_is_cast_as_sdpa_is"),
    ),
    *faults(f"{KERNELS}/compat.py",
        ("delta is verl's dual clip", "min(high, delta - 1)", "high",
         "kernels/test_compat.py::test_delta_is_trls_bound_of_the_ratio"),
        ("a fraction of a mask counts as 1", "mask != 0, mask.float()", "mask != 0, (mask != 0).float()",
         "kernels/test_compat.py::test_a_fraction_of_a_mask_weighs"),
    ),
    *faults(f"{KERNELS}/huggingface/lm_head.py",
        ("the head's scale ignored", '"temperature", temperature) / head.scale', '"temperature", temperature)',
         f"{HEADS}::test_logprobs_are_those_of_the_models_own_logits"),
        ("the head's soft cap ignored", "softcap=head.softcap / head.scale", "softcap=0.0",
         f"{HEADS}::test_logprobs_are_those_of_the_models_own_logits"),
        ("an adapter on the head ignored", 'if key not in ("weight", "bias")]', "if False]",
         f"{HEADS}::test_a_head_with_an_adapter_is_refused_even_while_it_adds_nothing"),
        ("a head is tried once, whatever changes", "_measured[model][0] != state", "False",
         f"{HEADS}::test_a_head_that_changed_after_it_was_tried_is_tried_again"),
    ),
    *faults("kernels/igpo_kernels/huggingface/dispatch.py",
        ("encoders taken as causal", "is_causal is None else is_causal) is False", "False else is_causal) is False",
         f"{HEADS}::test_models_that_cannot_run_packed_are_refused_in_one_line"),
        ("the model's scaling ignored", "q.shape[-1] ** -0.5 if scaling is None else scaling", "q.shape[-1] ** -0.5",
         f"{GAPS}::test_a_models_own_scaling_is_used"),
        ("the model's window ignored", "window=sliding_window or None)", "window=None)", ENGINE_LOGP),
        ("the model's soft cap ignored", "softcap=softcap or 0.0,", "softcap=0.0,", ENGINE_LOGP),
        ("unknown keywords swallowed", "    if unknown:", "    if False:",
         f"{HEADS}::test_unknown_keywords_are_refused_by_name"),
        ("windows in masks swallowed", "    if stated:", "    if False:",
         f"{HEADS}::test_models_that_cannot_run_packed_are_refused_in_one_line"),
    ),
    *faults("igpo_fast/update/learner.py",
        ("the trainer's temperature is 1", "Policy(lm, temperature,", "Policy(lm, 1.0,", ONE_PASS),
        ("the reference's temperature is 1", "requires_grad_(False), temperature,", "requires_grad_(False), 1.0,",
         FIRST_STEP),
        ("no masters", "if p.dtype != torch.float32}", "if False}",
         "test_learner.py::test_updates_below_a_weights_rounding_are_not_lost"),
        ("the last pack's gradients alone", "master.grad += parameter.grad", "master.grad = parameter.grad.float()",
         "test_learner.py::test_gradients_of_packs_are_added_up_in_float32"),
        ("masters stay out of the model", "            self._masters.round()\n", "",
         "test_learner.py::test_updates_below_a_weights_rounding_are_not_lost"),
        ("a resumed run's masters are rounded", 'master.copy_(state["master"])', "pass",
         "test_checkpoint.py::test_resumed_updates_equal_uninterrupted_ones"),
        ("a checkpoint without the critic", " or name.startswith(CRITIC) else {}", " else {}",
         "test_checkpoint.py::test_resumed_updates_equal_uninterrupted_ones"),
        ("a resumed critic is 0 until its update", "        self._masters.round()\n        self._load_teacher",
         "        self._load_teacher",
         "test_checkpoint.py::test_resumed_updates_equal_uninterrupted_ones"),
        ("the critic at the model's rate", "rate * self._factor(self._number)", "self.lr",
         "test_checkpoint.py::test_resumed_updates_equal_uninterrupted_ones"),
    ),
    *faults("igpo_fast/update/update.py",
        ("engine's log-probabilities of other tokens", "of_pairs(plan, engine_logp)",
         "of_pairs(plan, engine_logp)[::-1].copy()", FIRST_STEP),
        ("weights of each pack", "weights=weights[plan",
         "weights=(weights * len(weights) / len(np.unique(plan.rollout)))[plan", ONE_PASS),
        ("old log-probabilities of another rollout", "of_pairs(plan, old_logp)",
         "of_pairs(plan, old_logp)[::-1].copy()", TWO_PASSES),
        ("branches kept out of the one pass", "everything, scored=True)", "everything, scored=False)", ONE_PASS),
        ("branches in the training passes of two", "share, scored=False)", "share, scored=True)",
         f"{GAPS}::test_answers_are_scored_once_a_step"),
        ("weights of the whole batch in each share", "self._weights(batch, share)",
         "self._weights(batch, range(len(batch.groups)))", TWO_PASSES),
        ("scores of packs in packing order", "tuple(credits[i] for i in range(len(batch.rollouts)))",
         "tuple(credits.values())", ONE_PASS),
    ),
    *faults("igpo_fast/types.py",
        ("response tokens trained", "np.full(len(turn.ids), t), np.full(len(turn.response_ids), -1)",
         "np.full(len(turn.ids), t), np.full(len(turn.response_ids), t)", ROLLOUT),
        ("boundary before the response", "return np.cumsum([len(self.prompt_ids), *lengths])",
         "return np.cumsum([len(self.prompt_ids), *lengths]) - [0, *(len(t.response_ids) for t in self.turns[:-1])]",
         ROLLOUT),
    ),
    *faults("igpo_fast/pretrained.py",
        ("made-up weights", 'info["missing_keys"]', "()",
         "test_model.py::test_tensors_that_are_not_the_models_are_named"),
        ("weights that are not finite", "if not _finite(tensor)", "if False",
         "test_model.py::test_tensors_that_are_not_the_models_are_named"),
        ("a generation_config.json that cannot be saved", "lm.generation_config = _valid(lm.generation_config)", "pass",
         "test_model.py::test_a_model_that_loads_can_be_saved"),
    ),
    *faults("igpo_fast/model.py",
        ("the probe stays inside every window", "setattr(owner, name, _SHORT)", "pass",
         "test_model.py::test_the_probe_sees_a_window_that_is_measured_in_packed_indices"),
        ("recomputed layers are in training mode", "layer.forward = partial(",
         "layer.training = True\n        layer.forward = partial(",
         "test_model.py::test_recomputed_layers_run_twice_and_drop_nothing_out"),
        ("learned positions that end before the answers", "max_tokens + answer_tokens > most", "max_tokens > most",
         "test_model.py::test_positions_learned_and_by_rope"),
    ),
    *faults("igpo_fast/data/tokenizer.py",
        ("ids other than tokenizer.json's", "not _same(tokenizer, saved):\n            tokenizer",
         "False:\n            tokenizer", "test_tokenizer.py::test_ids_are_those_of_tokenizer_json"),
        ("words that are unknown", "id == unknown and", "False and",
         "test_tokenizer.py::test_unknown_words_are_refused"),
    ),
    *faults("igpo_fast/engines/torch.py",
        ("the LM head in half precision", "hidden_BH.float() @ self._head_weight.T",
         "(hidden_BH @ head.weight.T).float()",
         f"{ENGINE}::test_half_precision_heads_give_logits_in_float32"),
        ("asyncio logs the engine's Ctrl-C", "self._pump.add_done_callback", "id",
         "test_interrupt.py::test_a_second_one_that_meets_the_engine_is_not_logged_by_asyncio"),
        ("noise starts anew each turn", "noise.uniform(self._stream[slots], self._known[slots])",
         "noise.uniform(self._stream[slots], self._known[slots] - self._began[slots])",
         f"{ENGINE}::test_noise_is_indexed_by_the_token_in_the_rollout"),
        ("the stop token is dropped", "slice(self._began[slot], self._known[slot])",
         "slice(self._began[slot], self._known[slot] - stopped)", f"{ENGINE}::test_stop_ids_end_the_turn_and_are_kept"),
        ("keys and values outlive an update", "self._drop_caches()\n        self.version", "self.version",
         f"{ENGINE}::test_in_place_updates_are_seen_after_load_weights"),
    ),
    *faults("igpo_fast/engines/noise.py",
        ("sampled log-probability without the temperature", "token_B, logp_BV.gather(",
         "token_B, logits_BV.log_softmax(-1).gather(", ENGINE_LOGP),
    ),
    *faults("igpo_fast/data/load.py",
        ("the same order every epoch", 'f"{seed}/{epoch}"', 'f"{seed}"',
         "test_data.py::test_question_order_differs_by_epoch_and_seed"),
        ("sets of a list merged into one", "name or \"\", otherwise=stem", "name or stem",
         "test_formats.py::test_a_file_of_seven_sets_beside_another_is_eight"),
        ("evaluation on what is trained on", "        if all(both):", "        if False:",
         "test_formats.py::test_questions_that_are_trained_on"),
    ),
    *faults("igpo_fast/data/fields.py",
        ("a text is a list of letters", "value if isinstance(value, list) else [value]", "value",
         "test_formats.py::test_answers_are_texts_and_numbers_as_people_write_them"),
        ("true is a text", "isinstance(value, int) and not isinstance(value, bool):\n        return str",
         "isinstance(value, int):\n        return str", "test_formats.py::test_what_is_no_text_is_refused"),
        ("1999.0 stays a float", 'np.format_float_positional(value, trim="-")', "repr(value)",
         "test_formats.py::test_answers_are_texts_and_numbers_as_people_write_them"),
        ("texts keep the form they were typed in", "return nfc(value)", "return value",
         "test_formats.py::test_answers_are_texts_and_numbers_as_people_write_them"),
    ),
    *faults("igpo_fast/data/rows.py",
        ("half characters in JSON pass", "if not encodable(written):", "if False:",
         "test_formats.py::test_half_a_character_is_refused_in_questions"),
        ("deep JSON ends in a traceback", "    except RecursionError:\n", "    except MemoryError:\n",
         "test_formats.py::test_json_that_breaks_parsers"),
    ),
    *faults("igpo_fast/words.py",
        ("scripts without spaces are one word a sentence", "for word in _grams(piece)]", "for word in [piece]]",
         "test_words.py::test_bm25_finds_in_chinese_japanese_and_either_unicode_form"),
    ),
    *faults("igpo_fast/rollouts/rollout.py",
    ),
    *faults("igpo_fast/rollouts/batch.py",
        ("deadlines count the trainer's work", "return self.clock() - self._stood", "return self.clock()",
         "test_rollout_async.py::TestHandedOut::test_no_deadline_counts_the_work"),
        ("groups interrupt a busy engine", "(self._agent.engine.remote or not self._sampling)", "True",
         "test_rollout_async.py::TestHandedOut::test_only_when_the_engine_has_nothing_to_do"),
        ("who waits for a tool holds a place", "(places, free) if agent", "(places, free) if True or agent",
         "test_rollout_async.py::TestTime::test_who_waits_for_a_tool_makes_room_unless_the_engine_keeps_it"),
    ),
    *faults("igpo_fast/rollouts/dialect/encoding.py",
        ("text of others read as control tokens", "backend.encode_special_tokens = True",
         "backend.encode_special_tokens = False", f"{TEXT}::TestForgedTokens::test_in_an_answer"),
        ("delimiters of the template not control tokens", "self._control = self._special | {",
         "self._control = self._special & {", f"{TEXT}::TestForgedTokens::test_in_a_passage_and_in_a_failure"),
        ("our own control tokens read as text", "if not theirs[start:stop].any():", "if theirs[start:stop].all():",
         f"{TEXT}::TestForgedTokens::test_in_a_question"),
    ),
    *faults("igpo_fast/rollouts/dialect/parsing.py",
        ("a call nested too deep raises", "except (ValueError, RecursionError)", "except ValueError",
         f"{TEXT}::test_turns_that_look_odd"),
        ("a text that spells a number is one", 'if "string" in kinds:', 'if "string" in kinds and not word.isdigit():',
         f"{OWED}::TestChatDialect::test_calls_of_every_kind_parse_back"),
        ("an echo of the instructions acts", 'if known[name] in ("", "and", ECHO + name):', 'if known[name] == "":',
         f"{TEXT}::test_turns_that_look_odd"),
    ),
    *faults("igpo_fast/rollouts/dialect/calls.py",
        ("a tag in an argument closes it", r'"</parameter>(?=\s*<parameter=|\s*</function>\s*</tool_call>)"',
         '"</parameter>"', f"{FAMILY}::test_calls_are_read_in_the_familys_format"),
        ("GLM: a tag in an argument closes it", r'"</arg_value>(?=\s*<arg_key>|\s*</tool_call>)"',
         '"</arg_value>"', f"{FAMILY}::test_calls_are_read_in_the_familys_format"),
        ("arguments keep the lines around them", "removeprefix(self.frame).removesuffix(self.frame)", "strip(' ')",
         f"{OWED}::TestChatDialect::test_calls_of_every_kind_parse_back"),
        ("arguments lose the space around them", "removeprefix(self.frame).removesuffix(self.frame)", "strip()",
         f"{OWED}::TestChatDialect::test_calls_of_every_kind_parse_back"),
        ("typed arguments stay texts", "of_text(value, parameters.get(key[1], {}))", "value",
         f"{OWED}::TestChatDialect::test_calls_of_every_kind_parse_back"),
        ("a call without its end counts", "(called(schema, arguments), tail.end()) if tail else (NOTHING, at)",
         "(called(schema, arguments), tail.end() if tail else stop)",
         f"{FAMILY}::test_a_call_without_arguments_needs_its_end"),
        ("a function that does not exist raises", "schema = functions.get(head[1]) if head else None",
         "schema = functions[head[1]] if head else None", f"{FAMILY}::test_calls_are_read_in_the_familys_format"),
        ("DeepSeek: only the first call counts", "actions, at = actions + called(", "actions, at = actions or called(",
         f"{FAMILY}::test_calls_are_read_in_the_familys_format"),
        ("DeepSeek: a call needs no end", "        if not end:\n            break\n",
         "        if not end:\n            return called(functions.get(call[1] or call[2]), arguments), stop\n",
         f"{FAMILY}::test_calls_are_read_in_the_familys_format"),
        ("gpt-oss: text after a call's JSON", 'if rest[:2] in ("", "<|") else NOTHING', 'if True else NOTHING',
         f"{FAMILY}::test_calls_are_read_in_the_familys_format"),
        ("gpt-oss: calls in thoughts count", 'thought=("<|channel|>analysis<|message|>", "<|end|>"),', "",
         f"{FAMILY}::test_calls_are_read_in_the_familys_format"),
        ("gpt-oss: any channel calls", r'r"<\|channel\|>commentary"', r'r"(?:<\|channel\|>commentary)?"',
         f"{FAMILY}::test_calls_are_read_in_the_familys_format"),
    ),
    *faults("igpo_fast/rollouts/dialect/chat.py",
        ("descriptions end turns", "[map_texts(function, self.quote) for function in functions]", "list(functions)",
         f"{TEXT}::TestForgedTokens::test_in_a_description"),
        ("the hint forges a call", "self.quote(call, tags=False)", "call",
         f"{FAMILY}::test_what_the_hint_shows_is_text"),
        ("a thought may open or not", "if self._thinks and not after.endswith(self._thought):", "if False:",
         f"{FAMILY}::test_a_thought_that_the_template_opens_only_after_the_user_is_refused"),
        ("a second call that the template leaves out", "if len(actions) > 1 and not self._parallel:", "if False:",
         f"{FAMILY}::test_one_call_a_turn_where_the_template_writes_one"),
        ("calls end as answers do", "spelled = (self._end, self._call_end, *ends)", "spelled = (self._end, *ends)",
         f"{FAMILY}::test_stops"),
    ),
    *faults("igpo_fast/rollouts/dialect/tags.py",
        ("tags in JSON end turns", "text = text.replace(tag, f", "text = text or (tag, f",
         f"{OWED}::TestTagsDialectOfText::test_markup_in_an_argument_ends_no_turn_and_forges_no_call"),
        ("descriptions are read as the dialect's own", "{quote(functions[name]", "{str(functions[name]",
         f"{TEXT}::TestForgedTokens::test_in_a_description"),
        ("a full stop in the forced answer's wrapper", "enough information to answer\\n",
         "enough information to answer.\\n", f"{TEXT}::test_the_released_codes_wrapper"),
    ),
    *faults("igpo_fast/transcripts.py",
        ("a response begins with the end of the turn", "return int(ends[0]) + 1", "return int(ends[0])",
         f"{SCORED}::TestEqualsPlainForwards::test_masked"),
        ("texts end turns", "if not self._ends_turns or not len(ends):", "if not len(ends):",
         f"{SCORED}::test_a_template_that_ends_no_turn_by_a_token_is_refused"),
        ("parts that a template drops pass", "if mark not in rendered:", "if not rendered:",
         f"{INPUTS}::test_thoughts_that_a_template_drops_are_refused"),
        ("unknown words scored", "if unknown is not None and", "if unknown is None and",
         f"{INPUTS}::test_words_that_the_tokenizer_does_not_know_are_refused"),
    ),
    *faults("igpo_fast/demonstrations.py",
        ("responses are learned as turns", "(turn.response_ids, RESPONSE)", "(turn.response_ids, WRITTEN)",
         f"{GIVEN}::test_a_chat_is_written_by_the_template_and_a_turn_ends_with_its_token"),
        ("the prompt is learned", "pieces = [(prompt, PROMPT)]", "pieces = [(prompt, RESPONSE)]",
         f"{GIVEN}::test_a_prompt_of_ones_own_is_kept"),
        ("long trajectories are kept", "if len(written[0]) > max_tokens:", "if len(written[0]) > 10 * max_tokens:",
         f"{GIVEN}::test_long_ones_are_left_out_and_silent_ones_counted"),
    ),
    *faults("igpo_fast/contents.py",
        ("demonstrations known by their path", '"sft.demonstrations": config.sft.demonstrations',
         '"sft.demonstrations": None', f"{GIVEN}::test_the_cache_knows_a_file_by_its_content"),
        ("instructions known by their path", '"rollout.system_file": config.rollout.system_file',
         '"rollout.system_file": None', f"{GIVEN}::test_the_cache_knows_a_file_by_its_content"),
    ),
    *faults("igpo_fast/score.py",
        ("the same draws in every line", "[self.scoring.seed, number]", "[self.scoring.seed, 0]",
         f"{SCORED}::test_draws_depend_on_seed_and_place_in_the_input_alone"),
        ("the reservoir has no seed", 'f"{self._seed} {owner} "', 'f"{owner} "',
         f"{SCORED}::test_a_reservoir_forgets_while_it_is_filled"),
        ("one question fills the reservoir", "if counts[owner] <= LENT_PER_QUESTION and", "if",
         f"{SCORED}::test_a_reservoir_is_bounded_and_the_same_in_any_order"),
        ("the first that are offered stay", "in sorted(self._kept)", "in self._kept",
         f"{SCORED}::test_a_reservoir_is_bounded_and_the_same_in_any_order"),
        ("empty responses are kept", "            if turn.found:\n", "            if True:\n",
         f"{SCORED}::TestEqualsPlainForwards::test_random"),
        ("a question lends to itself on another line", "id=name))", "id=record.where))",
         f"{SCORED}::test_one_question_is_refused"),
        ("forks over the budget", "return tree_size(Tree([self.tokens(0)], self.branches))[0]",
         "return len(self.ids) + len(self.boundaries) * sum(branch.stop for branch in self.branches)",
         f"{SCORED}::test_packs_change_nothing_and_hold_their_budget"),
        ("no baseline counts as no gain", "[t in compared for t", "[True for t",
         f"{SCORED}::TestEqualsPlainForwards::test_random"),
        ("baselines of another scoring stay", 'if name != "baselines"}', "if name}",
         f"{SCORED}::TestEqualsPlainForwards::test_none_and_previous"),
    ),
    *faults("igpo_fast/rollouts/tools/search.py",
        ("blank passages take places", "islice(filter(None, map(_passage, hits)), self._top_k)",
         "filter(None, map(_passage, hits[: self._top_k]))",
         "test_search.py::test_http_understands_servers_that_give_less"),
        ("searches that find nothing pass in silence", 'counts["empty"] == calls - failures', 'counts["empty"] < 0',
         "test_search.py::test_what_finds_nothing_is_counted_and_told"),
    ),
    *faults("igpo_fast/endpoint.py",
        ("back-offs overflow", "2 ** min(attempt, 64)", "2**attempt",
         "test_search.py::test_many_retries_do_not_overflow"),
        ("a proxy stands before this machine", " mounts=self._mounts,", "",
         "test_search.py::test_a_proxy_does_not_stand_before_a_server_on_this_machine"),
    ),
    *faults("igpo_fast/rollouts/outcome.py",
        ("a reward that is not finite trains", "if math.isfinite(number) else None", "if number == number else 0.0",
         "e2e/test_outcomes.py::test_faults_end_the_run_in_one_line"),
    ),
    *faults("igpo_fast/update/rewards.py",
        ("the last of equally frequent answers wins", "counts[said] > counts[best]", "counts[said] >= counts[best]",
         "test_rewards.py::test_the_majority_of_a_group"),
        ("empty answers vote", "        if said:", "        if rollout.answer is not None:",
         "test_rewards.py::test_the_majority_of_a_group"),
    ),
    *faults("igpo_fast/search_server/index.py",
        ("offsets that do not fit are taken", " or not (ends > self._offsets[:-1]).all()", "",
         "test_search_index.py::test_damage_of_any_file_is_told_in_a_line"),
    ),
    *faults("igpo_fast/errors.py",
        ("secrets of URLs are shown", "line = masked(str(message))", "line = str(message)",
         "test_search.py::test_secrets_of_urls_are_masked"),
        ("messages grow with what they quote", "line if len(line) <= LONGEST", "line if line",
         "test_cli.py::test_a_message_stays_short_whatever_it_quotes"),
    ),
    *faults("igpo_fast/engines/vllm/serve.py",
        ("a replica asks for no key", "if self._wanted and not", "if not self._wanted and not",
         f"{VLLM}::test_without_its_key_a_replica_answers_only_that_it_is_well"),
        ("any method of the worker is called", "_method(body) not in METHODS", "_method(body) is None",
         f"{VLLM}::test_a_replica_answers_what_a_trainer_asks_and_nothing_else"),
        ("bodies of any route are stored", ' != "/update_weights":', ' == "/nowhere":',
         f"{VLLM}::test_only_weights_of_a_stated_size_are_stored"),
        ("a replica without a key listens everywhere", "and not is_loopback(known.host):", "and False:",
         f"{VLLM}::test_without_a_key_other_machines_are_kept_out"),
    ),
    *faults("igpo_fast/engines/vllm/servers.py",
        ("an aborted answer is a turn", 'choice["finish_reason"] == "abort"', 'choice["finish_reason"] == "never"',
         f"{VLLM}::test_aborted_requests_are_made_again"),
        ("a torn connection loses a replica", " and not await self._has_weights(replica):", ":",
         f"{VLLM}::test_a_torn_connection_costs_one_request"),
        ("a replica that died keeps its link", "replica.up, replica.link = False, None", "replica.up = False",
         f"{VLLM}::test_a_replica_that_does_not_come_to_the_broadcast_is_lost_and_then_gets_a_new_link"),
        ("part of an answer is a turn", " or [*begins, len(turn.ids)] != [0, *ends]", "",
         f"{VLLM}::test_an_answer_that_is_not_understood_is_none"),
    ),
    *faults("igpo_fast/engines/vllm/weights.py",
        ("a sync holds all weights", "for name, tensor in self._weights:", "for name, tensor in list(self._weights):",
         f"{VLLM}::test_a_sync_holds_a_bucket_and_a_tensor_at_most"),
        ("a sync holds two buckets", "bucket.clear()", "bucket = []",
         f"{VLLM}::test_a_sync_holds_a_bucket_and_a_tensor_at_most"),
        ("the first worker speaks for all", "for worker in workers:", "for worker in workers[:1]:",
         f"{VLLM}::test_workers_blocks_make_whole_fingerprints_and_copies_that_differ_do_not"),
    ),
    *faults("igpo_fast/engines/vllm/requests.py",
        ("vLLM's number for NaN is a log-probability", "np.where(logp > NOT_FINITE, logp, np.nan)", "logp",
         f"{VLLM}::test_generations_have_finite_log_probabilities"),
    ),
    *faults("igpo_fast/engines/vllm/colocated.py",
        ("what vLLM raises is a bug", "except (RunError, MemoryError, torch.OutOfMemoryError)", "except Exception",
         f"{VLLM}::test_what_vllm_itself_raises_ends_the_run_in_a_line"),
        ("the cache wakes before the weights", 'wake_up(["weights"])', 'wake_up(["kv_cache"])',
         f"{VLLM}::test_a_sleeping_engine_wakes_for_weights_before_its_cache"),
        ("an old prefix cache is kept", "if not self._llm.reset_prefix_cache():",
         "if self._llm.reset_prefix_cache() is None:", f"{VLLM}::test_a_prefix_cache_of_old_weights_is_refused"),
    ),
    *faults("igpo_fast/update/losses.py",
        ("the surrogate is not the configured one", "surrogate=algorithm.surrogate,", "",
         "test_losses.py::test_loss_settings_are_the_configured_ones"),
    ),
    *faults("igpo_fast/config.py",
        ("a ratio's own clip range counts as the user's", "| CLIP_OF_RATIO.get(self.ratio, {})", "",
         "test_signatures.py::test_clip_ranges_of_what_clips_nothing_are_pointed_out"),
    ),
    *faults(f"{KERNELS}/policy_loss/gradients.py",
        ("gradients are handed out twice", "gradients, ctx.gradients = ctx.gradients, None",
         "gradients = ctx.gradients", f"{LOSS}::test_gradients_are_handed_out_once"),
    ),
    *faults(f"{KERNELS}/compat.py",
        ("cispo's bound is a distance from 1", "clip_high=high - 1, surrogate", "clip_high=high, surrogate",
         f"{COMPAT}::test_trls_losses {COMPAT}::test_ligers_own_module"),
        ("vllm_is_ratio weighs nothing", "per_token = per_token * ratio", "per_token = per_token * 1",
         f"{COMPAT}::test_trls_losses"),
        ("a sequence's ratio counts once per token for vespo", "if vllm_is_ratio.shape != ids.shape:", "if False:",
         f"{COMPAT}::test_trls_losses"),
        ("luspo means over tokens", 'if loss_type == "luspo":', 'if loss_type == "lus":',
         f"{COMPAT}::test_trls_losses"),
        ("items of the batch are not shared out", "device=share.device) / processes", "device=share.device)",
         f"{COMPAT}::test_items_of_all_processes_are_shared_out"),
        ("items of other processes are not counted", "if processes > 1:", "if False:",
         f"{COMPAT}::test_items_of_all_processes_are_shared_out"),
        ("a reference's states are not read", "if ref_input is None:", "if True:",
         f"{COMPAT}::test_ligers_references"),
        ("hidden states beside their ids", "hidden.shape[:-1] != ids.shape", "hidden.ndim != 3",
         "kernels/test_compat.py::test_shapes_that_differ_from_the_ids_are_refused"),
    ),
    *faults("igpo_fast/run/checkpoint.py",
        ("manifest not verified", "content = check_manifest(folder, remedy)",
         'content = json_value(_content(folder / "manifest.json"), folder)',
         "test_checkpoint.py::test_a_damaged_checkpoint_is_named_and_never_passed_over"),
        ("an edited config.yaml compared with itself only", "load(run._begun) if run._begun.exists() else run.config",
         "run.config", "test_checkpoint.py::test_an_edit_of_the_stored_configuration_is_refused"),
        ("data edited in place accepted", "begun.get(key, digest) != digest", "begun.get(key, digest) is None",
         "test_checkpoint.py::test_data_edited_in_place_are_refused"),
        ("missing rows accepted", "if later > earlier + 1:", "if later > earlier + 1e9:",
         "test_checkpoint.py::test_rows_that_are_not_those_of_the_checkpoint_are_refused"),
        ("leftovers sought behind links", "return [path for path in folder.iterdir() if not path.is_symlink()]",
         "return list(folder.iterdir())", "test_checkpoint.py::test_nothing_behind_a_link_is_deleted"),
        ("half-written evaluations stay", r"\.(step|eval)_", r"\.(step)_",
         "test_checkpoint.py::test_half_written_rollouts_of_a_killed_session_go"),
        ("evaluations after the checkpoint kept", 'for kind in ("step", "eval") for s, path',
         'for kind in ("step",) for s, path', "test_checkpoint.py::test_rewind_keeps_up_to_the_step_and_loses_nothing"),
    ),
    *faults("igpo_fast/sft.py",
        ("warm start found by settings alone", "digest.update(repr(question)", "repr(repr(question)",
         "test_sft.py::test_a_warm_start_belongs_to_what_its_files_hold"),
        ("tokenizer not part of the warm start", "words = (tokenizer.backend_tokenizer.to_str(),", "words = (None,",
         "test_sft.py::test_a_warm_start_belongs_to_its_tokenizer"),
        ("kept warm start not verified", "    check_manifest(folder, f", "    str(f",
         "test_sft.py::test_a_damaged_warm_start_is_refused"),
    ),
    *faults("igpo_fast/files.py",
        ("half a row stays", "file.truncate(size)", "pass", "faults/test_storage.py::test_half_a_row_does_not_stay"),
        ("half a folder stays", "            with suppress(OSError):\n                remove(temporary)",
         "            pass", "faults/test_storage.py::test_a_full_disk_is_one_line_and_leaves_nothing_half_written"),
    ),
    *faults("igpo_fast/run/checkpoint.py",
        ("metrics rows after the checkpoint kept", "is not None and s <= step]", "is not None]",
         "test_checkpoint.py::test_rewind_keeps_up_to_the_step_and_loses_nothing"),
    ),
    *faults("igpo_fast/yaml12.py",
        ("a key that occurs twice is taken", "if key in found:", "if False:",
         "test_config.py::test_surprises_of_yaml_are_refused_in_a_line"),
        ("texts are written as YAML 1.2 alone reads them", "class _Dumper(yaml.SafeDumper):",
         "class _Dumper(yaml.SafeDumper):\n    yaml_implicit_resolvers: dict = {}\n",
         "test_config.py::test_texts_are_written_so_that_both_versions_read_texts"),
        ("a text's comment is dropped", "return text\n    if stripped", "return read(text)\n    if stripped",
         "test_config.py::test_a_text_is_taken_as_it_is_written"),
        ("a comment after a list is dropped", "stripped[-1] != _CLOSING[stripped[0]]", "False",
         "test_config.py::test_a_comment_in_an_override_drops_nothing_in_silence"),
    ),
    *faults("igpo_fast/config.py",
        ("a loaded model is warm-started", '{"sft": defaults | sft}', '{"sft": sft}',
         "test_config.py::test_a_loaded_model_has_no_warm_start_unless_asked_for"),
        ("config.yaml keeps credentials", "return url and masked(url)", "return url",
         "test_config.py::test_credentials_are_masked_in_the_stored_file"),
    ),
    *faults("igpo_fast/contents.py",
        ("of several files the first is known by content", '"".join(digests)', "digests[0]",
         "test_contents.py::test_one_of_two_files_changes_the_digest"),
    ),
    *faults("igpo_fast/config_load.py",
        ("the command line's mistakes are the file's", "if theirs else file", "if False else file",
         "faults/test_bad_input.py::test_an_unknown_key_of_the_command_line"),
        ("long values are shown whole", "short.maxlevel = 2", "short.maxlevel = 6",
         "test_config.py::test_an_alias_bomb_is_a_short_line"),
    ),
    *faults("igpo_fast/cli.py",
        ("a refused run leaves its folder", "folder.rmdir()", "pass",
         "test_cli.py::test_a_refused_run_leaves_no_folder test_cli.py::test_a_refused_sft_leaves_no_output"),
    ),
    *faults("igpo_fast/run/display.py",
        ("printed phases are by the display's clock", "self._phases | timed", "timed | self._phases",
         "test_display.py::test_only_long_phases_are_worth_a_line"),
        ("a phase's name is markup", "markup=False),\n            BarColumn(bar", "),\n            BarColumn(bar",
         "test_display.py::test_markup_and_credentials"),
    ),
    *faults("igpo_fast/run/checkpoint.py",
        ("the best is dropped with the old", "if old == best:", "if False:",
         "test_checkpoint.py::test_the_best_stays_beside_the_newest"),
    ),
    *faults("igpo_fast/heartbeat.py",
        ("a rank that is done is silent", "value == _ENDED or ", "", "test_heartbeat.py::test_one_that_is_done_is_not"),
        ("a store that does not answer is nobody's fault", "silent[0] += 1", "silent[0] += 0",
         "test_heartbeat.py::test_a_store_that_does_not_answer_is_its_hosts_silence"),
    ),
    *faults("igpo_fast/update/learner.py",
        ("gradients of a failed update count",
         "        self.policy.zero_grad()\n        self.optimizer.zero_grad()\n", "",
         "faults/test_out_of_memory.py::test_the_update_is_repeated_with_half_as_large_packs"),
    ),
    *faults("igpo_fast/run/interrupt.py",
        ("the first signal is answered by silence", "    _say(f", "    str(f",
         "test_interrupt.py::test_the_first_signal_is_answered_at_once"),
    ),
]
# fmt: on


class FirstFailure:
    """A pytest plugin that remembers the first test that failed in its own body, and why."""

    test = why = None

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.failed and self.test is None:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.test, self.why = report.nodeid, crash.message.splitlines()[0] if crash else ""


def preload() -> None:
    """Import the libraries once, for all processes forked from here. Nothing of ours: each runs its own copy."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    import hypothesis
    import pydantic  # noqa: F401
    import pytest  # noqa: F401
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, as in conftest.py
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2ForCausalLM  # noqa: F401

    torch.set_num_threads(1)
    # The same examples every time, and no search for smaller ones: that a test fails is enough.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutants", phases=phases, derandomize=True, database=None)
    hypothesis.settings.load_profile("mutants")
    gc.freeze()  # pytest collects garbage after each session: not among the libraries' objects


def copy_sources(source: Path, folder: Path) -> None:
    for name in COPIED:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source / name, folder / name)


def run_tests(folder: Path, tests: tuple[str, ...]) -> None:
    """In a process of its own: run tests of the copy at ``folder``, write result.json there."""
    import pytest

    os.chdir(folder)
    with open("log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    own = {str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), ""}
    sys.path[:] = [str(folder), str(folder / "kernels"), *(path for path in sys.path if path not in own)]
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
    sys.dont_write_bytecode = True
    first = FirstFailure()
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[first])
    for package in ("igpo_fast", "igpo_kernels"):
        used = Path(importlib.util.find_spec(package).origin)
        assert used.is_relative_to(folder), f"the tests ran {used}, not the copy"
    Path("result.json").write_text(json.dumps({"code": int(code), "test": first.test, "why": first.why}))


class Job:
    """Tests that run on a copy of ``source``, with a fault or without."""

    def __init__(self, name: str, source: Path, tests: tuple[str, ...], mutant: Mutant | None = None):
        self.name, self.mutant, self.start = name, mutant, time.monotonic()
        self.folder = Path(tempfile.mkdtemp(dir=source.parent))
        copy_sources(source, self.folder)
        if mutant:
            mutant.apply(self.folder)
        self.process = multiprocessing.get_context("fork").Process(target=run_tests, args=(self.folder, tests))
        self.process.start()

    def end(self) -> dict:
        """``code`` (pytest's, None if the process died or hung), ``test``, ``why``, ``seconds``."""
        self.process.join()
        written = self.folder / "result.json"
        found = json.loads(written.read_text()) if written.exists() else {"code": None, "test": None, "why": None}
        if found["test"] is None:
            found["why"] = " / ".join((self.folder / "log").read_text().splitlines()[-3:])
        shutil.rmtree(self.folder)
        return found | {"seconds": time.monotonic() - self.start}


def run_jobs(makers: Iterable[Callable[[], Job]]) -> Iterator[tuple[str, dict]]:
    """Names and results of jobs as they end, ``WORKERS`` at a time."""
    waiting, running = collections.deque(makers), []
    while waiting or running:
        while waiting and len(running) < WORKERS:
            running.append(waiting.popleft()())
        multiprocessing.connection.wait([job.process.sentinel for job in running], timeout=1)
        for job in list(running):
            if time.monotonic() - job.start > TIMEOUT * (10 if job.mutant is None else 1):
                job.process.kill()
                job.process.join()
            if not job.process.is_alive():
                running.remove(job)
                yield job.name, job.end()


def passes_unmutated(mutants: list[Mutant], source: Path) -> bool:
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    shares = [tuple(tests[i::WORKERS]) for i in range(WORKERS) if tests[i::WORKERS]]
    results = run_jobs(partial(Job, "", source, share) for share in shares)
    bad = [result for _, result in results if result["code"] != 0]
    for result in bad:
        print(f"without a fault pytest ends with {result['code']}: {result['test']}: {result['why']}")
    return not bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="name the faults and their tests, run nothing")
    parser.add_argument("--only", metavar="NAME", help="the faults whose name or file contains this")
    parser.add_argument("--why", action="store_true", help="print what the killing test said")
    options = parser.parse_args()
    mutants = [m for m in MUTANTS if options.only is None or options.only in f"{m.name} {m.file}"]
    width = max((len(m.name) for m in mutants), default=0)
    if options.list or not mutants:
        for m in mutants:
            print(f"{m.name:{width}}  {m.file}  {' '.join(m.tests)}")
        return 0 if mutants else 2
    begin, killed = time.monotonic(), 0
    preload()
    with tempfile.TemporaryDirectory(prefix="igpo_mutants_") as scratch:
        source = Path(scratch) / "sources"
        copy_sources(ROOT, source)
        stale = [fault for m in mutants if (fault := m.misfit(source))]
        print(*stale, sep="\n", end="\n" * bool(stale))
        if stale or not passes_unmutated(mutants, source):
            return 1
        print(f"{'mutant':{width}} | killed by | seconds")
        for name, result in run_jobs(partial(Job, m.name, source, m.tests, m) for m in mutants):
            dead = result["code"] == 1 and result["test"] is not None
            killed += dead
            verdict = result["test"] if dead else f"SURVIVED (pytest ended with {result['code']})"
            print(f"{name:{width}} | {verdict} | {result['seconds']:.1f}", flush=True)
            if options.why or not dead:
                print(f"{'':{width}} | {result['why']}")
    print(f"{time.monotonic() - begin:.0f} s")
    print(f"{len(mutants)} mutants, {killed} killed")
    return 0 if killed == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
