"""adapter.py: what an adapter computes, and that peft and transformers read what is written."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from igpo_fast import adapter, model
from igpo_fast.errors import InputError
from igpo_fast.update.learner import Learner
from igpo_kernels import LossSettings

peft = pytest.importorskip("peft")
IDS = torch.arange(9)[None]


@pytest.fixture
def base(tmp_path):
    """A base model on disk, read back."""
    lm = model.build(
        23, hidden_size=16, layers=2, heads=2, kv_heads=1, ffn_size=24, max_tokens=32, tie_embeddings=True, seed=0
    )
    lm.save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager").eval()


def with_adapter(base, targets="all-linear"):
    """``base`` with an adapter that is not 0."""
    lm = adapter.add(copy.deepcopy(base), 3, 12.0, targets)
    torch.manual_seed(1)
    for name, parameter in lm.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return lm


@torch.no_grad()
def logits(lm):
    return lm(IDS).logits


def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(base):
    lm = adapter.add(copy.deepcopy(base), 3, 12.0, "all-linear")
    assert torch.equal(logits(lm), logits(base))
    trained = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in lm.named_parameters() if adapter.is_adapter(name)}
    assert len(trained) == 2 * 2 * 7  # A and B of seven layers in each of two


def test_the_same_seed_gives_the_same_adapter(base):
    one, other = (dict(adapter.add(copy.deepcopy(base), 3, 12.0, "all-linear", 5).named_parameters()) for _ in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_merged_weights_compute_the_same_under_the_base_models_names(base):
    lm = with_adapter(base)
    merged = dict(adapter.merged(lm))
    assert list(merged) == list(base.state_dict())
    plain = copy.deepcopy(base)
    plain.load_state_dict(merged)
    torch.testing.assert_close(logits(plain), logits(lm), rtol=1e-5, atol=1e-5)
    assert (logits(lm) - logits(base)).abs().max() > 0.01


def test_switched_off_it_is_the_base_model(base):
    lm = with_adapter(base)
    with adapter.off(lm):
        assert torch.equal(logits(lm), logits(base))
    assert not torch.equal(logits(lm), logits(base))
    assert any(parameter.requires_grad for parameter in lm.parameters())


def test_peft_and_our_loader_read_the_folder(base, tmp_path):
    lm = with_adapter(base, ["q_proj", "down_proj"])
    Learner(lm, lr=1e-3, factor=lambda step: 1.0).snapshot()(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(lm))
    ours = model.load(str(tmp_path), check=True)
    ours.set_attn_implementation("eager")
    torch.testing.assert_close(logits(ours), logits(lm), rtol=1e-5, atol=1e-5)
    assert not adapter.adapted(ours)


def test_a_learner_trains_the_adapter_alone_and_resumes(base, tmp_path):
    def step(learner):
        learner.backward(learner.lm(input_ids=IDS, labels=IDS).loss)
        learner.step()

    def made():
        return Learner(with_adapter(base), settings=LossSettings(kl=0.1), lr=1e-2, factor=lambda number: 1.0)

    learner = made()
    before = {name: parameter.clone() for name, parameter in learner.lm.named_parameters()}
    step(learner)
    for name, parameter in learner.lm.named_parameters():
        assert torch.equal(parameter, before[name]) != adapter.is_adapter(name), name
    learner.snapshot()(tmp_path)
    step(learner)
    resumed = made()
    resumed.load(tmp_path)
    step(resumed)
    ours, theirs = dict(resumed.weights()), dict(learner.weights())
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("targets", [["no_such"], "no_such_layer"])
def test_layers_that_are_not_there_are_one_line(base, targets):
    with pytest.raises(InputError, match=r"^model\.lora_targets=.*name linear layers of Qwen2ForCausalLM"):
        adapter.add(base, 3, 12.0, targets)


@pytest.mark.parametrize("harm", ["missing", "other layers", "no base", "not json"])
def test_a_damaged_adapter_is_one_line(base, tmp_path, harm):
    folder = tmp_path / "adapter"
    folder.mkdir()
    lm = with_adapter(base)
    tensors = {name: p for name, p in lm.named_parameters() if adapter.is_adapter(name)}
    if harm == "missing":
        tensors.popitem()
    adapter.save(lm, folder, tensors)
    if harm == "other layers":
        with_adapter(base, ["q_proj"]).peft_config["default"].save_pretrained(folder)
    if harm in ("no base", "not json"):
        (folder / "adapter_config.json").write_text("{}" if harm == "no base" else "x")
    with pytest.raises(InputError) as error:
        model.load(str(folder))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
