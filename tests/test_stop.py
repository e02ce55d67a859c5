"""A stop request is kept from the first signal until it is obeyed."""

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from alexnet_jax import stop
from support import REPOSITORY

pytestmark = pytest.mark.usefixtures("default_handlers")


@pytest.mark.parametrize("number", stop.SIGNALS)
def test_signal_is_kept_until_it_is_obeyed(number: signal.Signals) -> None:
    with stop.requests() as request:
        request.obey("nobody has asked")
        signal.raise_signal(number)
        assert request.is_set()
        with pytest.raises(stop.Stopped, match="all is saved") as stopped:
            request.obey("all is saved")
    assert stopped.value.exit_status == 128 + number
    assert [signal.getsignal(each) for each in stop.SIGNALS] == [signal.default_int_handler] * 3
    with stop.requests() as request:
        assert not request.is_set()


def test_nested_contexts_share_the_request() -> None:
    """A signal at the end of a run, which has nothing left to stop, is obeyed by the study."""
    with stop.requests() as outer:
        with stop.requests() as inner:
            signal.raise_signal(signal.SIGTERM)
        assert inner is outer
        assert outer.is_set()


def test_second_signal_is_obeyed_at_once_unless_it_belongs_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with stop.requests() as request:
        signal.raise_signal(signal.SIGINT)
        now[0] += 0.05
        signal.raise_signal(signal.SIGTERM)
        assert request.number == signal.SIGINT
        now[0] += 1
        with pytest.raises(KeyboardInterrupt) as interrupted:
            signal.raise_signal(signal.SIGINT)
    assert not isinstance(interrupted.value, stop.Stopped)


def test_ignored_signal_stays_ignored() -> None:
    """A shell's background jobs ignore SIGINT, and programs under nohup SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop.requests() as request:
        signal.raise_signal(signal.SIGHUP)
        assert not request.is_set()


def test_other_threads_are_not_asked() -> None:
    def make() -> bool:
        with stop.requests() as request:
            return request.is_set()

    with stop.requests() as request, ThreadPoolExecutor(1) as thread:
        signal.raise_signal(signal.SIGTERM)
        assert request.is_set()
        assert not thread.submit(make).result()


def start(script: str) -> subprocess.Popen[str]:
    """Run Python code in another process, with pipes for its output and errors."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, **pipes)


VERB = """
import sys, time
from alexnet_jax import __main__, config
def run(name, argv):
    print("started", flush=True)
    time.sleep(60)
__main__._run_verb = run
__main__.run_verb("run", [])
"""


def test_interrupted_start_has_no_traceback() -> None:
    """Before a study has begun, as while its modules are imported."""
    with start(VERB) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert errors == "alexnet-jax run: interrupted\nre-run the command to resume\n"


def test_absent_standard_output_fails_no_command() -> None:
    """As of `>&-`."""
    script = "from alexnet_jax import __main__ as m; m._run_verb = lambda *_: print('text'); m.run_verb('run', [])"
    done = subprocess.run(
        ["sh", "-c", '"$0" -c "$1" >&-', sys.executable, script], cwd=REPOSITORY, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


CLOSED = """
import sys
from alexnet_jax import __main__
def run(name, argv):
    for number in range(20000):
        print(number, flush=number % 7 == 0)
    print("done", file=sys.stderr)
__main__._run_verb = run
__main__.run_verb("run", [])
"""


def test_closed_standard_output_fails_no_command() -> None:
    """As of `| head -1`."""
    with start(CLOSED) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        assert process.stderr is not None
        errors = process.stderr.read()
    assert process.returncode == 0
    assert errors == "done\n"
