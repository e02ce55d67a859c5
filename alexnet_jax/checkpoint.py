"""Checkpoints, verified on reading; and whole trained networks, read from and written to a run's folder."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from alexnet_jax.config import as_json
from alexnet_jax.data import statistics as statistics_lib
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.run_dir import RunDir, read_json, write_json


class Checkpoints:
    """The last few checkpoints of a run, saved by Orbax; a context manager."""

    def __init__(self, directory: Path, keep: int):
        self._directory = directory.absolute()
        handlers = {name: ocp.JsonCheckpointHandler() for name in ("progress", "checksums")}
        handlers["state"] = ocp.StandardCheckpointHandler()
        # In the background the arrays would be read while the next step reuses their memory.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
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
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            progress=ocp.args.JsonSave(progress),
            checksums=ocp.args.JsonSave(_checksums(state)),
        )
        if not self._manager.save(step, args=items):
            raise RuntimeError(f"the checkpoint of step {step} was not saved in {self._directory}")

    def restore(self, state: Any = None) -> tuple[Any, dict[str, Any]] | None:
        """Return state and progress of the latest checkpoint, or None if there is none.

        Args:
          state: arrays of the shapes and on the devices that the result should have; values do not matter. None:
            nested dictionaries of the saved arrays, on the first device.

        Raises:
          ValueError: the checkpoint is damaged, or belongs to another network.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        remedy = f"delete {self._directory / str(step)} to resume from the checkpoint before it, or from the start"
        try:
            shapes = self._saved_shapes(step) if state is None else jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            items = ocp.args.Composite(
                state=ocp.args.StandardRestore(shapes),
                progress=ocp.args.JsonRestore(),
                checksums=ocp.args.JsonRestore(),
            )
            restored = self._manager.restore(step, args=items)
        except Exception as error:  # Orbax has no type of its own for unreadable files
            raise ValueError(f"the checkpoint of step {step} cannot be read ({error}): {remedy}") from error
        # Orbax notices missing files, but not changed bytes.
        actual = _checksums(restored["state"])
        wrong = [name for name, checksum in restored["checksums"].items() if actual.get(name) != checksum]
        if wrong:
            raise ValueError(f"the checkpoint of step {step} is damaged, first in {wrong[0]}: {remedy}")
        return restored["state"], restored["progress"]

    def _saved_shapes(self, step: int) -> Any:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        saved = self._manager.item_metadata(step)["state"]
        return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding), saved.tree)


def _checksums(tree: Any) -> dict[str, int]:
    """Return the CRC-32 of every array, by its path in the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): zlib.crc32(np.asarray(leaf).tobytes())
        for path, leaf in leaves
    }


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
    config, dataset = run.read_config(), read_json(run.dataset_file)
    if config is None or dataset is None or not run.checkpoints.is_dir():
        raise ValueError(f"{run.path}: must be a run's folder, with config.json, dataset.json and checkpoints")
    with Checkpoints(run.checkpoints, config.train.keep_checkpoints) as checkpoints:
        restored = checkpoints.restore()
    if restored is None:
        raise ValueError(f"{run.path}: has no checkpoint yet; train the run first")
    state = jax.device_get(restored[0])
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
