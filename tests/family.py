"""The published variants of information gain, written from their papers' formulas in plain Python. Imports nothing of
ours. A rollout is (actions of its turns, values v_0 .. v_{T-1}, outcome, passages of its responses)."""

from __future__ import annotations

from itertools import pairwise
from math import exp, sqrt


def z_scores(pool):
    """(x - mean) / population std; zeros for a pool without spread."""
    if not pool or max(pool) == min(pool):
        return [0.0 for _ in pool]
    mean = sum(pool) / len(pool)
    std = sqrt(sum((x - mean) ** 2 for x in pool) / len(pool))
    return [(x - mean) / std for x in pool] if std else [0.0 for _ in pool]


def a2tgpo(group, gamma, beta, weight):
    """A2TGPO, Eq. 3 and 6 to 9 and 11: advantages and clip factors, per rollout and turn."""
    gains = [[after - before for before, after in pairwise(v)] for _, v, _, _ in group]
    z_out = z_scores([outcome for _, _, outcome, _ in group])
    z = [list(row) for row in gains]
    for t in range(max(map(len, gains), default=0)):
        members = [i for i, row in enumerate(gains) if t < len(row)]
        for i, x in zip(members, z_scores([gains[i][t] for i in members]), strict=True):
            z[i][t] = x
    advantages, factors = [], []
    for row, outcome in zip(z, z_out, strict=True):
        n = len(row)
        own = [sum(gamma ** (k - t) * weight * row[k] for k in range(t, n)) / sqrt(n - t) for t in range(n)]
        advantages.append([a + outcome for a in own] + [outcome])
        factors.append([1 + beta * (2 / (1 + exp(-x)) - 1) for x in row] + [1.0])
    return advantages, factors


def dr_venus(group, tools, every, penalty, gamma):
    """DR-Venus's code: gains at kept turns since the last kept one, scaled separately, summed over kept turns only. A
    turn that is not kept shares the advantage of the next that is."""
    kept, rewards = [], []
    for actions, v, outcome, _ in group:
        marks, row, before = [], [], 0
        for t, action in enumerate(actions[:-1], start=1):
            malformed = penalty and action == "invalid"
            if malformed or ((not tools or action in tools) and t % every == 0):
                marks.append(t)
                row.append(-penalty if malformed else v[t] - v[before])
                before = t
        kept.append([*marks, len(actions)])
        rewards.append([*row, outcome])
    z_ig = z_scores([x for row in rewards for x in row[:-1]])
    z_out = z_scores([row[-1] for row in rewards])
    size = sum(map(abs, z_ig)) / len(z_ig) if z_ig else 0.0
    scale = min(10.0, max(0.3, sum(map(abs, z_out)) / len(z_out)) / size) if size else 0.0
    taken = iter(z_ig)
    out = []
    for marks, row, last, (actions, *_) in zip(kept, rewards, z_out, group, strict=True):
        r = [scale * next(taken) for _ in row[:-1]] + [last]
        for k in reversed(range(len(r) - 1)):
            r[k] += gamma * r[k + 1]
        out.append([r[min(k for k, mark in enumerate(marks) if mark >= t)] for t in range(1, len(actions) + 1)])
    return out


def redundancy(passages):
    """StepSearch's P_t: the share of a response's passages that were seen before, in this response or an earlier."""
    seen, shares = [], []
    for response in passages:
        repeated = 0
        for passage in response:
            repeated += passage in seen
            seen.append(passage)
        shares.append(repeated / len(response) if response else 0.0)
    return shares


def ig_search(values, random_values):
    """IG-Search, Eq. 3: v after each response less the mean of v after other questions' responses."""
    return [v - sum(others) / len(others) for v, others in zip(values[1:], random_values, strict=True)]


def infopo(real, masked):
    """InfoPO's gain of each turn but the last: the mean over the next turn's tokens of the log-probability after the
    real response less the one after the masked."""
    return [sum(a - b for a, b in zip(x, y, strict=True)) / len(x) for x, y in zip(real, masked, strict=True)]


def ppo(lengths, rewards, values, gamma, lam, level):
    """PPO's advantages and returns of one rollout, per decision token, by GAE's sum of discounted errors. Turn t has
    ``lengths[t]`` tokens and earns ``rewards[t]`` at its last; ``values`` are the tokens'."""
    first = [sum(lengths[:t]) for t in range(len(lengths))]
    if level == "turn":
        v, r = [values[i] for i in first], list(rewards)
    else:
        v, r = list(values), [0.0] * sum(lengths)
        for t, i in enumerate(first):
            r[i + lengths[t] - 1] = rewards[t]
    errors = [r[s] + gamma * (v[s + 1] if s + 1 < len(v) else 0.0) - v[s] for s in range(len(v))]
    advantages = [sum((gamma * lam) ** (k - s) * errors[k] for k in range(s, len(v))) for s in range(len(v))]
    returns = [a + b for a, b in zip(advantages, v, strict=True)]
    if level == "turn":
        advantages, returns = ([x[t] for t, n in enumerate(lengths) for _ in range(n)] for x in (advantages, returns))
    return advantages, returns


def tips(values, score, alpha):
    """TIPS's rewards of a rollout's turns (its code, without its scaling per batch): the potential's increase, and its
    last value taken off the score."""
    return [alpha * (after - before) for before, after in pairwise(values)] + [score - alpha * values[-1]]


def ig_search_advantages(outcomes, gains, calls, lengths, alpha):
    """IG-Search, Eq. 4: GRPO's advantage on every token, and alpha ig_t / |Q_t| on those of turn t's query, per rollout
    and turn. ``calls[i][t]`` is the place of a query's first token; a turn without a gain has None."""
    out = []
    for advantage, row, places, sizes in zip(z_scores(outcomes), gains, calls, lengths, strict=True):
        rollout = []
        for gain, place, n in zip([*row, None], places, sizes, strict=True):
            share = 0.0 if gain is None else alpha * gain / (n - place)
            rollout.append([advantage + (share if token >= place else 0.0) for token in range(n)])
        out.append(rollout)
    return out


def infopo_advantages(outcomes, gains, beta, tau):
    """InfoPO's mixture, gains pooled per turn: A_out + beta sigmoid(-s / tau) z_t, the last turn A_out alone."""
    mean = sum(outcomes) / len(outcomes)
    s = sqrt(sum((o - mean) ** 2 for o in outcomes) / (len(outcomes) - 1)) if len(outcomes) > 1 else 0.0
    gate = 1 / (1 + exp(s / tau))
    z = iter(z_scores([g for row in gains for g in row]))
    return [[a + beta * gate * next(z) for _ in row] + [a] for a, row in zip(z_scores(outcomes), gains, strict=True)]
