"""The programs in docs/kernels.md, and the trainers' formulas that they stand for."""

import re
from pathlib import Path

import torch

PAGE = (Path(__file__).parents[2] / "docs/kernels.md").read_text(encoding="utf-8")


def test_the_programs_run_and_are_the_trainers_losses():
    found, losses = {}, []
    for program in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(program, found)
        losses.append(found.get("loss"))
    hidden, weight, ids, old, rollout, a, mask = (
        found[name].detach() for name in ("hidden", "weight", "ids", "old", "rollout", "advantages", "mask")
    )
    log_p = (hidden @ weight.T / 0.8).log_softmax(-1).flatten(0, 1)
    logp, entropy = log_p.gather(1, ids.flatten()[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    torch.testing.assert_close(found["logp"].detach(), logp)
    ratio, kept = (logp - old).exp(), mask.flatten()
    mean = lambda x: (x * kept).sum() / kept.sum()  # noqa: E731
    clipped = torch.max(-ratio * a, -ratio.clamp(0.8, 1.28) * a)
    dual = torch.where(a < 0, torch.min(clipped, -3.0 * a), clipped)
    vanilla = mean(dual * (old - rollout).exp().clamp(max=2.0) - 0.01 * entropy)
    openrlhf = mean(-torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a))
    (_, of_verl, of_liger, of_openrlhf) = losses
    torch.testing.assert_close(of_verl.detach(), vanilla)
    torch.testing.assert_close(of_openrlhf.detach(), openrlhf)
    torch.testing.assert_close(found["clip_fraction"], mean((clipped > -ratio * a).float()))
    torch.testing.assert_close(found["log_probs"], logp[kept == 1])
    assert of_liger.isfinite() and found["hidden"].grad.any()


def test_the_worked_example_is_its_formulas():
    u, h, v = 65_536, 4096, 151_936
    for number, text in (
        (6 * u * h * v / 1e12, "| 245 |"), (8 * u * h * v / 1e12, "| 326 |"), (12 * u * v / 1e9, "119 GB"),
        (4 * h * v / 1e9, "2.5 GB"), (2 * u * h / 1e9, "0.5 GB"),
    ):  # fmt: skip
        assert text in PAGE and float(re.search(r"[\d.]+", text)[0]) == round(number, 1 if number < 10 else 0)
