"""The tiled torch path against the dense-mask definition in float64, forward and gradients."""

import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo_kernels import Branch, RolloutTokens, Tree, pack, tree_attention
from igpo_kernels.tree_attention import ROWS, flex_path, reference, schedule, torch_path
from tests.allocations import peak_bytes
from tests.kernels.test_plan import plan_of

MODULE = sys.modules["igpo_kernels.tree_attention"]  # the package's attribute of that name is the function


def comb(trunk, turns, wrapper_and_answer=12, trees=1):
    """Rollouts of ``trunk`` tokens with a branch behind each of ``turns`` boundaries."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(trees):
        ids = rng.integers(0, 50, trunk)
        turn = np.where(np.arange(trunk) < 3, -1, 0)
        boundaries = np.linspace(3, trunk - 1, turns).astype(int)
        branch = Branch(rng.integers(0, 50, wrapper_and_answer), 4, wrapper_and_answer)
        made.append(Tree([RolloutTokens(i, ids, turn, boundaries)], [branch] if turns else []))
    return pack(made)


def check(plan, q_heads=4, kv_heads=2, d=16, softcap=0.0, window=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = plan.n_tokens
    inputs = [torch.randn(n, h, d, generator=generator, dtype=torch.float64) for h in (q_heads, kv_heads, kv_heads)]
    upstream = torch.randn(n, d, q_heads, generator=generator, dtype=torch.float64).transpose(1, 2)  # strided

    def run(dtype, backend):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = tree_attention(*leaves, plan, softcap=softcap, window=window, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))]

    exact = run(torch.float64, "reference")
    ours, plain = run(dtype, "torch"), run(dtype, "reference")
    for name, e, o, p in zip(("out", "dq", "dk", "dv"), exact, ours, plain, strict=True):
        allowed = 2 * (p.double() - e).abs().max() + 1e-5
        assert (o.double() - e).abs().max() <= allowed, name


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([(4, 1), (4, 4), (6, 2), (8, 1)]), st.sampled_from([None, 1, 3, 9]))
def test_random_trees(seed, heads, window):
    check(plan_of(seed)[-1], *heads, window=window, seed=seed)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([None, 4]))
def test_softcapped(seed, window):
    check(plan_of(seed)[-1], softcap=5.0, window=window, seed=seed)


def rows_and_all(
    plan, backend, chosen="rows_read", q_heads=4, kv_heads=2, dtype=torch.float64, device="cpu", **options
):
    """Output and gradients of the rows ``chosen``, by ``backend``, and those rows of everything by the definition,
    whose other rows have no upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n, heads: torch.randn(n, heads, 16, generator=generator, dtype=dtype).to(device)  # noqa: E731
    q, k, v = (draw(plan.n_tokens, heads) for heads in (q_heads, kv_heads, kv_heads))
    rows = plan.tensor(chosen, device)
    upstream = draw(len(rows), q_heads)

    def run(q, upstream, **how):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = tree_attention(*leaves, plan, **options, **how)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    ours = run(q[rows], upstream, backend=backend, rows=chosen)
    out, dq, *others = run(q, torch.zeros_like(q).index_copy(0, rows, upstream), backend="reference")
    return ours, [out[rows], dq[rows], *others]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32), st.sampled_from(ROWS), st.sampled_from([(4, 2), (8, 1)]), st.sampled_from([None, 1, 5]),
    st.sampled_from([0.0, 5.0]),
)  # fmt: skip
def test_rows_alone(seed, chosen, heads, window, softcap):
    """Each backend that has gradients here; keys that no row sees get none."""
    for backend in ("torch", "reference"):
        ours, exact = rows_and_all(plan_of(seed)[-1], backend, chosen, *heads, window=window, softcap=softcap)
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("window", [None, 100])
def test_rows_that_are_read_of_many_tiles(window, monkeypatch):
    """Of tiles in which nothing is read too, and no other row is computed."""
    asked, flash = [], torch_path._flash

    def counted(q, *given, **how):
        asked.append(q.shape[2])
        return flash(q, *given, **how)

    monkeypatch.setattr(torch_path, "_flash", counted)
    trunk = np.arange(1500)
    turn = np.where((trunk > 700) & (trunk < 720), 0, -1)
    plan = pack([Tree([RolloutTokens(0, trunk, turn, np.array([100, 1400]))], [Branch(np.arange(9), 6, 9)])])
    ours, exact = rows_and_all(plan, "torch", window=window)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-9)
    assert sum(asked) == len(plan.rows_read) == 19 + 2 * 3 < 0.02 * plan.n_tokens


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_backends_that_compute_all_rows_give_those_that_are_read():
    plan = comb(300, 3, 24)
    torch.manual_seed(0)
    q, k, v = (torch.randn(plan.n_tokens, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    rows = plan.tensor("rows_read")
    found = tree_attention(q[rows], k, v, plan, backend="flex", rows="rows_read")
    torch.testing.assert_close(found, tree_attention(q, k, v, plan)[rows], rtol=0, atol=1e-6)


def test_rows_that_are_not_those_read_are_refused():
    plan = comb(10, 2)
    with pytest.raises(ValueError, match=f"q has {N} rows, the plan {len(plan.rows_read)} rows_read"):
        tree_attention(Q, KV, KV, plan, rows="rows_read")
    with pytest.raises(ValueError, match=f"k and v have {N - 1} rows, the plan {N} tokens"):
        tree_attention(Q[: len(plan.rows_read)], KV[1:], KV[1:], plan, rows="rows_read")
    with pytest.raises(ValueError, match="got rows 'row'; expected one of rows_read, rows_without_gradient, "):
        tree_attention(Q, KV, KV, plan, rows="row")


@pytest.mark.parametrize("trunk", [65, schedule.TILE, schedule.TILE + 3, 700])
@pytest.mark.parametrize("window", [None, 100])
def test_trunks_longer_than_a_tile(trunk, window):
    check(comb(trunk, 9, trees=2), window=window)


@pytest.mark.parametrize("tokens", [8, 9, 10])
def test_a_path_as_long_as_the_window(tokens):
    plan = comb(tokens + 1, 0)
    assert plan.n_tokens == tokens
    check(plan, window=8)


@pytest.mark.parametrize("d", [16, 40, 64, 128])
def test_head_dims(d):
    check(comb(90, 3), d=d)


def test_bfloat16_errs_no_more_than_plain_torch():
    check(comb(150, 4), dtype=torch.bfloat16)


def test_one_token():
    check(pack([Tree([RolloutTokens(0, np.array([3]), np.array([-1]))])]))


def test_every_query_is_in_one_tile_and_no_visible_key_is_missing():
    plan = comb(600, 16, trees=3)
    cuts = [(t.start, t.stop) for t in schedule.tiles(plan, None)]
    assert [a for a, _ in cuts] == [0, *(b for _, b in cuts[:-1])] and cuts[-1][1] == plan.n_tokens


def test_work_is_proportional_to_the_visible_area():
    plan = comb(4096, 16, 24)
    index = np.arange(plan.n_tokens)
    visible = sum(int(((index <= q) & (q < plan.subtree_end)).sum()) for q in index)
    visited = sum((t.stop - t.start) * t.n_keys for t in schedule.tiles(plan, None))
    assert visited <= 1.2 * visible
    dense = plan.n_tokens**2
    assert visited < 0.7 * dense


def test_a_key_is_copied_once_not_once_a_tile():
    plan = comb(4096, 16, 24)
    tiles = schedule.tiles(plan, None)
    copied = sum(run.stop - run.start for tile in tiles for run in tile.fresh)
    assert copied <= plan.n_tokens < 0.1 * sum(tile.n_keys for tile in tiles)


def test_paths_share_one_mask():
    plan, cpu = comb(4096, 16, 24), torch.device("cpu")
    paths = [i for i, tile in enumerate(schedule.tiles(plan, None)) if tile.is_path]
    masks = [schedule.mask(plan, i, None, torch.float32, cpu) for i in paths]
    assert len(masks) >= 16 and len({mask.untyped_storage().data_ptr() for mask in masks}) == 1


@pytest.mark.parametrize(("softcap", "window"), [(50.0, None), (0.0, None), (50.0, 300)])
@pytest.mark.parametrize("heads", [(16, 8), (8, 1)])
def test_temporaries_stay_inside_the_workspace(heads, softcap, window, monkeypatch):
    budget = 1 << 20
    monkeypatch.setattr(torch_path, "workspace_bytes", lambda device: budget)
    monkeypatch.setattr(schedule, "TILE", 64)
    monkeypatch.setattr(schedule, "CACHED_CELLS", 0)
    plan = comb(400, 4)
    q, k, v = (torch.randn(plan.n_tokens, h, 32, requires_grad=True) for h in (heads[0], heads[1], heads[1]))
    forward, out = peak_bytes(lambda: tree_attention(q, k, v, plan, softcap=softcap, window=window))
    backward, grads = peak_bytes(lambda: torch.autograd.grad(out, (q, k, v), q))
    assert forward - out.nbytes < budget and backward - sum(g.nbytes for g in grads) < budget


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("heads", [(12, 2), (3, 3), (6, 1)])
@pytest.mark.parametrize("at_once", [1, 4, 7])
def test_pieces_of_heads(at_once, heads, softcap, monkeypatch):
    plan = comb(40, 2)
    n = plan.n_tokens  # one tile
    room = at_once * 4 * n * ((4 * n if softcap else 0) + 6 * 16)
    monkeypatch.setattr(torch_path, "workspace_bytes", lambda device: 2 * room)
    check(plan, *heads, softcap=softcap)


def test_deep_tiles_have_fewer_queries(monkeypatch):
    monkeypatch.setattr(schedule, "TILE_CELLS", 64 * 300)
    plan = comb(700, 9)
    tiles = schedule.tiles(plan, None)
    assert max((t.stop - t.start) * t.n_keys for t in tiles) <= 64 * 300
    check(plan)


def test_a_window_drops_keys_from_the_tiles():
    plan = comb(2048, 4)
    full = sum(t.n_keys for t in schedule.tiles(plan, None))
    windowed = sum(t.n_keys for t in schedule.tiles(plan, 64))
    assert windowed < 0.5 * full


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


N = comb(10, 2).n_tokens
Q, KV = zeros(N, 4, 8), zeros(N, 2, 8)
REFUSED = {
    "heads that do not divide": ((Q, zeros(N, 3, 8), zeros(N, 3, 8)), {}, "and Hq a multiple of Hkv"),
    "other values": ((Q, KV, zeros(N, 2, 4)), {}, r"v \(\d+, 2, 4\) do not fit"),
    "no key heads": ((Q, zeros(N, 0, 8), zeros(N, 0, 8)), {}, "nothing of size 0"),
    "a batch": ((Q[None], KV[None], KV[None]), {}, r"q \(1, \d+, 4, 8\), .* do not fit; expected \[N, Hq, D\]"),
    "another plan": ((Q[1:], KV[1:], KV[1:]), {}, "rows, the plan"),
    "two dtypes": (
        (Q.half(), KV, KV),
        {},
        "got q torch.float16 on cpu, k torch.float32 on cpu, .*; expected one float",
    ),
    "two devices": ((Q, KV.to("meta"), KV), {}, "k torch.float32 on meta, .* and one device"),
    "integers": ((Q.int(), KV.int(), KV.int()), {}, "expected one floating-point dtype"),
    "no scale": ((Q, KV, KV), {"scale": 0.0}, r"got scale 0\.0; expected a number above 0"),
    "a negative cap": ((Q, KV, KV), {"softcap": -5.0}, r"got softcap -5\.0; expected a number above 0, or 0"),
    "a cap that is none": ((Q, KV, KV), {"softcap": float("nan")}, "got softcap nan"),
    "no window": ((Q, KV, KV), {"window": 0}, "got window 0; expected a whole number of 1 or more, or None"),
    "a negative window": ((Q, KV, KV), {"window": -3}, "got window -3"),
    "a window that is no number": ((Q, KV, KV), {"window": True}, "got window True"),
    "numpy": ((Q.numpy(), KV, KV), {}, r"q is a ndarray; give a tensor: torch.as_tensor\(q\)"),
    "a tensor of scales": ((Q, KV, KV), {"scale": torch.ones(2)}, r"got scale a tensor \(2,\); give a plain number"),
    "a tensor of windows": (
        (Q, KV, KV),
        {"window": torch.ones(2, 2)},
        r"got window a tensor \(2, 2\); expected a whole",
    ),
    "no queries": ((None, KV, KV), {}, "q is None; give a tensor"),
    "no plan": ((Q, KV, KV), {"plan": None}, "plan is None; give a TreePlan"),
    "half a window": ((Q, KV, KV), {"window": 2.5}, r"got window 2\.5"),
    "a misspelt backend": (
        (Q, KV, KV),
        {"backend": "trition"},
        "choose one of auto, reference, torch, triton, flash, flex",
    ),
    "no flash-attn": ((Q, KV, KV), {"backend": "flash"}, r"backend='flash' needs flash-attn \(.*\); pass 'auto'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_line(what, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    inputs, options, message = REFUSED[what]
    with pytest.raises(ValueError, match=f"tree_attention: .*{message}") as error:
        tree_attention(*inputs, **{"plan": comb(10, 2), **options})
    assert "\n" not in str(error.value)


def test_numbers_of_other_kinds_are_taken():
    q, k = torch.randn(N, 4, 8), torch.randn(N, 2, 8)
    expected = tree_attention(q, k, k, comb(10, 2), 0.5, window=3)
    given = dict(scale=torch.tensor(0.5), softcap=None, window=np.int64(3))
    assert torch.equal(tree_attention(q, k, k, comb(10, 2), **given), expected)


@pytest.fixture
def flash_attn(monkeypatch):
    """A stand-in of flash-attn's signature, which needs a GPU: every sequence by itself, in torch."""

    def varlen(
        q, k, v, starts, starts_k, longest, longest_k, *, softmax_scale, causal, softcap, window_size, deterministic
    ):
        assert causal and deterministic and starts is starts_k and longest == longest_k == int(starts.diff().max())
        assert starts.dtype == torch.int32
        outs = []
        for a, b in pairwise(starts.tolist()):
            plan = pack([Tree([RolloutTokens(0, np.arange(b - a + 1), np.where(np.arange(b - a + 1) < b - a, -1, 0))])])
            window = None if window_size == (-1, -1) else window_size[0] + 1
            outs.append(reference.tree_attention(q[a:b], k[a:b], v[a:b], plan, softmax_scale, softcap, window))
        return torch.cat(outs)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=varlen, __spec__=True))
    monkeypatch.delitem(sys.modules, "igpo_kernels.tree_attention.flash_path", raising=False)


@pytest.mark.parametrize("window", [None, 5])
def test_sequences_through_flash_attn(flash_attn, window):
    plan = comb(30, 0, trees=3)
    q, k = torch.randn(plan.n_tokens, 4, 8), torch.randn(plan.n_tokens, 2, 8)
    ours, exact = (
        tree_attention(q, k, k, plan, softcap=3.0, window=window, backend=backend) for backend in ("flash", "reference")
    )
    torch.testing.assert_close(ours, exact)


def test_flash_attn_refuses_trees(flash_attn):
    plan = comb(30, 3)
    q = torch.zeros(plan.n_tokens, 4, 8)
    with pytest.raises(ValueError, match="without branches or sharing"):
        tree_attention(q, q, q, plan, backend="flash")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "window": 90}], ids=["plain", "capped_windowed"])
def test_flex_attention(options):
    plan = comb(300, 3, 24)
    torch.manual_seed(0)
    q, k, v = (torch.randn(plan.n_tokens, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    ours, exact = (tree_attention(q, k, v, plan, scale=0.3, backend=b, **options) for b in ("flex", "reference"))
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", [None, 300])
def test_flex_attentions_blocks_are_those_with_visible_pairs(window):
    """By query and, for gradients of keys, by key; full ones apart, for FlexAttention does not mask those."""
    plan, size = comb(700, 4, 40, trees=2), flex_path.BLOCK
    blocks = -(-plan.n_tokens // size)
    dense = torch.zeros(blocks * size, blocks * size, dtype=torch.bool)
    dense[: plan.n_tokens, : plan.n_tokens] = reference.visible(plan, window, torch.device("cpu"))
    dense = dense.view(blocks, size, blocks, size).transpose(1, 2)
    mask = flex_path.block_mask(plan, window)
    found = {}
    for name in ("kv", "full_kv", "q", "full_q"):
        found[name] = torch.zeros(blocks, blocks, dtype=torch.bool)
        count, columns = (getattr(mask, f"{name}_{what}")[0, 0].tolist() for what in ("num_blocks", "indices"))
        for row, (n, visited) in enumerate(zip(count, columns, strict=True)):
            found[name][row, visited[:n]] = True
    assert torch.equal(found["kv"] | found["full_kv"], dense.any((2, 3)))
    last = blocks - 1  # whose queries behind the last token are nobody's
    assert torch.equal(found["full_kv"][:last], dense.all((2, 3))[:last]) and found["full_kv"].any()
    assert torch.equal(found["q"].T, found["kv"]) and torch.equal(found["full_q"].T, found["full_kv"])
    assert not (found["kv"] & found["full_kv"]).any()
    assert flex_path.block_mask(plan, window) is mask, "kept on the plan"


def test_flex_attention_has_no_gradients_on_a_cpu():
    plan = comb(30, 2)
    q = torch.randn(plan.n_tokens, 2, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"gradients on a GPU only, got tensors on cpu; pass backend='torch'"):
        tree_attention(q, q, q, plan, backend="flex")


@pytest.fixture
def gpu(monkeypatch):
    """As if the chip had kernels."""
    monkeypatch.setattr(MODULE, "resolve", lambda *_: "triton")


BF16 = torch.bfloat16


def test_automatic_takes_what_fits_the_heads(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    choose = lambda *heads, **of: MODULE.automatic(torch.device("cuda"), BF16, *heads, **of)  # noqa: E731
    assert choose(128, 7) == choose(256, 16) == choose(64, 1, sequences=True) == "triton"
    falcon, starcoder, wide = choose(64, 71), choose(128, 48), choose(512, 1)
    assert falcon == starcoder == wide == "torch"


def test_automatic_takes_flash_attn_for_sequences(flash_attn, gpu, monkeypatch):
    choose = lambda dtype, *heads: MODULE.automatic(torch.device("cuda"), dtype, *heads, sequences=True)  # noqa: E731
    assert choose(BF16, 128, 1) == choose(BF16, 64, 71) == "flash"
    assert choose(torch.float32, 128, 1) == "triton" and choose(BF16, 512, 1) == "torch"
    # Only flash_attn.cute is installed.
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(__spec__=True, cute=1))
    assert choose(BF16, 128, 1) == "triton"


def test_a_cpu_takes_torch(flash_attn):
    assert MODULE.automatic(torch.device("cpu"), BF16, 64, 1, sequences=True) == "torch"


def test_the_choice_is_made_once_a_plan_and_logged_once(flash_attn, gpu, caplog, monkeypatch):
    MODULE._log_once.cache_clear()
    made = []
    automatic = MODULE.automatic
    monkeypatch.setattr(MODULE, "automatic", lambda *given: made.append(given) or automatic(*given))
    device = torch.device("cpu")
    with caplog.at_level("INFO"):
        for plan in (comb(30, 0), comb(30, 3), comb(40, 3)):
            names = {MODULE.backend_for(plan, device, BF16, 8, 2) for _ in range(3)}
            assert names == {"flash" if plan.is_sequences else "triton"}
    assert len(made) == 3
    assert caplog.messages == [
        "tree_attention: flash for single sequences, torch.bfloat16 on cpu, heads of 8 by 2",
        "tree_attention: triton for trees, torch.bfloat16 on cpu, heads of 8 by 2",
    ]


def test_attention_asks_for_the_choice(flash_attn, gpu):
    plan = comb(30, 0)
    q, k = torch.randn(plan.n_tokens, 4, 8), torch.randn(plan.n_tokens, 2, 8)
    plan.cache["backend", q.device, q.dtype, 8, 2] = "flash"
    torch.testing.assert_close(tree_attention(q, k, k, plan), tree_attention(q, k, k, plan, backend="reference"))
