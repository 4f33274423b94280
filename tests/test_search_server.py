"""The retrieval server: Search-R1's protocol, one index for several processes, bad input in one line."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from igpo_fast.cli import app
from igpo_fast.data.passages import load_corpus
from igpo_fast.rollouts.tools.search import Bm25Search, HttpSearch
from tests.search_server import ROOT, Serving, serving

uvicorn = pytest.importorskip("uvicorn")
ROWS = [
    {"id": "a", "title": "Mars", "text": "is red"},
    {"id": "b", "title": "", "text": "of Mars"},
    {"id": "c", "contents": '"Venus"\nis hot'},
]
A, B, C = (
    {"id": "a", "contents": "Mars\nis red"},
    {"id": "b", "contents": "\nof Mars"},
    {"id": "c", "contents": '"Venus"\nis hot'},
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def server(corpus):
    with serving(corpus, corpus.parent / "index", "--topk=1") as server:
        yield server


def post(server, **body):
    return httpx.post(server.url, json=body)


def test_scores(server):
    found = post(server, queries=["mars", "venus", "pluto"], topk=3, return_scores=True).json()
    (first, second), (third,), nothing = found["result"]
    assert [hit["document"] for hit in (first, second, third)] == [A, B, C] and nothing == []
    assert all(set(hit) == {"document", "score"} for hit in (first, second, third))
    assert first["score"] > second["score"] > 0


def test_without_scores_the_documents_themselves(server):
    assert post(server, queries=["mars", "venus"], topk=3).json() == {"result": [[A, B], [C]]}
    assert post(server, queries=["mars"], topk=3, return_scores=False).json() == {"result": [[A, B]]}


@pytest.mark.parametrize("topk", [None, 0])
def test_the_server_has_its_own_number(server, topk):
    assert (
        post(server, queries=["mars"], topk=topk).json() == post(server, queries=["mars"]).json() == {"result": [[A]]}
    )


def test_as_many_as_there_are(server):
    assert post(server, queries=["mars"], topk=1000).json() == {"result": [[A, B]]}
    assert post(server, queries=[]).json() == {"result": []}


def status(server, body):
    """Of the answer to a body of JSON or bytes, which repeats nothing of it."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = httpx.post(server.url, content=content, headers={"Content-Type": "application/json"})
    assert len(response.content) < 5_000 and (response.status_code == 200 or response.json()["detail"])
    return response.status_code


NAMED_WRONG = {"queries": [1] * 1000}


@pytest.mark.parametrize(
    "body", [{}, {"queries": "mars"}, {"queries": [1]}, {"queries": [], "topk": -1}, [], NAMED_WRONG],
    ids=lambda body: str(body)[:30],
)  # fmt: skip
def test_other_requests_are_refused(server, body):
    assert status(server, body) == 422


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "1.5", "9" * 4000, '"x"', "[]"])
def test_a_topk_that_is_no_number_of_passages_is_refused(server, number):
    assert status(server, f'{{"queries": ["mars"], "topk": {number}}}'.encode()) == 422
    assert status(server, f'{{"queries": [{number}]}}'.encode()) == (200 if number == '"x"' else 422)


@pytest.mark.parametrize(
    ("within", "beyond"),
    [
        ({"queries": ["mars"], "topk": 1000}, {"queries": ["mars"], "topk": 1001}),
        ({"queries": ["x"] * 1024}, {"queries": ["x"] * 1025}),
        ({"queries": ["x" * 10_000]}, {"queries": ["x" * 10_001]}),
        ({"queries": ["x"] * 10, "topk": 1000}, {"queries": ["x"] * 11, "topk": 1000}),
    ],
    ids=["topk", "queries", "characters", "passages"],
)
def test_a_request_has_limits(server, within, beyond):
    assert status(server, within) == 200
    assert status(server, beyond) == 422


def test_a_bodys_bytes_are_limited(server):
    blanks = b'{"queries": ["mars"]' + b" " * 3_999_979
    assert status(server, blanks + b"}") == 200
    head = f"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {10**9}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(head.encode() + blanks + b"  ")  # the rest does not come, and is not waited for
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "half",
    [
        b"",
        b"POST /retr",
        b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n{",
        b"GET",
    ],
    ids=["nothing", "half a header", "half a body", "half of a second request"],
)
def test_a_request_that_does_not_arrive_ends_its_connection(corpus, tmp_path, monkeypatch, half, request):
    """The server's own application and protocol, with a short patience; a quick client is not cut off."""
    from igpo_fast.search_server import server as module
    from igpo_fast.search_server.index import Bm25, open_index

    monkeypatch.setattr(module, "RECEIVE_WITHIN", 0.2)
    listener = module.bind("127.0.0.1", 0)
    settings = uvicorn.Config(
        module.make_app(open_index(corpus, Bm25(), tmp_path), 1), http=module.Timed, lifespan="off",
        log_level="warning", timeout_keep_alive=3600,
    )  # fmt: skip
    running = uvicorn.Server(settings)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        listener.listen()
        with socket.create_connection(listener.getsockname(), timeout=60) as client:
            if "second" in request.node.name:
                client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                assert client.recv(4096).startswith(b"HTTP/1.1 200 OK")
            client.sendall(half)
            with contextlib.suppress(ConnectionResetError):
                while client.recv(4096):
                    pass
    finally:
        running.should_exit = True
        thread.join()


def test_a_connection_that_is_kept_is_not_cut_off_between_requests(server):
    url = server.url.replace("/retrieve", "/health")
    with httpx.Client() as client:
        assert [client.get(url).status_code for _ in range(3)] == [200] * 3


def test_what_is_not_json_is_refused_and_the_server_lives_on(server):
    assert httpx.post(server.url, content=b"{", headers={"Content-Type": "application/json"}).status_code == 422
    health = httpx.get(server.url.replace("/retrieve", "/health"))
    assert health.json() == {"status": "ok", "retriever": "bm25", "passages": 3}


def test_our_client_finds_what_search_in_process_finds(server, corpus):
    local, remote = Bm25Search({"": load_corpus(corpus)}, 3), HttpSearch(server.url, 3)
    for query in ("mars", "venus is", "pluto", "", "\ud800 mars \x00"):
        assert asyncio.run(remote(query)) == asyncio.run(local(query))


def test_a_search_r1_client_reads_titles_and_texts(server):
    """As Search-R1 and verl read an answer: the first line of contents is the title."""
    (hits,) = post(server, queries=["mars"], topk=2, return_scores=True).json()["result"]
    contents = [hit["document"]["contents"] for hit in hits]
    assert [content.split("\n")[0] for content in contents] == ["Mars", ""]
    assert ["\n".join(content.split("\n")[1:]) for content in contents] == ["is red", "of Mars"]


def mapped(server):
    """Inodes of the mapped files, by name."""
    lines = Path(f"/proc/{server.process.pid}/maps").read_text().splitlines()
    parts = [line.split(maxsplit=5) for line in lines]
    return {Path(part[5]).name: int(part[4]) for part in parts if len(part) > 5}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_two_processes_share_one_index(corpus, tmp_path):
    """Started together: one builds, the other waits and maps the same files."""
    with ThreadPoolExecutor(2) as pool:
        started = list(pool.map(lambda _: Serving(corpus, tmp_path), range(2)))
    try:
        assert sorted("words 100%" in server.log for server in started) == [False, True]
        (folder,) = (path.parent for path in tmp_path.glob("*/manifest.json"))
        arrays = [f"{name}.csc.index.npy" for name in ("data", "indices", "indptr")]
        shared = ["documents.jsonl", "offsets.npy", *arrays]
        on_disk = {path.name: path.stat().st_ino for path in folder.rglob("*") if path.name in shared}
        assert sorted(on_disk) == sorted(shared)
        for server in started:
            assert {name: inode for name, inode in mapped(server).items() if name in shared} == on_disk
        assert [post(server, queries=["venus"]).json() for server in started] == [{"result": [[C]]}] * 2
    finally:
        for server in started:
            server.end()


def test_ctrl_c_ends_it_quietly(corpus, tmp_path):
    server = Serving(corpus, tmp_path)
    os.kill(server.process.pid, signal.SIGINT)
    assert server.process.wait(10) == 130
    assert server.process.stderr.read() == ""
    server.end()


def refused(*options):
    result = CliRunner().invoke(app, ["search", "serve", *options])
    assert result.exit_code == 2, result.output
    *_, line = result.stderr.splitlines()
    assert line.startswith("error: ") and "Traceback" not in result.output
    return line.removeprefix("error: ")


def test_a_taken_port_is_found_before_anything_is_built(corpus, tmp_path, server):
    line = refused(f"--corpus={corpus}", f"--index={tmp_path / 'index'}", f"--port={server.port}")
    assert line.startswith(
        f"127.0.0.1:{server.port}: cannot listen there (Address already in use); give another --port"
    )
    assert not (tmp_path / "index").exists()


def test_a_port_that_is_taken_meanwhile(corpus, tmp_path):
    """Between binding and listening another process may begin to listen."""
    from igpo_fast.errors import InputError
    from igpo_fast.search_server.server import bind, serve

    with bind("127.0.0.1", 0) as ours, socket.socket() as theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        theirs.bind(ours.getsockname())
        theirs.listen()
        with pytest.raises(InputError, match="cannot listen there"):
            serve(None, ours, 3)


@pytest.mark.parametrize(("host", "port"), [("a" * 70, 8000), ("a..b", 8000)])
def test_an_address_that_cannot_be(host, port):
    from igpo_fast.errors import InputError
    from igpo_fast.search_server.server import bind

    with pytest.raises(InputError, match=r"cannot listen there \(.*\); give another --port or --host$"):
        bind(host, port)


def test_other_bad_input(corpus, tmp_path):
    index = f"--index={tmp_path / 'index'}"
    assert refused(f"--corpus={tmp_path / 'absent'}", index, "--port=0").endswith("give an existing file")
    (tmp_path / "bad.jsonl").write_text('{"id": "a", "text": "t"}\n{"id": "b"\n')
    assert "bad.jsonl line 2: not JSON" in refused(f"--corpus={tmp_path / 'bad.jsonl'}", index, "--port=0")
    assert "host.invalid" in refused(f"--corpus={corpus}", index, "--host=host.invalid")
    assert "give --dense DIR" in refused(f"--corpus={corpus}", index, "--query-prompt=x", "--port=0")


@pytest.mark.parametrize(
    ("missing", "extra", "options"),
    [("fastapi", "search", []), ("uvicorn", "search", []), ("sentence_transformers", "dense", ["--dense=."])],
)
def test_a_missing_extra_is_named(corpus, missing, extra, options):
    code = f"import sys; sys.modules[{missing!r}] = None; from igpo_fast.cli import main; main()"
    command = [sys.executable, "-c", code, "search", "serve", f"--corpus={corpus}", "--port=0", *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 2 and line.endswith(f"pip install 'igpo-fast[{extra}]'")
