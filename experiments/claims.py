"""Write the tables and the forest plot of all studies' claims: python experiments/claims.py

Reads the study.json and results.csv of every folder beside the script. Rewrites the tables between the markers
`<!-- results -->` and `<!-- /results -->` in experiments/README.md (all claims) and README.md (those on all of
CIFAR-10), and effects.svg.
"""

from pathlib import Path

import matplotlib as mpl
import pandas as pd

from alexnet_jax.studies import analysis, plots
from experiments.pages import insert, markdown

HERE = Path(__file__).resolve().parent
METRICS = {  # in the README's table
    "eval/top1_error": "top-1 error, points",
    "generalisation_gap": "generalisation gap, points",
    "epochs_to_25": "epochs to 25 % training error",
    "train_eval_epochs_to_25": "epochs to 25 % training error",
}
# Seeds that PLAN.md has for a study, or for one of its arms, where fewer have run: verdicts are preliminary until then.
PLANNED = {
    ("contributions/cifar10", ""): 20,
    ("contributions/cifar10", "no_overlap"): 50,
    ("contributions/cifar10_5000", ""): 10,
    ("contributions/imagenette_small", ""): 5,
}
NATURAL = ("figure1/code2012", "figure1/fan_in", "contributions/cifar10")  # the studies of the README's table


def list_studies() -> list[Path]:
    """Return the folders of the studies with claims, in the order of the paper's sections."""

    def key(folder: Path) -> tuple[str, str]:
        return min(claim["source"] for claim in analysis.load_study(folder)["claims"]), str(folder)

    folders = [file.parent for file in HERE.glob("**/study.json")]
    return sorted((folder for folder in folders if analysis.load_study(folder)["claims"]), key=key)


def published() -> pd.DataFrame:
    """Return what others measured as text, by arm and metric: a column for each of them."""
    effects = pd.read_csv(HERE / "published.csv").pivot(index=["arm", "metric"], columns="by", values="effect")
    return effects.map(lambda effect: "" if pd.isna(effect) else f"{100 * effect:+.2f}").reset_index()


def list_claims(study: Path) -> pd.DataFrame:
    """Return the claims of a study as text, with the study's name and data; without those that no pair of runs has."""
    name, reported, rows = study.relative_to(HERE).as_posix(), analysis.load_study(study)["reported"], []
    for claim in analysis.verdicts(study).to_dict("records"):
        n, planned = int(claim.pop("pairs")), PLANNED.get((name, claim["arm"]), PLANNED.get((name, ""), 0))
        is_early, counts = n < planned, not claim["verdict"].startswith(analysis.WITHDRAWN)
        training = f"{reported.partition(', ')[0]}, training"
        if n:
            rows.append(
                {"study": name}
                | claim
                | {"n": f"{n} of {planned}" if is_early else str(n)}
                | {"verdict": claim["verdict"] + ", preliminary" * (is_early and counts)}
                | {"data": training if claim["metric"] in analysis.CENSORED else reported}
            )
    columns = ["study", "arm", "metric", "reference", "claim", "found", "95 % CI", "n", "margin", "verdict", "data"]
    return pd.DataFrame(rows, columns=columns)


def page(study: str) -> str:
    """Return the notebook of a study, or its README."""
    folder = study.split("/")[0]
    return f"{folder}/{'notebook.ipynb' if (HERE / folder / 'notebook.ipynb').exists() else 'README.md'}"


def to_markdown(table: pd.DataFrame, folder: str) -> str:
    """Return a table in Markdown; names of studies link to their notebooks, below `folder`."""
    linked = table.assign(study=[f"[{name}]({folder}{page(name)})" for name in table["study"]])
    return markdown([linked.columns.tolist(), *linked.to_numpy().tolist()])


def origins(studies: list[str]) -> str:
    """Return a table in Markdown: hours of each study's runs, from its results.csv, and machine and command."""
    machines = pd.read_csv(HERE / "machines.csv").set_index("study")
    rows = [["study", "hours of the reported runs, summed", "machine", "command"]]
    for study in studies:
        hours = pd.read_csv(HERE / study / "results.csv")["seconds"].sum() / 3600
        rows.append([study, f"{hours:.2f}", *machines.loc[study, ["machine", "command"]]])
    return markdown(rows)


def tables() -> dict[Path, str]:
    """Return the tables of each README: all claims; and those of `NATURAL` that count and are of `METRICS`."""
    claims = pd.concat(map(list_claims, list_studies()), ignore_index=True)
    short = claims[claims["study"].isin(NATURAL) & claims["metric"].isin(METRICS)]
    short = short[~short["verdict"].str.startswith(analysis.WITHDRAWN)]
    short = short.assign(metric=short["metric"].map(METRICS)).drop(columns=["margin", "reference"])
    others = published()
    full = claims.merge(others, how="left", on=["arm", "metric"]).fillna("")
    place = list(claims).index("claim") + 1
    full = full[[*claims.columns[:place], *others.columns[2:], *claims.columns[place:]]]
    full_text = f"{to_markdown(full, '')}\nWhere they come from:\n\n{origins(list(claims['study'].unique()))}"
    return {HERE / "README.md": full_text, HERE.parent / "README.md": to_markdown(short, "experiments/")}


def write_plot(path: Path) -> None:
    """Write the forest plot of all claims that count and have an interval."""
    effects = []
    for study in list_studies():
        frame = analysis.claim_effects(study)
        frame["arm"] = study.relative_to(HERE).as_posix() + ", " + frame["arm"]
        effects.append(frame[(frame["pairs"] > 1) & ~frame["verdict"].str.startswith(analysis.WITHDRAWN)])
    mpl.rcParams["svg.hashsalt"] = path.name  # the same file each time
    plots.plot_effects(pd.concat(effects, ignore_index=True)).savefig(path, metadata={"Date": None})


def main() -> None:
    """Write tables and plot."""
    texts = {path: insert(path.read_text(), table) for path, table in tables().items()}
    for path, text in texts.items():
        path.write_text(text)
    write_plot(HERE / "effects.svg")


if __name__ == "__main__":
    main()
