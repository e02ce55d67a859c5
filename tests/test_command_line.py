"""The command `alexnet-jax VERB`: help, exit statuses, and studies from any folder."""

import os
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from alexnet_jax import __main__, __version__
from alexnet_jax.configs import base
from alexnet_jax.run_dir import StudyDir, write_json

FLAGS = {
    "run": (
        *("--config", "--workdir", "--init_from", "--new_head", "--extend", "--dry_run", "--only", "--seeds"),
        *("--submit", "--submit_options"),
        *("--cluster", "--coordinator", "--num_processes", "--process_id", "--start_timeout"),
    ),
    "launch": ("--processes", "--devices", "--grace", "COMMAND"),
    "prepare": (
        *("FOLDER", "--data_dir", "--manual_dir", "--size"),
        *("--name", "--hold_out", "--skip_bad", "--max_pixels"),
    ),
    "evaluate": ("--run", "--views", "--data_dir", "--split", "--output"),
    "predict": ("IMAGE", "--run", "--config", "--views", "--neighbours", "--data_dir", "--output"),
    "summary": ("--config", "--classes", "--channels"),
    "convert": ("SOURCE", "TARGET", "--config"),
    "report": ("study",),
}
LRN = "--config=configs/ablation_lrn.py"


def commands(folder: Path, *calls: tuple[str, ...]) -> list[subprocess.CompletedProcess[str]]:
    """Run `python` with each tuple of arguments in a folder, two at a time: most of the time is the start."""

    def run(arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, calls))


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """Run the command in this process, and return the exit status it ends with."""
    monkeypatch.setattr(sys, "argv", ["alexnet-jax", *arguments])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    return ended.value.code


def test_help_lists_all_verbs(tmp_path: Path) -> None:
    help_, version, nothing, unknown = commands(
        tmp_path,
        ("-m", "alexnet_jax", "--help"),
        ("-m", "alexnet_jax", "--version"),
        ("-m", "alexnet_jax"),
        ("-m", "alexnet_jax", "rnu"),
    )
    assert (help_.returncode, version.returncode) == (0, 0)
    listed = re.findall(r"^  (\w+) +\w", help_.stdout.partition("verbs:")[2].partition("\n\n")[0], re.MULTILINE)
    assert listed == list(FLAGS)
    assert version.stdout == f"alexnet_jax {__version__}\n"
    assert (nothing.returncode, nothing.stdout) == (0, help_.stdout)
    assert unknown.returncode == 2
    assert "'rnu'" in unknown.stderr
    assert "Traceback" not in unknown.stderr


@pytest.mark.parametrize("verb", FLAGS)
def test_help_of_a_verb_explains_its_flags(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, verb, "--help") == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: alexnet-jax {verb} ")
    mentioned = set(re.findall(r"--\w+", printed.partition("usage:")[2].partition("\n\n")[0]))
    assert mentioned == {flag for flag in FLAGS[verb] if flag.startswith("--")}
    options = printed[printed.index("\noptions:") :] + printed.partition("positional arguments:")[2]
    for name in FLAGS[verb]:
        assert re.search(rf"^  (\S+\|)?{name}\b", options, re.MULTILINE), name


@pytest.mark.parametrize("verb", FLAGS)
def test_unknown_flag_is_a_usage_error(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 2; an abbreviation or a slip is not taken for another flag."""
    required = {
        "run": [LRN, "--dry_run"],
        "launch": ["--processes=2"],
        "prepare": ["x"],
        "evaluate": ["--run=x"],
        "predict": ["--run=x", "x"],
        "summary": [LRN],
        "convert": ["x", "y"],
        "report": ["x"],
    }
    arguments = required[verb]
    assert run_main(monkeypatch, verb, *arguments, "--confg=1") == 2
    assert "unknown argument '--confg=1'" in capsys.readouterr().err
    if verb not in ("run", "summary", "convert"):
        assert run_main(monkeypatch, verb, *arguments, "--config.seed=1") == 2
        assert "--config.seed=1: needs --config" in capsys.readouterr().err


def test_bad_input_is_one_line_and_exit_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All in this process, where Python has not yet printed the text that it exits with, and one as a command."""
    monkeypatch.chdir(tmp_path)
    calls = {
        ("run", LRN, "--seeds=0-5"): "--seeds=0-5: must be ",
        ("launch", "--processes=2", "run"): "COMMAND='run': must be -- and the verb run",
        ("prepare", "photos", "--size=0"): "--size=0: must be ",
        ("evaluate", "--run=nowhere"): "nowhere",
        ("predict", "--run=nowhere", "image.jpg"): "nowhere",
        ("summary", "--config=nowhere.py"): "--config=nowhere.py: must be a file",
        ("convert", "nowhere.npy", "target.npy"): "nowhere.npy",
        ("report", "nowhere"): "nowhere is not a study's folder",
    }
    assert {verb for verb, *_ in calls} == set(FLAGS)
    for (verb, *rest), message in calls.items():
        sentence = run_main(monkeypatch, verb, *rest)
        assert isinstance(sentence, str)
        assert re.fullmatch(f"alexnet-jax {verb}: .*", sentence)
        assert message in sentence
        assert capsys.readouterr().out == ""
    (done,) = commands(tmp_path, ("-m", "alexnet_jax", verb, *rest))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{sentence}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_studies_run_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The package's own studies, by both commands, and a user's own file: the example of `base.study`."""
    assert base.study.__doc__ is not None
    example = textwrap.dedent(re.split(r"A whole study:\n", base.study.__doc__)[1].partition("    Args:")[0])
    assert len(example.strip().splitlines()) <= 14
    (tmp_path / "my_study.py").write_text(example)
    as_verb, as_module = commands(
        tmp_path,
        ("-m", "alexnet_jax", "run", LRN, "--dry_run", "--seeds=0:1"),
        ("-m", "alexnet_jax.main", LRN, "--dry_run", "--seeds=0:1"),
    )
    assert as_verb.returncode == 0, as_verb.stderr
    assert re.findall(r"│ (\w+)/seed_(\d) ", as_verb.stdout) == [
        ("lrn", "0"),
        ("no_lrn", "0"),
        ("lrn_after_pooling", "0"),
    ]
    assert as_module.stdout == as_verb.stdout
    monkeypatch.chdir(tmp_path)
    __main__.run_verb("run", ["--config=my_study.py", "--dry_run", "--only=wide_and_slow"])
    printed = capsys.readouterr().out
    assert re.findall(r"│ (\w+)/seed_(\d) ", printed) == [("wide_and_slow", str(seed)) for seed in range(5)]
    assert "my_study" in printed
    sentence = run_main(monkeypatch, "run", "--config=my_study.py:tiny", "--dry_run")
    assert re.match(r"alexnet-jax run: my_study.py:\d+: scale=tiny: must be one of embedded, ", str(sentence))
    assert [path.name for path in tmp_path.iterdir()] == ["my_study.py"]


@pytest.mark.parametrize("printed", ["print('text')", "print('text' * 10**6)", "sys.exit(print('help'))"])
def test_closed_pipe_fails_no_verb(printed: str, tmp_path: Path) -> None:
    """Neither at once, nor when Python would flush at its end."""
    (tmp_path / "verb.py").write_text(f"import sys\nadd_arguments = lambda parser: None\nmain = lambda _: {printed}")
    code = "from alexnet_jax import __main__ as m; m.VERBS['v'] = m.Verb('verb', ''); m.run_verb('v', [])"
    read, write = os.pipe()
    os.close(read)
    call = [sys.executable, "-c", code]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        call, cwd=tmp_path, env=environment, stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


# Ctrl-C as soon as the preparation has read some images.
INTERRUPTED = """
import signal, sys
from alexnet_jax.__main__ import main
from alexnet_jax.data import image_io
encode = image_io.encode_jpeg
count = 0

def interrupt(*arguments):
    global count
    count += 1
    if count == 10:
        signal.raise_signal(signal.SIGINT)
    return encode(*arguments)

image_io.encode_jpeg = interrupt
main()
"""


@pytest.mark.slow
@pytest.mark.usefixtures("default_handlers")
def test_ctrl_c_in_prepare_ends_in_a_word_and_makes_nothing(photos: Path, tmp_path: Path) -> None:
    (done,) = commands(tmp_path, ("-c", INTERRUPTED, "prepare", str(photos), "--data_dir=sets", "--size=32"))
    assert done.returncode != 0
    assert done.stderr.startswith("alexnet-jax prepare: interrupted; nothing was made\n")
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "sets" / "photos" / "32px").iterdir())


REPORT = """
import sys
from alexnet_jax.__main__ import main
main()
assert not {"jax", "flax", "tensorflow"} & set(sys.modules)
"""


def test_report_does_without_jax(tmp_path: Path) -> None:
    study = StudyDir(tmp_path / "study")
    description = {"name": "s", "reported": "mnist5k, test", "arms": {"a": {}}, "sizes": {}, "seeds": [0], "claims": []}
    write_json(study.study_file, description | {"tuning": None})
    (done,) = commands(tmp_path, ("-c", REPORT, "report", "study"))
    assert done.returncode == 0, done.stderr
    assert "1 run(s) not started" in done.stdout
    assert study.report_file.exists()


def test_output_is_in_any_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = StudyDir(tmp_path / "study")
    description = {"name": "s", "reported": "\xe9t\xe9", "arms": {"a": {}}, "sizes": {}, "seeds": [0], "claims": []}
    write_json(study.study_file, description | {"tuning": None})
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    (done,) = commands(tmp_path, ("-m", "alexnet_jax", "report", "study"))
    assert done.returncode == 0, done.stderr
    assert r"top-1 error on \xe9t\xe9, %" in done.stdout
    assert "\xe9t\xe9" in study.report_file.read_text("utf-8")
