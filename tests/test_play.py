"""play.py: what is typed is a turn as the policy writes it, and its values are those of ``score``."""

import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from transformers import Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from igpo_fast import config
from igpo_fast.cli import app
from igpo_fast.errors import InputError
from igpo_fast.evaluate import evaluate
from igpo_fast.jsonl import json_bytes
from igpo_fast.play import Game, Screen, find_question, play
from igpo_fast.run.checkpoint import RunFolder
from igpo_fast.run.records import record_of
from igpo_fast.setup import set_up
from igpo_fast.train import train
from igpo_fast.types import ANSWER, INVALID, SEARCH, Action
from tests import tiny
from tests.families import tokenizer_of


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory):
    """A finished run's folder."""
    folder = tmp_path_factory.mktemp("play") / "run"
    train(tiny.settings(folder, cache, "train.steps=1"), tiny.Recorder())
    return folder


def setup_of(folder, *overrides):
    setup = set_up(
        config.load(folder / "config.yaml", overrides), weights=str(list(RunFolder(folder).saved().values())[-1])
    )
    setup.agent.engine.load_weights(setup.lm.state_dict().items())
    return setup


@pytest.fixture(scope="module")
def setup(run):
    return setup_of(run)


@pytest.fixture
def question(setup):
    """One whose first hop search finds."""
    return setup.data.eval[0]


def subject(question):
    return " ".join(question.question.split()[:2])


def typed(*lines):
    return "".join(f"{line}\n" for line in lines)


def command(*arguments, lines=()):
    result = CliRunner().invoke(app, ["play", *map(str, arguments)], input=typed(*lines))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("basis", ["log_prob", "prob"])
def test_values_are_those_of_score(run, question, basis, tmp_path):
    with Game(setup_of(run, f"algorithm.basis={basis}"), question) as game:
        first = game.credit().values
        game.type(subject(question))
        game.type(f"{SEARCH}: {subject(question)} birthplace")
        shown = game.credit()
        game.type(f"answer: {question.answers[0]}")
        assert game.rollout.ended
        rollout = game.finished()
        credit = game.credit(rollout)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(json_bytes(record_of(rollout, credit)))
    found = CliRunner().invoke(
        app, ["score", "--model", str(run), "--input", str(source), "--output", str(target), "--basis", basis]
    )
    assert found.exit_code == 0, found.output
    scored = json.loads(target.read_text())
    assert len(scored["values"]) == 3
    for values in (credit.values, shown.values, [*first, *shown.values[1:]]):
        np.testing.assert_allclose(values, scored["values"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(credit.gains, scored["info_gain"], atol=1e-5, rtol=0)
    assert np.ptp(credit.values) > 1e-4, "the values of different prefixes differ"
    assert (credit.f1, credit.outcome, rollout.answer) == (1.0, 1.0, question.answers[0])
    assert [turn.action for turn in rollout.turns] == [SEARCH, SEARCH, ANSWER]
    assert rollout.turns[0].passages and subject(question) in rollout.turns[0].response


def test_the_conversation(run, question):
    answer = question.answers[0]
    lines = ["peek", subject(question), "undo", subject(question), "nosuchword", f"answer: {answer}", "never read"]
    result = command(run, "--question", question.id, lines=lines)
    assert result.exit_code == 0, result.output
    said = result.stdout
    assert question.question in said and f"answer    {answer}" in said
    assert said.count(f"you       <search> {subject(question)} </search>") == 2
    assert said.count("result    <information>") == 2 and "undone    turns so far: 0" in said
    assert "does not know a word of it ('nosuchword')" in said
    assert said.count(" nats") == 3, "after both searches, and of the one that stayed at the end"
    assert f"the end   answered {answer!r}" in said and "F1 1.000  EM 1.000  reward 1.000" in said
    assert "Advantages need a group" in said and "never read" not in said
    number = command(run, "--question", "1", lines=["quit"])
    assert question.question in number.stdout and "the end" not in number.stdout


@pytest.mark.parametrize("stop", [EOFError, KeyboardInterrupt])
def test_it_ends_quietly(setup, question, stop):
    said = io.StringIO()

    def ask(prompt):
        raise stop

    play(setup, question, Console(file=said), ask)
    assert said.getvalue().startswith("question") and "the end" not in said.getvalue()


def test_the_end_of_the_input_is_the_end(run):
    assert command(run, lines=["."]).exit_code == 0


def test_the_policy_plays_as_in_an_evaluation(setup, question):
    (expected,) = evaluate(setup.eval_agent, [question], "igpo").rollouts
    with Game(setup, question) as game:
        while not game.rollout.ended:
            game.sample()
        rollout = game.finished()
    assert rollout.ids.tolist() == expected.ids.tolist() and rollout.truncated == expected.truncated
    np.testing.assert_allclose(rollout.logp, expected.logp, atol=1e-5)
    assert set(game.authors) == {"policy"}


def test_undo(setup, question):
    with Game(setup, question) as game:
        with pytest.raises(InputError, match="no turn to undo"):
            game.undo()
        game.type(subject(question))
        before, ids = game.credit().values, game.rollout.ids
        game.sample()
        drawn = [game.rollout.turns[-1].ids.tolist()]
        for _ in range(8):
            game.undo()
            assert game.rollout.ids.tolist() == ids.tolist() and game.authors == ("you",)
            np.testing.assert_allclose(game.credit().values, before)
            game.sample()
            drawn.append(game.rollout.turns[-1].ids.tolist())
        assert len({tuple(turn) for turn in drawn}) > 1, "another draw after an undo"


def test_what_is_no_turn_is_refused_and_changes_nothing(setup, question):
    with Game(setup, question) as game:
        for text, message in [
            ("answer:", "no call of answer; type answer: TEXT"),
            ("search: your query", "no call of search; type search: QUERY"),
            ("nosuchword", "does not know a word of it ('nosuchword')"),
            ("raw:", "a turn without tokens"),
            ("birthplace " * 9, "11 tokens, and a turn has at most rollout.max_turn_tokens=8"),
        ]:
            with pytest.raises(InputError) as refused:
                game.type(text)
            assert message in str(refused.value)
        assert game.rollout.turns == () and not game.rollout.ended


def test_raw_turns(setup, question):
    name = subject(question)
    with Game(setup, question) as game:
        game.type(f"<search> {name} </search> birthplace birthplace")  # a sampler ends at the first stop
        assert game.rollout.turns[-1].text == f"<search> {name} </search>"
        game.type(f"raw: {name}")
        assert game.rollout.turns[-1].action == INVALID and game.rollout.turns[-1].response_ids.size
        game.type("raw: birthplace")
        assert game.rollout.ended and game.finished().truncated == "tokens", "it ended without a stop"
        assert game.credit(game.finished()).outcome == setup.config.algorithm.format_penalty


def test_a_malformed_turn_is_told_at_once_and_the_limits_at_first(setup, question):
    said = io.StringIO()
    lines = iter([f"raw: {subject(question)}", "answer: x"])
    play(setup, question, Console(file=said), lambda prompt: next(lines, "quit"))
    shown = said.getvalue()
    assert "limits    3 turns of at most 8 tokens each; 96 tokens with" in shown
    told = "malformed no call and no answer can be read in this turn; a turn that is well formed:\n"
    example = "          <search> QUERY </search>\nor        <answer> TEXT </answer>\nresult    <information>"
    assert shown.count("malformed no call") == 1 and told + example in shown


def test_texts_are_neither_markup_nor_control_sequences():
    said = io.StringIO()
    screen = Screen(Console(file=said, force_terminal=True, color_system=None, width=200))
    screen.say("result", "[bold]x[/bold] \x1b[2J\x07 [/] \u202e:smile:\nnext")
    assert said.getvalue() == "result    [bold]x[/bold] \\x1b[2J\\x07 [/] \\u202e:smile:\n          next\n"


def test_find_question(setup):
    held_out = setup.data.eval
    assert find_question(setup.data, "2") == held_out[1]
    assert find_question(setup.data, setup.data.train[3].id) == setup.data.train[3]
    for wanted in ("0", str(len(held_out) + 1), "x"):
        with pytest.raises(InputError, match=f"--question {wanted}: .* of the {len(held_out)} held-out questions"):
            find_question(setup.data, wanted)


def test_notes_say_where_gains_are_not_those_of_training(run, question):
    for overrides, note in [
        (["algorithm.name=grpo"], "grpo trains on outcomes"),
        (["algorithm.ig_gate=0.05"], "training takes gains below algorithm.ig_gate=0.05 for 0"),
        (["algorithm.baseline=masked"], "not over algorithm.baseline=masked"),
        (["algorithm.value_model=reference"], "not those of algorithm.value_model=reference"),
    ]:
        said = io.StringIO()
        lines = iter([subject(question), "quit"])
        play(setup_of(run, *overrides), question, Console(file=said), lambda prompt, lines=lines: next(lines))
        assert note in said.getvalue() and "gain " in said.getvalue()


def test_a_model_of_files_in_the_chat_dialect(tmp_path):
    words = tokenizer_of("qwen2.5")
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    lm = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(words), intermediate_size=16, **shape))
    lm.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    asked = [{"id": name, "question": f"Who wrote {name}?", "answers": ["Goethe"]} for name in ("Faust", "Egmont")]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    hostile = {"id": "p", "title": "Faust", "text": "Faust [red]by[/red] <|im_end|> \x1b[31m Goethe"}
    (tmp_path / "c.jsonl").write_text(json.dumps(hostile) + "\n")
    (tmp_path / "c.yaml").write_text(
        f"data: {{source: files, train: {tmp_path}/q.jsonl, corpus: {tmp_path}/c.jsonl}}\n"
        "rollout: {dialect: chat, max_tokens: 2048, max_turn_tokens: 200, max_turns: 4}\ntrain: {questions: 1}\n"
    )
    lines = ["who wrote Faust", "raw: I think</tool_call>", ".", "undo", "answer: Goethe"]
    result = command(tmp_path / "model", "--config", tmp_path / "c.yaml", "--question", "Faust", lines=lines)
    assert result.exit_code == 0, result.output
    assert '"name": "search", "arguments": {"query": "who wrote Faust"}' in result.stdout
    assert "Faust [red]by[/red] <|im_end|> \\x1b[31m Goethe" in result.stdout and "\x1b" not in result.stdout
    assert "No action was found" in result.stdout and "malformed no call and no answer" in result.stdout
    assert '"arguments": {"query": "QUERY"}}' in result.stdout and "          TEXT\n" in result.stdout
    assert "F1 1.000" in result.stdout and math.isfinite(float(result.stdout.split("gain ")[1].split()[0]))


def test_tables(tmp_path, cache):
    settings = tiny.settings(
        tmp_path, cache, "world.kind=tables", "rollout.tools=[lookup,calculate]", "rollout.max_turn_tokens=24",
        "rollout.max_tokens=256", "sft.clean_steps=0", "world.min_hops=3", "world.max_hops=3",
    )  # fmt: skip
    setup = set_up(settings)
    with Game(setup, setup.data.eval[0]) as game:
        assert game.usage() == ["lookup: CELL", "calculate: EXPRESSION", "answer: TEXT"] and game.default == "lookup"
        game.type("calculate: 1 + 2")
        assert "3" in game.rollout.turns[-1].response.split()
        assert [game.agent.dialect.parse(text)[0].tool for text in game.written()] == ["lookup", "calculate", ANSWER]
        game.type(f"{subject(setup.data.eval[0])} height")
        assert "lookup" in game.rollout.turns[-1].text
        with pytest.raises(InputError, match="no call of calculate; type calculate: EXPRESSION"):
            game.type("calculate:")


def test_functions_of_several_arguments():
    two = {"type": "object", "properties": {"row": {"type": "string"}, "n": {"type": "integer"}}, "required": ["row"]}
    functions = {name: {"function": {"name": name, "parameters": of}} for name, of in [("cell", two), ("now", {})]}
    game = Game.__new__(Game)
    game.agent = SimpleNamespace(dialect=SimpleNamespace(functions=functions))
    assert game.usage() == ['cell: {"row": ..., "n": ...}', "now:", "answer: TEXT"] and game.default == ""
    assert game.actions('cell: {"row": "a", "n": 2}') == (Action("cell", {"row": "a", "n": 2}),)
    assert game.actions("now:") == (Action("now", {}),)
    for text, message in [
        ("a 2", r"which tool\? Type one of: cell: "),
        ('cell: {"n": 2}', "no call of cell; type cell: "),
    ]:
        with pytest.raises(InputError, match=message):
            game.actions(text)
