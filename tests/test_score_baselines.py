"""score with counterfactual baselines: equal to plain forwards, whatever the packs; what cannot be is refused."""

import json
import math
import random
from collections import Counter
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from igpo_fast import model
from igpo_fast import score as module
from igpo_fast.errors import InputError
from igpo_fast.rollouts.dialect import make_dialect
from igpo_fast.rollouts.tools.search import SEARCH_TOOL
from igpo_fast.run.checkpoint import RunFolder
from igpo_fast.run.records import record_of
from igpo_fast.score import Reservoir, Scorer, load_scorer, read_records, score_file
from igpo_fast.train import train
from igpo_fast.types import (
    ANSWER,
    INVALID,
    SEARCH,
    Passage,
    Question,
    Rollout,
    ToolResult,
    Turn,
    answer_with,
    search_for,
)
from tests.doing import doing
from tests.families import FAMILIES, tokenizer_of
from tests.parity import naive
from tests.test_score_inputs import fuzzed
from tests.test_score_inputs import scorer as small_scorer
from tests.tiny import Recorder, settings

ENDS = {"qwen2.5": "<|im_end|>", "qwen3": "<|im_end|>", "llama3.1": "<|eot_id|>"}
QWEN_EMPTY = (
    "\n<|im_start|>user\n<tool_response>\nNothing was found.\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
)
EMPTY = {
    "tags": "\n<information>\n\n</information>\n",
    "qwen2.5": QWEN_EMPTY,
    "qwen3": QWEN_EMPTY,
    "llama3.1": (
        '<|start_header_id|>ipython<|end_header_id|>\n\n"Nothing was found."<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
}
TEMPERATURE = 1.3
FORMS = ["tags", "chat qwen2.5", "chat qwen3", "chat llama3.1", "rollouts tags", "rollouts chat"]


def family_of(form):
    return form.split()[1] if form.startswith("chat") else "qwen3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders with a random Qwen2, its weights large enough to make attention sharp."""

    @cache
    def folder(family):
        path, words = tmp_path_factory.mktemp(family), tokenizer_of(family)
        lm = model.build(
            len(words), hidden_size=32, layers=2, heads=4, kv_heads=2, ffn_size=48, max_tokens=2000,
            tie_embeddings=True, seed=0,
        )  # fmt: skip
        with torch.no_grad():
            for name, parameter in lm.named_parameters():
                if parameter.ndim == 2:
                    parameter *= 24 if "self_attn" in name else 6
        lm.save_pretrained(path)
        words.save_pretrained(path)
        return str(path)

    return folder


def message(role, content):
    return {"role": role, "content": content}


def message_rows(silent=True):
    rows = []
    for who, found in (("Faust", ["A play.", "By Goethe."]), ("Emma", ["A novel."]), ("Faust", ["A long old play."])):
        said = [message("user", f"Who wrote {who}?")]
        for n, passage in enumerate(found):
            said += [message("assistant", f"I look up {who} {n}."), message("tool", passage)]
        said[-1:] = [said[-1], message("tool", "And more.")]  # two responses to one turn
        said += [message("assistant", "Hm.")] * silent  # a turn without any
        said += [message("assistant", f"<answer>{who[0]}</answer>")]
        asked = {"question": f"Who wrote {who}?", "answers": [f"Mr {who}", who]}
        rows.append(asked | {"messages": said, "tools": [SEARCH_TOOL]})
    return rows


def rollout_rows(kind):
    """With turns that searched, found nothing, and were malformed."""
    dialect = make_dialect(
        kind, tokenizer_of("qwen3"), (SEARCH_TOOL,), max_passage_tokens=99, max_answer_tokens=16, max_answers=2
    )
    rows = []
    for who, kinds in (("Faust", [SEARCH, INVALID, SEARCH]), ("Emma", [SEARCH]), ("Lear", [])):
        question = Question(who, f"Who wrote {who}?", (f"Mr {who}", who))
        turns = []
        for n, action in enumerate(kinds):
            actions = (search_for(f"{who} {n}"),) if action == SEARCH else ()
            passages = (Passage(f"p{n}", who, f"Text {n} on {who}."),) if n < 2 and actions else ()
            response, _ = dialect.response(actions, [ToolResult(passages)] * len(actions))
            ids = dialect.encode(dialect.write(actions) if actions else "Hm.")
            found = dict(passages=tuple(p.id for p in passages), found=bool(passages))
            turns.append(Turn(ids, np.zeros(len(ids)), dialect.decode(ids), actions, response, **found))
        ids = dialect.encode(dialect.write((answer_with(who),)))
        last = Turn(ids, np.zeros(len(ids)), dialect.decode(ids), doing(ANSWER, who), np.zeros(0, np.int32))
        rows.append(json.loads(json.dumps(record_of(Rollout(question, 0, dialect.prompt(question), (*turns, last))))))
    return rows


def rows_of(form):
    if form.startswith("rollouts"):
        return rollout_rows(form.split()[1])
    return message_rows(silent="qwen3" not in form)  # Qwen3 writes a turn without a response in another way


def parts_of(row, form):
    """By hand: tokens of the prompt; each turn's own tokens, response, whether it searched and whether it found."""
    words = tokenizer_of(family_of(form))
    encode = lambda text: words(text, add_special_tokens=False).input_ids  # noqa: E731
    if form.startswith("rollouts"):
        turns = [(t["ids"], t["response_ids"], t["action"] == SEARCH, bool(t["passages"])) for t in row["turns"]]
        return row["prompt_ids"], turns
    said = row["messages"]
    starts = [i for i, m in enumerate(said) if m["role"] == "assistant"] + [len(said)]
    turns = []
    if form == "tags":
        for a, b in pairwise(starts):
            response = [id for m in said[a + 1 : b] for id in encode(m["content"])]
            turns.append((encode(said[a]["content"]), response, b > a + 1, b > a + 1))
        return encode(said[0]["content"]), turns
    end = ENDS[family_of(form)]

    def render(n):
        more = n < len(said)
        return words.apply_chat_template(said[:n], tools=[SEARCH_TOOL], add_generation_prompt=more, tokenize=False)

    for a, b in pairwise(starts):
        own, mark, response = render(b)[len(render(a)) :].partition(end)
        if b == a + 1 and b < len(said):  # no response: the opening of the next turn belongs to the turn
            own, response = own + mark + response, ""
        elif b == len(said):
            own, response = own + mark, ""
        else:
            own += mark
        turns.append((encode(own), encode(response), b > a + 1, b > a + 1))
    return encode(render(1)), turns


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def score(tmp_path, rows, make_scorer):
    target = tmp_path / "out.jsonl"
    score_file(write(tmp_path / "in.jsonl", rows), target, make_scorer, overwrite=True)
    return [json.loads(line) for line in target.read_text().splitlines()]


def scorer_of(folder, form, **options):
    dialect = "chat" if "chat" in form else "tags"
    return load_scorer(folder(family_of(form)), dialect=dialect, temperature=TEMPERATURE, **options)


def numbers(column):
    return np.array([math.nan if number is None else number for number in column])


@pytest.mark.parametrize("form", FORMS)
class TestEqualsPlainForwards:
    def test_random(self, tmp_path, folder, form):
        rows, scorer = rows_of(form), scorer_of(folder, form, baseline="random", samples=2, answers="mean")
        out = score(tmp_path, rows, lambda: scorer)
        plain = AutoModelForCausalLM.from_pretrained(folder(family_of(form)), attn_implementation="eager").eval()
        parts = [parts_of(row, form) for row in rows]
        known = {}
        for row, (_, turns) in zip(rows, parts, strict=True):
            known.setdefault(row["question"], set()).update(tuple(r) for _, r, _, found in turns[:-1] if found)
        compared = 0
        for i, (row, scored, record) in enumerate(zip(rows, out, read_records(tmp_path / "in.jsonl"), strict=True)):
            branches = scorer.writer.dialect.branches(record.question)
            assert len(branches) == 2
            value = lambda prefix, branches=branches: np.mean(  # noqa: E731
                [naive.answer_value(plain, prefix, b.ids, b.start, b.stop, TEMPERATURE) for b in branches]
            )
            drawn = {}
            for fork in scorer.tokenise(record, i).forks:
                lent = fork.ids[: fork.start - branches[fork.answer % 2].start].tolist()
                drawn.setdefault(fork.turn, {})[fork.answer // 2] = lent
            ids, turns = list(parts[i][0]), parts[i][1]
            values, baselines = [value(ids)], []
            for t, (own, response, searched, _) in enumerate(turns[:-1], start=1):
                ids += own
                lent = list(drawn.get(t, {}).values())
                assert len(lent) == (2 if searched else 0)
                others = set().union(*(found for question, found in known.items() if question != row["question"]))
                assert all(tuple(response) in others for response in lent)
                assert len(set(map(tuple, lent))) == min(len(lent), len(others))
                baselines.append(np.mean([value([*ids, *r]) for r in lent]) if lent else math.nan)
                ids += response
                values.append(value(ids))
                compared += searched
            np.testing.assert_allclose(numbers(scored["values"]), values, atol=1e-4)
            np.testing.assert_allclose(numbers(scored["baselines"]), baselines, atol=1e-4)
            gains = np.subtract(values[1:], baselines)
            np.testing.assert_allclose(numbers(scored["info_gain"]), gains, atol=2e-4)
            assert {key: scored[key] for key in row if key != "values"} == {k: row[k] for k in row if k != "values"}
        assert compared >= 3

    def test_masked(self, tmp_path, folder, form):
        rows = rows_of(form)
        out = score(tmp_path, rows, lambda: scorer_of(folder, form, baseline="masked"))
        family, words = family_of(form), tokenizer_of(family_of(form))
        plain = AutoModelForCausalLM.from_pretrained(folder(family), attn_implementation="eager").eval()
        empty = words(EMPTY["tags" if "tags" in form else family], add_special_tokens=False).input_ids

        def value(prefix, following):
            with torch.no_grad():
                return float(naive.logprobs(plain, [*prefix, *following], TEMPERATURE)[-len(following) :].mean())

        apart = 0
        for row, scored in zip(rows, out, strict=True):
            ids, turns = parts_of(row, form)
            ids, values, baselines = list(ids), [math.nan], []
            for (own, response, searched, _), (following, *_) in pairwise(turns):
                ids += own
                baselines.append(value([*ids, *empty], following) if response and searched else math.nan)
                ids += response
                values.append(value(ids, following))
            np.testing.assert_allclose(numbers(scored["values"]), values, atol=1e-4)
            np.testing.assert_allclose(numbers(scored["baselines"]), baselines, atol=1e-4)
            gains = np.subtract(values[1:], baselines)
            np.testing.assert_allclose(numbers(scored["info_gain"]), gains, atol=2e-4)
            apart += (abs(gains) > 0.01).sum()
        assert apart >= 2

    def test_none_and_previous(self, tmp_path, folder, form):
        """Values are the same; what they are compared with is 0, or the value before and not in the row."""
        rows = [row | {"baselines": "of another run"} for row in rows_of(form)]
        none, previous = (
            score(tmp_path, rows, lambda b=b: scorer_of(folder, form, baseline=b)) for b in ("none", "previous")
        )
        for one, other in zip(none, previous, strict=True):
            np.testing.assert_allclose(one["values"], other["values"], atol=1e-5)
            assert one["info_gain"] == one["values"][1:] and one["baselines"] == [0.0] * len(one["info_gain"])
            np.testing.assert_allclose(other["info_gain"], np.diff(other["values"]))
            assert "baselines" not in other


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("baseline", ["random", "masked"])
def test_packs_change_nothing_and_hold_their_budget(tmp_path, folder, form, baseline):
    rows = rows_of(form) * 3
    whole = scorer_of(folder, form, baseline=baseline)
    together = score(tmp_path, rows, lambda: whole)
    sizes = [whole.tokenise(record, i).packed_tokens for i, record in enumerate(read_records(tmp_path / "in.jsonl"))]
    for budget in (max(sizes), 2 * max(sizes) + 1):
        small, passes = scorer_of(folder, form, baseline=baseline, token_budget=budget), []
        small.policy.lm.model.embed_tokens.register_forward_hook(lambda m, args, out, to=passes: to.append(args[0]))
        apart = score(tmp_path, rows, lambda small=small: small)
        assert len(passes) > 1 and max(read.numel() for read in passes) <= budget
        for one, other in zip(together, apart, strict=True):
            for name in ("values", "baselines", "info_gain"):
                np.testing.assert_allclose(numbers(one[name]), numbers(other[name]), atol=1e-5)
    with pytest.raises(
        InputError, match=rf"line {np.argmax(sizes) + 1}: {max(sizes)} tokens with all .*--token-budget"
    ):
        score(tmp_path, rows, lambda: scorer_of(folder, form, baseline=baseline, token_budget=max(sizes) - 1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("baseline", ["random", "masked", "none"])
def test_a_trajectory_alone_takes_the_tokens_it_counts(tmp_path, folder, form, baseline):
    scorer = scorer_of(folder, form, baseline=baseline)
    records = list(read_records(write(tmp_path / "in.jsonl", rows_of(form))))
    if baseline == "random":
        scorer.lend(records)
    trajectory, passes = scorer.tokenise(records[0]), []
    scorer.policy.lm.model.embed_tokens.register_forward_hook(lambda m, args, out: passes.append(args[0].numel()))
    next(scorer.score(records[:1]))
    assert passes == [trajectory.packed_tokens]


# --- draws ---


def test_draws_depend_on_seed_and_place_in_the_input_alone(tmp_path, folder):
    rows = [{**row, "question": f"{row['question']} {i}"} for i, row in enumerate(message_rows() * 4)]
    rows.append(rows[0])
    source = write(tmp_path / "in.jsonl", rows)

    def drawn(seed=0):
        scorer = scorer_of(folder, "tags", baseline="random", seed=seed)
        scorer.lend(read_records(source))
        return [
            [fork.ids.tobytes() for fork in scorer.tokenise(record, i).forks]
            for i, record in enumerate(read_records(source))
        ]

    first = drawn()
    assert first == drawn() and first != drawn(seed=1)
    assert first[0] != first[-1]  # the same line in another place


def offered(counts, seed=0, shuffle=None):
    """A reservoir that was offered so many responses of each question."""
    all_offers = [(who, number) for who, count in counts.items() for number in range(count)]
    if shuffle is not None:
        random.Random(shuffle).shuffle(all_offers)
    reservoir, none = Reservoir(seed), np.zeros(0, np.int32)
    for who, number in all_offers:
        found = Turn(none, none, "", doing(SEARCH), np.array([number], np.int32), found=True)
        reservoir.offer(Rollout(Question(who, "?", ("a",)), 0, none, (found, found)))
    lent = reservoir.lent()
    return list(zip(lent.owners.tolist(), (int(ids[0]) for ids in lent.responses), strict=True))


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 40), min_size=2, max_size=8), st.integers(0, 5), st.data())
def test_a_reservoir_is_bounded_and_the_same_in_any_order(counts, seed, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LENT", 12)
        patch.setattr(module, "LENT_PER_QUESTION", 5)
        kept = offered(counts, seed)
        assert kept == offered(counts, seed, shuffle=data.draw(st.integers(0, 9)))
        of = Counter(who for who, _ in kept)
        assert len(kept) == len(set(kept)) == min(12, sum(min(5, count) for count in counts.values()))
        assert max(of.values()) <= 5 and len(of) >= 2  # whoever asks finds a response of another


def test_a_reservoir_forgets_while_it_is_filled():
    reservoir, none = Reservoir(0), np.zeros(0, np.int32)
    for number in range(5 * module.LENT):
        turns = [
            Turn(none, none, "", doing(SEARCH), np.array([number], np.int32), found=found)
            for found in (True, False, True)  # the last turn's is not offered, nor what found nothing
        ]
        reservoir.offer(Rollout(Question(str(number // 100), "?", ("a",)), 0, none, tuple(turns)))
        assert len(reservoir._kept) <= 2 * module.LENT
    assert len(reservoir.lent().responses) == module.LENT
    assert offered({"a": 500, "b": 500}) != offered({"a": 500, "b": 500}, seed=1)


def test_random_without_anything_lent_is_a_callers_fault(tmp_path, folder):
    scorer = scorer_of(folder, "tags", baseline="random")
    with pytest.raises(ValueError, match="call lend before"):
        next(scorer.score(read_records(write(tmp_path / "in.jsonl", message_rows()))))


# --- a run's own rollouts ---


@pytest.mark.parametrize("baseline", ["masked", "none"])
def test_a_runs_rollouts_under_its_checkpoint_have_the_runs_gains(tmp_path, cache, baseline):
    """Step 3's were scored by the weights that step 2 left."""
    run = tmp_path / "run"
    made = settings(run, cache, f"algorithm.baseline={baseline}", "train.steps=3", "algorithm.passes=two")
    train(made, Recorder())
    source = run / "rollouts/step_000003.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    scorer = load_scorer(
        str(RunFolder(run).saved()[2]), baseline=baseline, temperature=made.rollout.temperature,
        basis=made.algorithm.basis, answers=made.algorithm.answers,
    )  # fmt: skip
    out = score(tmp_path, rows, lambda: scorer)
    compared = 0
    for row, scored in zip(rows, out, strict=True):
        for name, key in (("info_gain", "info_gain"), ("baselines", "baseline")):
            theirs = [turn[key] for turn in row["turns"][:-1]]
            np.testing.assert_allclose(numbers(scored[name]), numbers(theirs), atol=1e-4)
            compared += len(theirs)
        np.testing.assert_allclose(numbers(scored["values"]), numbers(row["values"]), atol=1e-4)
    assert compared > 10


# --- what cannot be ---


def test_one_question_is_refused(tmp_path, folder):
    rows = message_rows()
    with pytest.raises(InputError, match=r"--baseline random takes responses from other questions, and all"):
        score(tmp_path, [rows[0], rows[2]], lambda: scorer_of(folder, "tags", baseline="random"))
    assert not (tmp_path / "out.jsonl").exists()


def test_a_question_whose_others_found_nothing_has_no_baseline(tmp_path, folder):
    rows = message_rows()[:2]
    rows[1]["messages"] = [rows[1]["messages"][0], message("assistant", "A."), message("assistant", "B.")]
    out = score(tmp_path, rows, lambda: scorer_of(folder, "tags", baseline="random"))
    assert out[0]["baselines"] == out[0]["info_gain"] == [None] * 3 and None not in out[0]["values"]
    assert out[1]["baselines"] == [None]


@pytest.mark.parametrize("baseline", ["random", "masked"])
def test_only_single_turns(tmp_path, folder, baseline):
    """No turn has a baseline; with masked nothing is read at all."""
    rows = [row | {"messages": [row["messages"][0], row["messages"][-1]]} for row in message_rows()]
    out = score(tmp_path, rows, lambda: scorer_of(folder, "tags", baseline=baseline))
    assert all(row["baselines"] == row["info_gain"] == [] and len(row["values"]) == 1 for row in out)
    assert (out[0]["values"] == [None]) == (baseline == "masked")


@pytest.mark.parametrize("form", ["tags", "rollouts tags"])
def test_masked_needs_tokens_in_every_turn_that_it_reads(tmp_path, folder, form):
    rows = rows_of(form)
    if form == "tags":
        rows[0]["messages"][-1]["content"] = ""
    else:
        rows[0]["turns"][-1] |= {"ids": [], "text": ""}
    scorer_of(folder, form).tokenise(next(read_records(write(tmp_path / "in.jsonl", rows))))
    with pytest.raises(InputError, match=r"line 1: turn 4 has no tokens"):
        score(tmp_path, rows, lambda: scorer_of(folder, form, baseline="masked"))


@pytest.mark.parametrize("baseline", ["random", "masked"])
def test_a_template_that_ends_no_turn_by_a_token_is_refused(tmp_path, folder, monkeypatch, baseline):
    written = "{% for m in messages %}{{ m.role }}: {{ m.content }} END\n{% endfor %}"
    template = written + "{% if add_generation_prompt %}assistant: {% endif %}"
    words = tokenizer_of("qwen2.5")
    monkeypatch.setattr(words, "chat_template", template)
    lm = AutoModelForCausalLM.from_pretrained(folder("qwen2.5"))
    rows = message_rows()
    Scorer(model.use_attend(lm), words, dialect="chat").tokenise(next(read_records(write(tmp_path / "in", rows))))
    with pytest.raises(InputError, match=r"line 1: the chat template ends turn 1 with no token .* the dialect tags"):
        score(tmp_path, rows, lambda: Scorer(model.use_attend(lm), words, dialect="chat", baseline=baseline))


def test_calls_and_tools_are_compared_too(tmp_path, folder):
    """A turn of content and a call ends behind its call."""
    call = {"function": {"name": "search", "arguments": {"query": "<|im_end|> Faust"}}}
    row = message_rows(silent=False)[0]
    row["messages"][1] |= {"tool_calls": [call]}
    scorer = scorer_of(folder, "chat qwen3", baseline="masked")
    (record,) = read_records(write(tmp_path / "in.jsonl", [row]))
    first = scorer.tokenise(record).rollout.turns[0]
    decode = scorer.writer.dialect.decode
    assert decode(first.ids).endswith("</tool_call><|im_end|>")
    assert decode(first.response_ids).startswith("\n<|im_start|>user\n<tool_response>\nA play.")


# --- fuzz ---


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("baseline", ["random", "masked"])
def test_any_row_has_baselines_or_is_refused_in_a_line(tmp_path, baseline, seed):
    rng = random.Random(seed)
    reader = small_scorer(rng.choice([*FAMILIES]), rng.choice(["chat", "chat", "tags"]), baseline=baseline)
    source = write(tmp_path / "in.jsonl", [fuzzed(rng), message_rows(silent=False)[0]])
    try:
        records = list(read_records(source))
        if baseline == "random":
            reader.lend(records)
        found = list(reader.score(records))
    except InputError as error:
        assert str(error).startswith(f"{source} line ") and "\n" not in str(error) and str(error).encode()
        return
    for record, values, gains, baselines in found:
        assert len(values) == len(record.turns) == len(gains) + 1 == len(baselines) + 1
        assert np.isfinite(values[baseline == "masked" :]).all()
        np.testing.assert_allclose(gains, values[1:] - baselines)
