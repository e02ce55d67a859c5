"""Checkpoints, verified on reading; and whole trained networks, read from and written to a run's folder."""

import json
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from alexnet_jax import processes
from alexnet_jax.config import as_json
from alexnet_jax.data import statistics as statistics_lib
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.run_dir import DamagedFileError, RunDir, write_json


class Checkpoints:
    """The last few checkpoints of a run, saved by Orbax; a context manager.

    Everything in a checkpoint has a checksum, which is tied to its step; each tower's part of an array has its own. The
    processes of a job save and restore together, and all of them must see the folder.
    """

    def __init__(self, directory: Path, keep: int | None = None):
        """Open a run's checkpoints.

        Args:
          keep: how many checkpoints to keep; None only reads them, which is possible while the run trains.
        """
        self.damaged: list[str] = []  # a message for each checkpoint that `restore` set aside
        self._directory, self._writes = directory.absolute(), keep is not None
        handlers = {name: ocp.JsonCheckpointHandler() for name in ("progress", "checksums")}
        handlers["state"] = ocp.StandardCheckpointHandler()
        # In the background the arrays would be read while the next step reuses their memory.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=False, enable_async_checkpointing=False)
        if processes.count() > 1:  # named, so that Orbax's barriers have time limits; readers wait for nobody
            active = set(range(processes.count())) if self._writes else {jax.process_index()}
            options.multiprocessing_options = ocp.options.MultiprocessingOptions(min(active), active)
        if self._writes:
            if processes.is_first():
                self._directory.mkdir(parents=True, exist_ok=True)
                # Of processes that were killed while they saved; Orbax's own option may leave them when it is closed.
                for unfinished in self._directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                    shutil.rmtree(unfinished)
            processes.barrier("unfinished checkpoints")
        self._manager = ocp.CheckpointManager(self._directory, item_handlers=handlers, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Save a checkpoint after a number of finished steps; return when it is on disk.

        Args:
          state: a pytree of arrays.
          progress: what else the run needs to resume, as JSON.
        """
        checksums = _checksums_without_arrays(step, progress, state) | processes.merge(_checksums_by_tower(state))
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            progress=ocp.args.JsonSave(progress),
            checksums=ocp.args.JsonSave(checksums),
        )
        if not self._manager.save(step, args=items):
            raise RuntimeError(f"the checkpoint of step {step} was not saved in {self._directory}")

    def restore(self, state: Any = None) -> tuple[Any, dict[str, Any]] | None:
        """Return state and progress of the latest checkpoint, or None if there is none.

        A damaged checkpoint is set aside, as `damaged_STEP`, and the one before it is used, unless the checkpoints
        were opened only to be read.

        Args:
          state: arrays of the shapes and on the devices that the result should have; values do not matter. None:
            nested dictionaries of the saved arrays, on the host.

        Raises:
          ValueError: no checkpoint is left that is not damaged, or the checkpoint belongs to another network.
          OSError: the files cannot be read, whatever is in them.
        """
        reasons: dict[int, DamagedFileError] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                saved, progress = self._read(step)
            except DamagedFileError as error:
                if not self._writes:
                    raise DamagedFileError(
                        f"{error}; delete the run's result.json and re-run the study's command to train it again from "
                        "the checkpoint before"
                    ) from error
                reasons[step] = error
                continue
            restored = saved if state is None else _like(state, saved, self._directory / str(step))
            for damaged, reason in reasons.items():
                self._set_aside(damaged)
                self.damaged.append(f"{reason}: set aside as damaged_{damaged}; resumes from step {step}")
            return restored, progress
        if reasons:
            raise ValueError(
                f"{'; '.join(map(str, reasons.values()))}: delete {self._directory} to train from the start"
            )
        return None

    def _read(self, step: int) -> tuple[Any, dict[str, Any]]:
        """Return state, as nested dictionaries on the host, and progress; raise DamagedFileError if they changed."""
        folder = self._directory / str(step)
        try:
            items = ocp.args.Composite(progress=ocp.args.JsonRestore(), checksums=ocp.args.JsonRestore())
            restored = self._manager.restore(step, args=items)
            progress, expected = restored["progress"], restored["checksums"]
            saved = self._manager.item_metadata(step)["state"].tree
            state: Any = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), saved)
            actual = _checksums_without_arrays(step, progress, state)
            if actual.keys().isdisjoint(expected):  # version 0.2.0 had checksums of whole arrays only
                expected = actual | expected
            wrong = [name for name in actual if actual[name] != expected.get(name)]
            if not wrong:  # the shapes are right, and so is the memory that the arrays need
                items = ocp.args.Composite(state=ocp.args.StandardRestore(state))
                state = self._manager.restore(step, args=items)["state"]
                of_arrays = _checksums_by_tower(state)
                if of_arrays.keys().isdisjoint(expected):
                    of_arrays = {path: zlib.crc32(array.tobytes()) for path, array in _leaves(state).items()}
                actual |= of_arrays
                wrong = [name for name in actual | expected if actual.get(name) != expected.get(name)]
        except MemoryError:
            raise
        except Exception as error:  # Orbax has no type of its own for unreadable files
            for path in folder.rglob("*"):
                if path.is_file():
                    path.read_bytes()  # raises OSError where the disk is at fault, and not what is in the file
            reason = str(error).partition(" [tensorstore_spec")[0]  # which has pages
            raise DamagedFileError(f"{folder}: is damaged ({reason})") from error
        if wrong:
            raise DamagedFileError(f"{folder}: is damaged, first in {wrong[0]}")
        return state, progress

    def _set_aside(self, step: int) -> None:
        """Rename the folder of a damaged checkpoint, so that Orbax does not see it."""
        if processes.is_first():
            aside = self._directory / f"damaged_{step}"
            shutil.rmtree(aside, ignore_errors=True)
            (self._directory / str(step)).rename(aside)
        processes.barrier("damaged checkpoint")
        self._manager.reload()


def _leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by their paths, which are the same for nested dictionaries and for a `State`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _checksums_by_tower(state: Any) -> dict[str, int]:
    """Return the CRC-32 of each tower's part of every array, as far as this process has them, by path and tower."""
    return {
        f"{path}[{first + number}]": zlib.crc32(values.tobytes())
        for path, leaf in _leaves(state).items()
        for first, part in processes.local_shards(leaf)
        for number, values in enumerate(part)
    }


def _checksums_without_arrays(step: int, progress: dict[str, Any], state: Any) -> dict[str, int]:
    """Return the CRC-32 of progress and step, and of the paths, shapes and types of the arrays."""
    shapes = {path: (leaf.shape, str(leaf.dtype)) for path, leaf in _leaves(state).items()}
    described = {"progress": [step, progress], "shapes": sorted(shapes.items())}
    return {name: zlib.crc32(json.dumps(value, sort_keys=True).encode()) for name, value in described.items()}


def _like(state: Any, saved: Any, folder: Path) -> Any:
    """Return saved arrays in the structure and on the devices of a state; raise ValueError if their shapes differ."""
    arrays, wanted = _leaves(saved), _leaves(state)
    for path in wanted | arrays:
        shape, needed = (tree[path].shape if path in tree else "nothing" for tree in (arrays, wanted))
        if shape != needed:
            raise ValueError(
                f"{folder}: must be a checkpoint of this network, and has {shape} for {path} instead of {needed}; "
                "choose another --workdir, or delete the run's folder"
            )
    placed = [
        processes.put(arrays[path], leaf.sharding) if isinstance(leaf, jax.Array) else arrays[path]
        for path, leaf in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(state), placed)


class TrainedNetwork(NamedTuple):
    """A network with its weights."""

    config: ConfigDict  # of a run
    classes: int
    variables: dict[str, Any]  # "params" and "batch_stats", if there are any; each array has a leading tower axis
    statistics: Statistics | None = None  # None where no training images were measured
    class_names: Sequence[str] | None = None  # None where they are not known

    @property
    def channels(self) -> int:
        """Channels of the images: 1 (grey) or 3 (RGB)."""
        return self.variables["params"][self.config.model.order[0]]["kernel"].shape[-2]

    def known_statistics(self) -> Statistics:
        """Return the dataset statistics, from the config if they were not measured; raise ValueError without either."""
        if self.statistics is not None:
            return self.statistics
        if self.config.data.subtract != "mean":
            raise ValueError(
                f"data.subtract={self.config.data.subtract}: must be 'mean' for weights from elsewhere, as nothing was "
                "measured; give --config.data.subtract=mean --config.data.mean=(red, green, blue)"
            )
        return statistics_lib.uniform(self.config.data, self.channels)


def load_run(workdir: Path | str) -> TrainedNetwork:
    """Load the network of a run's latest checkpoint, whichever devices it was trained on.

    Raises:
      ValueError: the folder holds no run with a checkpoint, or the checkpoint is damaged.
    """
    run = RunDir(workdir)
    config, dataset = run.read_config(), run.read_dataset()
    if config is None or dataset is None or not run.checkpoints.is_dir():
        raise ValueError(f"{run.path}: must be a run's folder, with config.json, dataset.json and checkpoints")
    with Checkpoints(run.checkpoints) as checkpoints:
        restored = checkpoints.restore()
    if restored is None:
        raise ValueError(f"{run.path}: must have a checkpoint; train the run first")
    state, _ = restored
    variables = {name: state[name] for name in ("params", "batch_stats") if state.get(name)}
    statistics = statistics_lib.read(run.statistics_file)
    return TrainedNetwork(config, dataset["classes"], variables, statistics, dataset.get("class_names"))


def save_run(run: RunDir, network: TrainedNetwork, state: Any, progress: dict[str, Any]) -> None:
    """Write a network as a run that has done no step, in a new folder: training resumes from it.

    Args:
      state: the training state with the network's variables, as from `train.new_state`.
      progress: as JSON, of a run at step 0.
    """
    if run.path.exists():
        raise ValueError(f"{run.path}: must be a new folder, and exists; name another one, or delete it")
    write_json(run.config_file, as_json(network.config))
    names = {} if network.class_names is None else {"class_names": list(network.class_names)}
    write_json(run.dataset_file, {"classes": network.classes} | names)
    if network.statistics is not None:
        statistics_lib.write(run.statistics_file, network.statistics)
    with Checkpoints(run.checkpoints, keep=1) as checkpoints:
        checkpoints.save(0, state, progress)
