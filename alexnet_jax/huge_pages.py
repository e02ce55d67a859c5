"""Huge pages of memory, for commands that train on CPUs. Nothing here imports JAX.

XLA gives the memory of a step back after it, and Linux has to find and clear it in the next. In pages of 4 kB, and not
of 2 MB, the paper's step of 32 images took 1.24 and 1.04 times as long, in two measurements (``experiments/speed``).
glibc asks for huge pages if it is told to before Python starts.
"""

import os
import sys
from pathlib import Path

_TUNABLE = "glibc.malloc.hugetlb"
_STATE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def variables(state: Path = _STATE) -> dict[str, str]:
    """The environment variable that has glibc ask for huge pages; none where Linux does not wait to be asked.

    Nor is there one where the environment has already said whether glibc should ask.

    Args:
      state: the file in which Linux says who gets huge pages: all programs, none, or those that ask ("[madvise]").
    """
    said = os.environ.get("GLIBC_TUNABLES", "")
    if _TUNABLE in said or not state.exists() or "[madvise]" not in state.read_text():
        return {}
    return {"GLIBC_TUNABLES": f"{said}:{_TUNABLE}=1".lstrip(":")}


def restart_with(*command: str) -> None:
    """Starts Python once more in this process, with the same arguments, if that brings huge pages.

    Args:
      command: what Python was started with: "-m" and a module, or a script. Does nothing in a process that was
        started otherwise, as a notebook that runs the module.
    """
    arguments = sys.orig_argv[1:]
    own = any(tuple(arguments[start : start + len(command)]) == command for start in range(len(arguments)))
    if own and (wanted := variables()):
        os.execve(sys.executable, [sys.executable, *arguments], os.environ | wanted)
