"""Packed == naive: answer values, log-probabilities, and every parameter's gradient of the whole loss."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from igpo_fast import model
from igpo_fast.model import use_attend
from igpo_fast.update.advantages import Recipe, credit_rollouts
from igpo_fast.update.critic import CriticSettings, ValueHead, ValueInputs, estimate
from igpo_fast.update.gains import values_of
from igpo_fast.update.losses import token_weights
from igpo_fast.update.packs import advantages_of_pairs, means_of
from igpo_fast.update.policy import LossInputs, Policy, make_trees
from igpo_kernels import ANSWER, LossSettings, Tree, pack
from tests.parity import naive
from tests.trees import VOCAB, random_branches, random_group

TEMPERATURE = 1.3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def models(seed=0):
    """The same weights twice: run by us, and by plain transformers. Weights large enough to make attention sharp."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=256, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    return use_attend(copy.deepcopy(plain)), plain


class Case:
    """Random groups with their answers, and the numbers of their rollouts."""

    def __init__(self, seed, groups=5):
        rng = np.random.default_rng(seed)
        self.groups = [random_group(rng, int(rng.integers(2, 6))) for _ in range(groups)]
        self.branches = [random_branches(rng, int(rng.integers(1, 4))) for _ in self.groups]
        self.rollouts = [r for g in self.groups for r in g.rollouts]
        self.group_of = np.repeat(np.arange(groups), [len(g.rollouts) for g in self.groups])
        ends = np.cumsum([len(g.rollouts) for g in self.groups])
        self.numbers = np.split(np.arange(ends[-1]), ends[:-1])
        self.rng = rng

    def plans(self, packs, branches=True, split=False):
        """The same groups in so many packs; ``split`` cuts every group in two, as a small token budget does."""
        trees = make_trees(self.groups, self.branches if branches else None, self.numbers)
        if split:
            halves = [(tree.rollouts[:1], tree.rollouts[1:]) for tree in trees]
            trees = [Tree(half, ()) for pair in halves for half in pair]
        return [pack(trees[part[0] : part[-1] + 1]) for part in np.array_split(np.arange(len(trees)), packs)]

    def naive_values(self, lm, basis="log_prob", answers="max"):
        values = []
        for i, rollout in enumerate(self.rollouts):
            means = [
                [
                    naive.answer_value(lm, rollout.ids[:b], branch.ids, branch.start, branch.stop, TEMPERATURE)
                    for b in rollout.boundaries
                ]
                for branch in self.branches[self.group_of[i]]
            ]
            values.append(values_of(means, basis, answers))
        return values

    def naive_loss(self, lm, advantages, old_logp, settings, aggregation, ref_logp=None):
        """The loss of the batch, a forward a rollout."""
        weights = token_weights([r.decision_tokens for r in self.rollouts], aggregation)
        total = 0.0
        for i, rollout in enumerate(self.rollouts):
            at = np.flatnonzero(rollout.turn_of_token >= 0)
            logp = naive.logprobs(lm, rollout.ids, TEMPERATURE)[at - 1]
            advantage = torch.tensor(advantages[i][rollout.turn_of_token[at]], dtype=torch.float32)
            old = logp.detach() if old_logp is None else torch.tensor(old_logp[i])
            loss = naive.clipped_loss(logp, old, advantage)
            if settings.kl:
                d = torch.tensor(ref_logp[i]) - logp
                loss = loss + settings.kl * (d.exp() - d - 1)
            if settings.entropy:
                loss = loss - settings.entropy * naive.entropies(lm, rollout.ids, TEMPERATURE)[at - 1]
            total = total + weights[i] * loss.sum()
        return total

    def pairs(self, plan, per_rollout):
        """Numbers of each rollout's decision tokens, at the plan's decision pairs."""
        n = plan.n_decisions
        first = [np.flatnonzero(r.turn_of_token >= 0) for r in self.rollouts]
        return np.array(
            [
                per_rollout[r][np.searchsorted(first[r], token)]
                for r, token in zip(plan.rollout[:n], plan.token[:n], strict=True)
            ],
            dtype=np.float32,
        )


def gradients(lm):
    grads = {name: p.grad.cpu() for name, p in lm.named_parameters()}
    lm.zero_grad()
    return grads


def assert_same_gradients(ours, theirs, bar=1e-4):
    for name, expected in theirs.items():
        error = (ours[name] - expected).abs().max() / expected.abs().max()
        assert error <= bar, f"{name}: {error:.1e}"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("packs", [1, 2])
def test_answer_values_and_sampled_logprobs(seed, packs):
    case, (ours, plain) = Case(seed), models(seed)
    policy = Policy(ours, TEMPERATURE, LossSettings())
    values, logp = {}, {}
    for plan in case.plans(packs):
        scores = policy(plan)
        values |= {i: values_of(m, "log_prob", "max") for i, m in means_of(plan, scores.scored_logp, ANSWER).items()}
        for i in np.unique(plan.rollout):
            logp[i] = scores.decision_logp[plan.rollout[: plan.n_decisions] == i]
    expected = case.naive_values(plain)
    for i, rollout in enumerate(case.rollouts):
        np.testing.assert_allclose(values[i], expected[i], atol=1e-4)
        at = np.flatnonzero(rollout.turn_of_token >= 0)
        with torch.no_grad():
            separate = naive.logprobs(plain, rollout.ids, TEMPERATURE)[at - 1]
        np.testing.assert_allclose(logp[i], separate, atol=1e-4)


def test_one_pass_gradients_on_triton():
    """Every kernel in its place, in the interpreter where there is no GPU."""
    pytest.importorskip("triton")
    test_one_pass_gradients(1, "token_mean", "triton", groups=2)


@pytest.mark.parametrize("packs", [1, 2, 5])
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"])
def test_one_pass_gradients(packs, aggregation, backend="auto", groups=5):
    case, (ours, plain) = Case(7, groups), models()
    ours = ours.to(DEVICE)
    recipe = Recipe(answers="max", basis="prob", min_std=0.05, center=False)
    settings = LossSettings(entropy=0.01)
    policy = Policy(ours, TEMPERATURE, settings, backend)
    weights = token_weights([r.decision_tokens for r in case.rollouts], aggregation)
    for plan in case.plans(packs):
        at = np.unique(plan.rollout)
        groups = [case.groups[g] for g in np.unique(case.group_of[at])]

        def advantages_of(scored_logp, plan=plan, groups=groups, at=at):
            means = means_of(plan, scored_logp, ANSWER)
            scores = credit_rollouts(groups, [values_of(means[i], "prob", "max") for i in at], recipe)
            of = dict(zip(at, scores, strict=True))
            n = plan.n_decisions
            pairs = zip(plan.rollout[:n], plan.turn[:n], strict=True)
            return np.array([of[i].advantages[t] for i, t in pairs], np.float32)

        inputs = LossInputs(weights[plan.rollout[: plan.n_decisions]], None)
        policy(plan, inputs, advantages_of).loss.backward()
    scores = credit_rollouts(case.groups, case.naive_values(plain, "prob"), recipe)
    case.naive_loss(plain, [s.advantages for s in scores], None, settings, aggregation).backward()
    assert_same_gradients(gradients(ours), gradients(plain))


@pytest.mark.parametrize("packs", [1, 2, 5])
@pytest.mark.parametrize("split", [False, True])
def test_two_pass_gradients_off_policy(packs, split):
    case, (ours, plain) = Case(11), models(1)
    settings = LossSettings(kl=0.1, entropy=0.02)
    advantages = [case.rng.normal(size=len(r.turns)) for r in case.rollouts]
    noise = lambda r: case.rng.normal(0, 0.3, r.decision_tokens).astype(np.float32)  # noqa: E731
    with torch.no_grad():
        current = [
            naive.logprobs(plain, r.ids, TEMPERATURE)[np.flatnonzero(r.turn_of_token >= 0) - 1].numpy()
            for r in case.rollouts
        ]
    old_logp = [c + noise(r) for c, r in zip(current, case.rollouts, strict=True)]
    ref_logp = [c + noise(r) for c, r in zip(current, case.rollouts, strict=True)]
    policy = Policy(ours, TEMPERATURE, settings)
    weights = token_weights([r.decision_tokens for r in case.rollouts], "token_mean")
    clipped, tokens = 0.0, 0.0
    for plan in case.plans(packs, branches=False, split=split):
        n = plan.n_decisions
        inputs = LossInputs(
            weights[plan.rollout[:n]],
            np.array([advantages[r][t] for r, t in zip(plan.rollout[:n], plan.turn[:n], strict=True)], np.float32),
            case.pairs(plan, old_logp), None, case.pairs(plan, ref_logp),
        )  # fmt: skip
        scores = policy(plan, inputs)
        scores.loss.backward()
        clipped, tokens = clipped + scores.sums["clipped"], tokens + scores.sums["tokens"]
    case.naive_loss(plain, advantages, old_logp, settings, "token_mean", ref_logp).backward()
    assert_same_gradients(gradients(ours), gradients(plain))
    assert 0.05 < clipped / tokens < 0.95  # some tokens were clipped, so the test covers both sides


@pytest.mark.parametrize("ratio", ["sequence", "turn"])
def test_the_packed_gradient_of_ratios_over_tokens(ratio):
    # Advantages differ by turn: a rollout's ratio meets each of them, and their clip ranges.
    case, (ours, plain) = Case(3), models(2)
    advantages, scales = ([f(size=len(r.turns)) for r in case.rollouts] for f in (case.rng.normal, case.rng.uniform))
    weights = token_weights([r.decision_tokens for r in case.rollouts], "seq_mean_token_mean")
    policy = Policy(ours, TEMPERATURE, LossSettings(0.03, 0.03, ratio=ratio))
    total = 0.0
    old_logp = []
    for i, rollout in enumerate(case.rollouts):
        at = np.flatnonzero(rollout.turn_of_token >= 0)
        turn = rollout.turn_of_token[at]
        logp = naive.logprobs(plain, rollout.ids, TEMPERATURE)[at - 1]
        old = logp.detach() + 0.05 * torch.tensor(case.rng.normal(size=len(at)), dtype=torch.float32)
        old_logp.append(old.numpy())
        for t in range(len(rollout.turns)):
            of = turn == t if ratio == "turn" else turn >= 0
            width = 0.03 * scales[i][t]
            loss = naive.clipped_loss(logp[of].mean(), old[of].mean(), float(advantages[i][t]), width, width)
            total = total + loss * weights[i] * int((turn == t).sum())
    total.backward()
    clipped = tokens = 0.0
    for plan in case.plans(2, branches=False):
        n = plan.n_decisions
        advantage, scale = (
            np.array([x[r][t] for r, t in zip(plan.rollout[:n], plan.turn[:n], strict=True)], np.float32)
            for x in (advantages, scales)
        )
        inputs = LossInputs(weights[plan.rollout[:n]], advantage, case.pairs(plan, old_logp), clip_scale=scale)
        result = policy(plan, inputs)
        result.loss.backward()
        clipped, tokens = clipped + result.sums["clipped"], tokens + result.sums["tokens"]
    assert_same_gradients(gradients(ours), gradients(plain))
    assert 0.05 < clipped / tokens < 0.95


def head_of(hidden_size, coefficient=1.0):
    head = ValueHead(hidden_size, coefficient)
    with torch.no_grad():
        head.weight.normal_(0, 3, generator=torch.Generator().manual_seed(3))
        head.bias.fill_(0.2)
    return head


@pytest.mark.parametrize("packs", [1, 3])
@pytest.mark.parametrize("level", ["token", "turn"])
def test_values_and_gradients_of_a_critic(packs, level):
    """Policy and value loss of off-policy PPO, the values' clip included; prompts and turns are shared."""
    case, (ours, plain) = Case(13), models(1)
    clip, weights = 0.1, token_weights([r.decision_tokens for r in case.rollouts], "token_mean")
    critic = CriticSettings(level=level, gae_lambda=0.9, clip=clip)
    policy = Policy(ours, TEMPERATURE, LossSettings(), critic=head_of(32, 0.5), value_clip=clip)
    read = {}
    for plan in case.plans(packs):
        values = policy(plan).critic
        read |= {i: values[plan.rollout[: plan.n_decisions] == i] for i in np.unique(plan.rollout)}
    head = head_of(32)
    at = [np.flatnonzero(r.turn_of_token >= 0) - 1 for r in case.rollouts]
    with torch.no_grad():
        separate = [naive.values(plain, head, r.ids)[a].numpy() for r, a in zip(case.rollouts, at, strict=True)]
    for i, values in enumerate(separate):
        np.testing.assert_allclose(read[i], values, atol=1e-4)

    noise = lambda r, by: case.rng.normal(0, by, r.decision_tokens).astype(np.float32)  # noqa: E731
    old = [values + noise(r, 0.15) for values, r in zip(separate, case.rollouts, strict=True)]
    credits = credit_rollouts(case.groups, case.naive_values(plain), Recipe(algorithm="ppo_ig", answers="max"))
    credits, targets, _ = estimate(case.rollouts, credits, old, Recipe(algorithm="ppo_ig"), critic)
    old_logp = [noise(r, 0.3) - 4 for r in case.rollouts]
    clipped = steps = 0.0
    for plan in case.plans(packs, branches=False):
        n = plan.n_decisions
        returns, values, share = (case.pairs(plan, column) for column in zip(*targets, strict=True))
        of_tokens = weights[plan.rollout[:n]]
        inputs = LossInputs(
            of_tokens, advantages_of_pairs(plan, credits), case.pairs(plan, old_logp),
            critic=ValueInputs((share * of_tokens).astype(np.float32), returns, values),
        )  # fmt: skip
        result = policy(plan, inputs)
        result.loss.backward()
        clipped, steps = clipped + result.sums["value_clipped"], steps + result.sums["value_steps"]
    assert 0.1 < clipped / steps < 0.9
    assert steps == sum(len(r.turns) if level == "turn" else r.decision_tokens for r in case.rollouts)

    for i, rollout in enumerate(case.rollouts):
        logp = naive.logprobs(plain, rollout.ids, TEMPERATURE)[at[i]]
        surrogate = naive.clipped_loss(logp, torch.tensor(old_logp[i]), torch.tensor(credits[i].token_advantages))
        values, was, target = naive.values(plain, head, rollout.ids)[at[i]], torch.tensor(old[i]), targets[i].returns
        near = torch.minimum(torch.maximum(values, was - clip), was + clip)
        worse = torch.maximum((values - torch.tensor(target)) ** 2, (near - torch.tensor(target)) ** 2)
        turn = rollout.turn_of_token[at[i] + 1]
        counted = np.ones(len(turn)) if level == "token" else [
            (turn == t).sum() * (k == 0 or turn[k - 1] != t) for k, t in enumerate(turn)
        ]  # fmt: skip
        of_head = (torch.tensor(np.array(counted)) * worse).sum() / 2
        # The head's own gradient is whole, the model's half.
        parameters = list(plain.parameters())
        own = torch.autograd.grad(weights[i] * of_head, [*head.parameters(), *parameters], retain_graph=True)
        for p, g in zip([*head.parameters(), *parameters], own, strict=True):
            g = g if p is head.weight or p is head.bias else 0.5 * g
            p.grad = g if p.grad is None else p.grad + g
        (weights[i] * surrogate.sum()).backward()
    assert_same_gradients(gradients(policy.critic), gradients(head))
    assert_same_gradients(gradients(ours), gradients(plain))


@pytest.mark.parametrize("how", ["in parts", "in one forward", "by all rows"])
def test_each_packed_token_is_read_exactly_once_in_one_pass_mode(monkeypatch, how):
    case, (ours, _) = Case(5), models()
    policy = Policy(ours, TEMPERATURE, LossSettings())
    policy.in_parts = how != "in one forward"
    if how == "by all rows":
        monkeypatch.setattr(model, "CHOOSE_ROWS", ())
    read = []

    def note(module, args, out):
        read.append((args[0].numel(), torch.is_grad_enabled()))

    ours.model.embed_tokens.register_forward_hook(note)
    plans = case.plans(2)
    for plan in plans:
        n = plan.n_decisions
        inputs = LossInputs(np.full(n, 1 / n, np.float32), None)
        policy(plan, inputs, lambda scored_logp, n=n: np.ones(n, np.float32)).loss.backward()
    # First what the same rollouts would be without answers, then all else; no gradient there.
    alone = [plan.n_tokens for plan in case.plans(2, branches=False)]
    if how == "in parts":
        rest = [plan.n_tokens - n for plan, n in zip(plans, alone, strict=True)]
        assert read == [x for a, b in zip(alone, rest, strict=True) for x in ((a, True), (b, False))]
    else:
        assert read == [(plan.n_tokens, True) for plan in plans]
    decisions = sum(r.decision_tokens for r in case.rollouts)
    answers = sum(
        len(r.turns) * sum(b.stop - b.start for b in case.branches[case.group_of[i]])
        for i, r in enumerate(case.rollouts)
    )
    assert sum(plan.n_pairs for plan in plans) == decisions + answers
    assert all(len(np.unique(plan.row)) <= plan.n_pairs for plan in plans)
