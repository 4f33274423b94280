"""Two ranks under ZeRO compute what one process does: gradients, norms, weights, metrics."""

from __future__ import annotations

import pytest
import torch

from tests.ranks.launch import run
from tests.ranks.replay import HALF, WAYS, plain

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def replays(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replays")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))
        run(["-m", "tests.ranks.replay", str(folder)], 2)
    return folder


def test_deepspeed_compiles_nothing(replays):
    """A run that is killed while it compiles would leave a lock at which later runs wait for ever."""
    assert not list(replays.glob("extensions/**/*"))


@pytest.fixture(scope="module", params=WAYS, ids=str)
def alone(request):
    return request.param, plain(request.param)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_and_norms_equal_the_single_processs(replays, alone, stage):
    way, expected = alone
    found = torch.load(replays / f"{way}-{stage}.pt", weights_only=False)
    assert found["kept"][0] != found["kept"][1] and found["packs"][0] == found["packs"][1]
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        for name, gradient in theirs.items():
            error = (ours[name] - gradient).abs().max() / gradient.abs().max()
            assert error <= 1e-4, f"{name}: {error:.1e}"
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(found["moved"][name], expected["moved"][name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("way", [*WAYS[:2], HALF], ids=str)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_updates_that_are_not_finite_are_dropped_and_one_without_a_gradient_is_none(replays, way, stage):
    found = torch.load(replays / f"{way}-{stage}.pt", weights_only=False)
    assert found["dropped"] == [None, None, None, None, 0.0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_differs_by_its_rounding(replays, stage):
    """The first update's gradients: the same groups in one pack differ by 4 %."""
    found, expected = torch.load(replays / f"{HALF}-{stage}.pt", weights_only=False), plain(HALF)
    for name, gradient in expected["gradients"][0].items():
        assert (found["gradients"][0][name] - gradient).norm() <= 0.03 * gradient.norm(), name
    assert all(weight.dtype == torch.bfloat16 for weight in found["weights"].values())
