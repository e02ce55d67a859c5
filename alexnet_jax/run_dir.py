"""The JSON files of a run's folder: config, data set, environment, metrics and, once it is finished, its result."""

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")


FAILURE = "failure.json"  # what ended a run that failed


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write a file to, which becomes ``path`` once it is whole, or is deleted; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes the whole file or nothing, and makes its folder."""
    with whole(path) as unfinished:
        unfinished.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """A value as JSON, as by ``write_text``."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any | None:
    """The value in a file, or None where there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None


def complete_lines(path: Path) -> list[str]:
    """The lines of a file, less a last one that was being written when the process was killed."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def result(workdir: Path) -> dict[str, Any] | None:
    """The result of a finished run; None where it is not finished."""
    return read_json(workdir / "result.json")


def status(workdir: Path) -> str:
    """Of a run: "finished", "failed", "unfinished" or "not started"."""
    if result(workdir) is not None:
        return "finished"
    if (workdir / FAILURE).exists():
        return "failed"
    return "unfinished" if workdir.exists() else "not started"


def check_config(workdir: Path, config: dict[str, Any]) -> None:
    """Checks that a folder is free for the run of a config, or holds that run already.

    Args:
      config: nested, as JSON has it (lists, not tuples).

    Raises:
      ValueError: the folder holds a run of another config.
    """
    there = read_json(workdir / "config.json")
    if there is not None and there != config:
        old, new = flatten(there), flatten(config)
        changes = [
            f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
            for key in sorted(old | new)
            if old.get(key) != new.get(key)
        ]
        raise ValueError(
            f"{workdir} holds a run of another config ({'; '.join(changes)}): "
            "choose another --workdir, or delete that folder to start anew"
        )


def environment() -> dict[str, Any]:
    """What the numbers of a run depend on besides its config: versions, machine, state of the repository."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
    }


def _git(*arguments: str) -> str:
    """What git says of the repository this file is in; empty where there is none."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and their values."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
