"""The README's main job, and a real TensorBoard over what it left."""

import json
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator

import pandas as pd
import pytest
from browser import TEXT, Browser
from conftest import command
from PIL import Image

pytestmark = pytest.mark.slow

RUNS = [(arm, seed) for arm in ("lrn", "no_lrn") for seed in (0, 1)]
NAMES = {f"{arm}/seed_{seed}" for arm, seed in RUNS}


def test_every_run_is_well_above_chance(main_job) -> None:
    folder, _ = main_job
    results = pd.read_csv(folder / "results.csv").query("status == 'finished'")
    assert list(zip(results["arm"], results["seed"], strict=True)) == RUNS
    assert (results["steps"] == 500).all()
    assert (results["eval/top1_error"] < 0.5).all()
    assert results["eval/top1_error"].nunique() > 1


def test_every_run_evaluated_all_held_out_images(main_job) -> None:
    """An error is a whole number of thousandths."""
    folder, _ = main_job
    wrong = pd.read_csv(folder / "results.csv")["eval/top1_error"].dropna() * 1000
    assert ((wrong - wrong.round()).abs() < 1e-6).all()


def test_the_same_command_again_reruns_nothing_and_prints_the_table(main_job) -> None:
    folder, run = main_job
    results = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    assert len(results) == len(RUNS)
    page = (folder / "report.html").read_text()
    done = run()
    assert done.returncode == 0
    assert "step" not in done.stdout
    assert re.search(r"│ lrn\s+│ 2 │ .*│\n│ no_lrn\s+│ 2 │ .* to .*│", done.stdout)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")} == results
    assert (folder / "report.html").read_text() == page


def test_both_arms_of_a_seed_start_alike_and_see_the_same_images(main_job) -> None:
    """The first losses of a seed differ by LRN alone: a little."""
    folder, _ = main_job

    def first_loss(arm: str, seed: int) -> float:
        return json.loads((folder / arm / f"seed_{seed}" / "metrics.jsonl").read_text().splitlines()[0])["train/loss"]

    for seed in (0, 1):
        assert abs(first_loss("lrn", seed) - first_loss("no_lrn", seed)) < 0.1


def test_the_runs_of_an_arm_are_evaluated_and_averaged(main_job, tmp_path) -> None:
    """Each as when its training ended; the average of two nets is better than the mean of their errors."""
    folder, _ = main_job
    runs = [folder / "lrn" / f"seed_{seed}" for seed in (0, 1)]
    output = tmp_path / "errors.json"
    done = command("alexnet_jax.evaluate", *(f"--run={run}" for run in runs), "--views=1", f"--output={output}")
    assert done.returncode == 0, done.stderr
    assert "mnist5k, test: 1,000 images, views of each: 1" in done.stdout
    errors = json.loads(output.read_text())["errors"]
    assert list(errors) == [*map(str, runs), "average"]
    results = [json.loads((run / "result.json").read_text()) for run in runs]
    for run, result in zip(runs, results, strict=True):
        assert errors[str(run)] == pytest.approx({name: result[f"eval/{name}"] for name in errors["average"]})
    assert errors["average"]["loss"] < sum(result["eval/loss"] for result in results) / 2
    for of_net in errors.values():
        assert f"{100 * of_net['top1_error']:.2f} │" in done.stdout


@pytest.fixture(scope="module")
def tensorboard(main_job) -> Iterator[Callable[..., object]]:
    """Asks a running TensorBoard: path and query, or JSON to post, to the JSON or bytes it answers."""
    folder, _ = main_job
    server = [sys.executable, "-m", "tensorboard.main", f"--logdir={folder}", "--port=0", "--load_fast=false"]
    with subprocess.Popen(server, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        address = next(match[0] for line in process.stderr if (match := re.search(r"http://\S+(?=/)", line)))

        def ask(path: str, post: dict | None = None, raw: bool = False, **query: object) -> object:
            url = f"{address}/data/{path}?{urllib.parse.urlencode(query)}"
            body = None if post is None else json.dumps(post).encode()
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as response:
                content = response.read()
            return content if raw else json.loads(content)

        ask.address = address
        for plugin in ("scalars", "images"):  # it answers before it has read everything
            for _ in range(600):
                tags = ask(f"plugin/{plugin}/tags")
                if set(tags) >= NAMES and all(tags[name] for name in NAMES):
                    break
                time.sleep(0.1)
        yield ask
        process.kill()


def test_tensorboard_shows_the_runs_side_by_side_under_the_same_tags(tensorboard) -> None:
    tags = tensorboard("plugin/scalars/tags")
    assert set(tags) == NAMES
    expected = {f"train/{name}" for name in ("loss", "top1_error", "top5_error")}
    expected |= {f"{part}/{name}" for part in ("eval", "train_eval") for name in ("loss", "top1_error", "top5_error")}
    expected |= {"epoch", "learning_rate", "images_per_second", "data/wait_fraction"}
    assert all(set(of_run) == expected for of_run in tags.values())


def test_tensorboard_shows_what_metrics_jsonl_says(main_job, tensorboard) -> None:
    folder, _ = main_job
    for name in NAMES:
        lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for tag in ("train/loss", "eval/top1_error"):
            shown = tensorboard("plugin/scalars/scalars", run=name, tag=tag)
            recorded = [(line["step"], line[tag]) for line in lines if tag in line]
            assert [step for _, step, _ in shown] == [step for step, _ in recorded]
            assert [value for *_, value in shown] == pytest.approx([value for _, value in recorded])


def test_tensorboard_compares_the_arms_in_its_hparams_tab(main_job, tensorboard) -> None:
    folder, _ = main_job
    results = pd.read_csv(folder / "results.csv").set_index(["arm", "seed"])
    experiment = tensorboard("plugin/hparams/experiment", post={})
    then = {f"model.layers.{layer}.then" for layer in ("conv1", "conv2")}
    assert {info["name"] for info in experiment["hparamInfos"]} == {"arm", "seed", "model.lrn.enabled"} | then
    metrics = [info["name"] for info in experiment["metricInfos"]]
    assert {metric["tag"] for metric in metrics} == {"eval/loss", "eval/top1_error", "eval/top5_error"}
    request = {
        "allowedStatuses": ["STATUS_SUCCESS", "STATUS_UNKNOWN", "STATUS_RUNNING", "STATUS_FAILURE"],
        "colParams": [{"metric": metric} for metric in metrics],
        "startIndex": 0,
        "sliceSize": 100,
    }
    groups = tensorboard("plugin/hparams/session_groups", post=request)["sessionGroups"]
    assert len(groups) == len(RUNS)
    for group in groups:
        hparams = group["hparams"]
        values = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
        result = results.loc[(hparams["arm"], int(hparams["seed"]))]
        assert hparams["model.lrn.enabled"] == (hparams["arm"] != "no_lrn")
        for tag in ("eval/loss", "eval/top1_error", "eval/top5_error"):
            assert values[tag] == pytest.approx(result[tag])


def test_tensorboard_shows_the_first_kernels_as_images(tensorboard) -> None:
    tags = tensorboard("plugin/images/tags")
    assert {name: set(of_run) for name, of_run in tags.items() if of_run} == {
        name: {"conv1/kernels", "eval/mistakes"} for name in NAMES
    }
    images = tensorboard("plugin/images/images", run="lrn/seed_0", tag="conv1/kernels", sample=0)
    assert [image["step"] for image in images] == [500]
    png = tensorboard(f"plugin/images/individualImage?{images[-1]['query']}&", raw=True)
    assert png.startswith(b"\x89PNG")


def test_tensorboard_arranges_the_charts_of_all_runs(tensorboard) -> None:
    layout = tensorboard("plugin/custom_scalars/layout")
    assert [category["title"] for category in layout["category"]] == ["errors", "losses", "speed"]
    patterns = [
        tag for category in layout["category"] for chart in category["chart"] for tag in chart["multiline"]["tag"]
    ]
    tags = set.intersection(*(set(of_run) for of_run in tensorboard("plugin/scalars/tags").values()))
    for pattern in patterns:
        assert [tag for tag in tags if re.search(pattern, tag)] == [pattern.strip("^$")]


def test_a_browser_shows_every_run_of_every_arm(tensorboard, browser: Browser, tmp_path) -> None:
    """With nothing to set: the runs on one chart, and the hparams table with their final errors."""
    browser.open(f"{tensorboard.address}/?darkMode=false#custom_scalars", 1400, 1000)
    browser.wait_for(f"{TEXT}.includes('held-out images, top-1')")
    for name in NAMES:
        browser.wait_for(f"{TEXT}.includes({json.dumps(name)})")
    browser.open(f"{tensorboard.address}/?darkMode=false&second#hparams", 1400, 1000)
    browser.wait_for(f"{TEXT}.includes('eval/top1_error') && {TEXT}.includes('no_lrn')")
    browser.screenshot(tmp_path / "hparams.png")
    with Image.open(tmp_path / "hparams.png") as shot:
        assert shot.size == (1400, 1000)
        assert len(shot.convert("RGB").getcolors(1 << 20)) > 50  # it is not blank
