"""No field is dead, each arm changes its keys and nothing else, and a slip is answered with the way out."""

import importlib
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import REPOSITORY, TINY, command, run_config
from ml_collections import ConfigDict

from alexnet_jax import config as config_lib
from alexnet_jax import results, study, summary
from configs import base, scales

pytestmark = pytest.mark.usefixtures("quickly_compiled")

STUDIES = sorted(path.stem for path in (REPOSITORY / "configs").glob("ablation_*.py"))


def load(name: str, scale: str) -> ConfigDict:
    config = importlib.import_module(f"configs.{name}").get_config(scale)
    config.lock()
    return config


def test_a_run_reads_every_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a study with a config that notes which of its fields are asked for by name."""
    config = base.get_config("embedded")
    config.update_from_flattened_dict(TINY | {"train.epochs": 0.004, "eval.every_epochs": 0.001})
    config.update_from_flattened_dict({"optim.learning_rate": 1e-9, "optim.stall.evaluations": 1})  # it stalls
    config.model.layers.conv2.then = ("activation", "lrn", "spatial_lrn", "max_pool")
    config.lock()
    read: set[str] = set()
    paths: dict[int, str] = {}
    keep_alive = []
    get = ConfigDict.__getattr__

    def noting_get(self: ConfigDict, name: str):
        value = get(self, name)
        if name.startswith("_"):
            return value
        keep_alive.append((self, value))
        path = f"{paths[id(self)]}.{name}" if id(self) in paths else name
        if isinstance(value, ConfigDict):
            paths[id(value)] = path
        read.add(path)
        return value

    # A layer is looked up by the name in model.order.
    get_item = ConfigDict.__getitem__

    def noting_get_item(self: ConfigDict, name: str):
        value = get_item(self, name)
        if isinstance(value, ConfigDict) and paths.get(id(self)) == "model.layers":
            keep_alive.append(value)
            paths[id(value)] = f"model.layers.{name}"
        return value

    monkeypatch.setattr(config_lib, "validate", lambda config: None)  # a check is no use
    monkeypatch.setattr(study.train, "validate", lambda config: None)
    monkeypatch.setattr(ConfigDict, "__getattr__", noting_get)
    monkeypatch.setattr(ConfigDict, "__getitem__", noting_get_item)
    study.run_study(config, tmp_path / "study")
    monkeypatch.undo()
    fields = {key for key in config_lib.flatten(config) if not key.startswith("arms")} | {"seed", "arms"}
    # The embedded set has no folder and no colours: test_data.py and test_augment.py have sets that do.
    colour = {f"data.augment.colour.{field}" for field in ("eigenvalue_unit", "shrink")}
    tuning = {f"tuning.{field}" for field in ("choices", "epochs", "seed")}  # test_study.py has a study that tunes
    assert fields - read == {"data.data_dir"} | colour | tuning


@pytest.mark.parametrize("scale", scales.SCALES)
@pytest.mark.parametrize("name", STUDIES)
def test_each_arm_changes_exactly_its_keys(name: str, scale: str) -> None:
    config = load(name, scale)
    reference = config_lib.flatten(config_lib.run_config(config, next(iter(config.arms)), 0))
    seen = []
    for arm in config.arms:
        run = config_lib.run_config(config, arm, 0)
        config_lib.validate(run)
        flat = config_lib.flatten(run)
        before = {key: value for key, value in config_lib.flatten(config).items() if key in flat}
        declared = config_lib.flatten(config.arms[arm])
        assert {key: value for key, value in flat.items() if key != "seed" and value != before[key]} == declared
        assert flat.keys() == reference.keys()
        assert not any(key.startswith(("train.", "eval.")) for key in declared)
        assert flat not in seen
        seen.append(flat)


@pytest.mark.parametrize("name", STUDIES)
def test_claims_are_of_arms_and_of_columns(name: str) -> None:
    for scale in scales.SCALES:
        config = load(name, scale)
        _, *others = config.arms
        for claim in config.claims:
            assert claim["arm"] in others
            assert claim["metric"] in results.COLUMNS
        assert config.seeds == (0, 1, 2)


def test_the_papers_numbers_are_claimed() -> None:
    """Sections 3.1 to 4.2 and 7; a difference of errors as a fraction of 1."""
    said = {
        (claim["arm"], claim["metric"]): claim["ratio"] or claim["difference"]
        for name in STUDIES
        for claim in load(name, "cifar10").claims
    }
    top1, top5, speed, gap = "eval/top1_error", "eval/top5_error", "epochs_to_25", "generalisation_gap"
    assert said == {
        ("tanh", speed): 6.0,
        ("no_lrn", top1): 0.014,
        ("no_lrn", top5): 0.012,
        ("no_overlap", top1): 0.004,
        ("no_overlap", top5): 0.003,
        ("one_column", top1): 0.017,
        ("one_column", top5): 0.012,
        ("no_dropout", gap): None,
        ("no_dropout", speed): 0.5,
        ("no_crops_nor_flips", gap): None,
        ("no_colour", top1): 0.01,
        ("none", gap): None,
        **{(f"no_{layer}", top1): 0.02 for layer in ("conv2", "conv3", "conv4", "conv5", "fc7")},
    }


def sizes(name: str, scale: str) -> dict[str, dict]:
    config = load(name, scale)
    runs = {arm: config_lib.run_config(config, arm, 0) for arm in config.arms}
    return {arm: summary.sizes(run, 1000, 3) for arm, run in runs.items()}


@pytest.mark.parametrize("scale", scales.SCALES)
def test_pooling_with_and_without_overlap_makes_maps_of_the_same_size(scale: str) -> None:
    overlap, without = sizes("ablation_pooling", scale).values()
    assert overlap == without


def test_one_column_has_about_as_many_parameters_as_two() -> None:
    """Footnote 2; and half of the kernels where the footnote says so."""
    found = sizes("ablation_towers", "imagenet2012")
    assert found["two_crossing"]["parameters"] == 60_965_224
    assert abs(found["one_column"]["parameters"] / found["two_crossing"]["parameters"] - 1) < 0.04
    both = {name: size for name, size in found["two_crossing"]["maps"].items() if name != "logits"}
    assert found["one_column"]["maps"] == both | {
        "conv1": "55x55x48",
        "conv2": "27x27x128",
        "conv3": "13x13x192",
        "conv4": "13x13x192",
    }


@pytest.mark.parametrize("scale", ["embedded", "imagenet2012"])
def test_a_net_without_a_layer_keeps_the_maps_of_the_others(scale: str) -> None:
    whole, *others = sizes("ablation_depth", scale).items()
    for arm, found in others:
        assert found["maps"] == {
            name: size for name, size in whole[1]["maps"].items() if name != arm.removeprefix("no_")
        }


def test_an_arm_that_changes_what_is_not_there_is_answered_with_the_nearest_key() -> None:
    config = base.get_config("embedded")
    config.arms = ConfigDict({"typo": {"model": {"lrn": {"enable": False}}}})
    with pytest.raises(ValueError, match=r"arm 'typo': unknown .* 'model.lrn.enable'; did you mean model.lrn.enabled"):
        config_lib.run_config(config, "typo", 0)
    config.arms = ConfigDict({"wrong": {"model": {"lrn": {"n": "five"}}}})
    with pytest.raises(ValueError, match=r"arm 'wrong': .*five"):
        config_lib.run_config(config, "wrong", 0)


STUDY = "--config=configs/ablation_lrn.py"
SLIPS = {
    (
        STUDY,
        "--config.model.lrm.enabled=False",
    ): "key 'model.lrm.enabled'; did you mean model.lrn.enabled",
    (
        STUDY,
        "--config.model.dropuot.rate=0",
    ): "key 'model.dropuot.rate'; did you mean model.dropout.rate",
    (STUDY, "--config.train.batch_size=many"): "--config.train.batch_size=many",
    (STUDY, "--config.model.activation=rely"): "model.activation='rely': must be one of relu, tanh",
    (STUDY, "--config.seeds=(1,1)"): "different seeds",
    (STUDY, "surplus"): "unknown argument 'surplus'",
    ("--config=configs/ablation_lrn.py:cifar11",): "no scale is called 'cifar11'; after the colon goes one of: ",
    ("--config=configs/ablation_lnr.py",): "configs/ablation_lnr.py",
    (): "say which study: --config=configs/ablation_lrn.py",
}


def test_a_slip_on_the_command_line_is_one_clear_line(tmp_path: Path) -> None:
    """Two commands at a time: most of each is the start."""
    workdir = tmp_path / "study"

    def give(arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        return command("alexnet_jax.main", f"--workdir={workdir}", *arguments)

    with ThreadPoolExecutor(2) as pool:
        for done, message in zip(pool.map(give, SLIPS), SLIPS.values(), strict=True):
            assert done.returncode == 1
            assert message in done.stderr + done.stdout
            assert "Traceback" not in done.stderr
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("model.towers", 0, "1 or more"),
        ("model.order", ("conv1", "conv9"), "a tuple of some of conv1, "),
        ("model.order", ("conv1", "conv1", "fc8"), "each once"),
        ("model.layers.conv2.features", 63, "a multiple of model.towers=2"),
        ("model.layers.fc8.features", 10, "None, one for each class"),
        ("model.layers.conv1.then", ("relu",), "activation, lrn, spatial_lrn, max_pool, avg_pool, dropout"),
        ("model.layers.conv1.padding", (1,), "pixels before and after"),
        ("model.dropout.rate", 1.0, "from 0 to less than 1"),
        ("data.crop", 29, "from 1 to data.image_size=28"),
        ("data.mean", (1.0, 2.0), "one for each of the 1 channels"),
        ("optim.learning_rate", -0.1, "more than 0"),
        ("optim.cut_epochs", (3.0, 2.0), "ascending"),
        ("train.batch_size", 4001, "at most the 4000 training images"),
        ("train.executor", "xmap", "one of auto, vmap, pmap"),
        ("eval.batch_size", 0, "1 or more"),
    ],
)
def test_a_value_that_cannot_work_is_named_with_its_rule(key: str, value: object, rule: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}=") as error:
        study.train.prepare(run_config(**{key: value}))
    assert str(value) in str(error.value)
    assert rule in str(error.value)


def test_a_config_is_the_same_after_json() -> None:
    config = run_config()
    again = config_lib.as_json(config)
    assert again["model"]["order"] == list(config.model.order)
    assert again["model"]["layers"]["fc8"]["features"] is None
