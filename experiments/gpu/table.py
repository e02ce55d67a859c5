"""Write the table of targets in README.md from results.csv: python experiments/gpu/table.py"""

from pathlib import Path
from typing import NamedTuple

import pandas as pd

from experiments import pages
from experiments.pages import markdown

HERE = Path(__file__).resolve().parent
NOT_MEASURED = "not measured yet"
PRECISIONS = ("tensorfloat32", "bfloat16")
LOSS, GRADIENTS = "loss, relative difference", "gradients, norm of the difference over the norm"
WORST = "gradients, largest difference over largest value, worst parameter"
PEER, SEVERAL = "time over that of ours", "time over that of ours, 25 a dispatch"


class Value(NamedTuple):
    """Rows of results.csv, of which the last one counts; of any network, the largest value."""

    what: str
    network: str = "paper"  # "": any
    dtype: str = "tensorfloat32"
    batch: str = "128"  # "": any
    unit: str = ""  # "": any


class Target(NamedTuple):
    """A row of the table; `text` is the format string of the values."""

    measure: str
    reach: str
    text: str
    values: tuple[Value, ...]
    job: str


def of_step(what: str, batch: str = "128", network: str = "paper", unit: str = "ratio") -> tuple[Value, ...]:
    """Return a value of the training step in TF32 and in bfloat16."""
    return tuple(Value(what, network, dtype, batch, unit) for dtype in PRECISIONS)


REPEATS = tuple(
    Value(f"the run {name} in another process: product compiler options, {cache}", "embedded", batch="")
    for name in ("again", "resumed")
    for cache in ("with a compilation cache", "without")
)
TARGETS = (
    Target(
        "loss and gradients equal the CPU's, float32, 15 of 16 networks",
        "1e-5 and 1e-4",
        "{:.1e} and {:.2e}; worst parameter {:.1e}",
        tuple(Value(what, "", "float32", "") for what in (LOSS, GRADIENTS, WORST)),
        "right",
    ),
    Target(
        "the same for the paper's network, TF32; bfloat16",
        "stated",
        "{:.1e} and {:.1e}; {:.1e} and {:.1e}",
        tuple(Value(what, "paper", dtype, "") for dtype in PRECISIONS for what in (LOSS, GRADIENTS)),
        "right paper",
    ),
    Target(
        "a run repeats and resumes bit-identically in another process",
        "yes: 1",
        "{:.0f}, {:.0f}; {:.0f}, {:.0f}",
        REPEATS,
        "deterministic embedded",
    ),
    Target(
        "training step with nondeterministic algorithms, paper's network, batch 128",
        "stated",
        "{:.2f} of the time",
        (Value(f"{PEER}: ours, nondeterministic operations allowed"),),
        "step paper 128",
    ),
    *(
        Target(
            f"training step, paper's network, batch {batch}, TF32; bfloat16",
            "1.2 times PyTorch's images/s",
            "{0:,.0f} images/s, {2:.2f} times; {1:,.0f} images/s, {3:.2f} times",
            of_step("step: ours", batch, unit="images/s") + of_step(f"{PEER}: pytorch compile", batch),
            f"step paper {batch}",
        )
        for batch in ("128", "512")
    ),
    Target(
        "FLOP rate relative to a large matrix product, batch 128",
        "stated",
        "{:.0%}; {:.0%}",
        of_step("step: ours, share of the rate of matmul"),
        "step paper 128",
    ),
    Target(
        "peak device memory, paper's network, batch 128, TF32",
        "PyTorch's",
        "{:,.0f} MB; PyTorch: {:,.0f} MB",
        (Value("peak memory: ours"), Value("peak memory: pytorch compile")),
        "step paper 128",
    ),
    *(
        Target(
            f"training step, {network}, batch 128, TF32; bfloat16",
            "1.0 times PyTorch's images/s",
            "{:.2f} times; {:.2f} times",
            of_step(f"{PEER}: pytorch compile", network=network),
            f"step {network}",
        )
        for network in ("one_weird_trick", "torchvision")
    ),
    Target(
        "small two-tower network, batch 128, crops, flips and metrics included",
        "0.5 ms a step",
        "{:.2f} ms",
        (Value("step: ours, 25 a dispatch", "small", unit="ms"),),
        "step small",
    ),
    Target(
        "the same with a convolution for each tower; with grouped ones; with products with patches",
        "stated",
        "{:.2f}; {:.2f}; {:.2f} ms",
        tuple(
            Value(f"step: {form}, 25 a dispatch", "small", unit="ms")
            for form in ("convolutions one by one", "grouped convolutions", "convolutions by patches")
        ),
        "variants small",
    ),
    Target(
        "the same, time of all its kernels; with a convolution for each tower",
        "stated",
        "{:.2f}; {:.2f} ms",
        tuple(
            Value(f"time of all kernels: {form}, 25 a dispatch", "small", unit="ms")
            for form in ("ours", "convolutions one by one")
        ),
        "variants small",
    ),
    Target(
        "the same, beside PyTorch without CUDA graphs and with them",
        "2 and 1.0 times PyTorch's images/s",
        "{:.2f} and {:.2f} times",
        (Value(f"{SEVERAL}: pytorch compile", "small"), Value(f"{SEVERAL}: pytorch graphs", "small")),
        "step small",
    ),
    Target(
        "CIFAR-10, 30 epochs, one seed, from process start to result, warm cache",
        "20 s",
        "{:.0f} s",
        (Value("one run, warm cache, from process start to result", "small", batch="64"),),
        "run one",
    ),
    Target(
        "a study of 2 arms x 10 seeds of it",
        "180 s",
        "{:.0f} s",
        (Value("study of 2 arms, from process start to result", "small", batch="64"),),
        "run study",
    ),
    Target(
        "wait for images, Imagenette at 256, resident and streamed",
        "1 % and 10 %",
        "{:.1%} and {:.1%}",
        tuple(Value(f"photos, {where}: data/wait_fraction of a run") for where in ("resident", "streamed")),
        "photos",
    ),
)


def find(results: pd.DataFrame, value: Value) -> float | None:
    """Return the value in results.csv; None if it was not measured."""
    rows = results[(results["what"] == value.what) & (results["unit"] != "failed")]
    for field in ("network", "dtype", "batch", "unit"):
        if wanted := getattr(value, field):
            rows = rows[rows[field] == wanted]
    numbers = rows["value"].astype(float)
    return None if rows.empty else numbers.iloc[-1] if value.network else numbers.max()


def table(path: Path = HERE / "results.csv") -> str:
    """Return the table of targets, in Markdown."""
    results = pd.read_csv(path, dtype=str, keep_default_na=False)
    rows = [["measure", "target", "measured", "job"]]
    for target in TARGETS:
        values = [find(results, value) for value in target.values]
        measured = NOT_MEASURED if None in values else target.text.format(*values).replace("%", " %")
        rows.append([target.measure, target.reach, measured, f"`{target.job}`"])
    return markdown(rows)


def main() -> None:
    """Write the table."""
    readme = HERE / "README.md"
    readme.write_text(pages.insert(readme.read_text(), table()))


if __name__ == "__main__":
    main()
