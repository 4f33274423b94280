"""The tuner's choice, what it makes of wrong results, errors and kills, the tables' format; timing needs a GPU."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch

from igpo_kernels import triton_variants
from igpo_kernels.triton_variants import ARCHITECTURES, DTYPES, TABLES, Tunable, arch_of, config_for, configs

pytest.importorskip("triton")

from triton import knobs
from triton.backends.driver import GPUDriver
from triton.runtime.driver import driver

from igpo_kernels import tune
from igpo_kernels.inspect import SHARED_BYTES
from igpo_kernels.linear_logprob import triton_path

pytestmark = pytest.mark.aot
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
KERNELS = sorted(path.stem for path in TABLES.glob("*.json"))


START = {"num_warps": 4, "num_stages": 1, "BLOCK": 64}


@pytest.fixture
def one_table(monkeypatch):
    entries = {"sm_90": {"any": {"bf16": START}}}
    monkeypatch.setattr(tune, "table", lambda kernel: entries)
    return entries["sm_90"]["any"]


def choose(times, first=(), seconds=60.0, **options):
    """What the tuner leaves in the table, and the blocks that it timed, given times by block."""
    tried = []

    def attempt(entry):
        tried.append(entry["BLOCK"])
        return times.get(entry["BLOCK"], math.inf)

    space = {"num_warps": [4], "num_stages": [1], "BLOCK": list(times)}
    tunable = Tunable("k", "any", "bf16", space, None)
    return *tune.tune(tunable, "sm_90", attempt, first, seconds=seconds, **options), tried


def test_the_fastest_that_counts_is_left_in_the_table(one_table):
    best, after, before, _ = choose({64: 10.0, 128: 8.0, 256: math.inf, 512: 9.0})
    assert (best["BLOCK"], after, before) == (128, 8.0, 10.0)
    assert one_table["bf16"] == best


def test_the_shortlist_comes_first_and_alone_if_nothing_is_searched(one_table):
    first = [{**START, "BLOCK": block} for block in (64, 512, 2048)]
    told = []
    *_, tried = choose({64: 10.0, 128: 8.0, 512: 9.0}, first, search=False, ahead=told.append)
    assert tried == [64, 512, 2048] and one_table["bf16"]["BLOCK"] == 512
    assert told == [first[1:]], "the committed entry is no candidate"
    *_, tried = choose({512: 9.0, 64: 10.0, 128: 8.0}, first)
    assert tried == [512, 64, 2048, 128]


def test_rounds_change_one_constant_until_nothing_is_faster(one_table):
    """From (4, 64): all that differ in one constant, then again from the fastest of them."""
    times = {(4, 64): 10.0, (8, 64): 9.0, (4, 128): 7.0, (8, 128): 1.0, (8, 256): 3.0, (4, 256): 9.5}
    seen = []

    def attempt(entry):
        seen.append((entry["num_warps"], entry["BLOCK"]))
        return times[seen[-1]]

    space = {"num_warps": [4, 8], "BLOCK": [64, 128, 256], "num_stages": [1]}
    best, after, _ = tune.tune(Tunable("k", "any", "bf16", space, None), "sm_90", attempt)
    assert seen == [(4, 64), (8, 64), (4, 128), (4, 256), (8, 128), (8, 256)]
    assert (best["num_warps"], best["BLOCK"], after) == (8, 128, 1.0)


def test_no_candidate_is_begun_after_the_time(one_table):
    best, after, before, tried = choose({64: 10.0, 128: 1.0}, seconds=-1.0)
    assert (best["BLOCK"], after, before, tried) == (64, 10.0, 10.0, [64])


def test_noise_changes_nothing(one_table):
    best, after, before, _ = choose({64: 10.0, 128: 9.9})
    assert (best["BLOCK"], after, before) == (64, 10.0, 10.0)
    assert one_table["bf16"] == best


def test_nothing_is_tuned_whose_own_entry_does_not_run(one_table):
    *_, tried = choose({128: 1.0})
    assert tried == [64] and one_table["bf16"] == START


def candidate(one_table):
    """A workload whose block decides what comes of it."""

    def workload(device):
        x = torch.randn(4, 8, device=device)

        def run():
            block, out = one_table["bf16"]["BLOCK"], torch.empty_like(x)
            if block == 128:
                raise RuntimeError("out of resource: shared memory")
            out[: 3 if block == 256 else 4] = x[: 3 if block == 256 else 4]
            out[-1] *= 2.0 if block == 512 else 1.003
            return out

        return run

    return workload


TIMES = {64: 10.0, 128: 1.0, 256: 2.0, 512: 3.0, 1024: 4.0}
"""128 raises, 256 leaves a row unwritten, 512 has a row that is wrong; each would be faster."""


def tuner(one_table, folder, times=TIMES):
    milliseconds = lambda run: times[one_table["bf16"]["BLOCK"]]  # noqa: E731
    return tune.Tuner(folder, "sm_90", torch.device("cpu"), milliseconds=milliseconds)


def rows(folder):
    found = map(json.loads, (folder / "tune.jsonl").read_text().splitlines())
    return {row["candidate"][-1]["BLOCK"]: row for row in found if "begun" not in row}


def test_wrong_results_and_errors_never_win(one_table, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "lost", lambda device: False)
    tunable = Tunable("k", "any", "bf16", {}, candidate(one_table))
    tuner(one_table, tmp_path).tune("op", tunable, [{**START, "BLOCK": b} for b in TIMES], False, 60.0)
    found = rows(tmp_path)
    assert one_table["bf16"]["BLOCK"] == 1024 and found[1024]["ms"] == 4.0
    assert found[128]["error"] == "RuntimeError: out of resource: shared memory"
    assert found[256]["difference"] == math.inf and found[512]["difference"] == pytest.approx(1.0, abs=0.1)
    assert all("ms" not in found[block] for block in (128, 256, 512))
    assert json.loads((tmp_path / "tables.json").read_text()) == {"k": {"sm_90": {"any": {"bf16": one_table["bf16"]}}}}


def test_a_tuner_that_was_killed_goes_on_behind_what_it_began(one_table, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "lost", lambda device: True)
    tunable = Tunable("k", "any", "bf16", {}, candidate(one_table))
    first = [{**START, "BLOCK": block} for block in (1024, 128, 512)]
    with pytest.raises(SystemExit) as ended:
        tuner(one_table, tmp_path).tune("op", tunable, first, False, 60.0)
    assert ended.value.code == tune.LOST and set(rows(tmp_path)) == {64, 1024, 128}
    one_table["bf16"] = START  # as a new process finds it
    with (tmp_path / "tune.jsonl").open("a") as file:
        began = {"run": "", "candidate": ["k", "sm_90", "any", "bf16", first[2]], "begun": True}
        file.write(json.dumps(began) + "\n")
    tuner(one_table, tmp_path).tune("op", tunable, first, False, 60.0)
    assert set(rows(tmp_path)) == {64, 1024, 128}, "what hung the process is not begun again"
    assert tune.Tuner(tmp_path, "sm_90", torch.device("cpu"), run="another").begun == set()


def test_differences_are_of_a_row_and_its_own_size():
    x = torch.tensor([[1.0, 2.0], [0.01, -0.02]])
    assert tune.difference([x], [x]) == 0.0
    # The root mean square of all is 1.118, a hundredth of it 0.01118; the second row's largest entry is 0.02.
    wrong = x + torch.tensor([[0.0, 0.0], [0.0, 0.01]])
    assert tune.difference([wrong], [x]) == pytest.approx(0.01 / (0.02 + 0.01118), rel=1e-3)
    assert tune.difference([x[0] * 1.01], [x[0]]) == pytest.approx(0.01, rel=0.02)
    assert math.inf == tune.difference([x[:1]], [x]) == tune.difference([x * float("nan")], [x])


def test_entries_of_a_gpu_are_adopted(tmp_path, monkeypatch):
    entries = {"sm_90": {"any": {"bf16": START, "fp32": START}}}
    monkeypatch.setattr(tune, "table", lambda kernel: entries)
    monkeypatch.setattr(tune, "TABLES", tmp_path)
    won = {**START, "BLOCK": 512}
    (tmp_path / "tables.json").write_text(json.dumps({"k": {"sm_90": {"any": {"bf16": won}}}}))
    assert not tune.main(["--adopt", str(tmp_path / "tables.json")])
    assert (tmp_path / "k.json").read_text() == tune.render({"sm_90": {"any": {"bf16": won, "fp32": START}}})


def test_the_shortlist_fits_the_tables():
    """Every candidate has the constants of its table's entry, and what its name groups is of one architecture."""
    known = {tunable.kernel for *_, tunable in tune.tunables()}
    listed = tune.shortlist()
    assert len(listed) == len(
        {json.dumps([*map(row.get, ("kernel", "shape_class", "dtype")), row["entry"]]) for row in listed}
    )
    for row in listed:
        config = config_for(row["kernel"], row["arch"], row["shape_class"], row["dtype"])
        assert row["kernel"] in known and set(row["entry"]) == {"num_warps", "num_stages", *config.constants}
        assert row["shared"] <= SHARED_BYTES[row["arch"]] and row["triton"]


def test_entries_of_a_name_are_put_into_the_tables(monkeypatch):
    listed = [
        dict(kernel="k", arch="sm_90", shape_class="any", dtype="bf16", entry={"BLOCK": 1}),
        dict(kernel="k", arch="sm_90", shape_class="any", dtype="bf16", entry={"BLOCK": 2}, name="narrow"),
    ]
    entries = {"sm_90": {"any": {"bf16": START}}}
    monkeypatch.setattr(tune, "shortlist", lambda: listed)
    monkeypatch.setattr(tune, "table", lambda kernel: entries)
    assert tune.apply_named("narrow", "sm_90") == 1 and entries["sm_90"]["any"]["bf16"] == {"BLOCK": 2}
    with pytest.raises(ValueError, match="no entries 'wide' for sm_90; names are narrow"):
        tune.apply_named("wide", "sm_90")


def test_what_may_be_tuned_is_in_the_tables():
    for _, module, tunable in tune.tunables():
        found = {(c, d): config for arch, c, d, config in configs(tunable.kernel) if arch == "sm_90"}
        config = found[tunable.shape_class, tunable.dtype]
        assert set(tunable.space) == {"num_warps", "num_stages", *config.constants}
        built = {(v.kernel, v.dtype, v.shape_class.split("/")[0]) for v in module.variants()}
        assert (tunable.kernel, tunable.dtype, tunable.shape_class) in built
        for arch, shape_class, dtype, config in configs(tunable.kernel):
            if (shape_class, dtype) == (tunable.shape_class, tunable.dtype):
                space = tunable.on(PROCESSORS[arch]).space
                assert all(config[name] in space[name] for name in tunable.a_processor)


def test_what_is_built_is_of_one_class():
    """``variants()`` adds the options to the class: "small/plain", "small/entropy", ..."""
    for size, count in {"small": 5, "large": 4}.items():
        found = tune.built(triton_path, "linear_logprob_forward", "sm_90", size, "bf16")
        assert len(found) == count and {v.shape_class.split("/")[0] for v in found} == {size}
        assert {(v.kernel, v.arch, v.dtype) for v in found} == {("linear_logprob_forward", "sm_90", "bf16")}
        assert found[0].shape_class == f"{size}/plain", "the one that the tuner times, so the one to compile ahead"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's size")
@pytest.mark.usefixtures("bf16_dots")
@pytest.mark.parametrize("size", ["small", "large"])
def test_what_the_tuner_times_runs(size, monkeypatch):
    monkeypatch.setattr(triton_path, "TUNED_HIDDEN", 16)
    monkeypatch.setattr(triton_path, "TUNED_VOCAB", 512)
    monkeypatch.setattr(triton_path, "TUNED_ROWS", {"small": 20, "large": 80})
    launched = []
    monkeypatch.setattr(triton_path.Head, "grid", lambda self, config, n, vocab: launched.append((config, n)) or (1,))
    for op, _, tunable in tune.tunables():
        if (op, tunable.shape_class, tunable.dtype) == ("linear_logprob", size, "bf16"):
            _, found = tune.results(tunable, torch.device("cpu"))
            again = tune.results(tunable, torch.device("cpu"))[1]
            assert tune.difference(again, found) == 0.0, "the same inputs, and nothing unwritten"
            config, n = launched.pop()
            assert n == triton_path.TUNED_ROWS[size]
            expected = config_for(tunable.kernel, "sm_90", size, "bf16")
            assert {name: config[name] for name in expected.constants} == dict(expected.constants)


def test_a_filter_given_twice_takes_both():
    found = {t.kernel for _, t in tune.wanted(tune.parsed(["--out=x", "--op=policy_loss", "--op=turn_advantages"]))}
    assert {"policy_loss", "turn_advantages"} <= found and not any(name.startswith("linear") for name in found)
    both = {
        t.dtype for _, t in tune.wanted(tune.parsed(["--out=x", "--dtype=bf16", "--dtype=fp32", "--op=linear_logprob"]))
    }
    assert both == {"bf16", "fp32"}


def test_counts_for_each_multiprocessor():
    space = {"BLOCK": [64, 128], "PROGRAMS": [2, 4]}
    tunable = Tunable("k", "any", "bf16", space, None, ("PROGRAMS",)).on(132)
    assert tunable.space == {"BLOCK": [64, 128], "PROGRAMS": [264, 528]} and tunable.on(7) == tunable


@pytest.mark.parametrize("kernel", KERNELS)
def test_committed_tables_are_as_the_tuner_writes_them(kernel):
    text = (TABLES / f"{kernel}.json").read_text()
    assert tune.render(json.loads(text)) == text


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_configured_for_every_architecture(kernel):
    found = {(arch, dtype) for arch, _, dtype, _ in configs(kernel)}
    assert {arch for arch, _ in found} == set(ARCHITECTURES)
    assert {dtype for _, dtype in found} <= {*DTYPES, "fp64"}


def test_without_a_gpu_the_tuner_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--out=x"]) == 2
    assert capsys.readouterr().err == "igpo_kernels.tune: no GPU is visible; run it on the machine to tune for\n"


def test_fusion_is_pinned():
    # Whether a * b + c contracts is a knob of the Triton version: no launch leaves it open.
    assert config_for("policy_loss", "sm_90", "any", "fp32").launch()["enable_fp_fusion"] is True


def test_a_missing_entry_is_named():
    with pytest.raises(KeyError, match=re.escape("configs/policy_loss.json has no entry sm_90/huge/fp32")):
        config_for("policy_loss", "sm_90", "huge", "fp32")


@pytest.mark.parametrize("capability, expected", [((9, 0), "sm_90"), ((8, 0), "sm_80"), ((10, 0), "sm_100")])
def test_architecture_of_a_device(capability, expected, monkeypatch):
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    triton_variants.arch_name.cache_clear()
    assert arch_of(torch.device("cuda", 0)) == expected
    triton_variants.arch_name.cache_clear()


def test_tensors_on_the_cpu_are_refused_beside_a_gpu(monkeypatch):
    class Gpu(GPUDriver):
        def __init__(self):
            pass

    Gpu.__abstractmethods__ = frozenset()
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    monkeypatch.setattr(driver, "_active", Gpu())
    with pytest.raises(ValueError, match="Triton kernels run on GPUs, got tensors on the CPU; pass backend='auto'"):
        arch_of(torch.device("cpu"))
    monkeypatch.setattr(driver, "_active", object())  # as aot's absent device
    assert arch_of(torch.device("cpu")) == "sm_90"


def test_a_device_without_tables_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=8, minor=9))
    triton_variants.arch_name.cache_clear()
    with pytest.raises(ValueError, match=r"no Triton configurations for sm_89.*pass backend='torch'"):
        triton_variants.arch_of(torch.device("cuda", 0))
    triton_variants.arch_name.cache_clear()
