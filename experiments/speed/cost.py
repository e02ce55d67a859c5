"""What a training step costs on paper: the arithmetic, memory traffic and exchange of one device, and their time.

An estimate from shapes alone. Products with weights are counted in FLOPs and bytes, what follows them and the update in
bytes. Left out: augmentation, the loss, and copies that gathering makes within a device.
"""

import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from alexnet_jax import layers

if TYPE_CHECKING:
    from alexnet_jax.summary import Row

FLOAT32 = 4  # bytes: parameters, their gradients and velocities, and logits, whatever `model.dtype` is


class Cost(NamedTuple):
    """Of one layer, and of what follows its weights, in one training step on one device.

    Attributes:
      name: of the layer.
      forward: FLOPs, 2 for each multiply-add; those with the zeros of padding count, too.
      input_gradient: FLOPs, as many; 0 in the first layer, as images need no gradient.
      weight_gradient: FLOPs, as many.
      moved: bytes read from memory and written to it.
      exchanged: bytes sent to other devices; as many are received.
    """

    name: str
    forward: int
    input_gradient: int
    weight_gradient: int
    moved: int
    exchanged: int

    @property
    def flops(self) -> int:
        """FLOPs of the three products."""
        return self.forward + self.input_gradient + self.weight_gradient


class Peak(NamedTuple):
    """The most that one device can do: FLOPs, bytes to and from its memory, and bytes sent, each per second."""

    flops: float
    bandwidth: float
    link: float


def step(rows: list["Row"], config: ConfigDict, channels: int, devices: int) -> list[Cost]:
    """The cost of every layer, on devices as ``train.executor="auto"`` uses them.

    Memory: each operation reads each operand and writes each result once; what a compiler fuses moves less. Of the map
    that a layer sees, the map that it makes and its parameters, each of its products has two for operands and one for
    result. The gradient of what follows reads that of its result, and its input. The update (``optim.sgd``) reads
    parameters, gradients and velocities, and writes the first and the last.

    Exchange: towers gather maps, and add up and scatter their gradients on the way back. Devices that share a batch add
    up the gradients of parameters. In a ring of n, each sends (n - 1) / n of what is gathered, as much of what is added
    up and scattered, and twice that of a sum that all need (Patarasuk and Yuan, 2009). A normalisation that crosses
    sends a border to both sides, and its gradient back.

    Args:
      rows: of ``summary.rows``.
      config: of a run.
      channels: of the images.
      devices: 1, for all towers; or several, equally many for each tower, which share the batch.

    Raises:
      ValueError: some towers would have more devices than others.
    """
    towers, lrn = config.model.towers, config.model.lrn.enabled
    if devices > 1 and devices % towers:
        raise ValueError(
            f"--devices={devices}: must be 1, where all towers are, or a multiple of model.towers={towers}, each "
            f"having as many; use {devices // towers * towers or 1} or {(devices // towers + 1) * towers}"
        )
    shares, own_towers = max(1, devices // towers), towers if devices == 1 else 1
    images = -(-config.train.batch_size // shares)  # where it cannot be divided, shares are filled up
    value_bytes = jnp.dtype(config.model.dtype).itemsize
    off = {"lrn": not lrn, "spatial_lrn": not lrn, "dropout": config.model.dropout.rate == 0}
    pool = partial(layers.max_pool, **config.model.pool)
    costs, maps = [], (config.data.crop, config.data.crop, channels)
    for row in rows:
        back = int(row is not rows[0])  # whether what the layer sees has a gradient
        products, values = 2 + back, 0
        if row.kind:
            seen = math.prod(maps) * (towers if row.crosses else 1)
            maps = (*row.maps[:-1], row.maps[-1] // towers)
            values = products * (seen + math.prod(maps))
        for operation in row.then:
            before = maps
            if operation in ("max_pool", "avg_pool"):
                maps = jax.eval_shape(pool, jax.ShapeDtypeStruct((1, *maps), jnp.float32)).shape[1:]
            values += 0 if off.get(operation) else 3 * math.prod(before) + 2 * math.prod(maps)
        gathered, borders = row.exchanged[: row.crosses], row.exchanged[row.crosses :]
        given = 0 if devices == 1 else (1 + back) * (towers - 1) * sum(gathered) + 2 * 2 * sum(borders)
        given_bytes = images * (value_bytes if row.kind else FLOAT32) * given
        parameter_bytes = FLOAT32 * row.parameters // towers * own_towers
        flops = 2 * row.multiply_adds // towers * own_towers * images
        costs.append(
            Cost(
                name=row.name,
                forward=flops,
                input_gradient=back * flops,
                weight_gradient=flops,
                moved=own_towers * images * value_bytes * values + (products + 5) * parameter_bytes,
                exchanged=given_bytes + 2 * (shares - 1) * parameter_bytes // shares,
            )
        )
    return costs


def total(costs: list[Cost]) -> Cost:
    """Of all layers together."""
    return Cost("total", *(sum(column) for column in zip(*(cost[1:] for cost in costs), strict=True)))


def seconds(costs: list[Cost], peak: Peak) -> float:
    """Of layers in turn: the roofline of each (Williams, Waterman and Patterson, 2009), and then its exchange."""
    return sum(max(cost.flops / peak.flops, cost.moved / peak.bandwidth) + cost.exchanged / peak.link for cost in costs)
