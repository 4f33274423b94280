"""The page in a real browser; needs Chromium, and is skipped without."""

from dataclasses import replace
from threading import Thread

import pytest

from bench.browser import Browser, chromium
from igpo_fast.report.live import Server
from igpo_fast.report.page import Report
from igpo_fast.run.records import record_of
from tests.report.made import answers, credit, rollout, run_folder, searches, turn
from tests.report.test_report import HOSTILE, hostile  # noqa: F401 (a fixture)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(chromium() is None, reason="there is no Chromium")]


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


def scored(i, step=1):
    one = rollout(
        searches(f"query {i} of {step}", f"passage 🙂 {i}: the WEIMAR (or so) of Weimarer"),
        answers("Weimar" if i % 2 else "Bonn"),
        truth=("Weimar", "Weimar (or so)"), index=i % 4,
        id=f"q{i // 4}", question=f"Question {i // 4}?",
    )  # fmt: skip
    return one, credit(one, [-3.0, -1.0 - i], f1=float(i % 2), advantages=[i - 2, 1.0])


@pytest.fixture
def run(tmp_path):
    return run_folder(
        tmp_path / "run", rows=[{"step": step, "reward/f1": 0.5} for step in (1, 2)],
        evaluations={1: [rollout(answers("Bonn"), id=f"e{i}", question=f"Held out {i}?") for i in range(40)]},
        step_1=[scored(i) for i in range(40)],
    )  # fmt: skip


def opened(browser, run, tmp_path, key=""):
    file = tmp_path / "report.html"
    Report(run.path).write(file)
    browser.open("about:blank")
    browser.open(f"{file.as_uri()}#{key}")


def test_no_script_of_a_text_runs(browser, hostile, tmp_path):  # noqa: F811
    opened(browser, hostile, tmp_path)
    title = browser.js("document.title")
    for i, text in enumerate(HOSTILE):
        browser.js(f"show('step_000001.{i + 1}')")
        found = browser.js("[...document.querySelectorAll('#rollout pre')].map(pre => pre.textContent)")
        assert f"found {text}" in found and text in found
        assert browser.js("document.querySelector('#rollout h2').textContent") == text
    assert browser.js("document.title") == title and "owned" not in title
    allowed = browser.js("[...document.querySelectorAll('img, b script, #rollout script, #rows script')].length")
    assert allowed == 0
    assert browser.js("document.querySelectorAll('script:not([type])').length") == 1
    assert browser.js("document.documentElement.scrollWidth <= innerWidth")


def test_a_rollout_by_its_address_the_keys_and_the_filters(browser, run, tmp_path):
    opened(browser, run, tmp_path, "step_000001.6")
    turn = browser.js("document.querySelector('#rollout .turn').textContent")
    assert "p(answer) 0.050 → 0.002" in turn and "gain -3.000" in turn and "advantage +3.000" in turn
    assert browser.js("document.querySelectorAll('#rollout th a').length") == 4  # its group, side by side
    marks = "[...document.querySelectorAll('#rollout .response mark')].map(mark => mark.textContent)"
    assert browser.js(marks) == ["WEIMAR (or so"]
    browser.press("j")
    assert browser.js("location.hash") == "#step_000001.7"
    browser.press("k")
    browser.press("/")
    assert browser.js("[location.hash, document.activeElement.id]") == ["#step_000001.6", "text"]
    browser.call("Input.insertText", text="QUERY 3")
    browser.press("j")  # a letter of the search now
    assert browser.js("at('text').value") == "QUERY 3j" and browser.js("location.hash") == "#step_000001.6"
    browser.press("Escape")
    assert browser.js("[at('text').value, document.activeElement.id]") == ["", ""]
    browser.js("at('text').value = 'QUERY 3'; filter()")
    assert browser.js("at('count').textContent") == "11 of 80 rollouts"  # 3, and 30 to 39
    kinds = "[...document.querySelectorAll('#failures button')]"
    browser.js(f"{kinds}.find(b => b.textContent.startsWith('no exact match though')).click()")
    assert browser.js("at('count').textContent") == "5 of 80 rollouts"  # 30, 32 .. 38
    browser.js("document.querySelector('#filters [type=reset]').click()")
    browser.js("new Promise(done => setTimeout(done))")
    assert browser.js("at('count').textContent") == "80 of 80 rollouts"
    browser.js("at('gain-from').value = '0'; filter()")  # -1 - i + 3 >= 0: 0, 1, 2
    assert browser.js("found.map(r => r.key)") == ["step_000001.1", "step_000001.2", "step_000001.3"]
    browser.js("at('gain-from').value = ''; at('kind').value = 'eval'; at('f1-to').value = '0.5'; filter()")
    assert browser.js("found.length") == 40
    browser.js("location.hash = '#eval_000001.40'")
    browser.js("new Promise(done => setTimeout(done, 50))")
    assert browser.js("document.querySelector('#rollout h2').textContent") == "Held out 39?"
    assert browser.js("document.querySelector('#rows [aria-current]').textContent").startswith("Held out 39?")
    assert browser.js("document.querySelectorAll('#rows a').length") < 40  # those in sight


def test_a_malformed_turn_is_no_search_and_texts_may_come_from_the_right(browser, tmp_path):
    one = rollout(
        turn("hm", response="a hint"), searches("x"), answers("\u05d2\u05ea\u05d4?"), question="\u05de\u05d9?"
    )
    run = run_folder(tmp_path / "run", step_1=[(one, credit(one)), (replace(one, index=1), credit(one))])
    opened(browser, run, tmp_path, "step_000001.1")
    heads = "[...document.querySelectorAll('#rollout .turn > .facts > b:first-child')].map(b => b.textContent)"
    assert browser.js(heads)[:2] == ["1. malformed", "2. search"]
    assert browser.js("document.querySelector('#rollout .did').textContent") == "malformed"
    told = browser.js("[...document.querySelectorAll('#rollout .response span')].map(span => span.textContent)")
    assert told == ["no call and no answer were read in this turn; told in return"]
    for place in ("h2", ".facts b:nth-child(1)", "tr:last-child td"):
        assert browser.js(f"document.querySelector('#rollout {place}').dir") == "auto", place
    assert browser.js("document.querySelector('#rollout h2').matches(':dir(rtl)')")


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_window(browser, run, tmp_path, width):
    browser.window(width, 800)
    opened(browser, run, tmp_path, "step_000001.6")
    assert browser.js("document.documentElement.scrollWidth") <= width
    browser.window(1280, 800)


def test_a_run_that_goes_on_keeps_the_readers_place(browser, run):
    with Server(Report(run.path)) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            browser.open(f"{server.url}#step_000001.6")
            browser.js("at('text').value = 'query'; filter(); at('list').scrollTop = 3 * ROW + 7; drawRows()")
            top = browser.js("found[3].key")
            browser.js("at('section-1').open = false")
            run.append_metrics({"step": 3, "reward/f1": 0.5, "eval/f1": 0.5})
            for step in (2, 3, 4):
                run.write_rollouts(step, [record_of(*scored(i, step)) for i in range(40)])
            browser.js("follow()")
            steps = browser.js("[...new Set(index.rollouts.map(r => r.step))].sort()")
            assert steps == [1, 2, 3, 4] and browser.js("at('curves').textContent").count("Evaluation") == 1
            assert browser.js("[location.hash, at('text').value]") == ["#step_000001.6", "query"]
            assert browser.js("found[Math.floor(at('list').scrollTop / ROW)].key") == top
            assert browser.js("at('list').scrollTop % ROW") == 7
            assert browser.js("[at('section-1').open, at('live').textContent]") == [False, "following the run"]
            # Its group is no longer on the page that the server makes, but stays in this one.
            run.write_rollouts(1, [record_of(*scored(i)) for i in range(2)])
            browser.js("follow()")
            browser.press("j")
            assert browser.js("document.querySelectorAll('#rollout .turn').length") == 2
            run.metrics.write_bytes(b"broken\n")
            browser.js("follow()")
            assert "not following: " in browser.js("at('live').textContent")
        finally:
            server.shutdown()
            thread.join()
