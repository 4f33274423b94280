"""memory.py: hand-worked bytes, what a layer really keeps, who is refused, and the tables of docs/recipes.md."""

import re
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from igpo_fast import config, doctor
from igpo_fast.errors import InputError
from igpo_fast.estimate import GPUS, ROOM
from igpo_fast.run import memory
from igpo_fast.run.memory import Place, parts_of, shape_of
from igpo_fast.setup import set_up

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "docs" / "recipes.md"
TINY = dict(
    vocab_size=10, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1,
)  # fmt: skip
# q with bias, k and v with bias, o, three feed-forward matrices, two norms; embeddings, LM head and a norm.
MATRICES = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12
LAYER = MATRICES + 8 + 2 * 4 + 2 * 8
COUNT = 3 * LAYER + 2 * 10 * 8 + 8
# From the published config.json files of Qwen2.5-3B and Qwen2.5-7B.
QWEN = {
    "3B": dict(
        vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "7B": dict(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    ),
}  # fmt: skip
NO_ENGINE = ["rollout.engine=vllm", "rollout.server=[http://nowhere]"]


def tiny(tie=False):
    return Qwen2Config(**TINY, tie_word_embeddings=tie)


def sizes(overrides, lm, place, host=False):
    """Bytes by part and its phases, of a run whose rollouts are sampled elsewhere."""
    settings = config.load(None, [*NO_ENGINE, *overrides])
    parts = parts_of(settings, shape_of(settings, lm), place)
    return {part.name: part.size for part in parts if part.host == host}


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_process_by_hand(dtype, size, checkpointing):
    found = sizes(
        [f"train.precision={dtype}", f"model.gradient_checkpointing={checkpointing}", "train.token_budget=100"],
        tiny(), Place(1, gpu=False),
    )  # fmt: skip
    last, saved = 12 * 8 + 6 * 12, (9 if size == 4 else 11) * 8 + 4 * 12
    assert found == {
        "weights": COUNT * size,
        **({"float32 masters": COUNT * 4} if size == 2 else {}),
        "gradients": COUNT * 4,
        "Adam states": COUNT * 8,
        "reference": COUNT * size,
        "activations of a pack": 100 * size * (2 * 3 * 8 + last if checkpointing else 2 * saved + last),
        "LM head": 2 * 100 * size * 8 + 2**26,
        "AdamW's temporaries": 8 * 8 * 12,  # a feed-forward matrix, twice
    }
    assert "reference" not in sizes(["algorithm.kl=0"], tiny(), Place(1, gpu=False))
    ppo = [f"train.precision={dtype}", "train.token_budget=100", "algorithm.name=ppo"]
    assert sizes(ppo, tiny(), Place(1, gpu=False))["critic"] == 100 * 8 * (size + 3 * 4)
    assert memory.kv_bytes_per_token(tiny(), getattr(torch, dtype)) == 2 * 3 * 1 * 4 * size


def test_stages_share_by_hand():
    """Four ranks in bfloat16 on GPUs: 2 bytes of weights, 4 of masters and gradients, 8 of moments per number."""
    half, place = "train.precision=bfloat16", Place(4, gpu=True)
    P = COUNT
    bucket = memory.BUCKET
    two = sizes([half, "distributed.zero_stage=2"], tiny(), place)
    assert {name: two[name] for name in list(two)[:6]} == {
        "weights": 2 * P, "float32 masters": P, "gradients": P, "Adam states": 2 * P, "reference": 2 * P,
        "reduction buffers": 2 * bucket + 4 * P,
    }  # fmt: skip
    assert sizes([half, "distributed.zero_stage=1"], tiny(), place) == two  # runs as 2
    three = sizes([half, "distributed.zero_stage=3"], tiny(), place)
    assert {name: three[name] for name in list(three)[:8]} == {
        "weights": P // 2, "float32 masters": P, "gradients": P, "Adam states": 2 * P, "reference": P // 2,
        "reduction buffer": 4 * bucket, "reduction copy": 4 * P, "gathered weights": 2 * P,
    }  # fmt: skip
    assert three["AdamW's temporaries"] == P
    whole = sizes([half, "distributed.engine=none"], tiny(), Place(1, gpu=True))
    assert (whole["float32 masters"], whole["Adam states"], whole["AdamW's temporaries"]) == (4 * P, 8 * P, 4 * P)


def test_float32_under_zero_keeps_masters_of_its_own_but_in_stage_3():
    P, place = COUNT, Place(2, gpu=False)
    assert sizes(["distributed.zero_stage=2"], tiny(), place)["float32 masters"] == 2 * P
    assert sizes(["distributed.zero_stage=1"], tiny(), place)["gradients"] == 4 * P
    three = sizes(["distributed.zero_stage=3"], tiny(), place)
    assert "float32 masters" not in three and three["weights"] == 2 * P
    assert three["reduction buffer"] == 4 * P  # on a CPU only what is written takes memory


def test_offloaded_parts_are_the_hosts():
    half, P = "train.precision=bfloat16", COUNT
    states = [half, "distributed.offload=optimizer"]
    here = sizes(states, tiny(), Place(2, gpu=True))
    there = sizes(states, tiny(), Place(2, gpu=True), host=True)
    assert {"weights", "gradients", "reference"} <= set(here) and not {"float32 masters", "Adam states"} & set(here)
    assert there == {
        "float32 masters": 2 * P, "gradients": 2 * P, "weights on their way": P, "Adam states": 4 * P,
        "AdamW's temporaries": 4 * P,
    }  # fmt: skip
    everything = [half, "distributed.offload=all", "distributed.zero_stage=3"]
    assert not {"weights", "reference", "gradients"} & set(sizes(everything, tiny(), Place(2, gpu=True)))
    assert sizes(everything, tiny(), Place(2, gpu=True), host=True)["weights"] == P


def test_lora_by_hand():
    """A and B of rank 4 for each linear layer but the LM head, made by the adapter's own code."""
    settings = config.load(None, ["model.lora_rank=4"])
    shape = shape_of(settings, tiny())
    layer = sum(4 * (a + b) for a, b in [(8, 8), (8, 4), (8, 4), (8, 8), (8, 12), (8, 12), (12, 8)])
    assert (shape.base, shape.adapters, shape.linear, shape.trained) == (COUNT, 3 * layer, 3 * MATRICES, 3 * layer)
    found = sizes(["model.lora_rank=4"], tiny(), Place(1, gpu=False))
    assert found["Adam states"] == 8 * 3 * layer and found["weights"] == 4 * (COUNT + 3 * layer)
    assert "reference" not in found  # the base model is


def test_tied_weights_count_once():
    assert shape_of(config.load(), tiny(tie=True)).base == COUNT - 10 * 8


def test_memory_of_rollouts():
    """The embedded engine keeps slots of full length, and under stage 3 the weights; vLLM takes its share."""
    settings = config.load(
        None,
        ["train.precision=bfloat16", "train.questions=6", "rollout.group_size=2", "rollout.max_tokens=100",
         "distributed.zero_stage=3"],
    )  # fmt: skip
    parts = parts_of(settings, shape_of(settings, tiny()), Place(4, gpu=True))
    sampling = {part.name: part.size for part in parts if part.phases == ("rollouts",)}
    assert sampling == {"keys and values": 2 * 2 * 100 * 2 * 3 * 4 * 2, "engine's LM head in float32": 4 * 8 * 10}
    copy = next(part for part in parts if part.name == "engine's copy of the weights")
    assert copy.size == 2 * COUNT and copy in memory.certain(parts)
    settings = config.load(None, ["rollout.engine=vllm", "rollout.gpu_memory=0.25"])
    parts = parts_of(settings, shape_of(settings, tiny()), Place(1, gpu=True, device_bytes=1000))
    assert [(part.size, part.phases) for part in parts if part.name == "vLLM"] == [(250, ("rollouts",))]


@pytest.mark.parametrize(("dtype", "per_hidden"), [(torch.float32, 9), (torch.bfloat16, 11)])
def test_what_a_layer_keeps_is_within_the_formula(dtype, per_hidden):
    """4 F + 9 H (11 H in bfloat16) numbers a token, and 2 F + H or more for gradients on the way: 6 F + 12 H."""
    hidden, ffn, tokens = 64, 344, 256
    lm = Qwen2ForCausalLM(Qwen2Config(**TINY | dict(hidden_size=hidden, intermediate_size=ffn, head_dim=16))).to(dtype)
    own = {parameter.untyped_storage().data_ptr() for parameter in lm.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    x = torch.randn(1, tokens, hidden, dtype=dtype, requires_grad=True)
    positions = torch.arange(tokens)[None]
    angles = lm.model.rotary_emb(x, positions)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lm.model.layers[0](x, attention_mask=None, position_ids=positions, position_embeddings=angles)
    numbers = sum(size for _, size in kept.values()) / (tokens * dtype.itemsize)
    assert numbers == pytest.approx(4 * ffn + per_hidden * hidden, rel=0.05)


def recipe(name, overrides=(), model=None):
    settings = config.load(ROOT / "configs" / f"{name}.yaml", overrides)
    return settings, shape_of(settings, Qwen2Config(**QWEN[model or re.search(r"\d+B", name.upper())[0]]))


def gigabytes(parts):
    return f"{memory.total(parts) / 1e9:.1f}"


def cells(document, columns):
    """The rows of a document's tables with so many columns, by their first cell."""
    rows = [line.strip("|").split("|") for line in document.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if len(row) == columns}


COLUMNS = [
    ("qwen2.5-3b-search", [], 1, "h200"),
    ("qwen2.5-7b-search", [], 1, "h200"),
    ("qwen2.5-7b-search", ["distributed.zero_stage=3", "distributed.offload=none"], 8, "h100"),
]


def parts_table():
    """The first table of the section on memory: parts by name, three columns."""
    columns = []
    for name, overrides, ranks, gpu in COLUMNS:
        settings, shape = recipe(name, overrides)
        parts = parts_of(settings, shape, Place(ranks, True, GPUS[gpu].gb * 1e9))
        column = {f"{p.name}{', CPU' * p.host}": gigabytes([p]) for p in parts}
        for phase in memory.ALWAYS:
            column[f"**in {phase}**"] = f"**{gigabytes(memory.held(parts, phase))}**"
        column["keys and values of 1,000 tokens"] = f"{memory.kv_bytes_per_token(shape.lm, torch.bfloat16) / 1e6:.3f}"
        columns.append(column)
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name, "") for column in columns] for name in names}


def test_the_table_of_parts_in_the_recipes():
    found = cells(RECIPES.read_text(), 4)
    assert {name: found.get(name) for name in parts_table()} == parts_table()


def test_every_recipe_fits_the_gpu_that_it_names():
    """Rows of the recipes' table: model and GPUs, settings, GB per GPU in training and in rollouts, GB on the CPU."""
    rows = re.findall(
        r"^\| (\d+B) \| (\d+) x (\w+) \| `([\w.-]+)`(.*?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
        RECIPES.read_text(), re.MULTILINE,
    )  # fmt: skip
    assert {(model, count, gpu) for model, count, gpu, *_ in rows} >= {
        ("3B", "1", "h200"), ("7B", "1", "h200"), ("3B", "8", "h100"), ("7B", "8", "h100"), ("3B", "1", "4090"),
        ("3B", "1", "l40s"), ("7B", "1", "l40s"),
    }  # fmt: skip
    for model, count, gpu, name, overrides, *said in rows:
        settings, shape = recipe(name, re.findall(r"`([\w.]+=[^`]+)`", overrides), model)
        place = Place(int(count), True, GPUS[gpu].gb * 1e9)
        parts = parts_of(settings, shape, place)
        training = max((memory.held(parts, phase) for phase in memory.TRAINING), key=memory.total)
        host = memory.busiest(parts, host=True)
        assert said == [gigabytes(training), gigabytes(memory.held(parts, "rollouts")), gigabytes(host)]
        assert memory.excess(parts, Place(int(count), True, ROOM * GPUS[gpu].gb * 1e9)) is None, (model, gpu)
        longest = settings.rollout.max_tokens + settings.rollout.max_turns * (settings.data.max_answer_tokens + 32)
        assert longest <= settings.train.token_budget


def test_a_whole_7b_is_refused_on_one_gpu_with_what_mends_it():
    settings, shape = recipe("qwen2.5-7b-search", ["distributed.offload=none"])
    with pytest.raises(InputError) as refusal:
        memory.check_fits(settings, shape, Place(1, True, 80e9, 1e12))
    line = str(refusal.value)
    assert line.startswith("memory: a rank takes 152.3 GB of 80.0 GB on its GPU, 60.9 of them Adam states; set ")
    assert "distributed.offload=optimizer, or " in line and "model.lora_rank=16" in line and "\n" not in line
    assert "zero_stage=3," not in line  # one rank has nobody to share with
    memory.check_fits(settings, shape, Place(1, True, 153e9, 1e12))  # activations are no reason: they depend on data
    with pytest.raises(InputError, match="no single setting mends that"):
        memory.check_fits(settings, shape, Place(1, True, 10e9, 20e9))


def test_the_hosts_ranks_share_its_memory():
    settings, shape = recipe("qwen2.5-7b-search")
    there = 160e9  # masters, gradients, moments and the weights' buffer take 137 GB
    memory.check_fits(settings, shape, Place(1, True, 141e9, there))
    with pytest.raises(InputError, match="on the CPU"):
        memory.check_fits(settings, shape, Place(1, True, 141e9, there, on_host=2))


def test_remedies_do_mend():
    """Each setting that a refusal names makes the run fit."""
    settings, shape = recipe("qwen2.5-7b-search", ["distributed.offload=none"])
    place = Place(8, True, 60e9, 1e12, 8)
    assert memory.excess(parts_of(settings, shape, place), place)
    named = memory.remedy(settings, shape.lm, place).removeprefix("set ").split(", or ")
    assert "distributed.zero_stage=3" in named
    for change in named:
        changed, other = recipe("qwen2.5-7b-search", ["distributed.offload=none", *change.split()])
        assert memory.excess(parts_of(changed, other, place), place) is None, change


def test_a_container_has_less_than_its_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "none")
    machine = memory.host_bytes()
    for text, there in (("max\n", machine), ("1000\n", 1000), (f"{2 * machine}\n", machine)):
        monkeypatch.setattr(memory, "CGROUP", tmp_path / "limit")
        (tmp_path / "limit").write_text(text)
        assert memory.host_bytes() == there


WORLD = [
    "world.persons=12", "world.companies=6", "world.cities=6", "world.countries=4", "world.train_worlds=1",
    "world.eval_worlds=1", "eval.questions=4", "sft.clean_steps=0", "sft.noisy_steps=0", "sft.hard_steps=0",
]  # fmt: skip


def test_training_is_refused_before_weights_are_loaded(monkeypatch, tmp_path):
    """Training alone: nobody evaluates with Adam."""
    monkeypatch.setattr(memory, "host_bytes", lambda: 100_000)
    settings = config.load(None, WORLD)
    with pytest.raises(InputError, match=r"^memory: a rank takes \S+ GB of 0\.0 GB on the CPU"):
        set_up(settings, trained=True)
    set_up(settings)


def test_doctor_says_it_before_it_loads_the_model(tmp_path):
    """A directory with a configuration and no weights is enough."""
    tiny().save_pretrained(tmp_path)
    settings = config.load(None, [f"model.path={tmp_path}", "model.device=cpu"])
    training, rollouts, *_ = doctor._configured(settings, 2)
    assert training.name == "memory in training" and training.ok
    assert re.match(r"\S+ of \S+ GB per rank: weights 0\.0, float32 masters 0\.0, gradients 0\.0, ", training.found)
    assert rollouts.name == "memory in rollouts" and "keys and values" in rollouts.found


def test_doctor_fails_where_a_pack_does_not_fit(tmp_path, monkeypatch):
    """A warning for training, which alone refuses what no data could make fit."""
    monkeypatch.setattr(memory, "host_bytes", lambda: 300_000_000)
    tiny().save_pretrained(tmp_path)
    settings = config.load(None, [f"model.path={tmp_path}", "model.device=cpu", "train.token_budget=200000"])
    line = next(iter(doctor._configured(settings, 1)))
    assert not line.ok and "activations of a pack 0.3" in line.found
    assert line.found.endswith("; set model.gradient_checkpointing=true, or train.token_budget=100000")
    memory.check_fits(settings, shape_of(settings, tiny()), memory.place_of("cpu", 1))
