"""One process of a job of test_processes.py: trains, evaluates, saves and restores; process 0 writes what came out.

python tests/job.py FOLDER [--restore=FOLDER] [flags of `processes.add_arguments`]
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax import optim, parallel, processes, train
from alexnet_jax.checkpoint import Checkpoints
from alexnet_jax.data.datasets import Arrays
from alexnet_jax.evaluate import evaluate, make_predictor
from support import TINY, noise_batch, noise_setup, random_statistics, run_config

STEPS = 3
LAYERS = ("conv1", "conv3", "fc6", "fc8")  # all but conv1 see all towers
# Initial values that let every image count; batches that eight devices can share; dropout and crops at random.
CHANGES: dict[str, Any] = TINY | {
    "model.order": LAYERS,
    **{f"model.layers.{name}.weight_std": 0.2 for name in LAYERS},
    "train.batch_size": 8,
    "eval.batch_size": 12,
}


def job_config(**changes: Any) -> ConfigDict:
    """Return the config of a run of the job, with changes by dotted keys."""
    return run_config(**CHANGES | changes)


def save_arrays(file: Path, tree: Any) -> None:
    """Write the arrays of a tree, as all processes together have them, by their paths; process 0 writes."""
    leaves = jax.tree_util.tree_leaves_with_path(processes.fetch(tree))
    if processes.is_first():
        np.savez(file, **{jax.tree_util.keystr(path): leaf for path, leaf in leaves})


def train_steps(setup: train.Setup) -> train.State:
    """Return the state after `STEPS` steps on random batches."""
    config, executor = setup.config, setup.executor
    step, rows = train.make_train_step(setup), executor.local_rows(config.train.batch_size)
    statistics = random_statistics(config, setup.dataset.channels)
    state = executor.place(train.init_state(setup))
    for number in range(1, STEPS + 1):
        batch = {key: rows_of_all[rows] for key, rows_of_all in noise_batch(config, 8, seed=number).items()}
        state = step(
            state, batch, statistics, np.uint32(config.seed), np.int32(number), optim.peak_learning_rate(config.optim)
        )
    return state


def evaluate_images(setup: train.Setup, state: train.State) -> Any:
    """Return the outcomes of 21 images, which no number of processes divides."""
    images = Arrays(*noise_batch(setup.config, 21).values())
    predictor = make_predictor(setup.config, setup.dataset.classes, setup.executor)
    predict = functools.partial(predictor, state.variables, random_statistics(setup.config, setup.dataset.channels))
    return evaluate([predict], images, setup.config, setup.executor)._asdict()


def main() -> None:
    """Do all of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--restore", type=Path)
    processes.add_arguments(parser)
    arguments = parser.parse_args()
    processes.initialize(arguments)
    parallel.initialize(2)
    setup = noise_setup(job_config())
    state = train_steps(setup)
    save_arrays(arguments.folder / "state.npz", state)
    save_arrays(arguments.folder / "outcomes.npz", evaluate_images(setup, state))
    with Checkpoints(arguments.folder / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(STEPS, state, {"process": processes.count()})
    if arguments.restore:
        template = setup.executor.place(train.init_state(setup))
        with processes.first_alone("restore"), Checkpoints(arguments.restore / "checkpoints") as checkpoints:
            restored = checkpoints.restore(template)  # which needs no other process
        assert restored is not None
        save_arrays(arguments.folder / "restored.npz", restored[0])


if __name__ == "__main__":
    main()
