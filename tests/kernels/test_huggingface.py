"""``igpo_tree`` in plain transformers models: a packed forward equals separate eager ones, gradients too; recomputed
under gradient checkpointing; left out by torch.compile at one graph break a layer."""

import copy
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from igpo_kernels import Branch, Fork, RolloutTokens, Tree, pack
from igpo_kernels.huggingface import (
    ATTENTION,
    TreeAttend,
    heads_of,
    keep_attention,
    last_layer,
    model_inputs,
    read_in_parts,
    read_rows_in_last_layer,
)
from igpo_kernels.tree_attention import backend_for

VOCAB = 53
SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, max_position_embeddings=256, initializer_range=0.2, pad_token_id=None, bos_token_id=None,
    eos_token_id=None,
)  # fmt: skip
FAMILIES = {
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "gemma2": Gemma2Config(
        **SIZES, head_dim=16, sliding_window=5, query_pre_attn_scalar=4, attn_logit_softcapping=3.0,
        final_logit_softcapping=None, layer_types=["sliding_attention", "full_attention"],
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
}  # fmt: skip

RECOMPUTED = {
    "recomputed": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "attention kept": {"use_reentrant": False, "context_fn": keep_attention},
}
"""Ways of gradient checkpointing."""


def make(family, attention=ATTENTION, **more):
    """The same weights for every ``attention``; large ones, which make attention sharp and faults plain."""
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[family])
    config.update(more)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def trees(seed=0, longest=9):
    """Two groups; rollouts share a prompt and a turn, answers a wrapper. Every token after the first is a decision."""
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(0, VOCAB, n)  # noqa: E731
    made = []
    for group, endings in enumerate(((longest, 6), (4,))):
        prompt, turn, wrapper = draw(4), draw(3), draw(2)
        rollouts = []
        for number, length in enumerate(endings):
            ids = np.concatenate([prompt, turn, draw(length)])
            decisions = np.where(np.arange(len(ids)) > 0, 0, -1)
            rollouts.append(RolloutTokens(2 * group + number, ids, decisions, np.array([4, 7, len(ids)])))
        made.append(Tree(rollouts, [Branch(np.concatenate([wrapper, draw(n)]), 2, 2 + n) for n in (3, 2)]))
    return made


def separate(lm, made):
    """Logits and hidden states that predict the pack's pairs, one unpadded sequence a forward; nothing of ours runs."""
    sequences = [(r.ids, 1, len(r.ids)) for tree in made for r in tree.rollouts]
    for tree in made:
        for rollout in tree.rollouts:
            for b in rollout.boundaries:
                for branch in tree.branches:
                    ids = np.concatenate([rollout.ids[:b], branch.ids])
                    sequences.append((ids, b + branch.start, b + branch.stop))
    logits, hidden = [], []
    for ids, start, stop in sequences:
        out = lm(input_ids=torch.from_numpy(ids)[None], use_cache=False, output_hidden_states=True)
        logits.append(out.logits[0, start - 1 : stop - 1])
        hidden.append(out.hidden_states[-1][0, start - 1 : stop - 1])
    return torch.cat(logits), torch.cat(hidden)


def packed(lm, plan, /, **changed):
    """The same of the pack, read in one forward by the model as it comes."""
    out = lm(**{**model_inputs(plan), **changed}, output_hidden_states=True)
    row = plan.tensor("row")
    return out.logits[0, row], out.hidden_states[-1][0, row]


def results(lm, logits, hidden):
    """Logits, hidden states, and every parameter's gradient of a random linear function of the logits, in float64."""
    lm.zero_grad()
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * upstream).sum().backward()
    grads = {name: p.grad.double() for name, p in lm.named_parameters()}
    return {"logits": logits.detach().double(), "hidden": hidden.detach().double(), **grads}


def difference(ours, theirs):
    """The largest of the differences, each relative to the largest entry there."""
    return max(float((ours[name] - x).abs().max() / x.abs().max()) for name, x in theirs.items())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_separate(family, seed):
    ours, plain, made = make(family), make(family, "eager"), trees(seed)
    expected = results(plain, *separate(plain, made))
    assert difference(results(ours, *packed(ours, pack(made))), expected) < 2e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_errs_no_more_than_separate_forwards(family):
    ours, plain, made = make(family).bfloat16(), make(family, "eager"), trees()
    expected = results(plain, *separate(plain, made))
    plain = plain.bfloat16()
    allowed = 2 * difference(results(plain, *separate(plain, made)), expected) + 1e-2
    found = results(ours, *packed(ours, pack(made)))
    assert difference(found, expected) < allowed < 0.5


def of_rows(lm, plan, **changed):
    """``packed``, by a decoder whose last layer gives ``plan.rows_read`` alone."""
    attend = TreeAttend(plan, rows_read=True)
    out = lm(**{**model_inputs(plan), "plan": attend, **changed}, output_hidden_states=True)
    assert out.logits.shape[1] == len(plan.rows_read) < plan.n_tokens
    place = plan.pairs(rows_read=True).on("cpu").rows
    return out.logits[0, place], out.hidden_states[-1][0, place]


def answers_alone(made):
    """The same trees with one decision token a rollout: most rows are read by nothing."""
    return [
        Tree([replace(r, turn=np.where(np.arange(len(r.ids)) == 6, 0, -1)) for r in tree.rollouts], tree.branches)
        for tree in made
    ]


@pytest.mark.parametrize("how", ["kept", *RECOMPUTED])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_last_layer_of_rows_that_are_read(family, how):
    """As the whole layer in values and every gradient, also when it is recomputed; called twice, the hook is one."""
    lm, plan = make(family), pack(answers_alone(trees()))
    expected = results(lm, *packed(lm, plan))
    assert read_rows_in_last_layer(lm) and read_rows_in_last_layer(lm)
    if how != "kept":
        lm.train().gradient_checkpointing_enable(RECOMPUTED[how])
    *others, last = lm.model.layers
    fed = []
    for layer in (*others, last):
        layer.mlp.register_forward_hook(lambda module, args, out: fed.append(out.shape[1]))
    out = of_rows(lm, plan)
    assert fed == [plan.n_tokens, len(plan.rows_read)]
    assert difference(results(lm, *out), expected) < 2e-6
    assert len(last._forward_pre_hooks) == 1


def in_parts(lm, plan):
    """Logits and hidden states of all pairs, from a forward of each part; those of decision pairs have a graph."""
    attends = []

    def forward(ids, positions, attend):
        attends.append((attend, torch.is_grad_enabled()))
        out = lm(
            input_ids=ids[None], position_ids=positions[None], plan=attend, use_cache=False, output_hidden_states=True
        )
        return torch.cat([out.logits[0], out.hidden_states[-1][0]], 1)

    of_loss, every = read_in_parts(forward, plan)
    (trunk, with_graph), (_, others) = attends
    assert with_graph and not others and not trunk.kept
    n = plan.n_decisions
    decisions = trunk.plan.pairs(slice(0, n), rows_read=True).on("cpu").rows
    answers = plan.pairs(slice(n, None), rows_read=True).on("cpu").rows
    return *torch.cat([of_loss[decisions], every[answers]]).split([VOCAB, every.shape[1] - VOCAB], 1), attends


def with_forks(made):
    """``answers_alone`` of the trees, each rollout with another continuation, and a rollout that trains nothing."""
    fork = Fork(5, np.arange(6), 2, 5, turn=0)
    trees = [replace(tree, rollouts=[replace(r, forks=[fork]) for r in tree.rollouts]) for tree in answers_alone(made)]
    ids = np.arange(9)
    return [*trees, Tree([RolloutTokens(9, ids, np.full(9, -1), np.array([4, 9]))], trees[0].branches)]


def results_of_decisions(lm, plan, logits, hidden):
    """``results``, whose function is one of the decision pairs alone."""
    n = plan.n_decisions
    return {**results(lm, logits[:n], hidden[:n]), "all": torch.cat([logits, hidden], 1).detach().double()}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("how", ["kept", *RECOMPUTED])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("of", [trees, lambda: with_forks(trees())], ids=["answers", "forks"])
def test_a_pack_in_two_parts(of, family, how):
    """As one forward in all values, and in every gradient of a loss on decisions; keys are kept until they are read."""
    lm, plan = make(family), pack(of())
    expected = results_of_decisions(lm, plan, *packed(lm, plan))
    read_rows_in_last_layer(lm)
    if how != "kept":
        lm.train().gradient_checkpointing_enable(RECOMPUTED[how])
    *out, attends = in_parts(lm, plan)
    assert difference(results_of_decisions(lm, plan, *out), expected) < 2e-6
    (trunk, _), (branches, _) = attends
    assert not trunk.kept  # neither after the backward, which may have run the layers again
    with pytest.raises(ValueError, match="the trunk keeps no keys for layer 0"):
        branches(0, *[torch.zeros(4, 2, 8)] * 3, scale=1.0, softcap=0.0, window=None)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_parts_of_layers_that_run_twice_and_of_a_last_layer_that_is_whole(family):
    """Each run of a layer has its own keys. Without the hook the last layer gives all rows."""
    lm, plan = make(family), pack(trees())
    first, *_ = lm.model.layers
    lm.model.layers.insert(1, first)
    lm.config.num_hidden_layers += 1
    if hasattr(lm.config, "layer_types"):
        lm.config.layer_types = [lm.config.layer_types[0], *lm.config.layer_types]
    expected = results_of_decisions(lm, plan, *packed(lm, plan))
    *out, _ = in_parts(lm, plan)
    assert difference(results_of_decisions(lm, plan, *out), expected) < 2e-6


def test_a_last_layer_of_rows_changes_no_other_forward():
    lm, plan = make("llama"), pack(trees())
    expected = lm(**model_inputs(plan)).logits
    read_rows_in_last_layer(lm)
    assert torch.equal(lm(**model_inputs(plan)).logits, expected)
    assert torch.equal(lm(**{**model_inputs(plan), "plan": TreeAttend(plan)}).logits, expected)


def test_a_plan_that_reads_nothing_leaves_the_last_layer_whole():
    lm, plan = make("llama"), pack([Tree([RolloutTokens(0, np.arange(5), np.full(5, -1))])])
    read_rows_in_last_layer(lm)
    logits = lm(**{**model_inputs(plan), "plan": TreeAttend(plan, rows_read=True)}).logits
    assert logits.shape[1] == plan.n_tokens > len(plan.rows_read) == 0


def test_a_last_layer_without_the_parts_stays_whole():
    lm = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0),
        attn_implementation=ATTENTION,
    ).eval()
    plan = pack(trees())
    assert not read_rows_in_last_layer(lm)
    whole = lm(**{**model_inputs(plan), "plan": TreeAttend(plan, rows_read=True)}).logits
    assert whole.shape[1] == plan.n_tokens


def test_keys_of_the_rows_alone_are_seen(monkeypatch):
    """What the tests above would notice: a last layer whose rows attend to a wrong token's keys."""
    lm, plan = make("llama"), pack(answers_alone(trees()))
    expected = results(lm, *packed(lm, plan))
    read_rows_in_last_layer(lm)
    keep = last_layer._Keys.__call__

    def shifted(self, layer, q, k, v, **options):
        return keep(self, layer, q, k.roll(1, 0), v, **options)

    monkeypatch.setattr(last_layer._Keys, "__call__", shifted)
    assert difference(results(lm, *of_rows(lm, plan)), expected) > 1e-2


def a_token_too_far(plan):
    return replace(plan, subtree_end=np.minimum(plan.subtree_end + 1, plan.n_tokens))


def window_in_packed_indices(plan):
    return TreeAttend(replace(plan, position_ids=np.arange(plan.n_tokens)))


def without(**options):
    """An attention that a model's ``options`` do not reach."""

    def fault(plan):
        inner = TreeAttend(plan)
        return lambda layer, q, k, v, **given: inner(layer, q, k, v, **(given | options))

    return fault


FAULTS = [
    ("qwen2", a_token_too_far),
    ("mistral", a_token_too_far),
    ("mistral", window_in_packed_indices),
    ("mistral", without(window=None)),
    ("gemma2", without(softcap=0.0)),
    ("gemma2", without(scale=16**-0.5)),
]


@pytest.mark.parametrize(("family", "fault"), FAULTS)
def test_a_fault_is_seen(family, fault):
    ours, plain, made = make(family), make(family, "eager"), trees()
    expected = results(plain, *separate(plain, made))
    plan = pack(made)
    assert difference(results(ours, *packed(ours, plan, plan=fault(plan))), expected) > 1e-2


def test_forgotten_positions_are_seen():
    ours, plain, made = make("llama"), make("llama", "eager"), trees()
    found = results(ours, *packed(ours, pack(made), position_ids=None))
    assert difference(found, results(plain, *separate(plain, made))) > 1e-2


class Counted:
    """Attention of a plan that counts its calls, layer by layer."""

    def __init__(self, plan):
        self.inner, self.calls = TreeAttend(plan), []

    def __call__(self, layer, *qkv, **options):
        self.calls.append(layer)
        return self.inner(layer, *qkv, **options)


class Writes(dict):
    """A plan's cache that counts how often each entry is made."""

    def __init__(self):
        super().__init__()
        self.made = Counter()

    def __setitem__(self, key, value):
        self.made[key] += 1
        super().__setitem__(key, value)

    def setdefault(self, key, default=None):
        if key not in self:
            self[key] = default
        return self[key]


@pytest.mark.parametrize("how", RECOMPUTED)
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_gradient_checkpointing(family, how):
    lm = make(family).train()
    kept_plan, plan = (pack(trees()) for _ in range(2))
    for each in (kept_plan, plan):
        object.__setattr__(each, "cache", Writes())
    kept = results(lm, *packed(lm, kept_plan))
    lm.gradient_checkpointing_enable(RECOMPUTED[how])
    attend = Counted(plan)
    out = packed(lm, plan, plan=attend)
    assert attend.calls == [0, 1]
    assert difference(results(lm, *out), kept) < 1e-6
    assert attend.calls == [0, 1, 1, 0]
    assert plan.cache.made == kept_plan.cache.made and set(plan.cache.made.values()) == {1}


def compiled(lm, how, backend):
    """``lm`` with all of it, or each layer, compiled."""
    if how == "model":
        return torch.compile(lm, backend=backend)
    for layer in lm.model.layers:
        layer.compile(backend=backend)
    return lm


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("family", "how", "checkpointing"),
    [
        pytest.param("qwen2", "model", False, marks=pytest.mark.slow),
        ("gemma2", "layers", False),
        ("gemma2", "model", True),
        pytest.param("qwen2", "layers", True, marks=pytest.mark.slow),
    ],
)
def test_compiled_around_the_attention(family, how, checkpointing, dynamo):
    plain, lm = make(family), make(family).train()
    if checkpointing:
        lm.gradient_checkpointing_enable()
    backend = CompileCounterWithBackend("aot_eager")
    run = compiled(lm, how, backend)
    graphs = []
    for longest in (9, 12, 21, 30):
        plan = pack(trees(longest=longest))
        out = run(**model_inputs(plan)).logits[0, plan.tensor("row")]
        expected = results(plain, *packed(plain, plan))
        assert difference(results(lm, out, expected["hidden"]), expected) < 1e-5
        graphs.append(backend.frame_count)
    # One compilation for the first length, one for any length. torch 2.11 compiles a graph anew for each length after.
    assert graphs[0] > 0
    anew = [0, 1, 2] if torch.__version__ < "2.12" else [0, 0, 0]
    assert all(2 * graphs[0] <= n <= 2 * graphs[0] + more for n, more in zip(graphs[1:], anew, strict=True))
    (reason,) = counters["graph_break"]
    assert "torch.compiler.disable" in reason and "attention" in reason


@pytest.mark.parametrize("how", ["model", "layers"])
def test_a_last_layer_of_rows_is_compiled_around(how, dynamo):
    plain, lm = make("llama"), make("llama")
    read_rows_in_last_layer(lm)
    run = compiled(lm, how, "aot_eager")
    for longest in (9, 12):
        plan = pack(answers_alone(trees(longest=longest)))
        expected = results(plain, *packed(plain, plan))
        logits = run(**{**model_inputs(plan), "plan": TreeAttend(plan, rows_read=True)}).logits[0]
        place = plan.pairs(rows_read=True).on("cpu").rows
        assert difference(results(lm, logits[place], expected["hidden"]), expected) < 1e-5


@pytest.mark.parametrize("depth", [2, 6])
def test_the_layers_share_their_graphs(depth, dynamo):
    lm, backend = make("llama", num_hidden_layers=depth), CompileCounterWithBackend("aot_eager")
    compiled(lm, "layers", backend)(**model_inputs(pack(trees()))).logits.sum().backward()
    # Before the attention: norm, projections, RoPE; behind it: output projection; residual and MLP.
    assert backend.frame_count == 4


@pytest.mark.slow
@pytest.mark.parametrize("how", ["model", "layers"])
def test_compiled_by_inductor(how, dynamo):
    plain, lm = make("qwen2"), make("qwen2")
    run = compiled(lm, how, "inductor")
    for longest in (9, 21):
        plan = pack(trees(longest=longest))
        out = run(**model_inputs(plan)).logits[0, plan.tensor("row")]
        expected = results(plain, *packed(plain, plan))
        assert difference(results(lm, out, expected["hidden"]), expected) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_choice_for_a_model_is_the_one_its_attention_asks_for(family):
    lm, plan = make(family), pack(trees())
    backend_for(plan, lm.device, lm.dtype, *heads_of(lm))
    chosen = [key for key in plan.cache if key[0] == "backend"]
    lm(**model_inputs(plan))
    assert [key for key in plan.cache if key[0] == "backend"] == chosen


def test_transformers_makes_no_mask(monkeypatch):
    """Nor does it look for packed sequences in position_ids, which would have the host wait for the device."""
    lm, plan = make("gemma2"), pack(trees())
    masks = []
    layer = type(lm.model.layers[0]).forward

    def spy(self, *args, attention_mask=None, **kwargs):
        masks.append(attention_mask)
        return layer(self, *args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(type(lm.model.layers[0]), "forward", spy)
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", None)
    lm(**model_inputs(plan))
    assert masks == [None, None]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"plan": None}, r"igpo_tree: Qwen2Attention got no plan; run the model as model\(\*\*model_inputs"),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.long), "position_ids": None}, "got a batch of 2; a pack is one"),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.long), "position_ids": None}, "q has 3 rows, the plan"),
        ({"attention_mask": torch.zeros(1, 1, 1, 1)}, "Qwen2Attention got an attention_mask, but the plan is the mask"),
    ],
)
def test_what_is_no_pack_is_refused_in_one_line(changed, message):
    with pytest.raises(ValueError, match=message) as error:
        make("qwen2")(**{**model_inputs(pack(trees())), **changed})
    assert "\n" not in str(error.value)


def test_attention_sinks_are_refused():
    config = GptOssConfig(**SIZES, head_dim=16, num_local_experts=2, num_experts_per_tok=1)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).eval()
    with pytest.raises(ValueError, match="igpo_tree: GptOssAttention has attention sinks"):
        lm(**model_inputs(pack(trees())))


def test_dropout_is_refused():
    lm, inputs = make("qwen2", attention_dropout=0.1), model_inputs(pack(trees()))
    lm(**inputs)
    with pytest.raises(ValueError, match=r"drops out 0\.1 of its weights; set attention_dropout to 0"):
        lm.train()(**inputs)
