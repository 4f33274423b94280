"""The tool ``python``: what programs print, what they may not do, and that nothing of them is left."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from igpo_fast.rollouts.tools.python import ENVIRONMENT, ISOLATION, Limits, isolation, python_processes
from tests.leftovers import AMPLE, MARK, marked, nothing_is_left, outcome, run  # noqa: F401

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits on memory and isolation are Linux's")


@pytest.fixture(scope="module")
def allowed():
    """What this machine's kernel allows."""
    return isolation()


@pytest.fixture
def programs(monkeypatch):
    """Runs programs one after another and returns their texts."""
    monkeypatch.setitem(ENVIRONMENT, "MARK", MARK)

    made = {}

    def texts(*codes, **limits):
        limits = Limits(**{"seconds": AMPLE, **limits})
        if limits not in made:
            made[limits] = python_processes(limits)
        processes = made[limits]

        async def main():
            handle = await processes.open({})
            found = [await outcome(processes.call(handle, "python", {"code": code})) for code in codes]
            await processes.aclose()
            assert len(marked()) == len(made)  # forkservers
            return found

        return run(main())

    yield texts
    for processes in made.values():
        processes.end()


PROGRAMS = {
    "1 + 1": "2",
    "x = 2\nx * 3": "6",
    "print('a')": "a",
    "print('a')\n'b'": "a\n'b'",
    "None": "[nothing was printed]",
    "": "[nothing was printed]",
    "print('a\\n\\n')": "a",
    "import sys\nprint('out')\nprint('err', file=sys.stderr)\nprint('end')": "out\nerr\nend",
    "print('\\ud800')": "\\ud800",
    "print('é')": "é",
    "1 / 0": 'Traceback (most recent call last):\n  File "<program>", line 1, in <module>\n    1 / 0\n'
    "ZeroDivisionError: division by zero",
    "def f(:": '  File "<program>", line 1\n    def f(:\nSyntaxError: invalid syntax',
    "import sys\nsys.exit('bye')": "bye",
    "print(1)\nexit(3)": "1",
    "import sys; sys.exit(244)": "[nothing was printed]",
    "import os; os._exit(244)": "[nothing was printed]",
    "import ctypes; ctypes.string_at(0)": "[killed by SIGSEGV]",
    "import os; print(4, flush=True); os.closerange(0, 100)": "4",
    "import os; os.listdir()": "[]",
    "open('f', 'w').write('abc'); open('f').read()": "'abc'",
    "import os; os.path.exists('f')": "False",  # the folder of the program before is gone
    "import os; os.getcwd() == os.environ['HOME'] == os.environ['TMPDIR']": "True",
    "x = 1\nimport __main__\n__main__.x": "1",
    "x": 'Traceback (most recent call last):\n  File "<program>", line 1, in <module>\n    x\n'
    "NameError: name 'x' is not defined",
    "import json, math; json.dumps(math.factorial(5))": "'120'",
    "import numpy; int(numpy.arange(4).sum())": "6",
    "from dataclasses import dataclass\n@dataclass\nclass A:\n  x: int\nA(3)": "A(x=3)",
    "import threading\nt = threading.Thread(target=print, args=(3,))\nt.start()\nt.join()": "3",
    "import os\nfor n in range(3, 200):\n  try: print(n, os.fstat(n))\n  except OSError: pass": "[nothing was printed]",
    "import resource; resource.getrlimit(resource.RLIMIT_NPROC)": "(64, 64)",
    "import resource; resource.getrlimit(resource.RLIMIT_CORE)": "(0, 0)",
}
LAST_LINES = {
    "input()": "EOFError: EOF when reading a line",
    "len(bytearray(2 * 10**9))": "MemoryError",
    "open('f', 'wb').write(b'x' * 10**8)": "OSError: [Errno 27] File too large",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "'\ud800'": "UnicodeEncodeError: 'utf-8' codec can't encode character '\\ud800'",
    "1\0": "null bytes",
}


def test_programs_by_hand(programs, allowed):
    texts = programs(*PROGRAMS, *LAST_LINES, isolated=allowed)
    for (code, expected), text in zip(PROGRAMS.items(), texts, strict=False):
        lines = [line for line in text.splitlines() if line.strip(" ~^")]  # marks differ among versions of Python
        assert "\n".join(lines) == expected, code
    for (code, expected), text in zip(LAST_LINES.items(), texts[len(PROGRAMS) :], strict=True):
        assert expected in text.splitlines()[-1], code


def test_time_is_up(programs, allowed):
    """Whatever hangs; what was printed before is there."""
    hangs = ["while True: pass", "import time; time.sleep(1000)"]
    hangs += ["import signal, time\nfor n in (2, 15): signal.signal(n, signal.SIG_IGN)\ntime.sleep(1000)"]
    assert programs(*hangs, seconds=0.5, isolated=allowed) == ["[stopped after 0.5 s]"] * 3
    assert programs("print('a')\nwhile True: pass", seconds=4, isolated=allowed) == ["a\n[stopped after 4 s]"]


@pytest.mark.parametrize("isolated", [True, False])
def test_what_a_program_leaves_is_ended(programs, allowed, isolated):
    code = """
import os, time
for session in (False, True):
    if os.fork() == 0:
        if session:
            os.setsid()
            if os.fork():
                os._exit(0)
        time.sleep(1000)
"""
    stray = code + "print('done')"
    hang = code + "time.sleep(1000)"
    bomb = "import os\nwhile True:\n    if os.fork(): os.wait()"
    isolated = allowed if isolated else ()
    assert programs(stray, "1", stray, isolated=isolated) == ["done", "1", "done"]
    assert programs(hang, bomb, seconds=0.5, isolated=isolated) == ["[stopped after 0.5 s]"] * 2


def test_output_is_cut(programs, allowed):
    codes = ["print('abcdefgh', end='')", "print('abcdefghi', end='')", "print('é' * 9)"]
    codes += ["for _ in range(1000): print('x' * 10**5)"]
    assert programs(*codes, max_characters=8, isolated=allowed) == [
        "abcdefgh",
        "abcdefgh\n[cut: 9 bytes were printed]",
        "éééééééé\n[cut: 19 bytes were printed]",
        "xxxxxxxx\n[cut: 100,001,000 bytes were printed]",
    ]
    (text,) = programs("while True: print('x' * 10**5)", seconds=0.5, max_characters=8, isolated=allowed)
    assert text.endswith("[stopped after 0.5 s]")


def test_no_environment(programs, allowed, monkeypatch):
    """Nor may a program look for it in the trainer."""
    monkeypatch.setenv("API_KEY", "secret")  # a name that the first program would print
    code = "import os; print(*sorted(set(os.environ) - {'LC_CTYPE'}))"
    look = f"print(open('/proc/{os.getpid()}/environ').read().count('PATH=') > 0)"
    (seen,) = programs(code, isolated=allowed)
    assert seen == "HOME LANG MARK OMP_NUM_THREADS PATH PYTHONHASHSEED TMPDIR"
    for name in allowed:
        (looked,) = programs(look, isolated=(name,))
        assert looked.splitlines()[-1].startswith(("PermissionError", "FileNotFoundError")), name
    assert programs(look, isolated=()) == ["True"]


def test_a_program_repeats_itself(programs, allowed):
    code = "import random; [random.random(), {'a', 'b', 'c', 'd'}]"
    first, second = programs(code, code, isolated=allowed)
    (third,) = programs(code, isolated=allowed, seconds=AMPLE + 1)  # another forkserver
    assert first == second == third and first.startswith("[0.8444218515250481, ")  # random.seed(0)'s first number


def insisted(name, allowed):
    if name not in allowed:
        pytest.skip(f"this kernel does not keep programs from {name}")
    return (name,)


def test_network(programs, allowed):
    """A server here is reached without isolation, and not with it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]})).close(); 'reached'"
        assert programs(code, isolated=()) == ["'reached'"]
        (text,) = programs(code, isolated=insisted("network", allowed))
        assert "reached" not in text.splitlines()[-1]


def test_processes(programs, allowed):
    """A process here is killed without isolation, and not with it."""
    code = "import os; os.kill({}, 9)"
    for isolated in ((), insisted("processes", allowed)):
        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], env={}) as other:
            try:
                (text,) = programs(code.format(other.pid), isolated=isolated)
                if isolated:
                    assert "ProcessLookupError" in text and other.poll() is None
                else:
                    assert other.wait() == -9
            finally:
                other.kill()


def test_files(programs, allowed, tmp_path):
    """The user's files can be read, emptied and deleted without isolation, and not with it."""
    kept, link = tmp_path / "kept", tmp_path / "link"
    actions = {
        "read": f"open({str(kept)!r}).read()",
        "list": f"import os; os.listdir({str(tmp_path)!r})",
        "write": f"open({str(kept)!r}, 'w')",
        "truncate": f"import os; os.truncate({str(kept)!r}, 0)",
        "make": f"open({str(tmp_path / 'new')!r}, 'w')",
        "link": f"import os; os.symlink('x', {str(link)!r})",
        "remove": f"import os; os.remove({str(kept)!r})",
        "remove by a program": f"import subprocess; subprocess.run(['/bin/rm', {str(kept)!r}], check=True)",
    }
    for isolated in ((), insisted("files", allowed)):
        for name, code in actions.items():
            kept.write_text("kept")
            before = set(tmp_path.iterdir())
            (text,) = programs(code, isolated=isolated)
            refused = "PermissionError" in text or "non-zero exit status" in text
            assert refused == bool(isolated), (name, text)
            if isolated:
                assert kept.read_text() == "kept" and set(tmp_path.iterdir()) == before, name
            for path in set(tmp_path.iterdir()) - {kept, tmp_path / "temporary"}:
                path.unlink()


def test_isolation_that_cannot_be_had(tmp_path):
    """No program runs where the kernel refuses what is insisted on."""
    code = f"""
import dataclasses
from igpo_fast.rollouts.tools import python

class Refusing:
    def __getattr__(self, name):
        return lambda *_: -1

for name in python.ISOLATION:
    limits = dataclasses.asdict(python.Limits(seconds={AMPLE}, isolated=(name,)))
    libc, python.LIBC = python.LIBC, Refusing()
    try:
        print(python.python("open({str(tmp_path / "ran")!r}, 'w')", limits))
    except python.NotRunError as error:
        print(error)
    python.LIBC = libc
"""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=root
    )
    lines = found.stdout.splitlines()
    assert len(lines) == len(ISOLATION) and all(line.startswith("the program was not run: ") for line in lines)
    assert not (tmp_path / "ran").exists()


def test_what_the_policy_is_told():
    """Its schema has the program alone."""
    processes = python_processes(Limits(isolated=()))
    processes.end()
    (schema,) = processes.schemas
    assert schema["function"]["name"] == "python"
    assert list(schema["function"]["parameters"]["properties"]) == ["code"]
    assert "limits" not in json.dumps(schema)
