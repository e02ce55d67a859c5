"""No field is unused, each arm changes its fields and no others, and mistakes are answered with a remedy."""

import functools
import importlib
import math
import operator
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import alexnet_jax
from alexnet_jax import config as config_lib
from alexnet_jax import model, optim, train
from alexnet_jax.__main__ import run_verb
from alexnet_jax.configs import base, scales
from alexnet_jax.studies import analysis, runner
from alexnet_jax.tools import summary
from support import NETWORKS, REPOSITORY, TINY, network_config, random_statistics, run_config

STUDIES = sorted(path.stem for path in (REPOSITORY / "configs").glob("ablation_*.py"))


def load(name: str, scale: str) -> ConfigDict:
    config = importlib.import_module(f"alexnet_jax.configs.{name}").get_config(scale)
    config.lock()
    return config


def record_reads(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return the dotted keys of the fields that the package reads from now on; checks in config.py do not count."""
    package = Path(alexnet_jax.__file__).parent
    read: set[str] = set()
    paths: dict[int, str] = {}
    keep_alive: list[Any] = []  # so that no id is used twice

    @functools.cache
    def counts(file: str) -> bool:
        return package in Path(file).parents and Path(file).name != "config.py"

    def recording(get: Callable[[ConfigDict, str], Any]) -> Callable[[ConfigDict, str], Any]:
        def wrapper(self: ConfigDict, name: str) -> Any:
            value = get(self, name)
            path = f"{paths[id(self)]}.{name}" if id(self) in paths else name
            if isinstance(value, ConfigDict):
                paths[id(value)] = path
                keep_alive.append(value)
            if counts(sys._getframe(1).f_code.co_filename):
                read.add(path)
            return value

        return wrapper

    monkeypatch.setattr(ConfigDict, "__getattr__", recording(ConfigDict.__getattr__))
    monkeypatch.setattr(ConfigDict, "__getitem__", recording(ConfigDict.__getitem__))
    return read


@pytest.mark.slow
def test_no_field_is_unused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train small runs, and compare the fields that are read with those that exist."""
    changes = TINY | {"train.epochs": 0.004, "eval.every_epochs": 0.001, "data.validation_split": "1/20"}
    changes |= {"optim.learning_rate": 1e-9, "optim.plateau.patience": 1}  # decays on plateau
    changes |= {
        "model.layers.conv1.then": ("batch_norm", "activation", "max_pool"),
        "model.layers.conv2.then": ("activation", "lrn", "spatial_lrn", "max_pool"),
    }
    study = base.get_config("embedded", changes)
    study.optim.unused = 1
    study.lock()
    with_adamw = base.get_config("embedded", {"optim.name": "adamw"})
    read = record_reads(monkeypatch)
    runner.run_study(study, tmp_path / "study")
    study.data.update(resident_bytes=0, host_bytes=0)  # streams its images
    runner.run_study(study, tmp_path / "streamed")
    optim.make_optimizer(with_adamw.optim, with_adamw.model.layers, 1.0, 1)
    monkeypatch.undo()
    fields = {key for key in config_lib.flatten(study) if not key.startswith("arms.")} | {"seed", "arms"}
    # The embedded dataset has neither folder nor colours; tests/data has datasets with both.
    colour = {"data.augment.colour.eigenvalue_unit", "data.augment.code2012.shrink_noise"}
    tuning = {f"tuning.{field}" for field in ("choices", "epochs", "seeds")}  # see tests/studies
    assert fields - read == {"data.data_dir", "optim.unused"} | colour | tuning


@pytest.mark.parametrize("scale", scales.SCALES)
@pytest.mark.parametrize("name", STUDIES)
def test_each_arm_changes_exactly_its_fields(name: str, scale: str) -> None:
    study = load(name, scale)
    unchanged = config_lib.flatten(study)
    runs = []
    for arm in study.arms:
        run = config_lib.run_config(study, arm, 0)
        config_lib.validate(run)
        flat = config_lib.flatten(run)
        declared = config_lib.flatten(study.arms[arm])
        assert {key: value for key, value in flat.items() if key != "seed" and value != unchanged[key]} == declared
        # Arms train and are evaluated alike.
        assert all(key == "train.label_smoothing" for key in declared if key.startswith(("train.", "eval.")))
        assert flat not in runs
        runs.append(flat)


@pytest.mark.parametrize("scale", scales.SCALES)
@pytest.mark.parametrize("name", STUDIES)
def test_claims_and_tuning_fit_the_study(name: str, scale: str) -> None:
    study = load(name, scale)
    _, *others = study.arms
    for claim in study.claims:
        assert claim["arm"] in others
        assert claim["metric"] in analysis.COLUMNS
    assert study.seeds == (0, 1, 2)
    if study.tuning.key:
        assert study.tuning.key in config_lib.flatten(study)
        assert list(study.tuning.choices) == sorted(study.tuning.choices)
        assert study.tuning.metric in runner.TUNING_METRICS
        assert not set(study.tuning.seeds) & set(study.seeds)


def test_claims_have_the_papers_numbers() -> None:
    """Sections 3.1 to 4.2 and 7; differences of errors are fractions of 1."""
    effects = {
        (claim["arm"], claim["metric"]): claim["ratio"] or claim["difference"]
        for name in STUDIES
        for claim in load(name, "cifar10").claims
    }
    top1, top5, speed, gap = "eval/top1_error", "eval/top5_error", "epochs_to_25", "generalisation_gap"
    assert effects == {
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


@pytest.mark.parametrize("scale", scales.SCALES)
def test_relu_study_tunes_on_its_claims_metric(scale: str) -> None:
    study = load("ablation_relu", scale)
    (claim,) = study.claims
    assert study.tuning.metric == claim["metric"] == "epochs_to_25"


@pytest.mark.parametrize("initial_weights", ["code2012", "fan_in"])
def test_figure_1_regularises_nothing_and_compares_activations_alone(initial_weights: str) -> None:
    study = load("figure1", initial_weights)
    assert {claim["metric"] for claim in study.claims} == {study.tuning.metric}
    for arm in study.arms:
        run = config_lib.run_config(study, arm, 0)
        config_lib.validate(run)
        assert run.model.activation == arm
        assert run.optim.weight_decay == 0
        assert not any(layer.weight_decay for layer in run.model.layers.values())
        assert not run.data.augment.random_crop
        assert not run.data.augment.flip
        assert run.data.augment.colour.noise == 0
        assert not {"dropout", "lrn", "batch_norm"} & {name for each in run.model.layers.values() for name in each.then}
        stds = [run.model.layers[name].weight_std for name in run.model.order]
        if initial_weights == "code2012":
            assert stds == [0.0001, 0.01, 0.01, 0.01]
        else:
            gain = 2.0 if arm == "relu" else 1.0
            first, rest = math.sqrt(gain / 75) / 63, math.sqrt(gain / 800)
            assert stds == pytest.approx([first, rest, rest, 1 / 32])


@pytest.mark.slow
def test_photos_have_feature_maps_of_equal_size_without_overlap() -> None:
    sizes = network_sizes("photos", "imagenette")
    assert sizes["code2012"]["maps"] == sizes["no_overlap"]["maps"]
    assert sizes["code2012"]["maps"]["conv1"].startswith("31x31")


CONFIGS = [path for path in sorted((REPOSITORY / "configs").rglob("*.py")) if "scale: str" in path.read_text()]


@pytest.mark.parametrize("file", [path for path in CONFIGS if path.stem != "scales"], ids=lambda file: file.stem)
def test_every_config_runs_at_a_scale_or_says_which_ones_it_has(file: Path) -> None:
    errors = {scale: refusal(config_lib.load_study, f"{file}:{scale}") for scale in scales.SCALES}
    assert "" in errors.values()
    for scale, error in errors.items():
        if error:
            assert f"scale={scale}: must be one of" in error
            continue
        study = config_lib.load_study(f"{file}:{scale}")
        for arm in study.arms:
            config_lib.validate(config_lib.run_config(study, arm, 0))


def test_figure_1_has_two_initial_weights() -> None:
    with pytest.raises(ValueError, match="scale=cifar10: must be code2012 or fan_in"):
        load("figure1", "cifar10")


def network_sizes(name: str, scale: str) -> dict[str, dict[str, Any]]:
    """Return the sizes of the network of each arm, for 1000 classes of colour images."""
    study = load(name, scale)
    return {arm: summary.sizes(config_lib.run_config(study, arm, 0), 1000, 3) for arm in study.arms}


@pytest.mark.parametrize("scale", scales.SCALES)
def test_pooling_without_overlap_keeps_the_feature_map_sizes(scale: str) -> None:
    overlap, no_overlap = network_sizes("ablation_pooling", scale).values()
    assert overlap == no_overlap


@pytest.mark.slow
def test_one_column_has_half_the_kernels_and_about_as_many_parameters() -> None:
    """Compare with footnote 2."""
    sizes = network_sizes("ablation_towers", "imagenet2012")
    two, one = sizes["two_crossing"], sizes["one_column"]
    assert two["parameters"] == 60_965_224
    assert abs(one["parameters"] / two["parameters"] - 1) < 0.04
    halved = {"conv1": "55x55x48", "conv2": "27x27x128", "conv3": "13x13x192", "conv4": "13x13x192"}
    assert one["maps"] == {name: size for name, size in two["maps"].items() if name != "logits"} | halved


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["embedded", "imagenet2012"])
def test_removing_a_layer_keeps_the_feature_maps_of_the_others(scale: str) -> None:
    sizes = network_sizes("ablation_depth", scale)
    complete = sizes.pop("eight_layers")["maps"]
    for arm, size in sizes.items():
        removed = arm.removeprefix("no_")
        assert size["maps"] == {name: maps for name, maps in complete.items() if name != removed}


@pytest.mark.parametrize(
    "text", [str(base.study.__doc__), (REPOSITORY / "configs" / "README.md").read_text()], ids=["docstring", "readme"]
)
def test_example_study_is_a_study(text: str, tmp_path: Path) -> None:
    """Run the example as a file of the user's own."""
    (example,) = re.findall(r'^( *)("""Does a wider .*?return base\.study\(.*?\)\n)', text, re.DOTALL | re.MULTILINE)
    indentation, code = example
    file = tmp_path / "wider.py"
    file.write_text("\n".join(line.removeprefix(indentation) for line in code.splitlines()))
    study = config_lib.load_study(str(file), ["--config.train.epochs=1"])
    assert [config_lib.run_config(study, arm, 0).model.layers.conv1.features for arm in study.arms] == [32, 64, 64]
    assert study.seeds == (0, 1, 2, 3, 4)
    assert study.train.epochs == 1


def test_changes_may_be_dotted_or_nested() -> None:
    dotted = base.study("embedded", {"arm": {"model.lrn.n": 3, "model.lrn.k": 1.0, "train.batch_size": 4}})
    nested = base.study("embedded", {"arm": {"model": {"lrn": {"n": 3, "k": 1.0}}, "train.batch_size": 4}})
    assert dotted.to_dict() == nested.to_dict()
    assert config_lib.run_config(dotted, "arm", 0).model.lrn.n == 3


def test_changes_may_be_of_numpy() -> None:
    study = base.study("embedded", {"arm": {}}, changes={"model.lrn.n": np.int64(3), "optim.betas": [np.float32(0), 0]})
    assert (type(study.model.lrn.n), study.optim.betas) == (int, (0.0, 0.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.lrn.enable": False}, "^unknown config key 'model.lrn.enable'; did you mean model.lrn.enabled"),
        ({"model": {"lrn": 5}}, "^unknown config key 'model.lrn'"),
        ({"foo": 5}, "^unknown config key 'foo'; see configs/base.py"),
        ({"model.lrn.n": "five"}, "^model.lrn.n='five': must be an integer$"),
    ],
)
def test_changes_of_a_study_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        base.study("embedded", {"arm": {}}, changes=changes)


def test_unknown_field_of_an_arm_is_answered_with_the_nearest() -> None:
    study = base.study("embedded", {"typo": {"model.lrn.enable": False}, "wrong": {"model.lrn.n": "five"}})
    with pytest.raises(ValueError, match=r"arm 'typo': unknown .* 'model.lrn.enable'; did you mean model.lrn.enabled"):
        config_lib.run_config(study, "typo", 0)
    with pytest.raises(ValueError, match=r"arm 'wrong': .*five"):
        config_lib.run_config(study, "wrong", 0)


STUDY = "--config=configs/ablation_lrn.py"
MISTAKES = {
    (STUDY, "--config.model.lrm.enabled=False"): "key 'model.lrm.enabled'; did you mean model.lrn.enabled",
    (STUDY, "--config.model.dropuot.rate=0"): "key 'model.dropuot.rate'; did you mean model.dropout.rate",
    (STUDY, "--config.train.batch_size=many"): "train.batch_size='many': must be an integer",
    (STUDY, "--config.model.order=('fc6','fc7','fc8')"): "must be convolutions, of which the first is of kind",
    (STUDY, "--config.model.order=('conv1','fc6','conv2','fc8')"): "then dense layers",
    (STUDY, "--config.model.layers.conv1.kind=local"): "must be convolutions, of which the first is of kind",
    (
        STUDY,
        "--config.model.layers.fc6.then=('activation','max_pool')",
    ): "must be a tuple without spatial_lrn, max_pool",
    (STUDY, "surplus"): "unknown argument 'surplus'",
    ("--config=configs/ablation_lrn.py:cifar11",): "scale=cifar11: must be one of embedded, cifar10, ",
    ("--config=configs/ablation_lnr.py",): "configs/ablation_lnr.py",
    (): "--config",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistake_on_the_command_line_is_a_one_line_error(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit) as ended:
        run_verb("run", ["--workdir=/nowhere", *arguments])
    message = capsys.readouterr().err if ended.value.code == 2 else str(ended.value.code)
    assert MISTAKES[arguments] in message.splitlines()[-1]


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.decay_epochs=(2,4.5)", "optim.decay_epochs", (2.0, 4.5)),
        ("optim.decay_epochs=[2]", "optim.decay_epochs", (2.0,)),
        ("optim.decay_epochs=2", "optim.decay_epochs", (2.0,)),
        ("optim.decay_epochs=()", "optim.decay_epochs", ()),
        ("model.layers.conv1.then=activation", "model.layers.conv1.then", ("activation",)),
        ("model.layers.conv1.weight_decay=1e-3", "model.layers.conv1.weight_decay", 1e-3),
        ("optim.biases.decay_epochs=None", "optim.biases.decay_epochs", None),
        ("model.pool.ceil=true", "model.pool.ceil", True),
        ("model.pool.ceil", "model.pool.ceil", True),
        ("data.name=1e3", "data.name", "1e3"),
        ("arms.no_lrn.model.lrn.enabled=True", "arms.no_lrn.model.lrn.enabled", True),
    ],
)
def test_override_becomes_a_value_of_the_fields_type(override: str, key: str, value: Any) -> None:
    study = config_lib.load_study("configs/ablation_lrn.py", [f"--config.{override}"])
    changed = config_lib.flatten(study)[key]
    assert (changed, type(changed)) == (value, type(value))
    if isinstance(value, tuple):
        assert [type(element) for element in changed] == [type(element) for element in value]


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("train.epochs=None", "a finite number"),
        ("train.epochs=nan", "a finite number"),
        ("train.epochs=1e400", "a finite number"),
        ("train.epochs", "a finite number"),
        ("train.batch_size=8.0", "an integer"),
        ("train.batch_size=True", "an integer"),
        ("train.batch_size=", "an integer"),
        ("model.pool.ceil=1", "True or False"),
        ("model.layers.conv1.padding=(1,'2')", "a tuple, each an integer"),
        ("model.layers.conv1.padding=None", "a tuple, each an integer"),
        ("model.layers.conv1.decay_epochs=('2',)", "None or a tuple, each a finite number"),
        ("model.layers.conv1.then=(1,)", "a tuple, each a string"),
        ("optim.decay_epochs=(1,None)", "a tuple, each a finite number"),
        ("seeds=(0,1.5)", "a tuple, each an integer"),
        ("seeds=" + "(" * 1000, "a tuple, each an integer"),
        ("arms.no_lrn.model.lrn.enabled=5", "True or False"),
    ],
)
def test_override_of_another_type_is_refused_before_anything_runs(override: str, rule: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(override.split('=')[0])}=.*: must be {rule}"):
        config_lib.load_study("configs/ablation_lrn.py", [f"--config.{override}"])


def test_last_of_repeated_overrides_counts() -> None:
    overrides = ["--config.seeds=(0,1)", "--config.train.epochs=2", "--config.seeds=(2,)", "--config.train.epochs=3"]
    study = config_lib.load_study("configs/ablation_lrn.py", overrides)
    assert (study.seeds, study.train.epochs) == ((2,), 3.0)


BASE = "from alexnet_jax.configs import base\n"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("", "--config=FILE: must define a function get_config"),
        ("get_config = 3", "--config=FILE: must define a function get_config"),
        ("x = 1\ndef get_config(:\n", "FILE:2: SyntaxError: "),
        ("x = 1\nprint(y)", "FILE:2: NameError: name 'y'"),
        ("import numpy as np\n\nimport nothing_of_this_name", "FILE:3: ModuleNotFoundError: "),
        ("x = 1\nimport broken", r"FILE:2: SyntaxError: .*\(broken.py, line 1\)"),
        ("x = '\udcff'", r"FILE:1: SyntaxError: \(unicode error\) 'utf-8' codec can't decode"),
        ("x = 1\ndef get_config():\n    return {}", "FILE:2: get_config must return a study, not any dict; "),
        ("def get_config():\n    pass", "FILE:1: get_config must return a study, not any NoneType; "),
        (
            "from ml_collections import ConfigDict\nget_config = lambda: ConfigDict({'model': 1})",
            "FILE:2: get_config must return a study, not any ConfigDict; return base.study",
        ),
        ("def get_config(scale):\n    pass", 'FILE:1: get_config must take a scale, or none; add ":SCALE" to --config'),
        ("def get_config():\n    return 1 / 0", "FILE:2: ZeroDivisionError: division by zero"),
        (BASE + "def get_config():\n    return base.study('embedded', 3)", "FILE:3: AttributeError: "),
        (BASE + "def get_config():\n    return base.study('small', {})", "FILE:3: scale=small: must be one of "),
        (
            BASE + "def get_config():\n    return base.study('embedded', {}, changes={'train.epoch': 1})",
            "FILE:3: unknown config key 'train.epoch'; did you mean train.epochs",
        ),
    ],
)
def test_mistake_in_a_config_file_is_answered_with_file_and_line(code: str, message: str, tmp_path: Path) -> None:
    file, path = tmp_path / "mine.py", list(sys.path)
    (tmp_path / "broken.py").write_text("x = = 3")
    file.write_bytes(code.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="^" + message.replace("FILE", re.escape(str(file)))) as error:
        config_lib.load_study(str(file))
    assert "\n" not in str(error.value)
    assert sys.path == path


def test_config_file_without_scales_says_so(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(BASE + "def get_config():\n    return base.study('embedded', {'a': {}})")
    assert list(config_lib.load_study(f"{tmp_path / 'mine.py'}").arms) == ["a"]
    with pytest.raises(ValueError, match=':2: get_config must take a scale, or none; leave out ":embedded" in --c'):
        config_lib.load_study(f"{tmp_path / 'mine.py'}:embedded")


def test_config_file_may_be_anywhere_and_import_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "elsewhere: 2"
    folder.mkdir()
    (folder / "my_arms.py").write_text("ARMS = {'first': {}}")
    code = "def get_config(scale='embedded'):\n    import my_arms\n    return base.study(scale, my_arms.ARMS)"
    (folder / "mine.py").write_text(BASE + code)
    for spec in (f"{folder}/mine.py", f"{folder}/mine.py:cifar10"):
        assert list(config_lib.load_study(spec).arms) == ["first"]
    monkeypatch.setenv("HOME", str(folder))
    assert config_lib.load_study("~/mine.py:cifar10").data.name == "cifar10"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.model.activation=rely", "model.activation='rely': must be one of relu, tanh"),
        ("--config.seeds=(1,1)", "seeds=(1, 1): must be"),
    ],
)
def test_value_that_cannot_work_ends_the_command_before_anything_is_written(
    override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit) as ended:
        run_verb("run", [STUDY, override, f"--workdir={tmp_path / 'study'}"])
    assert message in str(ended.value.code)
    assert "\n" not in str(ended.value.code)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("model.towers", 0, "from 1 to 1000"),
        ("model.activation", "rely", "one of relu, tanh, scaled_tanh, gelu, silu"),
        ("model.order", ("conv1", "conv9"), "a tuple of some of conv1, "),
        ("model.order", ("conv1", "conv1", "fc8"), "each once"),
        ("model.layers.conv2.features", 63, "a multiple of model.towers=2"),
        ("model.layers.conv3.sees", "both", "one of all, own"),
        ("model.layers.fc8.features", 10, "None (one for each class)"),
        ("model.layers.conv1.then", ("relu",), "activation, lrn, spatial_lrn, batch_norm, max_pool, avg_pool, dropout"),
        ("model.layers.conv1.then", ("batch_norm", "batch_norm"), "batch_norm at most once"),
        ("model.layers.conv1.padding", (1,), "pixels before and after"),
        ("model.layers.conv1.padding", (5, 0), "fewer than kernel=5"),
        ("model.dropout.rate", 1.0, "from 0 to less than 1"),
        ("data.crop", 29, "from 1 to data.image_size=28"),
        ("data.mean", (1.0, 2.0), "one for each of the 1 channels"),
        ("optim.name", "adam", "one of paper, sgd, adamw"),
        ("optim.schedule", "linear", "one of step, cosine"),
        ("optim.betas", (0.9,), "two, "),
        ("optim.learning_rate", -0.1, "more than 0"),
        ("optim.decay_epochs", (3.0, 2.0), "ascending"),
        ("train.batch_size", 4001, "at most the 4000 training images"),
        ("train.label_smoothing", 1.0, "from 0 to less than 1"),
        ("train.executor", "xmap", "one of auto, vmap, pmap"),
        ("train.layout", "columns", "one of towers, one_weird_trick"),
        ("eval.batch_size", 0, "from 1 to 1000000"),
        ("model.lrn.n", 10**12, "from 1 to 10000"),
        ("train.epochs", math.inf, "a finite number"),
        ("optim.momentum", math.nan, "a finite number"),
        ("model.layers.conv1.padding", (1, "1"), "a tuple, each an integer"),
        ("train.batch_size", True, "an integer"),
    ],
)
def test_value_that_cannot_work_is_named_with_its_rule(key: str, value: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}=") as error:
        train.open_run(set_field(run_config(), key, value))
    assert str(value) in str(error.value)
    assert rule in str(error.value)


NASTY: tuple[Any, ...] = (
    *(math.nan, math.inf, -math.inf, -1, 0, 0.5, 1, 1e12, 10**12, 10**400, True, False, None, "", "x", "1/0", b"x", {}),
    *((), (1,), (0.5,), (-1, -1), (math.nan, math.nan), (1e12, 1e12), (1, 10**12), (True, True), (None, None)),
    *(("x",), ("",), ((1, 1), (1, 1)), [1, 1], {1}, ([],), 1 + 1j),
)


def set_field(config: ConfigDict, key: str, value: Any) -> ConfigDict:
    """Return a config with a field of any value, as it may be in a file."""
    values = config.to_dict()
    *sections, name = key.split(".")
    functools.reduce(operator.getitem, sections, values)[name] = value
    return ConfigDict(values)


def every_field(config: ConfigDict) -> dict[str, Any]:
    """Return all fields and their values, but of layers that have the same as others."""
    flat = config_lib.flatten(config)
    return {key: value for key, value in flat.items() if not re.match(r"model\.layers\.(conv[2-5]|fc7)", key)}


def refusal(function: Callable[..., Any], *arguments: Any) -> str:
    """Return the message of the ValueError that a function raises; empty without one."""
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_every_value_of_every_field_is_accepted_or_refused_with_its_name() -> None:
    """No value ends in anything but ValueError, from a file or as a change; those accepted are finite, of the type."""
    config, study = run_config(), base.study("embedded", {"arm": {}})
    for key, default in every_field(config).items():
        for value in NASTY:
            message = refusal(config_lib.validate, set_field(config, key, value))
            assert re.match(r"$|[\w.]+(=.*)?: must be ", message, re.DOTALL), message
            if not message:
                assert type(value) is not bool or type(default) is bool, (key, value)
                numbers = [number for number in np.ravel(value) if isinstance(number, float)]
                assert np.isfinite(numbers).all(), (key, value)
            if key != "seed" and not isinstance(value, dict):
                message = refusal(config_lib.apply_changes, study, {key: value})
                assert not message or message.startswith(f"{key}="), message
    assert config_lib.flatten(config_lib.from_json(config_lib.as_json(study))) == config_lib.flatten(study)


def trace_step(setup: train.Setup) -> None:
    """Trace a run's training step, without compiling it."""
    config, data = setup.config, setup.config.data
    channels = setup.dataset.channels
    variables = model.shapes(config.model, setup.dataset.classes, (data.crop, data.crop, channels))
    state = jax.eval_shape(functools.partial(train.new_state, config), variables)
    shape = (config.train.batch_size, data.image_size, data.image_size, channels)
    batch = {"image": np.broadcast_to(np.uint8(0), shape), "label": np.zeros(shape[0], np.int32)}
    scalars = (np.uint32(config.seed), np.int32(1), optim.peak_learning_rate(config.optim))
    jax.eval_shape(train.make_train_step(setup), state, batch, random_statistics(config, channels), *scalars)


@pytest.mark.slow
def test_accepted_values_train() -> None:
    """Trace the training step with a sample of the values that `validate` accepts, unless `open_run` refuses them."""
    order = ("conv1", "conv3", "fc6", "fc8")  # `every_field` leaves the other layers out
    config = run_config(**TINY | {"train.executor": "vmap", "model.order": order})
    cases = [
        changed
        for key in every_field(config)
        for value in NASTY
        if not refusal(config_lib.validate, changed := set_field(config, key, value))
    ]
    assert len(cases) > 200
    traced = 0
    for changed in random.Random(0).sample(cases, 12):
        if not refusal(train.open_run, changed):
            trace_step(train.open_run(changed))
            traced += 1
    assert traced > 6


def test_decay_on_plateau_requires_a_validation_split() -> None:
    changes: dict[str, Any] = {"optim.plateau.patience": 2}
    with pytest.raises(ValueError, match=r"^data\.validation_split='': must be .*optim\.plateau\.patience"):
        config_lib.validate(run_config(**changes))
    config_lib.validate(run_config(**changes | {"data.validation_split": "1/20"}))


@pytest.mark.parametrize("name", NETWORKS)
def test_config_is_unchanged_by_json(name: str) -> None:
    config = network_config(name)
    again = config_lib.from_json(config_lib.as_json(config))
    assert config_lib.flatten(again) == config_lib.flatten(config)  # tuples are not equal to lists
    head = again.model.layers[again.model.order[-1]]
    assert head.features is None
    assert isinstance(again.model.order, tuple)


def test_run_of_an_earlier_version_has_the_defaults_of_later_fields() -> None:
    config = run_config()
    values = config_lib.as_json(config)
    del values["train"]["layout"], values["train"]["init_from"], values["model"]["batch_norm"]
    assert config_lib.flatten(config_lib.from_json(values)) == config_lib.flatten(config)


def test_arms_may_have_choices_of_their_own() -> None:
    """In a study's changes and on the command line, where the last one counts."""
    key = "tuning.choices_by_arm"
    study = base.study("embedded", {"relu": {}, "tanh": {}}, changes={key: {"tanh": (0.01,)}})
    assert study.tuning.choices_by_arm.to_dict() == {"tanh": (0.01,)}
    study = config_lib.load_study(
        "configs/ablation_lrn.py", [f"--config.{key}.lrn=0.1", f"--config.{key}.lrn=(0.2,0.3)"]
    )
    assert study.tuning.choices_by_arm.to_dict() == {"lrn": (0.2, 0.3)}
    with pytest.raises(ValueError, match=r"^tuning\.choices_by_arm\.lrn=3: must be .*a tuple"):
        config_lib.apply_changes(study, {f"{key}.lrn": 3})
    with pytest.raises(ValueError, match="unknown config key"):  # an arm cannot change it
        config_lib.run_config(base.study("embedded", {"relu": {f"{key}.relu": (0.1,)}}), "relu", 0)


def test_configs_of_version_1_are_refused() -> None:
    values = config_lib.as_json(run_config())
    for layer in values["model"]["layers"].values():
        layer["crosses"] = layer.pop("sees") == "all"
    with pytest.raises(ValueError, match=r"alexnet_jax 0\.1"):
        config_lib.from_json(values)
