"""Two ranks under ZeRO compute what one process does: gradients, norms, weights, metrics."""

from __future__ import annotations

import pytest
import torch

from tests.ranks.launch import run
from tests.ranks.replay import CASES, HALF, IN_CI, WAYS, plain

pytest.importorskip("deepspeed")


class Replays:
    """What two ranks did. All cases of CI are replayed by one pair of processes, the slow ones by another."""

    def __init__(self, folder):
        self.folder = folder
        self._done = set()

    def __getitem__(self, case):
        cases = IN_CI if case in IN_CI else [case for case in CASES if case not in IN_CI]
        if case not in self._done:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TORCH_EXTENSIONS_DIR", str(self.folder / "extensions"))
                run(["-m", "tests.ranks.replay", str(self.folder), *map(str, cases)], 2)
            self._done.update(cases)
        return torch.load(self.folder / f"{case}.pt", weights_only=False)


@pytest.fixture(scope="module")
def replays(tmp_path_factory):
    return Replays(tmp_path_factory.mktemp("replays"))


def cases(*ways):
    chosen = [case for case in CASES if case.way in ways]
    slow = [pytest.param(case, marks=pytest.mark.slow) for case in chosen if case not in IN_CI]
    return pytest.mark.parametrize("case", [case for case in chosen if case in IN_CI] + slow, ids=str)


def test_deepspeed_compiles_nothing(replays):
    """A run that is killed while it compiles would leave a lock at which later runs wait for ever."""
    assert replays[IN_CI[0]] and not list(replays.folder.glob("extensions/**/*"))


@cases(*WAYS)
def test_gradients_and_norms_equal_the_single_processs(replays, case):
    found, expected = replays[case], plain(case.way)
    assert found["kept"][0] != found["kept"][1] and found["packs"][0] == found["packs"][1]
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        for name, gradient in theirs.items():
            error = (ours[name] - gradient).abs().max() / gradient.abs().max()
            assert error <= 1e-4, f"{name}: {error:.1e}"
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(found["moved"][name], expected["moved"][name], rtol=1e-3, atol=2e-5)


@cases(*WAYS[:2], HALF)
def test_updates_that_are_not_finite_are_dropped_and_one_without_a_gradient_is_none(replays, case):
    assert replays[case]["dropped"] == [None, None, None, None, 0.0]


@cases(HALF)
def test_bfloat16_differs_by_its_rounding(replays, case):
    """The first update's gradients: the same groups in one pack differ by 4 %."""
    found, expected = replays[case], plain(HALF)
    for name, gradient in expected["gradients"][0].items():
        assert (found["gradients"][0][name] - gradient).norm() <= 0.03 * gradient.norm(), name
    assert all(weight.dtype == torch.bfloat16 for weight in found["weights"].values())
