"""The scripts of experiments/scaling: their predictions, and what they do without a TPU and without measuring."""

import itertools
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from experiments.pages import insert
from experiments.scaling import measure, plan, tpu
from experiments.speed import cost
from support import REPOSITORY

FOLDER = REPOSITORY / "experiments" / "scaling"


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script as a user does."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_committed_predictions_are_those_of_the_script() -> None:
    table = plan.predict(plan.DEVICES)
    pd.testing.assert_frame_equal(pd.read_csv(FOLDER / "plan.csv"), table, check_exact=True)
    text = (FOLDER / "README.md").read_text()
    assert insert(text, plan.to_markdown(plan.DEVICES, table)) == text, "run experiments/scaling/plan.py"


@pytest.mark.parametrize("check", plan.CHECKS, ids=lambda check: f"{check.count} x {check.device}")
def test_predictions_are_near_the_published_times(check: plan.Check) -> None:
    """Those that calibrate nothing are predictions; that 8 devices share links is left out."""
    parts = plan.step_seconds(plan.DEVICES[check.device], check.layout, check.count, check.batch)
    tolerance = 1e-3 if check.used_for else {4: 0.02, 8: 0.15}[check.count]
    assert plan.hours(parts, check.batch) == pytest.approx(check.hours, rel=tolerance)


def test_all_layouts_of_a_network_do_the_same_arithmetic() -> None:
    batch = 1024
    flops = {
        count * cost.total(plan.step_costs(layout, count, batch, "float32")).flops
        for layout, count in itertools.product(("data", "hybrid"), (1, 2, 8))
    }
    assert flops == {(6 * 714_188_480 - 2 * 70_276_800) * batch}  # the first layer has no input gradient


def test_hybrid_layout_sends_gradients_of_convolutions_and_activations_of_dense_layers() -> None:
    count, batch = 8, 1024
    sent = cost.total(plan.step_costs("hybrid", count, batch, "float32")).sent
    convolutions = sum(
        size**2 * channels * features + features
        for size, channels, features in ((11, 3, 64), (5, 64, 192), (3, 192, 384), (3, 384, 256), (3, 256, 256))
    )
    all_reduced = 2 * 4 * convolutions * (count - 1) // count
    gathered = 4 * (2 * (9216 + 4096 + 4096) + 1000) * batch * (count - 1) // count  # logits: forwards only
    assert sent == pytest.approx(all_reduced + gathered, abs=5)  # each layer rounds down


def test_settings_change_the_assumptions() -> None:
    devices = plan.parse(["H100.price=2.5", "TPU v5e.fraction=0.5"])
    assert (devices["H100"].price, devices["TPU v5e"].fraction) == (2.5, 0.5)
    for wrong in ("H100.dtype=bfloat16", "H200.price=1", "H100.cost=1"):
        with pytest.raises(ValueError, match=f"--set={wrong}: must be DEVICE.FIELD=VALUE; use"):
            plan.parse([wrong])


def test_input_limits_devices_with_few_cores() -> None:
    device = plan.DEVICES["H100"]._replace(cores=1.0)
    parts = plan.step_seconds(device, "data", 2, 256)
    assert parts["input"] == 128 / plan.DECODED > parts["compute"] + parts["communication"]
    assert plan.hours(parts, 256) == pytest.approx(plan.IMAGES * plan.EPOCHS / (2 * plan.DECODED) / 3600)


PROGRAM = """HloModule jit__fun
%all-reduce-scatter (input: f32[2,128,500]) -> f32[64,8,128] {
  %all-reduce.1 = f32[128,8,128]{2,1,0:T(8,128)} all-reduce(%pad.21), channel_id=5, replica_groups={{0,1},{2,3}}
}
ENTRY %main (param: f32[1,48]) -> f32[] {
  %all-gather.23 = f32[4,10]{1,0:T(8,128)S(1)} all-gather(%fusion.10), replica_groups=[2,2]<=[4], dimensions={0}
  %all-reduce.2 = (f32[4]{0:T(128)S(1)}, bf16[5,4]{1,0}, /*index=2*/f32[]) all-reduce(%a), replica_groups={{0,1,2,3}}
  %collective-permute-start = (f32[1,8]{1,0}, f32[1,8]{1,0}, u32[]{:S(2)}) collective-permute-start(%slice.209)
  %collective-permute-done = f32[1,8]{1,0} collective-permute-done(%collective-permute-start)
  ROOT %reduce_scatter.47 = f32[1,20]{1,0} reduce-scatter(%fusion.58), replica_groups={{0,1},{2,3}}, dimensions={0}
}
"""


def test_collectives_of_a_program_are_counted_and_measured() -> None:
    counts, sent = tpu.collectives(PROGRAM)
    assert counts == {"reduce-scatter": 2, "all-gather": 1, "all-reduce": 1, "collective-permute": 1}
    assert sent == 4 * 128 * 8 * 128 / 2 + 4 * 40 / 2 + (16 + 40) * 2 * 3 / 4 + 32 + 80
    with pytest.raises(ValueError, match="must be synchronous"):
        tpu.collectives(PROGRAM.replace(" all-gather(", " all-gather-start("))


def test_committed_tpu_programs_send_what_the_cost_model_says() -> None:
    """XLA may pad what it sends; of FLOPs it leaves out those with the zeros of padding."""
    table = pd.read_csv(FOLDER / "results_tpu.csv")
    programs = sorted(zip(table.network, table.executor, strict=True))
    assert programs == sorted(itertools.product(tpu.NETWORKS, tpu.SHARDS))
    for row in table[table.network == "paper"].to_dict("records"):
        model = cost.total(plan.step_costs("towers", row["devices"], row["batch"], "float32"))
        columns = "model_sent_bytes", "model_flops", "model_moved_bytes"
        assert [row[name] for name in columns] == [model.sent, model.flops, model.moved]
        assert row["sent_bytes"] == pytest.approx(model.sent, rel=1e-3)
        assert 0.9 < row["flops"] / model.flops < 1


@pytest.mark.slow
def test_tpu_script_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "libtpu.so"))
    done = run_script("tpu", f"--folder={tmp_path}")
    assert done.returncode == 1
    assert 'libtpu.so: must be FOLDER/libtpu/libtpu.so; pip install --target FOLDER --no-deps "libtpu==' in done.stderr


class FakeProcess:
    """A baseline that takes as many seconds as it has devices, and twice the CPU seconds."""

    stopped = 0

    def __init__(self, devices: int, steps: int):
        self.stdin, self.stdout, self._line = self, self, f"{devices * steps} {2 * devices * steps}\n"

    def write(self, line: str) -> None:
        assert line == "go\n"

    def flush(self) -> None: ...

    def readline(self) -> str:
        return self._line

    def kill(self) -> None:
        FakeProcess.stopped += 1

    def communicate(self) -> None: ...


def test_measurements_are_appended_resumed_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[tuple[str, int]] = []

    def start(baseline: measure.Baseline, **environment: str) -> FakeProcess:
        devices = int(environment["JAX_NUM_CPU_DEVICES"])
        started.append((baseline.network, devices))
        return FakeProcess(devices, baseline.steps)

    monkeypatch.setattr(measure, "start", start)

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["measure.py", f"--folder={tmp_path}", "--only=small", *arguments])
        measure.main()
        return capsys.readouterr().out

    output = call("--dry_run", "--repetitions=2")
    assert "small: 14 measurements left" in output
    assert "network=small  devices=4  batch=256" in output
    assert not started
    call("--repetitions=1")
    path = tmp_path / "results.csv"
    lines = path.read_text().splitlines()
    assert len(lines) == 1 + 7
    assert FakeProcess.stopped == len(started) == 7
    path.write_text("\n".join(lines[:-1]) + "\n")  # the last measurement was interrupted
    output = call("--repetitions=2")
    table = pd.read_csv(path)
    assert list(table) == list(measure.COLUMNS)
    assert len(table) == len(table.drop_duplicates([*measure.CASE, "repetition"])) == 14
    assert (table.cpu_seconds == 2 * table.seconds).all()
    compared = measure.ratios(table)[["devices", "batch", "scaling", "n", "wall", "from", "to", "CPU"]]
    expected = [(2, 64, "strong"), (2, 128, "weak"), (4, 64, "strong"), (4, 256, "weak")]
    assert compared.to_numpy().tolist() == [[*case, 2, *[case[0]] * 4] for case in expected]
    assert "small: 0 measurements left" in call("--repetitions=2", "--dry_run")


@pytest.mark.slow
def test_measurements_run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "list_cases", lambda network: [(network, 4, 4)])
    monkeypatch.setattr(sys, "argv", ["measure.py", f"--folder={tmp_path}", "--only=embedded", "--repetitions=2"])
    measure.main()
    table = pd.read_csv(tmp_path / "results.csv")
    assert table[["network", "devices", "batch", "repetition"]].to_numpy().tolist() == [
        ["embedded", 4, 4, repetition] for repetition in range(2)
    ]
    assert (table.seconds > 0).all()
