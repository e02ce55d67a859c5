"""Memory in huge pages: who asks for them, and that the command starts again with them."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, run_script

from alexnet_jax import huge_pages

WANTED = "glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(
    ("state", "said", "expected"),
    [
        ("always [madvise] never", None, WANTED),
        ("always [madvise] never", "glibc.malloc.check=0", f"glibc.malloc.check=0:{WANTED}"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", None),
        ("[always] madvise never", None, None),
        ("always madvise [never]", None, None),
        (None, None, None),
    ],
)
def test_who_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str | None, said: str | None, expected: str | None
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if said:
        monkeypatch.setenv("GLIBC_TUNABLES", said)
    if state:
        (tmp_path / "enabled").write_text(state)
    assert huge_pages.variables(tmp_path / "enabled") == ({"GLIBC_TUNABLES": expected} if expected else {})


SCRIPT = """
import os, sys
from pathlib import Path
from alexnet_jax import huge_pages

state = Path(sys.argv[1])
wanted = huge_pages.variables
huge_pages.variables = lambda: wanted(state)
huge_pages.restart_with({command})
print(os.getpid(), sys.argv[1:], os.environ["KEPT"], os.environ.get("GLIBC_TUNABLES"))
"""


@pytest.mark.parametrize(("command", "asked"), [("sys.argv[0]", WANTED), ("'-m', 'alexnet_jax.main'", None)])
def test_a_process_starts_again_once_with_its_arguments(tmp_path: Path, command: str, asked: str | None) -> None:
    """One that was started otherwise does not."""
    state, script = tmp_path / "enabled", tmp_path / "script.py"
    state.write_text("always [madvise] never")
    script.write_text(SCRIPT.format(command=command))
    environment = {"PYTHONPATH": str(REPOSITORY), "KEPT": "as it was"}
    pipes = {"stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([sys.executable, str(script), str(state), "--b=c d"], **pipes) as process:
        said = process.communicate()[0]
    assert said == f"{process.pid} {[str(state), '--b=c d']} as it was {asked}\n"


def test_the_training_command_asks_before_it_imports_jax() -> None:
    script = f"""
import os, runpy, sys
sys.orig_argv = [sys.executable, "-m", "alexnet_jax.main", "--config=configs/base.py"]
os.execve = lambda *given: sys.exit(f"{{given[1]}} {{given[2]['GLIBC_TUNABLES']}} {{'jax' in sys.modules}}")
from alexnet_jax import huge_pages
huge_pages.variables = lambda: {{"GLIBC_TUNABLES": "{WANTED}"}}
runpy.run_module("alexnet_jax.main", run_name="__main__")
"""
    done = run_script(script)
    assert done.stderr == f"{[sys.executable, '-m', 'alexnet_jax.main', '--config=configs/base.py']} {WANTED} False\n"
