"""The processes of a launched job: their output, their ends, and the signals that reach them. They need no JAX."""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from alexnet_jax import __main__
from alexnet_jax.tools import launch
from support import REPOSITORY

# The verb, with other programs in the place of `alexnet-jax run`: those of the command line after "-- run".
LAUNCHER = """
import sys
from alexnet_jax import __main__
from alexnet_jax.tools import launch
launch.job_commands = lambda arguments, _: [[sys.executable, "-uc", program] for program in arguments[1:]]
__main__.main()
assert not {"jax", "flax"} & set(sys.modules)
"""
# A process that ends at SIGTERM, and the beginning of one that waits until the former is ready.
ENDS_AT_SIGTERM = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit("asked to end"))
open("ready", "w")
time.sleep(60)
"""
WHEN_READY = """
import os, sys, time
while not os.path.exists("ready"):
    time.sleep(0.01)
"""


pytestmark = pytest.mark.usefixtures("default_handlers")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


@contextlib.contextmanager
def job(*programs: str, grace: float = 30.0, redirection: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """Launch Python programs as the processes of a job, in a process group of their own; kill it in the end."""
    flags = [f"--processes={len(programs)}", f"--grace={grace}"]
    call = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-c", LAUNCHER, "launch", *flags]
    pipe = subprocess.PIPE
    with subprocess.Popen([*call, "--", "run", *programs], stdout=pipe, stderr=pipe, process_group=0) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str, list[str]]:
    """Return the exit status of a job, what it prints from now on, and the lines of its errors, sorted by process."""
    output, errors = process.communicate(timeout=20)
    return process.returncode, output.decode(), sorted(errors.decode().splitlines())


def read_lines(process: subprocess.Popen[bytes], count: int) -> list[str]:
    """Return the next lines that a job prints, sorted by process."""
    assert process.stdout is not None
    return sorted(process.stdout.readline().decode() for _ in range(count))


def test_lines_stay_whole_and_carry_the_number_of_their_process() -> None:
    """Whatever the pieces in which a process writes them, and whatever their bytes."""
    program = """
import sys
for number in range(1000):
    for piece in (b"\\xff\\xe9\\r", b"x" * 100, b" %d\\n" % number):
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
sys.stderr.write("no newline")
"""
    with job(program, program) as launcher:
        output, errors = launcher.communicate(timeout=20)
    lines = output.split(b"\n")
    assert lines.pop() == b""
    for process in (b"0", b"1"):
        expected = [b"%s: \xff\xe9\r%s %d" % (process, b"x" * 100, number) for number in range(1000)]
        assert [line for line in lines if line.startswith(process)] == expected
    assert len(lines) == 2000
    assert sorted(errors.splitlines()) == [b"0: no newline", b"1: no newline"]
    assert launcher.returncode == 0


def test_process_that_has_finished_lets_the_others_finish() -> None:
    with job("print('short')", "import time; time.sleep(0.5); print('long')", grace=0) as launcher:
        assert finish(launcher) == (0, "0: short\n1: long\n", [])


@pytest.mark.parametrize(
    ("end", "status", "line"),
    [
        ("sys.exit(3)", 3, "process 1 ended with exit status 3; re-run the command to resume"),
        ("sys.exit(1)", 1, "process 1 ended with exit status 1; its own message says why"),
        ("os.kill(os.getpid(), 9)", 137, "process 1 was killed by SIGKILL; re-run the command to resume"),
    ],
)
def test_status_is_that_of_the_first_failure_and_the_others_are_asked_to_end(end: str, status: int, line: str) -> None:
    with job(ENDS_AT_SIGTERM, WHEN_READY + end, grace=0.1) as launcher:
        assert finish(launcher) == (status, "", ["0: asked to end", f"alexnet-jax launch: {line}"])


def test_others_have_time_to_end_by_themselves() -> None:
    ends_soon = ENDS_AT_SIGTERM.replace("60", "0.5") + "sys.exit('saved')"
    with job(ends_soon, WHEN_READY + "sys.exit(3)", grace=20) as launcher:
        returncode, _, errors = finish(launcher)
    assert (returncode, errors[0]) == (3, "0: saved")


def test_process_that_does_not_end_is_killed() -> None:
    ignores = ENDS_AT_SIGTERM.replace("sys.exit", "print")
    with job(ignores, WHEN_READY + "sys.exit(3)", grace=0.1) as launcher:
        returncode, output, _ = finish(launcher)
    assert (returncode, output) == (3, "0: asked to end\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_reaches_every_process_once(number: signal.Signals) -> None:
    """Also that of a terminal, which goes to the whole process group."""
    program = """
import signal, sys, time
from alexnet_jax import stop
numbers = []
for number in stop.SIGNALS:
    signal.signal(number, lambda number, _: numbers.append(number))
print("started")
while not numbers:
    time.sleep(0.01)
time.sleep(0.5)
print(*numbers)
sys.exit(128 + numbers[0])
"""
    with job(program, program) as launcher:
        assert read_lines(launcher, 2) == ["0: started\n", "1: started\n"]
        launcher.send_signal(signal.SIGSTOP)  # the processes would get the group's signal before the launcher's
        os.killpg(launcher.pid, number)
        time.sleep(0.1)
        launcher.send_signal(signal.SIGCONT)
        returncode, output, errors = finish(launcher)
    assert returncode == 128 + number
    assert sorted(output.splitlines()) == [f"0: {number:d}", f"1: {number:d}"]
    line = rf"alexnet-jax launch: process \d ended with exit status {returncode}; re-run the command to resume"
    assert re.fullmatch(line, "\n".join(errors))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not kill processes whose parent has ended")
def test_processes_end_with_a_launcher_that_is_killed() -> None:
    os.mkfifo("alive")
    program = "import time; held = open('alive', 'w'); print('started'); time.sleep(60)"
    with job(program, program) as launcher, open("alive") as ends:
        assert read_lines(launcher, 2) == ["0: started\n", "1: started\n"]
        launcher.kill()
        assert select.select([ends], [], [], 10)[0]  # it ends once no process has it open


def test_closed_standard_output_stops_no_process() -> None:
    """Standard output is closed by `>&-`, and by `| head -1`."""
    program = "for number in range(20000): print(number)\nopen('done', 'a').write('done ')"
    with job(program, redirection=">&-") as launcher:
        assert finish(launcher) == (0, "", [])
    with job(program) as launcher:
        assert read_lines(launcher, 1) == ["0: 0\n"]
        assert launcher.stdout is not None
        launcher.stdout.close()
        assert finish(launcher) == (0, "", [])
    assert Path("done").read_text() == "done done "


def test_job_commands_share_a_port_and_differ_in_their_process() -> None:
    first, second = launch.job_commands(["run", "--config=study.py"], 2)
    assert first[:-1] == second[:-1]
    assert (first[-1], second[-1]) == ("--process_id=0", "--process_id=1")
    assert first[1:6] == ["-u", "-m", "alexnet_jax", "run", "--config=study.py"]
    assert re.fullmatch(r"--coordinator=127.0.0.1:\d+", first[6])
    assert first[7] == "--num_processes=2"


def test_processes_share_no_gpu() -> None:
    variables = [launch.device_variables(index, 2) for index in range(2)]
    assert [each["JAX_LOCAL_DEVICE_IDS"] for each in variables] == ["0,1", "2,3"]
    assert {each["JAX_NUM_CPU_DEVICES"] for each in variables} == {"2"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes=2"], r"COMMAND='': must be -- and the verb run; write `launch ... -- run --config=FILE ...`"),
        (["--processes=2", "--"], r"COMMAND='--': must be"),
        (["--processes=2", "--", "evaluate", "--run=x"], r"COMMAND='-- evaluate': must be"),
        (["--processes=0", "--", "run"], r"--processes=0: must be 1 or more"),
        (["--processes=1", "--devices=0", "--", "run"], r"--devices=0: must be 1 or more"),
        (["--processes=1", "--grace=nan", "--", "run"], r"--grace=nan: must be 0 or more"),
    ],
)
def test_wrong_command_line_starts_nothing(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["alexnet-jax", "launch", *arguments])
    monkeypatch.setattr(launch, "supervise", None)
    with pytest.raises(SystemExit, match=f"^alexnet-jax launch: {message}"):
        __main__.main()
