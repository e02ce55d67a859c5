"""The measurements of measure.py, which starts this in a process of its own for each job and gives it the path.

A measurement that fails is recorded with its error, and the next one starts. Some pieces start this file again, as
another framework, backend or process.
"""

import argparse
import contextlib
import csv
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import alternatives
import baselines
import jax
import jax.numpy as jnp
import numpy as np
from harness import (
    PRECISIONS,
    SMALL,
    Child,
    Context,
    Steps,
    at_precision,
    configure,
    flop_per_image,
    interleaved,
    matmul,
    milliseconds,
    our_setup,
    our_step,
    random_examples,
    report_steps,
    serve,
)
from jax import lax
from measure import MACHINE
from ml_collections import ConfigDict

import support
from alexnet_jax import layers, model, optim, parallel, train
from alexnet_jax.checkpoint import Checkpoints
from alexnet_jax.config import reference_run
from alexnet_jax.configs import base
from alexnet_jax.data import datasets
from alexnet_jax.evaluate import per_example_metrics
from alexnet_jax.parallel import TOWER
from alexnet_jax.run_dir import RunDir, read_json

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS_PER_DISPATCH = 25
SEVERAL, NONDETERMINISTIC = f"ours, {STEPS_PER_DISPATCH} a dispatch", "ours, nondeterministic operations allowed"
SEEDS = (1, 4, 10, 20)


def ceilings(context: Context) -> None:
    """Measure the rate of matrix products and the bandwidth of a copy."""
    for precision in ("default", *PRECISIONS):
        with context.attempt("matmul", dtype=precision):
            steps, flop = matmul(context, precision)
            rates = [flop / steps.seconds() / 1e12 for _ in range(context.repetitions)]
            context.results.samples("matmul", rates, "TFLOP/s", dtype=precision)
    with context.attempt("copy"):
        x = jax.random.normal(jax.random.key(0), (1 << (16 if context.tiny else 28),))
        times = milliseconds(context, jax.jit(lambda x: x + 1), x)
        context.results.samples("copy", [2 * x.nbytes / ms / 1e6 for ms in times], "GB/s", note="read and written")


def right(context: Context, what: str, first: str = "0", stop: str = "0") -> None:
    """Compare loss and gradients with those of the CPU, which another process computes meanwhile.

    Args:
      what: "paper": the paper's network at full size and the small one, in all precisions; "networks": all networks
        with few features, in float32.
      first, stop: Which of the networks.
    """
    chosen = support.NETWORKS[int(first) : int(first) + 1 if context.tiny else int(stop)]
    names = ["paper", "small"] if what == "paper" else chosen
    precisions = PRECISIONS if what == "paper" else ("float32",)
    with tempfile.TemporaryDirectory() as folder:
        command = context.command("reference", folder, what, *names)
        with subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}) as reference:
            for name in names:
                for precision in precisions:
                    size = "" if what == "paper" else ", few features"
                    labels = {"network": f"{name}{size}", "dtype": precision}
                    with context.attempt("difference to the CPU", **labels):
                        actual = loss_and_gradients(right_config(context, what, name), precision)
                        while not (file := Path(folder, f"{name}.npz")).exists():
                            if reference.poll() is not None and not file.exists():
                                raise RuntimeError("the process on the CPU computed no reference")
                            time.sleep(0.05)
                        report_difference(context, actual, dict(np.load(file)), **labels)
            reference.kill()


def right_config(context: Context, what: str, name: str) -> ConfigDict:
    """Return the config whose gradients are compared: at full size ("paper"), or with few features ("networks")."""
    if what == "networks":
        config = support.reduced(name)
    elif name == "paper" and not context.tiny:
        config = support.network_config(name)
    else:
        config = support.reduced(name) if name == "paper" else support.run_config("cifar10")
    config.train.batch_size = 8
    return config


def reference(context: Context, folder: str, what: str, *names: str) -> None:
    """Compute loss and gradients here, for `right`."""
    for name in names:
        values = loss_and_gradients(right_config(context, what, name), "float32")
        np.savez(Path(folder, "incomplete.npz"), **values)
        os.replace(Path(folder, "incomplete.npz"), Path(folder, f"{name}.npz"))


def loss_and_gradients(config: ConfigDict, precision: str) -> dict[str, np.ndarray]:
    """Return "loss" and the gradient of every parameter on random images, with dropout, all towers on one device."""
    if precision == "bfloat16":
        config.model.dtype = "bfloat16"
    towers, dataset = config.model.towers, support.noise_dataset(config)
    generator, shape = np.random.default_rng(0), (config.data.crop, config.data.crop, dataset.channels)
    batch = config.train.batch_size
    pixels = (generator.integers(0, 256, (batch, *shape)) - 120.0) / np.array(config.data.std[: dataset.channels])
    images, labels = pixels.astype(np.float32), generator.integers(0, dataset.classes, batch).astype(np.int32)
    variables = model.init(config.model, dataset.classes, shape, config.seed)
    network = model.AlexNet(config.model, dataset.classes)
    executor = parallel.make_executor("vmap", towers, batch)

    def of_tower(variables: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        key = jax.random.fold_in(jax.random.key(1), lax.axis_index(TOWER))

        def loss(params: Any) -> jax.Array:
            options: dict[str, Any] = {"train": True, "rngs": {"dropout": key}, "mutable": ["batch_stats"]}
            logits, _ = network.apply(variables | {"params": params}, images, **options)
            return per_example_metrics(logits, labels)["loss"].mean() / towers

        return jax.value_and_grad(loss)(variables["params"])

    compiled = executor.map(at_precision(of_tower, precision), in_axes=(TOWER, None, None), out_axes=(TOWER, TOWER))
    losses, gradients = jax.device_get(compiled(executor.place(variables), images, labels))
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return {"loss": np.float32(towers * losses[0]), **named}


def report_difference(context: Context, actual: dict[str, Any], expected: dict[str, Any], **labels: Any) -> None:
    """Record the relative difference of the losses, and of the gradients: of the worst parameter and of all of them."""
    loss = float(expected["loss"])
    context.results.add("loss, relative difference", abs(float(actual["loss"]) - loss) / abs(loss), "ratio", **labels)
    worst, largest, squares, total = "", 0.0, 0.0, 0.0
    for name in expected.keys() - {"loss"}:
        difference, values = (array.astype(np.float64) for array in (actual[name] - expected[name], expected[name]))
        relative = float(np.abs(difference).max() / (np.abs(values).max() or 1.0))
        if not relative <= largest:  # NaN is the worst
            worst, largest = name, relative
        squares, total = squares + (difference**2).sum(), total + (values**2).sum()
    what = "gradients, largest difference over largest value, worst parameter"
    context.results.add(what, largest, "ratio", note=worst, **labels)
    context.results.add(
        "gradients, norm of the difference over the norm", float((squares / total) ** 0.5), "ratio", **labels
    )


def kernels(context: Context, operation: str) -> None:
    """Time each form of an operation alone, with the shapes of the paper's network, forward and with its gradient."""
    batch, side = (2, 15) if context.tiny else (128, 0)
    if operation == "conv":
        compare_convolutions(context, batch, side)
        return
    for size, channels in ((side or 55, 48), (side or 27, 128)):
        for dtype in (jnp.float32, jnp.bfloat16):
            x = jax.random.normal(jax.random.key(0), (2, batch, size, size, channels)).astype(dtype)
            name = f"{size}x{size}x{channels}, 2 towers"
            if operation == "pool":
                pool = {"window": 3, "stride": 2, "ceil": False}
                forms = {
                    "ours": (lambda x, pool=pool: layers.max_pool(x, **pool), layers.KERNELS),
                    "plain": (lambda x, pool=pool: layers.max_pool(x, **pool), ()),
                }
            else:
                lrn = {"n": 5, "k": 2.0, "alpha": 1e-4, "beta": 0.75}
                forms = {"ours": (lambda x, lrn=lrn: layers.lrn(x, **lrn), layers.KERNELS)}
                forms |= {
                    label: (lambda x, form=form, lrn=lrn: form(x, **lrn), ())
                    for label, form in alternatives.LRN.items()
                }
            mapped = {label: (jax.vmap(form), enabled) for label, (form, enabled) in forms.items()}
            compare_forms(context, f"{operation} {name}", mapped, (x,), "tensorfloat32", batch)


def compare_convolutions(context: Context, batch: int, side: int) -> None:
    """Time the convolutions of two towers: name, side, kernel, stride, padding, input channels, features of a tower."""
    shapes = [("conv2", 27, 5, 1, 2, 48, 128), ("conv4", 13, 3, 1, 1, 192, 192), ("conv1", 224, 11, 4, 0, 3, 48)]
    for name, size, width, stride, border, channels, features in shapes:
        for precision in ("tensorfloat32", "bfloat16", "default"):
            dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
            keys = jax.random.split(jax.random.key(0))
            images = jax.random.normal(keys[0], (2, batch, side or size, side or size, channels)).astype(dtype)
            kernel = (0.05 * jax.random.normal(keys[1], (2, width, width, channels, features))).astype(dtype)
            where = {"strides": (stride, stride), "padding": ((border, border if name != "conv1" else 3),) * 2}
            forms = {
                "ours": (jax.vmap(lambda x, w, where=where: layers.conv(x, w, **where)), layers.KERNELS),
                "grouped": (jax.vmap(lambda x, w, where=where: alternatives.conv(x, w, **where)), ()),
                "grouped, channels joined": (lambda x, w, where=where: alternatives.conv_joined(x, w, **where), ()),
                "patches": (jax.vmap(lambda x, w, where=where: alternatives.conv_by_patches(x, w, **where)), ()),
            }
            if name == "conv1":
                del forms["patches"]  # 363 times as many values as the image
            if precision == "default":
                forms = {"ours": forms["ours"]}
            compare_forms(context, f"conv {name}, 2 towers", forms, (images, kernel), precision, batch)


def compare_forms(
    context: Context,
    what: str,
    forms: dict[str, tuple[Callable[..., jax.Array], tuple[str, ...]]],
    arguments: tuple[jax.Array, ...],
    precision: str,
    batch: int,
) -> None:
    """Time forms of one function, the first of which is the reference for how much their gradients differ.

    Args:
      forms: By name, the function and our kernels that are used in it.
    """
    dtype = "bfloat16" if arguments[0].dtype == jnp.bfloat16 else precision
    labels: dict[str, Any] = {"network": "paper", "batch": batch, "dtype": dtype}
    cotangent: Any = None
    expected: list[np.ndarray] = []
    for name, (form, enabled) in forms.items():
        with context.attempt(f"{what}: {name}", **labels), layers.kernels(*enabled):

            def both(cotangent: jax.Array, *arguments: jax.Array, form: Any = form) -> Any:
                value, backward = jax.vjp(form, *arguments)
                return value, backward(cotangent)

            if cotangent is None:
                shape = jax.eval_shape(form, *arguments)
                cotangent = jax.random.normal(jax.random.key(2), shape.shape).astype(shape.dtype)
            forward, both = (jax.jit(at_precision(function, precision)) for function in (form, both))
            found = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(both(cotangent, *arguments))]
            expected = expected or found
            differences = [
                float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1)) for a, b in zip(found, expected, strict=True)
            ]
            note = f"value and gradients differ from the first form's by {max(differences):.1e}"
            context.results.samples(
                f"{what}: {name}, forward", milliseconds(context, forward, *arguments), "ms", **labels
            )
            times = milliseconds(context, both, cotangent, *arguments)
            context.results.samples(f"{what}: {name}, forward and gradient", times, "ms", note=note, **labels)


def variants(context: Context, network: str, precision: str) -> None:
    """Time the training step with each form in the place of ours, all in one process and interleaved; and its kernels.

    One process, because XLA then chooses the same algorithms for the operations that the variants share. The small
    networks take several steps a dispatch.
    """
    labels: dict[str, Any] = {"network": network, "batch": 128, "dtype": precision}
    config = configure(context, network, 128, precision)
    several = {"per_dispatch": STEPS_PER_DISPATCH} if network in SMALL else {}
    suffix = f", {STEPS_PER_DISPATCH} a dispatch" if several else ""
    without = {name: [kernel for kernel in layers.KERNELS if kernel != name] for name in layers.KERNELS}

    def nondeterministic() -> contextlib.AbstractContextManager:
        return mock.patch.dict(parallel.GPU_COMPILER_OPTIONS, clear=True)

    @contextlib.contextmanager
    def plain_pooling() -> Iterator[None]:  # its scatter is refused as long as operations must be deterministic
        with nondeterministic(), layers.kernels(*without["max_pool"]):
            yield

    changes: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
        "ours": contextlib.nullcontext,
        NONDETERMINISTIC: nondeterministic,
        "pooling by select_and_scatter, nondeterministic": plain_pooling,
        "convolutions one by one": lambda: mock.patch.object(layers, "_NARROW", 0),
        "all convolutions joined": lambda: mock.patch.object(layers, "_NARROW", 1 << 30),
        "grouped convolutions": lambda: layers.kernels(*without["conv"]),
        "layout NHWC forced": lambda: mock.patch.dict(parallel.GPU_COMPILER_OPTIONS, xla_gpu_force_conv_nhwc=True),
    }
    for name in ("reduce_window, closed form", "shifted slices, closed form", "banded product, closed form"):
        form = alternatives.LRN[name]
        changes[f"LRN by {name}"] = lambda form=form: mock.patch.object(layers, "lrn", form)
    if not context.tiny:
        changes["convolutions by patches"] = lambda: mock.patch.object(layers, "conv", alternatives.conv_by_patches)
    built: dict[str, Steps] = {}
    for name, change in changes.items():
        with context.attempt(f"step: {name}{suffix}", **labels), change():
            built[name + suffix] = our_step(context, config, network, **several)
            first = built[name + suffix].first
            context.results.add(f"until the first step is done: {name}{suffix}", first, "s", **labels)
    # XLA's Triton kernels compute in TF32 with "default" only, cuBLAS with "tensorfloat32", too.
    for other in ("default", "float32") if precision == "tensorfloat32" else ():
        with context.attempt(f"step: {other} precision", **labels):
            changed = configure(context, network, 128, other)
            built[f"{other} precision{suffix}"] = our_step(context, changed, network, **several)
    seconds = interleaved(context, {name: steps.seconds for name, steps in built.items()})
    report_steps(context, seconds, config, f"ours{suffix}", **labels)
    for name, steps in built.items():
        with context.attempt(f"time of all kernels: {name}", **labels):
            report_kernels(context, name, kernel_times(steps), **labels)


def step(context: Context, network: str, batch_size: str) -> None:
    """Time our training step and PyTorch's, interleaved, and their memory; and a matrix product, as the ceiling."""
    # A shared cache may hold incomplete files of a process that was killed at its time limit.
    cache = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    peer = Child(context, "pytorch", network, batch_size, TORCHINDUCTOR_CACHE_DIR=cache.name)
    batch = 4 if context.tiny else int(batch_size)
    config = configure(context, network, batch, "tensorfloat32")
    flop = flop_per_image(config, network)
    context.results.add("training step, FLOPs of one image", flop, "FLOP", network=network)
    precisions, timed = ("tensorfloat32", "bfloat16"), {}
    try:
        for precision in precisions:
            for name, seconds in our_baselines(context, network, batch, precision).items():
                timed[name, precision] = seconds
        for precision in precisions:
            for name, seconds in pytorch_baselines(context, peer, network, batch, precision).items():
                timed[name, precision] = seconds
            with context.attempt("matmul", dtype=precision):
                product, product_flop = matmul(context, precision)
                timed["matmul", precision] = product.seconds
        measured = interleaved(context, timed)
    finally:
        peer.close()
        cache.cleanup()
    for precision in precisions:
        of_precision = {name: values for (name, dtype), values in measured.items() if dtype == precision}
        labels = {"network": network, "batch": batch, "dtype": precision}
        products = of_precision.pop("matmul", None)
        report_steps(context, of_precision, config, SEVERAL if network in SMALL else "ours", **labels)
        if products and "ours" in of_precision:
            rates = [product_flop / value for value in products]
            context.results.samples("matmul", [rate / 1e12 for rate in rates], "TFLOP/s", dtype=precision)
            shares = [flop * batch / ours / rate for ours, rate in zip(of_precision["ours"], rates, strict=True)]
            context.results.samples("step: ours, share of the rate of matmul", shares, "ratio", **labels)
        with context.attempt("memory of the program", **labels):
            report_memory(context, configure(context, network, batch, precision), **labels)


def our_baselines(context: Context, network: str, batch: int, precision: str) -> dict[str, Callable[[], float]]:
    """Return our training steps, compiled: as it is, several a dispatch for small networks, and nondeterministic."""
    labels: dict[str, Any] = {"network": network, "batch": batch, "dtype": precision}
    config, built = configure(context, network, batch, precision), {}
    for name in ("ours", SEVERAL, NONDETERMINISTIC):
        if (name == SEVERAL and network not in SMALL) or (name == NONDETERMINISTIC and precision == "bfloat16"):
            continue
        options = {} if name == NONDETERMINISTIC else parallel.GPU_COMPILER_OPTIONS.copy()
        changed = mock.patch.dict(parallel.GPU_COMPILER_OPTIONS, options, clear=True)
        with context.attempt(f"step: {name}", **labels), changed:
            steps = our_step(context, config, network, per_dispatch=STEPS_PER_DISPATCH if name == SEVERAL else 0)
            built[name] = steps.seconds
            context.results.add(f"until the first step is done: {name}", steps.first, "s", **labels)
            context.results.add(f"step, alone: {name}", 1000 * steps.seconds(), "ms", **labels)
            if len(built) == 1 and precision == "tensorfloat32" and peak_bytes():  # later ones would include the first
                note = "of the process, with XLA's search for algorithms"
                context.results.add(f"peak memory: {name}", peak_bytes() / 1e6, "MB", note=note, **labels)
    return built


def pytorch_baselines(
    context: Context, peer: Child, network: str, batch: int, precision: str
) -> dict[str, Callable[[], float]]:
    """Return PyTorch's training steps, compiled in another process; with CUDA graphs, too, for small networks."""
    labels: dict[str, Any] = {"network": network, "batch": batch, "dtype": precision}
    built: dict[str, Callable[[], float]] = {}
    for mode in ("eager", "compile", *(["graphs"] if network in SMALL else [])):
        name, key = f"pytorch {mode}", f"{precision}:{mode}"
        with context.attempt(f"step: {name}", **labels):
            answer = peer.ask(f"build {key}")
            context.results.add(f"until the first step is done: {name}", answer["first"], "s", **labels)
            context.results.add(f"peak memory: {name}", answer["bytes"] / 1e6, "MB", **labels)
            built[name] = lambda key=key: peer.ask(f"run {key}")["seconds"]
            context.results.add(f"step, alone: {name}", 1000 * built[name](), "ms", **labels)
    return built


def peak_bytes() -> int:
    """Return the most memory of the device that was ever in use by this process; 0 where that is not known."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def report_memory(context: Context, config: ConfigDict, **labels: Any) -> None:
    """Record the memory of the compiled step: arguments, results that do not reuse them, and temporary memory."""
    setup, statistics = our_setup(config, labels["network"])
    examples = random_examples(config, setup.dataset.classes, config.train.batch_size)
    arguments = (
        train.init_state(setup),
        examples,
        statistics,
        np.uint32(0),
        np.int32(1),
        optim.peak_learning_rate(config.optim),
    )
    memory = train.make_train_step(setup).lower(*arguments).compile().memory_analysis()
    size = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = (size + memory.temp_size_in_bytes) / 1e6
    context.results.add("memory of the program: ours", total, "MB", note="by the compiler", **labels)


def pytorch(context: Context, network: str, batch_size: str) -> None:
    """Serve PyTorch's steps of a network by "DTYPE:MODE", for `step`."""
    import torch

    on_card = torch.cuda.is_available()
    if on_card == context.on_cpu:
        raise RuntimeError(
            f"PyTorch: cuda.is_available() is {on_card}, with the card {'absent' if on_card else 'present'}"
        )
    jax.config.update("jax_platforms", "cpu")  # the card is PyTorch's

    def wait(_: Any) -> None:
        if on_card:
            torch.cuda.synchronize()

    def build(key: str) -> tuple[Steps, dict[str, Any]]:
        precision, mode = key.split(":")
        config = configure(context, network, int(batch_size), precision)
        classes, before = baselines.count_classes(network), 0
        if on_card:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        count = config.train.batch_size if network not in SMALL else 200 if context.tiny else 50_000
        examples = random_examples(config, classes, count)
        call = alternatives.pytorch_step(config, classes, examples["image"], examples["label"], precision, mode)
        began = time.perf_counter()
        wait(call())
        first = time.perf_counter() - began
        for _ in range(4):  # CUDA graphs are recorded in the third call
            wait(call())
        steps = Steps(call, wait, seconds=context.seconds)
        used = torch.cuda.max_memory_allocated() - before if on_card else 0
        return steps, {"first": first, "bytes": used}

    serve(build)


def deterministic(context: Context, network: str) -> None:
    """Train a short run several times: is it the same in another process, and interrupted and resumed?"""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as threads:
        cases = [
            (
                options,
                cache,
                threads.submit(train_in_pieces, context, network, options, Path(folder, f"{options}_{cache}"), cache),
            )
            for options in ("product", "nondeterministic")
            for cache in ("with a compilation cache", "without")
        ]
        for options, cache, future in cases:
            what, labels = f"{options} compiler options, {cache}", {"network": network, "dtype": "tensorfloat32"}
            with context.attempt(what, **labels):
                digests = future.result()
                for name in ("again", "resumed"):
                    same = float(digests[name] == digests["whole"])
                    context.results.add(
                        f"the run {name} in another process: {what}", same, "1: bit-identical", **labels
                    )


def train_in_pieces(context: Context, network: str, options: str, folder: Path, cache: str) -> dict[str, str]:
    """Return a hash of the last state of a run in one go, of the same run again, and interrupted and resumed."""
    enabled = cache != "without"
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": str(enabled).lower()}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")

    def train_once(name: str, stop: str) -> str:
        command = context.command("train", network, options, folder / name, stop)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
        return done.stdout.strip().splitlines()[-1]

    digests = {"whole": train_once("whole", "end"), "again": train_once("again", "end")}
    train_once("resumed", "checkpoint")
    return digests | {"resumed": train_once("resumed", "end")}


class InterruptionError(Exception):
    """The end of a run at its first checkpoint."""


def train_run(context: Context, network: str, options: str, workdir: str, stop: str) -> None:
    """Train a short run to its end or to its first checkpoint, and print a hash of its last state."""
    parallel.initialize(2)
    if options == "nondeterministic":
        parallel.GPU_COMPILER_OPTIONS.clear()
    if network == "paper":
        config = support.reduced("paper", **{"model.dropout.rate": 0.5, "data.image_size": 128, "train.batch_size": 32})
        shape = (320, config.data.image_size, config.data.image_size, 3)
        pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        source = datasets.Arrays(pixels, np.arange(len(pixels)) % 10)
        dataset = datasets.Dataset(source, None, source, [str(digit) for digit in range(10)], 3)
        opened = mock.patch.object(datasets, "load", return_value=dataset)
    else:
        config = reference_run(base.get_config("embedded", {"train.batch_size": 64}))
        opened = contextlib.nullcontext()
    steps_per_epoch = 10 if network == "paper" else 4000 / 64
    steps = 8 if context.tiny else 200
    config.train.update(
        executor="vmap", epochs=steps / steps_per_epoch, checkpoint_every=steps // 2, log_every=steps // 4
    )
    config.eval.update(every_epochs=steps / steps_per_epoch, train_images=100)
    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, *arguments: Any) -> None:
        save(self, *arguments)
        raise InterruptionError

    stopping = mock.patch.object(Checkpoints, "save", save_and_stop)
    with opened, stopping if stop == "checkpoint" else contextlib.nullcontext(), contextlib.suppress(InterruptionError):
        train.train_and_evaluate(config, workdir)
    run = RunDir(workdir)
    if (run.result is None) != (stop == "checkpoint"):
        raise RuntimeError(f"{workdir}: a run to the {stop} has {'no' if run.result is None else 'a'} result")
    with Checkpoints(run.checkpoints, config.train.keep_checkpoints) as checkpoints:
        state, _ = checkpoints.restore()
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(state)):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    print(digest.hexdigest())


def seeds(context: Context, network: str, form: str) -> None:
    """Time a step of several seeds at once, in one of five ways."""
    batch = 64 if network == "small" else 128
    precision = "tensorfloat32"
    for count in (1, 2) if context.tiny else SEEDS:
        labels: dict[str, Any] = {"network": network, "batch": batch, "dtype": precision}
        what = f"step and seed: {count} seeds, {form}"
        with context.attempt(what, **labels):
            config = configure(context, network, batch, precision)
            if form == "processes":
                times, first = seeds_in_processes(context, network, batch, count)
            else:
                steps = seeds_in_one_program(context, config, network, form, count)
                times, first = [steps.seconds() for _ in range(context.repetitions)], steps.first
            context.results.samples(what, [1000 * seconds / count for seconds in times], "ms", **labels)
            context.results.add(f"until the first step is done: {count} seeds, {form}", first, "s", **labels)


def seeds_in_one_program(context: Context, config: ConfigDict, network: str, form: str, count: int) -> Steps:
    """Return a step of `count` seeds, each with its own state and images.

    Args:
      form: "map": one seed after the other; "unrolled": all is vmapped but our convolutions, one by one; "patches": and
        these are products with patches; "grouped": and these are grouped convolutions.
    """
    setup, statistics = our_setup(config, network)
    states = []
    for seed in range(count):
        setup.config.seed = seed
        states.append(train.init_state(setup))
    place = setup.executor.replicate
    state = place(jax.tree.map(lambda *leaves: np.stack(leaves), *states))
    batches = place(
        jax.tree.map(
            lambda *leaves: np.stack(leaves),
            *[random_examples(config, setup.dataset.classes, config.train.batch_size) for _ in range(count)],
        )
    )
    numbers = place(np.arange(count, dtype=np.uint32))
    one: Any = train.make_train_step(setup).__wrapped__  # without its own `jit`, whose options another one refuses
    grouped = [kernel for kernel in layers.KERNELS if kernel != "conv"]
    changes: dict[str, contextlib.AbstractContextManager] = {
        "grouped": layers.kernels(*grouped),
        "patches": mock.patch.object(layers, "conv", alternatives.conv_by_patches),
    }

    def all_seeds(state: Any, batches: Any, statistics: Any, numbers: jax.Array, step: Any) -> Any:
        def one_seed(of_seed: Any) -> Any:
            state, batch, seed = of_seed
            return one(state, batch, statistics, seed, step, optim.peak_learning_rate(config.optim))

        return (
            lax.map(one_seed, (state, batches, numbers))
            if form == "map"
            else jax.vmap(one_seed)((state, batches, numbers))
        )

    options = {} if context.on_cpu else dict(parallel.GPU_COMPILER_OPTIONS)
    compiled = jax.jit(all_seeds, donate_argnums=0, compiler_options=options or None)
    number = 0

    def call() -> Any:
        nonlocal state, number
        number += 1
        state = compiled(state, batches, statistics, numbers, np.int32(number))
        return state

    with changes.get(form, contextlib.nullcontext()):
        return Steps(call, jax.block_until_ready, seconds=context.seconds)


def seeds_in_processes(context: Context, network: str, batch: int, count: int) -> tuple[list[float], float]:
    """Return the seconds in which `count` processes at once take a step, and until the last of them is ready."""
    began = time.perf_counter()
    children = [Child(context, "seed", network, batch) for _ in range(count)]
    try:
        for child in children:
            child.send("build all")
        for child in children:
            child.receive()
        ready, times = time.perf_counter() - began, []
        for _ in range(context.repetitions):
            for child in children:
                child.send(f"run all {10 * context.seconds}")
            rates = [1 / child.receive()["seconds"] for child in children]  # all at once, for the same time
            times.append(count / sum(rates))
    finally:
        for child in children:
            child.close()
    return times, ready


def seed(context: Context, network: str, batch: str) -> None:
    """Serve the step of one seed, for `seeds`."""
    context.check_backend()

    def build(key: str) -> tuple[Steps, dict[str, Any]]:
        return our_step(context, configure(context, network, int(batch), "tensorfloat32"), network), {}

    serve(build)


def run(context: Context, what: str) -> None:
    """Time CIFAR-10 from process start to result: one run, with a cold and a warm cache, or a study of 20 runs."""
    data = dataset_arguments(context, "cifar10", 32)
    epochs = 0.02 if context.tiny else 30.0
    labels: dict[str, Any] = {"network": "small", "batch": 64, "dtype": "tensorfloat32"}
    with tempfile.TemporaryDirectory() as folder:
        cache = {"JAX_COMPILATION_CACHE_DIR": str(Path(folder, "cache"))}

        def command(name: str, epochs: float, *arguments: str) -> None:
            workdir = Path(folder, name.replace(" ", "_"))
            options = ("--config=configs/ablation_lrn.py:cifar10", *data, f"--workdir={workdir}", *arguments)
            with context.attempt(name, **labels):
                seconds = run_command(*options, f"--config.train.epochs={epochs}", **cache)
                context.results.add(
                    f"{name}, from process start to result", seconds, "s", note=f"{epochs} epochs", **labels
                )
                report_runs(context, workdir, name, **labels)

        if what == "study":
            runs = "0:1" if context.tiny else "0:10"
            command("study of 2 arms", epochs, "--only=lrn,no_lrn", f"--seeds={runs}")
            return
        one = ("--only=lrn", "--seeds=0")
        command("one run, cold cache", epochs, *one)
        command("one run, warm cache", epochs, *one)
        streamed = ("--config.data.resident_bytes=0", "--config.data.host_bytes=0", "--config.data.threads=16")
        command("one run, images in host memory", epochs / 6, *one, streamed[0])
        command("one run, images streamed", epochs / 15, *one, *streamed)


def photos(context: Context) -> None:
    """Measure how long the paper's network waits for images of 256 x 256 pixels."""
    data = dataset_arguments(context, "imagenette", 256)
    labels: dict[str, Any] = {"network": "paper", "batch": 128, "dtype": "tensorfloat32"}
    in_memory = ("--config.data.resident_bytes=0",)
    streamed = (*in_memory, "--config.data.host_bytes=0", "--config.data.threads=16")
    cases = {"resident": (20, ()), "in host memory": (10, in_memory), "streamed": (5, streamed)}
    with tempfile.TemporaryDirectory() as folder:
        for name, (epochs, arguments) in cases.items():
            with context.attempt(f"photos, {name}", **labels):
                workdir = Path(folder, name.replace(" ", "_"))
                count = 0.02 if context.tiny else epochs
                sizes = [f"--config.train.epochs={count}", f"--config.eval.every_epochs={count}"]
                sizes += ["--config.train.batch_size=4"] if context.tiny else []
                options = ("--config=configs/base.py:imagenette", *data, f"--workdir={workdir}", *sizes, *arguments)
                seconds = run_command(*options, JAX_COMPILATION_CACHE_DIR=str(Path(folder, "cache")))
                context.results.add(f"photos, {name}, from process start to result", seconds, "s", **labels)
                report_runs(context, workdir, f"photos, {name}", **labels)


def dataset_arguments(context: Context, name: str, size: int) -> list[str]:
    """Return the arguments that name a prepared dataset; raise ValueError if it is absent."""
    if not datasets.prepared_folder(name, size, context.data_dir).is_dir():
        raise ValueError(
            f"--data_dir={context.data_dir}: must have {name} at {size} pixels; unpack its images as {name}/train and "
            f"{name}/val or test, and prepare them: python -m alexnet_jax prepare {name} --size={size} --data_dir=..."
        )
    return [f"--config.data.data_dir={context.data_dir}"]


def run_command(*arguments: str, **environment: str) -> float:
    """Return the seconds that `python -m alexnet_jax.main` takes; raise RuntimeError if it fails."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "alexnet_jax.main", *arguments]
    environment = os.environ | environment
    environment.pop("XLA_PYTHON_CLIENT_PREALLOCATE", None)  # nothing else uses the card
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        print(*lines[-20:], sep="\n", file=sys.stderr)
        raise RuntimeError(f"exit status {done.returncode}: {lines[-1] if lines else ''}")
    return time.perf_counter() - began


def report_runs(context: Context, workdir: Path, name: str, **labels: Any) -> None:
    """Record speed, waiting, seconds and error of the finished runs of a study."""
    found = [read_json(file) for file in sorted(workdir.glob("*/seed_*/result.json"))]
    units = {"images_per_second": "images/s", "data/wait_fraction": "ratio", "seconds": "s", "eval/top1_error": "ratio"}
    for metric, unit in units.items():
        if values := [result[metric] for result in found if metric in result]:
            context.results.samples(f"{name}: {metric} of a run", values, unit, **labels)


def profile(context: Context, network: str) -> None:
    """Record the time of each kernel of a training step, and the longest in a table of their own."""
    batch, precision = 128, "tensorfloat32"
    labels: dict[str, Any] = {"network": network, "batch": batch, "dtype": precision}
    totals = kernel_times(our_step(context, configure(context, network, batch, precision), network))
    report_kernels(context, "ours", totals, **labels)
    whole = sum(milliseconds for milliseconds, _ in totals.values())
    table = context.output.parent / f"profile_{network}.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("kernel", "milliseconds a step", "calls a step", "share"))
        for name, (milliseconds, calls) in sorted(totals.items(), key=lambda item: -item[1][0])[:25]:
            writer.writerow((name, f"{milliseconds:.4f}", calls, f"{milliseconds / whole:.4f}"))
    print(table.read_text())


def report_kernels(context: Context, name: str, totals: dict[str, tuple[float, float]], **labels: Any) -> None:
    """Record the milliseconds of all kernels of a step, and their number."""
    milliseconds, calls = (sum(column) for column in zip(*totals.values(), strict=True))
    what, note = f"time of all kernels: {name}", f"{calls:.0f} kernels"
    context.results.add(what, float(milliseconds), "ms", note=note, **labels)


def kernel_times(steps: Steps, calls: int = 5) -> dict[str, tuple[float, float]]:
    """Return the milliseconds of each kernel in a step, and how often a step calls it."""
    steps.calls = calls
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            steps.seconds()
        events = kernel_events(Path(folder))
    count, totals = calls * steps.per_call, dict[str, tuple[float, float]]()
    for name, microseconds in events:
        milliseconds, launches = totals.get(name, (0.0, 0.0))
        totals[name] = (milliseconds + microseconds / 1000 / count, launches + 1 / count)
    return totals


def kernel_events(folder: Path) -> list[tuple[str, float]]:
    """Return name and microseconds of each kernel in the newest trace of a folder.

    A GPU's kernels are in the lines of its streams. Dry runs on a CPU use the operations of XLA's threads.
    """
    planes = list(jax.profiler.ProfileData.from_file(str(max(folder.rglob("*.xplane.pb")))).planes)
    lines = [line for plane in planes if "/device:" in plane.name for line in plane.lines]
    chosen = [line for line in lines if "stream" in line.name.lower()] or lines
    chosen = chosen or [line for plane in planes for line in plane.lines if line.name.startswith("tf_XLA")]
    events = [(event.name, event.duration_ns / 1000) for line in chosen for event in line.events]
    events = [(name, microseconds) for name, microseconds in events if microseconds]
    if not events:
        raise RuntimeError(
            f"no kernels in the trace: {[(plane.name, [line.name for line in plane.lines]) for plane in planes]}"
        )
    print("lines of the trace:", [line.name for line in lines])
    return events


PIECES: dict[str, Callable[..., None]] = {
    "ceilings": ceilings,
    "right": right,
    "kernels": kernels,
    "step": step,
    "variants": variants,
    "deterministic": deterministic,
    "seeds": seeds,
    "run": run,
    "photos": photos,
    "profile": profile,
}
ONLY_PROCESSES = ("deterministic", "run", "photos")  # these leave the card to what they start
CHILDREN: dict[str, Callable[..., None]] = {
    "reference": reference,
    "pytorch": pytorch,
    "train": train_run,
    "seed": seed,
}


def main() -> None:
    """Run the piece of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in ("output", "data_dir", *MACHINE):
        parser.add_argument(f"--{field}", default="")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("piece", choices=[*PIECES, *CHILDREN])
    parser.add_argument("arguments", nargs="*")
    options = parser.parse_args()
    context = Context(options)
    if options.piece in PIECES and options.piece not in ONLY_PROCESSES:
        context.check_backend()
    (PIECES | CHILDREN)[options.piece](context, *options.arguments)


if __name__ == "__main__":
    main()
