"""What makes the host wait for the device in an update of one pass: the read of a pack's answers before its loss, and
one read per pack when all backwards were launched."""

from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode

from igpo_fast import model
from igpo_fast.update import advantages, policy
from igpo_fast.update.learner import Learner
from tests.parity.test_parity import Case, models
from tests.test_mutant_gaps import Updates, budget

WAITS = {
    "cpu", "item", "tolist", "equal", "allclose", "nonzero", "argwhere", "unique", "unique_consecutive",
    "masked_select", "is_nonzero", "__float__", "__int__", "__bool__", "__index__", "__contains__", "__array__",
}  # fmt: skip
"""Names of what reads numbers of a tensor, or gives one whose shape depends on them."""


class Waits(TorchFunctionMode):
    """Notes the calls that would wait if the CPU's tensors were a device's. What ``to`` moves it cannot tell from what
    is there already."""

    def __init__(self):
        super().__init__()
        self.events, self._counts = [], True

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        index = args[1] if name in ("__getitem__", "__setitem__") else None
        masked = any(getattr(x, "dtype", None) == torch.bool for x in (index if type(index) is tuple else (index,)))
        if self._counts and (name in WAITS or masked):
            self.events.append(name)
        return func(*args, **(kwargs or {}))

    @contextmanager
    def elsewhere(self):
        """What happens inside is not counted: it has tests of its own."""
        counted, self._counts = self._counts, False
        yield
        self._counts = counted


def watched(monkeypatch, *settings):
    """Events of a one-pass update over several packs, up to its optimiser step; and how many packs it read."""
    waits = Waits()

    def aside(module, name):
        real = getattr(module, name)

        def call(*args, **kwargs):
            with waits.elsewhere():
                return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    aside(model, "hidden_states")
    for name in ("linear_logprob", "linear_policy_loss", "policy_loss"):
        aside(policy, name)
    aside(advantages, "turn_advantages")
    backward, step = Learner.backward, Learner.step

    def noted(learner, loss):
        waits.events.append("backward")
        with waits.elsewhere():
            backward(learner, loss)

    def last(learner, sound):
        waits.events.append("step")
        with waits.elsewhere():
            return step(learner, sound)

    monkeypatch.setattr(Learner, "backward", noted)
    monkeypatch.setattr(Learner, "step", last)
    case, (ours, _) = Case(7), models()
    options = ["algorithm.passes=one", f"train.token_budget={budget(case, 'several')}", *settings]
    with waits:
        run = Updates(monkeypatch, case, ours, *options, before=lambda trainer: waits.events.clear())
    assert run.gradients
    events = waits.events[: waits.events.index("step") + 1]
    return events, events.count("backward")


@pytest.mark.parametrize("settings", [
    [], ["algorithm.ig_spread=0.5"], ["algorithm.credit=query", "algorithm.accumulate=none"],
    ["algorithm.redundancy_penalty=0.5"], ["algorithm.ratio=turn", "algorithm.entropy=0.01"],
    ["algorithm.ratio=sequence"],
], ids=str)  # fmt: skip
def test_the_host_waits_for_answers_and_at_the_end(monkeypatch, settings):
    events, packs = watched(monkeypatch, *settings)
    assert packs > 1
    assert events == ["cpu", "backward"] * packs + ["cpu"] * packs + ["step"]


def test_a_planted_wait_is_seen(monkeypatch):
    real = policy.Policy._loss

    def logged(*args):
        loss, sums, logp = real(*args)
        assert float(loss.detach()) == loss.item()
        return loss, sums, logp

    monkeypatch.setattr(policy.Policy, "_loss", logged)
    events, packs = watched(monkeypatch)
    assert events == ["cpu", "__float__", "item", "backward"] * packs + ["cpu"] * packs + ["step"]
