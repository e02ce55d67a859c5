"""Compile the training step for TPUs, without one, and compare the program with the cost model.

    pip install --target FOLDER --no-deps "libtpu==0.0.42.*"     # the compiler that fits jax 0.10.2, 0.7 GB
    TPU_LIBRARY_PATH=FOLDER/libtpu/libtpu.so python experiments/scaling/tpu.py [--only=NETWORK,...] [--folder=...]

Writes a row for each network and executor to results_tpu.csv: the collectives of the compiled program and the bytes
that they make a device send, FLOPs and memory traffic as XLA counts them, and the memory that it reserves. The columns
`model_...` have what experiments/speed/cost.py says, and the bytes of parameters, velocities and images.
"""

import argparse
import collections
import dataclasses
import functools
import importlib.metadata
import itertools
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from alexnet_jax import model, optim, parallel, train
from alexnet_jax.tools import summary
from experiments.speed import baselines, cost

TOPOLOGY = "v5e:2x2"
# Without them the compiler looks for a TPU, or for a machine that has one.
VARIABLES = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
NETWORKS = {"embedded": 8, "paper": 128}  # of baselines.py, and their batch sizes
SHARDS = {"pmap": 1, "shard_map": 2}  # by executor
COLLECTIVE = re.compile(
    r"\s*(?:ROOT )?%\S+ = (.*?) (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(-start)?\("
)


@dataclasses.dataclass(frozen=True)
class DescribedExecutor(parallel.Executor):
    """An executor of the devices of a topology, which are not here."""

    @functools.cached_property
    def devices(self) -> list[jax.Device]:
        """The devices in use."""
        return list(topologies.get_topology_desc(TOPOLOGY, platform="tpu").devices)[: self.shards * self.towers]


def compile_step(config: ConfigDict, network: str, executor: parallel.Executor) -> Any:
    """Return the compiled training step of a run on an executor; only shapes are needed."""
    dataset, statistics = baselines.placeholder_dataset(config, network)
    size, crop, batch = config.data.image_size, config.data.crop, config.train.batch_size
    variables = model.shapes(config.model, dataset.classes, (crop, crop, dataset.channels))
    state = jax.eval_shape(functools.partial(train.new_state, config), variables)
    examples = {"image": np.broadcast_to(np.uint8(0), (batch, size, size, 3)), "label": np.zeros(batch, np.int32)}

    def described(tree: Any, *axes: str) -> Any:
        sharding = NamedSharding(executor.sharding.mesh, PartitionSpec(*axes))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding), tree)

    step: Any = train.make_train_step(train.Setup(config, dataset, executor))
    return step.lower(
        described(state, parallel.TOWER),
        described(examples, *[parallel.DATA] if executor.name == "shard_map" else []),
        *described((statistics, np.uint32(0), np.int32(1), optim.peak_learning_rate(config.optim))),
    ).compile()


def collectives(program: str) -> tuple[dict[str, int], float]:
    """Return how often each collective occurs in an optimised HLO program, and the bytes that a device sends in them.

    As in cost.py, a ring of n devices sends (n - 1) / n of what is gathered or scattered, and twice that of what is
    all-reduced. Scalars, which are metrics, have no bytes.

    Raises:
      ValueError: The program has a form of collective that this function does not know.
    """
    counts: collections.Counter[str] = collections.Counter()
    sent, computation = 0.0, ""
    for line in program.splitlines():
        computation = computation if line.startswith(" ") else line
        if not (found := COLLECTIVE.match(line)):
            continue
        result, name, start = found.groups()
        arrays = re.findall(r"[a-z]+(\d+)\[([\d,]+)\]", result)
        moved = sum(int(bits) // 8 * math.prod(map(int, shape.split(","))) for bits, shape in arrays)
        group = re.search(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])", line)
        if name == "collective-permute":
            sent += moved / 2 if start else moved  # the start returns its operand, too
        elif start or group is None:
            raise ValueError(f"{line.strip()[:200]}: must be synchronous, with replica_groups; extend collectives()")
        else:
            size = int(group[2]) if group[2] else len(group[1].split(","))
            if name == "all-reduce" and computation.startswith("%all-reduce-scatter"):
                name, moved = "reduce-scatter", moved / size  # a fusion, which keeps a slice of the sum
            sent += moved * {"all-reduce": 2 / size, "reduce-scatter": 1.0}.get(name, 1 / size) * (size - 1)
        counts[name] += 1
    return dict(counts), sent


def measure(network: str, name: str) -> dict[str, Any]:
    """Return the row of a network and an executor."""
    config = baselines.load_config(network, NETWORKS[network])
    executor = DescribedExecutor(name, config.model.towers, SHARDS[name])
    shape = (config.data.crop, config.data.crop, 3)
    rows = summary.rows(config.model, baselines.count_classes(network), shape)
    expected = cost.total(cost.step(rows, config, 3, len(executor.devices)))
    parameters = sum(row.parameters for row in rows) // executor.towers
    image_bytes = config.train.batch_size // executor.shards * config.data.image_size**2 * 3
    compiled = compile_step(config, network, executor)
    counts, sent = collectives(compiled.as_text())
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return {
        "network": network,
        "batch": config.train.batch_size,
        "executor": name,
        "devices": len(executor.devices),
        "collectives": ", ".join(f"{count} {collective}" for collective, count in sorted(counts.items())),
        "sent_bytes": round(sent),
        "model_sent_bytes": expected.sent,
        "flops": round(analysis["flops"]),
        "model_flops": expected.flops,
        "moved_bytes": round(analysis["bytes accessed"]),
        "model_moved_bytes": expected.moved,
        "argument_bytes": memory.argument_size_in_bytes,
        "model_argument_bytes": 2 * cost.FLOAT32 * parameters + image_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
    }


def main() -> None:
    """Compile the networks for each executor, and write their rows in the place of earlier ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(NETWORKS), help="networks, separated by commas")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="of results_tpu.csv")
    arguments = parser.parse_args()
    library = Path(os.environ.get("TPU_LIBRARY_PATH", ""))
    if not library.is_file():
        remedy = 'pip install --target FOLDER --no-deps "libtpu==0.0.42.*"'
        sys.exit(f"tpu.py: TPU_LIBRARY_PATH={library}: must be FOLDER/libtpu/libtpu.so; {remedy}")
    os.environ.update(VARIABLES)
    jax.config.update("jax_platforms", "cpu")
    sys.path.append(str(library.parents[1]))  # where its version is
    path, key = arguments.folder / "results_tpu.csv", ["network", "executor", "devices"]
    for network, name in itertools.product(arguments.only.split(","), SHARDS):
        rows = pd.DataFrame([measure(network, name)])
        print(rows.T.to_string(header=False), end="\n\n", flush=True)
        rows = pd.concat([pd.read_csv(path), rows]) if path.exists() else rows
        rows.drop_duplicates(key, keep="last").sort_values(key).to_csv(path, index=False)


if __name__ == "__main__":
    main()
