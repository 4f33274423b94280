"""The page over HTTP while the run goes on."""

import http.client
import os
import signal
from threading import Thread

import pytest

from igpo_fast.errors import InputError
from igpo_fast.report.live import Server, serve
from igpo_fast.report.page import Report
from tests.report.made import Page, answers, credit, rollout, run_folder

ONE = rollout(answers("Weimar"))


@pytest.fixture
def run(tmp_path):
    return run_folder(
        tmp_path, "train.steps=9", rows=[{"step": 1, "reward/f1": 0.5}], step_1=[(ONE, credit(ONE, f1=1.0))]
    )


@pytest.fixture
def server(run):
    with Server(Report(run.path)) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, path="/", method="GET", host=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{server.server_port}"})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


def test_what_comes_between_two_requests_is_on_the_second_page(run, server):
    first, version = ask(server)[1], ask(server, "/version")[1]
    assert ask(server, "/version")[1] == version and ask(server)[1] == first
    about = dict(Page(first).tags)  # of each tag the last
    assert about["body"]["data-version"] == version.decode() and b"connect-src" in first
    with open(run.metrics, "ab") as file:
        file.write(b'{"step": 2, "rew')  # not whole yet
    half = ask(server)[1]
    assert b"1 of 9" in first and b"1 of 9" in half and len(Page(half).rollouts) == 1
    with open(run.metrics, "ab") as file:
        file.write(b'ard/f1": 0.75}\n')
    from igpo_fast.run.records import record_of

    run.write_rollouts(2, [record_of(ONE, credit(ONE, f1=1.0))])
    page = ask(server)[1]
    assert ask(server, "/version")[1] != version
    assert b"2 of 9" in page and list(Page(page).rollouts) == ["step_000002.1", "step_000001.1"]


def test_a_run_that_cannot_be_read_is_told_and_may_recover(run, server):
    content = run.metrics.read_bytes()
    run.metrics.write_bytes(b"broken\n")
    status, said = ask(server)
    assert status == 503 and b"metrics.jsonl:1: not JSON" in said
    run.metrics.write_bytes(content)
    assert ask(server)[0] == 200


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"host": "127.0.0.1"}, 421),
        ({"path": "/version", "host": "evil.example"}, 421),
        ({"path": "/config.yaml"}, 404),
        ({"path": "/../config.yaml"}, 404),
        ({"path": "/version?x"}, 404),
        ({"method": "POST"}, 501),
        ({"method": "HEAD"}, 501),
    ],
)
def test_only_this_machines_gets_of_two_paths_are_answered(server, request_, status):
    found, content = ask(server, **request_)
    assert found == status and b"Weimar" not in content
    assert ask(server, host=f"localhost:{server.server_port}")[0] == 200


def test_a_file_has_no_version_and_asks_nobody(run):
    assert b"data-version" not in Report(run.path).html().split(b"<script>")[0]


def test_ctrl_c_ends_it_quietly(run, capfd):
    def stop(url):
        port = int(url.rpartition(":")[2].strip("/"))
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/version")
        connection.getresponse().read()
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        serve(Report(run.path), 0, lambda url: Thread(target=stop, args=[url]).start())
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr() == ("", "")


def test_a_port_that_is_taken_is_refused(run, server):
    with pytest.raises(
        InputError, match=f"127.0.0.1:{server.server_port}: cannot listen there .*; give another --port"
    ):
        Server(Report(run.path), server.server_port)
