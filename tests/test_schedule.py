"""The learning rate of every update, worked by hand."""

import doctest

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

import igpo_fast.update.schedule as schedule_module
from igpo_fast.update.schedule import schedule_factor

TABLE = {
    # A warm-up of 4: quarters. Then 4 updates from the peak down: 4/4, 3/4, 2/4, 1/4.
    ("constant", 4, 8): [0.25, 0.5, 0.75, 1, 1, 1, 1, 1],
    ("linear", 4, 8): [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25],
    # (1 + cos(pi * passed)) / 2 with passed 0, 1/4, 1/2, 3/4: 1, .5 + sqrt(1/8), .5, .5 - sqrt(1/8).
    ("cosine", 4, 8): [0.25, 0.5, 0.75, 1, 1, 0.8535534, 0.5, 0.1464466],
    ("constant", 0, 3): [1, 1, 1],
    ("linear", 0, 4): [1, 0.75, 0.5, 0.25],
    ("linear", 3, 3): [1 / 3, 2 / 3, 1],
    ("cosine", 1, 2): [1, 1],
}


def test_doctests():
    assert doctest.testmod(schedule_module).failed == 0


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_factors(case):
    schedule, warmup, total = case
    found = [schedule_factor(update, warmup, total, schedule) for update in range(total)]
    assert found == pytest.approx(TABLE[case])


def test_the_optimiser_has_the_rate_of_its_update_and_a_restored_one_goes_on():
    def made():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
        return optimizer, LambdaLR(optimizer, lambda update: schedule_factor(update, 10, 30, "linear"))

    rates = []
    optimizer, scheduler = made()
    for update in range(30):
        if update == 7:
            states = optimizer.state_dict(), scheduler.state_dict()
            optimizer, scheduler = made()
            for one, state in zip((optimizer, scheduler), states, strict=True):
                one.load_state_dict(state)
        rates.append(optimizer.param_groups[0]["lr"])
        assert scheduler.get_last_lr() == rates[-1:]
        optimizer.step()
        scheduler.step()
    assert rates == [2.0 * schedule_factor(update, 10, 30, "linear") for update in range(30)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == 2.0 and 0 < rates[-1] == pytest.approx(0.1)
