"""How fast a step is beside other libraries: python experiments/speed/measure.py [--only=GROUP,...] [--repetitions=7]

The contestants of a group take turns, each in a process of its own that has compiled. Writes results.csv beside it, a
row for each turn, and prints medians. Peers that are not installed are named and left out.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
TORCH = ("pytorch-contiguous", "pytorch-channels_last", "pytorch-compile")
WITHOUT = ("ours-pmap-conv", "ours-pmap-normalise", "ours-pmap-max_pool", "ours-pmap-plain")
# Group: what is done, net, batch, steps a turn, contestants.
GROUPS = {
    "paper_128": ("train", "paper", 128, 1, ("ours-auto", *TORCH, "matmul")),
    "paper_32": ("train", "paper", 32, 1, ("ours-auto", *TORCH, "flax", "ours-vmap", "ours-vmap-grouped")),
    "operations_32": ("train", "paper", 32, 1, ("ours-auto", *WITHOUT)),
    "small_64": ("train", "small", 64, 10, ("ours-auto", *TORCH)),
    "cifar_128": ("train", "cifar", 128, 10, ("ours-auto", "ours-vmap", *TORCH)),
    "seed_v1_32": ("train", "seed_v1", 32, 2, ("ours-auto", "keras")),
    "evaluation_128": ("evaluate", "paper", 128, 1, ("ours-auto", *TORCH)),
    "ten_views_32": ("ten_views", "paper", 32, 1, ("ours-auto", *TORCH)),
}
PACKAGES = {"pytorch": ("torch", "requirements-torch.lock"), "keras": ("keras", "requirements.lock")}


def measured(group: str, repetitions: int) -> list[dict[str, object]]:
    """The turns of a group's contestants."""
    what, net, batch, steps, kinds = GROUPS[group]
    running = {}
    for kind in kinds:
        package, lock = PACKAGES.get(kind.split("-")[0], ("jax", "requirements.lock"))
        if importlib.util.find_spec(package) is None:
            print(f"{kind}: not installed: pip install --requirement {lock}")
            continue
        command = [sys.executable, HERE / "contestants.py", kind, what, net, str(batch), str(steps)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, text=True, **pipes)
        if process.stdout.readline() == "ready\n":  # one after the other: compiling takes all cores
            running[kind] = process
        else:
            print(f"{group}, {kind}: does not run here")
    rows = []
    for repetition in range(repetitions):
        for kind, process in running.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            seconds = float(process.stdout.readline())
            rate = None if kind == "matmul" else batch * steps / seconds
            row = {"group": group, "contestant": kind, "repetition": repetition}
            rows.append(row | {"seconds": round(seconds, 4), "images_per_second": rate and round(rate, 2)})
    peaks = {kind: int(process.communicate()[0]) for kind, process in running.items()}
    return [row | {"peak_bytes": peaks[str(row["contestant"])]} for row in rows]


def startup(repetitions: int) -> list[dict[str, object]]:
    """Seconds from starting Python to the first finished step of the embedded job, without and with a warm cache."""
    rows = []
    for repetition in range(repetitions):
        with tempfile.TemporaryDirectory() as cache:
            for kind in ("cold", "warm"):
                began = time.perf_counter()
                command = ["env", f"JAX_COMPILATION_CACHE_DIR={cache}", sys.executable, HERE / "contestants.py"]
                subprocess.run([*command, "startup"], check=True, capture_output=True)
                seconds = round(time.perf_counter() - began, 3)
                row = {"group": "startup", "contestant": kind, "repetition": repetition, "seconds": seconds}
                rows.append(row)
    return rows


def main() -> None:
    """Measures the groups in turn and prints each contestant's median, and its speed over that of the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join((*GROUPS, "startup")), help="groups, with commas")
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    path = HERE / "results.csv"
    results = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["group"])
    for group in arguments.only.split(","):
        rows = startup(arguments.repetitions) if group == "startup" else measured(group, arguments.repetitions)
        results = pd.concat([results[results.group != group], pd.DataFrame(rows)])
        results.to_csv(path, index=False)
        table = pd.DataFrame(rows).groupby("contestant", sort=False)["seconds"].agg(["count", "median", "min", "max"])
        table["ours is faster by"] = table["median"] / table["median"].iloc[0]
        print(f"\n{group}\n{table.round(3).to_string()}", flush=True)


if __name__ == "__main__":
    main()
