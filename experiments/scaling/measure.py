"""Measure the training step on 1, 2 and 4 CPU devices: python experiments/scaling/measure.py [--only=small,...]

A case (network, number of devices, batch size) is a process of its own that has compiled: speed/baselines.py.
The cases of a network are measured interleaved, in another order in each repetition, and appended to results.csv one by
one. Re-run the command to resume: what is there from the same machine, versions and commit is skipped. At the end it
prints ratios of times.
"""

import argparse
import csv
import random
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd

from alexnet_jax.parallel import instruction_set
from alexnet_jax.run_dir import environment
from experiments.speed.measure import Baseline, start

# Images per device, and steps of a repetition, by network of baselines.py. "cifar" has one tower, the others have two.
NETWORKS = {"small": (64, 10), "cifar": (128, 10), "paper": (16, 1), "embedded": (4, 2)}
COUNTS = (1, 2, 4)
RUN = ("jax", "cores", "instruction_set", "commit")  # rows of equal values belong together
CASE = ("network", "devices", "batch")
COLUMNS = (*RUN, *CASE, "repetition", "seconds", "cpu_seconds")

Case = tuple[str, int, int]


def list_cases(network: str) -> list[Case]:
    """Return the cases of a network: each number of devices, and one device, with the batch of one and of all."""
    batch = NETWORKS[network][0]
    pairs = {pair for count in COUNTS for pair in ((count, batch), (count, count * batch), (1, count * batch))}
    return [(network, *pair) for pair in sorted(pairs)]


def this_run() -> dict[str, str]:
    """Return the columns `RUN`."""
    facts = environment()
    commit = facts["commit"][:12] + ("+" if facts["uncommitted_changes"] else "")
    values = facts["jax"], facts["cores"], instruction_set(), commit
    return dict(zip(RUN, map(str, values), strict=True))


def read(path: Path, run: dict[str, str]) -> pd.DataFrame:
    """Return the rows of this run in a CSV file, none if it is not there."""
    table = pd.read_csv(path, dtype=dict.fromkeys(RUN, str)) if path.exists() else pd.DataFrame(columns=list(COLUMNS))
    return table[(table[list(RUN)] == pd.Series(run)).all(axis=1)]


def missing(finished: pd.DataFrame, network: str, repetitions: int) -> dict[int, list[Case]]:
    """Return the cases of each repetition that are not among the finished rows, shuffled."""
    done = set(finished[["repetition", *CASE]].itertuples(index=False, name=None))
    cases, left = list_cases(network), {}
    for repetition in range(repetitions):
        # A fixed order would always measure a case after the same other one.
        shuffled = random.Random(repetition).sample(cases, len(cases))
        left[repetition] = [case for case in shuffled if (repetition, *case) not in done]
    return {repetition: cases for repetition, cases in left.items() if cases}


def append(path: Path, row: dict[str, Any]) -> None:
    """Append a row, and the header if the file is new."""
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def measure(path: Path, run: dict[str, str], left: dict[int, list[Case]]) -> None:
    """Measure the cases of each repetition."""
    running: dict[Case, subprocess.Popen] = {}
    try:
        for case in sorted(set().union(*left.values())):  # one after the other: compiling takes all cores
            network, count, batch = case
            baseline = Baseline("ours-auto", "train", network, batch, NETWORKS[network][1])
            process = start(baseline, JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES=str(count))
            if process is None:
                raise RuntimeError(f"{baseline}: must run on {count} CPU devices; run baselines.py to see its error")
            running[case] = process
        for repetition, cases in left.items():
            for case in cases:
                running[case].stdin.write("go\n")
                running[case].stdin.flush()
                steps = NETWORKS[case[0]][1]
                passed, cpu = (float(number) / steps for number in running[case].stdout.readline().split())
                values = {"repetition": repetition, "seconds": round(passed, 5), "cpu_seconds": round(cpu, 5)}
                append(path, run | dict(zip(CASE, case, strict=True)) | values)
    finally:
        for process in running.values():
            process.kill()
            process.communicate()


def ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Return for each case of several devices how long it takes relative to one device with the same images.

    "wall" is the median of the ratios of single repetitions, "from" and "to" their range, "CPU" the median ratio of CPU
    seconds. The scaling is "strong" with the batch of one device, "weak" with that of all.
    """
    alone = table[table.devices == 1].drop(columns="devices")
    pairs = table[table.devices > 1].merge(alone, on=[*RUN, "network", "batch", "repetition"], suffixes=("", "_alone"))
    pairs["wall"] = pairs.seconds / pairs.seconds_alone
    pairs["CPU"] = pairs.cpu_seconds / pairs.cpu_seconds_alone
    pairs["scaling"] = ["strong" if row.batch == NETWORKS[row.network][0] else "weak" for row in pairs.itertuples()]
    groups = pairs.groupby([*CASE, "scaling"])
    columns = {"n": ("wall", "size"), "seconds": ("seconds", "median"), "wall": ("wall", "median")}
    return groups.agg(
        **columns, **{"from": ("wall", "min"), "to": ("wall", "max"), "CPU": ("CPU", "median")}
    ).reset_index()


def main() -> None:
    """Measure the networks one after the other, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="small,cifar", help=f"of {', '.join(NETWORKS)}; default: small,cifar")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="of results.csv")
    parser.add_argument("--dry_run", action="store_true", help="print what is left to measure, measure nothing")
    arguments = parser.parse_args()
    path, run = arguments.folder / "results.csv", this_run()
    for network in arguments.only.split(","):
        left = missing(read(path, run), network, arguments.repetitions)
        print(f"{network}: {sum(map(len, left.values()))} measurements left")
        for case in sorted(set().union(*left.values())) if arguments.dry_run else []:
            print(*(f"  {name}={value}" for name, value in zip(CASE, case, strict=True)), sep="")
        if left and not arguments.dry_run:
            measure(path, run, left)
    if not arguments.dry_run:
        print(ratios(read(path, run)).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
