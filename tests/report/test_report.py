"""The page of a run: its numbers are the records', hostile texts are texts, and what it leaves out it says."""

import base64
import hashlib
import json
import math
import re
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from igpo_fast.cli import app
from igpo_fast.errors import InputError
from igpo_fast.report.choice import _spread, choose, ranges
from igpo_fast.report.contents import Contents, pieces
from igpo_fast.report.curves import curves
from igpo_fast.report.page import Report, _embedded
from igpo_fast.train import train
from igpo_fast.update.rewards import normalise_answer
from tests.report.made import Page, answers, calls, credit, rollout, run_folder, searches, turn
from tests.tiny import Recorder, settings

STEPS = 3


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    """A finished run: three steps of four groups of four, an evaluation of eight before, after 2 and 3."""
    folder = tmp_path_factory.mktemp("report") / "run"
    train(settings(folder, cache, f"train.steps={STEPS}"), Recorder())
    return folder


@pytest.fixture(scope="module")
def page(trained):
    return Page(Report(trained).html())


def records(folder):
    """Key -> record of every rollout."""
    found = {}
    for path in sorted((folder / "rollouts").glob("*.jsonl")):
        for line, text in enumerate(path.read_text().splitlines(), 1):
            found[f"{path.stem}.{line}"] = json.loads(text)
    return found


def made(run, **options):
    return Page(Report(run.path, **options).html())


def test_every_number_of_the_page_is_the_records(trained, page):
    found = records(trained)
    assert len(page.rollouts) == STEPS * 16 + 8  # all of training, and the last evaluation
    for key, entry in page.rollouts.items():
        record = found[key]
        for name in ("id", "question", "answers", "answer", "index", "dataset"):
            assert entry[name] == record[name]
        assert entry["tokens"] == sum(turn["tokens"] for turn in record["turns"])
        assert entry["turns"] == [[turn["action"], turn["argument"]] for turn in record["turns"]]
        detail = page.detail(key)
        for full, written in zip(detail, record["turns"], strict=True):
            assert "".join(full["said"]) == written["text"] and len(full["said"]) == written["tokens"]
            assert full["logp"] == pytest.approx(written["logp"], abs=5.1e-5)
            for name in ("response", "passages", "found"):
                assert full[name] == written[name]
        if entry["kind"] == "train":
            for name in ("f1", "em", "outcome", "values"):
                assert entry[name] == record[name]
            assert entry["advantages"] == [turn["advantage"] for turn in record["turns"]]
            assert entry["gains"] == [turn["info_gain"] for turn in record["turns"][:-1]]
        else:
            assert "advantages" not in entry and entry["outcome"] is None


def test_without_a_tokenizer_turns_are_their_text(trained, page, tmp_path):
    plain = "turns are shown as text, not token by token"
    assert plain not in page.text
    shutil.copytree(trained, folder := tmp_path / "run")
    for path in folder.glob("checkpoints/*/tokenizer*.json"):
        path.write_text("{")
    damaged = Page(Report(folder).html())
    assert f"{plain}: the tokenizer in {folder}/checkpoints/step_00000{STEPS} is damaged" in damaged.text
    shutil.rmtree(folder / "checkpoints")
    without = Page(Report(folder).html())
    assert f"{plain}: the run has no checkpoint" in without.text
    for found in (damaged, without):
        for key, record in records(trained).items():
            if key in found.rollouts:
                assert [turn["said"] for turn in found.detail(key)] == [[turn["text"]] for turn in record["turns"]]


def test_f1_of_an_evaluation_is_that_of_its_row(trained, page):
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    shown = [entry["f1"] for entry in page.rollouts.values() if entry["kind"] == "eval"]
    assert sum(shown) / len(shown) == pytest.approx(last["eval/f1"])


def test_a_group_stands_together_and_knows_its_prompt(page):
    groups = {}
    for entry in page.rollouts.values():
        if entry["kind"] == "train":
            groups.setdefault(entry["group"], []).append(entry)
    assert len(groups) == STEPS * 4
    assert all([entry["index"] for entry in group] == [0, 1, 2, 3] for group in groups.values())
    first = next(iter(groups))
    assert page.rollouts[first]["question"] in json.loads(page.scripts[f"group-{first}"])["prompt"]


def test_every_number_of_the_rows_has_a_line(trained):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    drawn = [line for charts in curves(rows).values() for chart in charts for line in chart.lines]
    keys = {key for row in rows for key, value in row.items() if value is not None} - {"step", "eval/f1_se"}
    assert len(drawn) == len(keys) > 30
    f1 = curves(rows)["Evaluation"][0].lines[0]
    evaluated = [row for row in rows if "eval/f1" in row]
    assert f1.ys == [row["eval/f1"] for row in evaluated] and f1.xs == [0, 2, 3]
    assert f1.high == [row["eval/f1"] + row["eval/f1_se"] for row in evaluated]


def test_what_a_row_lacks_is_skipped_and_what_is_null_is_a_gap():
    rows = [
        {"step": 1, "eval/f1": 0.5},
        {"step": 2},
        {"step": 3, "eval/f1": None},
        {"step": 4, "eval/f1": 1, "odd": "x"},
    ]
    ((section, (chart,)),) = curves(rows).items()
    assert (section, chart.title) == ("Evaluation", "F1")
    assert (chart.lines[0].xs, chart.lines[0].ys) == ([1, 3, 4], [0.5, None, 1])


def test_many_rows_are_drawn_as_means_in_a_band():
    rows = [{"step": s, "loss/kl": None if s in (1, 2, 3) else 10 * s} for s in range(1, 802)]
    line = curves(rows)["Optimisation"][0].lines[0]
    assert len(line.xs) == 267 and line.xs[:2] == [3, 6] and line.xs[-1] == 801
    assert (line.ys[:2], line.low[:2], line.high[:2]) == ([None, 50], [None, 40], [None, 60])
    assert (line.ys[-1], line.low[-1], line.high[-1], line.bars) == (8000, 7990, 8010, False)


def test_several_data_sets_share_a_chart():
    (chart,) = curves([{"step": 1, "eval/f1": 0.5, "eval/NQ/f1": 0.25, "eval/NQ/f1_se": 0.1, "eval/2Wiki/f1": 0.75}])[
        "Evaluation"
    ]
    assert [line.name for line in chart.lines] == ["f1", "NQ/f1", "2Wiki/f1"]


HOSTILE = [
    "</script><script>document.title = 'owned'</script>",
    '<img src=x onerror="document.title = 1"><!-- <style>*{}</style>',
    "{{ 7 * 7 }}{% for x in y %}{# #}&lt;&amp;",
    "\u2028\u2029\x00\x1b[31m\u202eright to left\ufffe שלום",
    "<!--<script>",
    "x" * 100_000,
]


@pytest.fixture
def hostile(tmp_path):
    """A run whose every text is hostile."""
    pairs = []
    for i, text in enumerate(HOSTILE):
        made_up = rollout(
            searches(text, f"found {text}", passages=(text,)), turn(text), answers(text), id=text, question=text,
            truth=(text,), index=0, rewards={"reward": 1.0, text[:50]: 0.5},
        )  # fmt: skip
        pairs.append((made_up, credit(made_up, [0.1 * i, 0.2, 0.3], f1=1.0)))
    return run_folder(
        tmp_path / "</title><script>alert(1)</script>",
        "data.source=files", "model.tokenizer=bpe", f"data.train={json.dumps(HOSTILE[0])}", "data.corpus=contexts",
        rows=[{"step": 1, HOSTILE[0]: 1.0}], step_1=pairs,
    )  # fmt: skip


def test_hostile_texts_are_texts(hostile):
    html = Report(hostile.path).html()
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("script") == 1 + 1 + len(HOSTILE)  # the page's own, the index, groups
    assert not {"img", "b"} & {tag for tag, _ in page.tags}
    assert all(not name.startswith("on") and name != "style" for _, attrs in page.tags for name in attrs)
    embedded = html.decode().split('<div id="data" hidden>')[1].split("</div>")[0]
    assert embedded.count("<") == embedded.count(">") == 2 * (1 + len(HOSTILE)) and "&" not in embedded
    assert "\u2028" not in embedded and "\u2029" not in embedded
    for text, entry in zip(HOSTILE, page.rollouts.values(), strict=True):
        assert entry["question"] == entry["answer"] == entry["id"] == text and text[:50] in entry["rewards"]
        detail = page.detail(entry["key"])
        assert detail[0]["response"] == f"found {text}" and detail[1]["said"] == [text]
    assert HOSTILE[0] in page.text  # the row's key, over its chart
    assert "script>" in page.text  # the folder's name


@given(st.recursive(st.text() | st.integers(0, 9), lambda inner: st.dictionaries(st.text(), inner), max_leaves=5))
def test_embedded_values_come_back_and_hold_no_markup(value):
    found = _embedded(value)
    assert json.loads(found) == value and not set(found) & set("<>&\u2028\u2029")


def test_the_page_allows_its_own_script_and_style_and_nothing_else(hostile):
    html = Report(hostile.path).html()
    page, text = Page(html), html.decode()
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv"))
    for kind, content in (
        ("script", page.scripts["own"]),
        ("style", text.split("<style>")[1].split("</style>")[0]),
    ):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "connect-src" not in policy
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|Function\(", text)
    assert not any({"src", "href"} & attrs.keys() and "#" not in attrs.get("href", "") for _, attrs in page.tags)


def test_what_went_wrong_by_hand(tmp_path):
    cases = {
        "none": [searches("x", "It is Weimar."), answers("weimar!")],
        "wrong": [searches("x", "It is Bonn."), answers("Bonn")],
        "wrong though found": [searches("x", "In Weimar, it is said."), answers("Bonn")],
        "wrong, found by nobody": [searches("x", "Weimarer Land"), answers("Bonn")],  # another word
        "malformed no answer": [turn("hm"), turn("hm")],
        "no answer tokens": [searches("x", "Weimar"), turn("sea")],
        "no answer turns": [searches("x", "Weimar"), turn("search y", searches("y").actions)],
        "found nothing": [searches("x"), answers("Weimar")],
        "failed call": [searches("x", "It did not answer.", found=False, failed=True), answers("Weimar")],
        "malformed": [turn("hm"), answers("Weimar")],
    }
    ends = {"no answer tokens": "tokens", "no answer turns": "turns"}
    pairs = []
    for i, (name, turns) in enumerate(cases.items()):
        one = rollout(*turns, index=i, truncated=ends.get(name, ""))
        pairs.append((one, credit(one, f1=float(one.answer in ("Weimar", "weimar!")))))
    page = made(run_folder(tmp_path, step_1=pairs))
    expected = [
        [], ["no exact match"], ["no exact match though found"], ["no exact match"],
        ["malformed", "no answer"], ["tokens", "no answer"],
        ["turns", "no answer"], ["found nothing"], ["failed call"], ["malformed"],
    ]  # fmt: skip
    assert [entry["failures"] for entry in page.rollouts.values()] == expected


@pytest.mark.parametrize(
    ("normalisation", "text", "truth", "marked"),
    [
        ("igpo", "a cat, a Cat: 'CAT' concat", ["cat"], ["cat", "Cat", "CAT"]),
        ("igpo", "In New York; York, New-York", ["York", "New York"], ["New York", "York", "New-York"]),
        ("igpo", "1,000 is not 1000", ["1000"], ["1000"]),
        ("squad", "1,000 is (1000)", ["1000"], ["1,000", "1000"]),
        ("squad", "The Who, then the band who sang", ["the who"], ["Who", "who"]),
        ("igpo", "a banana, A. b", ["a"], ["a", "A"]),
        ("igpo", "🙂🙂 in 東京都 🙂", ["東京"], ["東京"]),
        ("igpo", "Cafe\u0301 caf\u00e9 cafe", ["caf\u00e9"], ["Cafe\u0301", "caf\u00e9"]),
        ("igpo", "שלום עולם", ["שלום"], ["שלום"]),
        ("igpo", "nothing", ["", "?"], []),
    ],
)
def test_what_is_marked(normalisation, text, truth, marked):
    assert [text[a:b] for a, b in Contents(normalisation).marks(text, truth)] == marked


@given(
    st.lists(st.sampled_from(["cat", "Cat", "the", "concat", ",", "-", " ", "x", "東", "é", "e\u0301", "ที่", "🙂"])),
    st.sampled_from(["cat", "the cat", "cat x", "東東", "é", "ที่", "x,x", "🙂 cat"]), st.sampled_from(["igpo", "squad"]),
)  # fmt: skip
def test_what_stands_is_marked_and_reads_as_the_answer(pieces, answer, normalisation):
    contents, text = Contents(normalisation), "".join(pieces)
    marks = contents.marks(text, [answer])
    assert bool(marks) == contents.stands(text, [answer])
    for start, end in marks:
        assert normalise_answer(text[start:end], normalisation) == normalise_answer(answer, normalisation)


def test_a_group_without_advantages_teaches_nothing(tmp_path):
    one, two, three = rollout(answers("Weimar")), rollout(answers("Weimar"), index=1), rollout(answers("x"), id="q2")
    pairs = [(one, credit(one, f1=1, advantages=[0.0])), (two, credit(two, f1=1, advantages=[math.nan]))]
    pairs += [(three, credit(three, advantages=[-1.0]))]
    page = made(run_folder(tmp_path, step_1=pairs, evaluations={1: [rollout(answers("Weimar"))]}))
    assert [entry["failures"] for entry in page.rollouts.values()] == [
        [], ["teaches nothing"], ["teaches nothing"], ["no exact match"],
    ]  # fmt: skip


def test_runs_of_other_kinds(tmp_path):
    """Without values, with baselines, a verdict without ground truth, a majority's answer, other tools, data sets."""
    plain = rollout(searches("x", "y"), answers("z"), rewards={"reward": 0.25}, truth=())
    masked = rollout(calls("lookup", key="a", table="b"), answers("z"), id="q2")
    run = run_folder(
        tmp_path, "algorithm.basis=prob", "algorithm.baseline=masked", "algorithm.preset=robust",
        step_1=[
            (plain, credit(plain, f1=math.nan, outcome=0.25)),
            (masked, credit(masked, [0.5, 0.75], baselines=np.array([0.625]))),
        ],
        evaluations={1: [plain]},
    )  # fmt: skip
    page = made(run)
    assert (page.index["basis"], page.index["baseline"]) == ("prob", "masked")
    evaluated, first, second = page.rollouts.values()
    assert evaluated["f1"] is None and evaluated["em"] is None and evaluated["rewards"] == {"reward": 0.25}
    assert first["f1"] is None and first["values"] == [None, None] and first["gains"] == [] and not first["failures"]
    assert second["baselines"] == [0.625] and second["turns"][0] == ["lookup", '{"key": "a", "table": "b"}']


def test_a_run_that_has_just_begun_and_one_that_is_no_run(tmp_path):
    page = made(run_folder(tmp_path / "run"))
    assert not page.rollouts and "No step is finished yet." in page.text and "No rollouts are written yet." in page.text
    with pytest.raises(InputError, match=r"nowhere: no such run folder; give the run.dir of a run"):
        Report(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not a run folder"):
        Report(tmp_path)


def test_a_half_written_last_row_is_left_out_and_another_is_refused(tmp_path):
    run = run_folder(tmp_path, rows=[{"step": 1, "reward/f1": 0.5}])
    whole = Report(run.path).html()
    with open(run.metrics, "ab") as file:
        file.write(b'{"step": 2, "reward/')
    strip = lambda html: re.sub(rb"<footer>.*</footer>", b"", html)  # noqa: E731 (has the time)
    assert strip(Report(run.path).html()) == strip(whole)
    for line in (b'f1": 0.5, "bro\n', b"[]\n"):
        run.metrics.write_bytes(b'{"step": 1}\n' + line)
        with pytest.raises(InputError, match=r"metrics\.jsonl.*"):
            Report(run.path).html()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda record: json.dumps(record)[:-9], r"step_000001\.jsonl:1: not JSON"),
        (lambda record: json.dumps(record | {"version": 2}), "version 2; this igpo-fast reads up to 1"),
        (lambda record: json.dumps({k: record[k] for k in record if k != "turns"}), "not a rollout's record"),
        (lambda record: json.dumps(record).replace("Where", "\\ud800"), r"step_000001\.jsonl:1: not JSON"),
    ],
    ids=["damaged", "newer", "not a record", "half a character"],
)
def test_damaged_and_newer_records_are_refused(tmp_path, spoil, said):
    one = rollout(answers("x"))
    run = run_folder(tmp_path, step_1=[(one, credit(one))])
    path = run.rollouts / "step_000001.jsonl"
    path.write_text(spoil(json.loads(path.read_text())) + "\n")
    with pytest.raises(InputError, match=said):
        Report(run.path).html()


def many(count, group=4):
    pairs = [rollout(answers("x"), id=f"q{i // group}", index=i % group) for i in range(count)]
    return [(one, credit(one)) for one in pairs]


def shown(groups):
    return [f"{group[0].file}:{len(group)}" for group in groups]


def test_which_rollouts_a_page_shows(tmp_path):
    steps = {f"step_{step}": many(12) for step in range(1, 6)}
    evaluated = [rollout(answers("x"), id=f"q{i}") for i in range(10)]
    run = run_folder(tmp_path, evaluations={0: evaluated, 5: evaluated}, **steps)
    groups, told = choose(run, 26)
    # 10 of the evaluation (13 are half of the room), then groups of 4 of steps 1, 5 and 3 in turn.
    trained = ["step_000005:4", "step_000003:4", "step_000001:4", "step_000001:4"]
    assert shown(groups) == ["eval_000005:1"] * 10 + trained
    assert told == [
        "evaluation rollouts: step 5 (10); not on this page: step 0",
        "training rollouts: step 1 (8 of 12), step 3 (4 of 12), step 5 (4 of 12); not on this page: steps 2, 4",
        f"igpo-fast report {tmp_path}: other steps by --steps 0,2, more of them by --rollouts 104",
    ]
    assert shown(choose(run, 7)[0]) == ["eval_000005:1"] * 3 + ["step_000001:4"]
    assert shown(choose(run, 6)[0]) == ["eval_000005:1"] * 6  # no whole group fits the other half
    groups, told = choose(run, 1000)
    assert len(groups) == 10 + 5 * 3 and told[1] == "training rollouts: " + ", ".join(
        f"step {s} (12)" for s in range(1, 6)
    )
    groups, told = choose(run, 1000, [0, 2])
    assert shown(groups) == ["step_000002:4"] * 3 + ["eval_000000:1"] * 10
    assert told[1] == "training rollouts: step 2 (12); not on this page: steps 1, 3-5"
    with pytest.raises(InputError, match=r"--steps 7: .* has no rollouts of it; it has 0, 1, 2, 3, 4, 5"):
        choose(run, 10, [2, 7])


def test_room_that_training_leaves_is_for_the_evaluation(tmp_path):
    evaluated = [rollout(answers("x"), id=f"q{i}") for i in range(10)]
    run = run_folder(tmp_path, evaluations={1: evaluated}, step_1=many(4))
    assert shown(choose(run, 12)[0]) == ["eval_000001:1"] * 8 + ["step_000001:4"]


def test_a_step_whose_file_was_emptied_has_no_rollouts(tmp_path):
    run = run_folder(tmp_path, step_1=many(4), step_2=many(4))
    (run.rollouts / "step_000002.jsonl").write_bytes(b"")
    with pytest.raises(InputError, match=r"--steps 2: .* has no rollouts of it; it has 1$"):
        choose(run, 10, [1, 2])
    assert choose(run, 10)[1] == ["training rollouts: step 1 (4)"]


def test_a_group_that_does_not_fit_is_told(tmp_path):
    run = run_folder(tmp_path, evaluations={1: [rollout(answers("x"))]}, step_2=many(4))
    with pytest.raises(InputError, match="--rollouts 3: a group has 4 rollouts and the page whole groups; give 4"):
        choose(run, 3, [2])
    assert shown(choose(run, 4, [2])[0]) == ["step_000002:4"]
    groups, told = choose(run, 4, [1, 2])
    assert shown(groups) == ["eval_000001:1"]
    assert told[-1] == "training groups have 4 rollouts and do not fit; --rollouts 8 has room for one"
    groups, told = choose(run, 8, [1, 2])
    assert shown(groups) == ["step_000002:4", "eval_000001:1"] and "do not fit" not in " ".join(told)


def test_a_question_that_comes_twice_in_a_step_is_two_groups(tmp_path):
    pairs = many(8)
    again = [(rollout(answers("x"), id="q1", index=i), credit(rollout(answers("x")))) for i in (0, 2, 3)]
    assert shown(choose(run_folder(tmp_path, step_1=pairs + again), 100)[0]) == [
        "step_000001:4", "step_000001:4", "step_000001:3",
    ]  # fmt: skip


@given(st.lists(st.integers(1, 100), unique=True).map(sorted))
def test_steps_are_spread(steps):
    order = _spread(steps)
    assert sorted(order) == steps and order[:2] == [*steps[:1], *steps[1:][-1:]]
    named = [part.split("-") for part in ranges(steps).split(", ") if part]
    assert [s for part in named for s in range(int(part[0]), int(part[-1]) + 1)] == steps


@given(st.text(max_size=20), st.lists(st.integers(1, 3), max_size=30))
def test_pieces_joined_are_the_text(text, sizes):
    """Tokens that are runs of bytes, as a byte-level tokenizer has them."""
    content, tokens = text.encode(), []
    for size in [*sizes, *[1] * len(content)]:
        if content:
            tokens.append(content[:size])
            content = content[size:]
    decode = lambda ids: b"".join(tokens[i] for i in ids).decode(errors="replace")  # noqa: E731
    found = pieces(decode, list(range(len(tokens))))
    assert "".join(found) == text and len(found) == len(tokens)


def igpo_fast_(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_the_command_writes_a_file(trained, tmp_path):
    result = igpo_fast_(trained, "--output", tmp_path / "page.html", "--rollouts", 20, "--steps", "2,3")
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'page.html'}: open it in a browser" in result.stdout
    page = Page((tmp_path / "page.html").read_bytes())
    assert {(entry["kind"], entry["step"]) for entry in page.rollouts.values()} == {
        ("train", 2), ("train", 3), ("eval", 2), ("eval", 3),
    }  # fmt: skip
    assert igpo_fast_(trained).exit_code == 0 and (trained / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "1,x"], "--steps 1,x: give a step, or several like 1,60,120"),
        (["--steps", "99"], "--steps 99: "),
        (["--rollouts", "3", "--steps", "1"], "--rollouts 3: a group has 4 rollouts"),
        (["--output", "/"], "--output /: a folder; give a file, like /report.html"),
        (["--live", "--output", "x"], "--output: --live writes no file; leave one of them out"),
        (["--output", "/nowhere/page.html"], "/nowhere/page.html: cannot write (No such file or directory)"),
    ],
)
def test_what_the_command_refuses(trained, arguments, said):
    result = igpo_fast_(trained, *arguments)
    assert result.exit_code == 2 and result.stderr.startswith(f"error: {said}") and result.stderr.count("\n") == 1
