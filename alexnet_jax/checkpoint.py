"""Checkpoints: saved by Orbax, verified when they are read; and a whole run read from its folder."""

import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from alexnet_jax import config, pixels, records
from alexnet_jax.pixels import Pixels


class Checkpoints:
    """The last few checkpoints of a run; a context manager."""

    def __init__(self, directory: Path, keep: int):
        """
        Args:
          keep: how many to keep; older ones are deleted.
        """
        self._directory = directory.absolute()
        self._manager = ocp.CheckpointManager(
            self._directory,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "progress": ocp.JsonCheckpointHandler(),
                "checksums": ocp.JsonCheckpointHandler(),
            },
            # In the background the arrays would be read while the next step reuses their memory.
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._manager.close()

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Saves; returns once it is written.

        Args:
          step: how many steps are done.
          state: a pytree of arrays.
          progress: what else the run needs to go on, as JSON.
        """
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                progress=ocp.args.JsonSave(progress),
                checksums=ocp.args.JsonSave(_checksums(state)),
            ),
        )
        if not saved:
            raise RuntimeError(f"the checkpoint of step {step} was not saved in {self._directory}")

    def restore(self, state: Any = None) -> tuple[Any, dict[str, Any]] | None:
        """The latest checkpoint, or None where there is none.

        Args:
          state: arrays of the shapes and on the devices the result should have; the values do not matter. Without
            it: nested dictionaries of whatever was saved, on the first device.

        Raises:
          ValueError: the checkpoint is damaged, or is of another net.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        remedy = f"delete {self._directory / str(step)} to go on from the checkpoint before it, or from the start"
        try:
            shapes = self._saved_shapes(step) if state is None else jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(shapes),
                    progress=ocp.args.JsonRestore(),
                    checksums=ocp.args.JsonRestore(),
                ),
            )
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
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): zlib.crc32(np.asarray(leaf).tobytes())
        for path, leaf in leaves
    }


class Weights(NamedTuple):
    """A net with its weights.

    Attributes:
      config: of a run.
      classes: that it tells apart.
      params: by layer, then ``"kernel"`` and ``"bias"``, each with a leading tower axis.
      pixels: what these weights want to be subtracted; None where no training images have been seen.
    """

    config: ConfigDict
    classes: int
    params: dict[str, dict[str, Any]]
    pixels: Pixels | None = None

    def known_pixels(self) -> Pixels:
        """What is to be subtracted from the pixels.

        Raises:
          ValueError: it is to be measured on training images, and they have not been seen.
        """
        if self.pixels is not None:
            return self.pixels
        if self.config.data.subtract != "mean":
            raise ValueError(
                f"data.subtract={self.config.data.subtract}: is measured when training begins, and these weights come "
                "from elsewhere: give --config.data.subtract=mean --config.data.mean=(red, green, blue)"
            )
        channels = self.params[self.config.model.order[0]]["kernel"].shape[-2]
        return pixels.uniform(self.config.data, channels)


def read_run(workdir: Path) -> Weights:
    """The latest checkpoint of a run, whichever devices it was trained on.

    Raises:
      ValueError: there is no checkpoint, or it is damaged.
    """
    values, dataset = (records.read_json(workdir / name) for name in ("config.json", "dataset.json"))
    if values is None or dataset is None or not (workdir / "checkpoints").is_dir():
        raise ValueError(f"{workdir}: is no run's folder; that has config.json, dataset.json and checkpoints")
    run = config.from_json(values)
    with Checkpoints(workdir / "checkpoints", run.train.keep_checkpoints) as checkpoints:
        restored = checkpoints.restore()
    if restored is None:
        raise ValueError(f"{workdir}: has no checkpoint yet")
    return Weights(run, dataset["classes"], jax.device_get(restored[0]["params"]), pixels.read(workdir / pixels.FILE))
