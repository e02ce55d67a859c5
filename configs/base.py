"""Every config field. The defaults are the paper's network on ImageNet; other configs are small changes to it.

Sections, tables and figures are those of Krizhevsky, Sutskever, Hinton: ImageNet Classification with Deep
Convolutional Neural Networks (NIPS 2012). Where the text is silent, the authors' 2012 code decides.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from alexnet_jax.config import apply_changes, flatten
from alexnet_jax.configs import scales

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")  # figure 2


def conv(
    features: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    sees: str = "own",
    weight_std: float = 0.01,
    bias: float = 0.0,
    then: tuple[str, ...] = ("activation",),
) -> ConfigDict:
    """Return the fields of a convolutional layer.

    Set `kind="local"` afterwards for a layer whose weights are not shared between positions.

    Args:
      features: Kernels of all towers together.
      kernel: Height and width, in pixels.
      stride: In pixels.
      padding: Zeros before (top, left) and after (bottom, right), in pixels.
      sees: The towers whose feature maps it reads: "all", or its "own" only.
      weight_std: Standard deviation of the initial weights, whose mean is 0.
      bias: Mean of the initial biases.
      then: Operations that follow, in order: any of "activation", "lrn", "spatial_lrn", "batch_norm", "max_pool",
        "avg_pool" and "dropout".
    """
    return _layer("conv", features, sees, weight_std, bias, then, kernel=kernel, stride=stride, padding=padding)


def dense(
    features: int | None,
    *,
    sees: str = "all",
    weight_std: float = 0.01,
    bias: float = 0.0,
    then: tuple[str, ...] = ("activation", "dropout"),
) -> ConfigDict:
    """Return the fields of a fully connected layer; `features=None` means one for each class."""
    return _layer("dense", features, sees, weight_std, bias, then)


def _layer(
    kind: str, features: int | None, sees: str, weight_std: float, bias: float, then: tuple[str, ...], **window: Any
) -> ConfigDict:
    return ConfigDict(
        {
            "kind": kind,
            "features": placeholder(int) if features is None else features,
            **window,
            "sees": sees,
            "weight_std": weight_std,
            "bias": bias,
            "bias_std": 0.0,  # standard deviation of the initial biases
            "then": then,
            "weight_decay": placeholder(float),  # of the weights; None: optim.weight_decay
            "decay_epochs": placeholder(tuple),  # of the weights' learning rate; None: optim.decay_epochs
            "freeze_epoch": placeholder(float),  # learning rates are 0 from this epoch on; 0: frozen; None: never
        }
    )


def claim(
    arm: str,
    metric: str,
    source: str,
    *,
    difference: float | None = None,
    ratio: float | None = None,
    margin: float | None = None,
) -> dict[str, object]:
    """Return a claim of the paper about an arm: that its metric is higher than the first arm's, if no size is given.

    Args:
      arm: Name of an arm other than the first.
      metric: A column of results.csv.
      source: Section or figure of the paper.
      difference: Claimed effect: the arm's metric minus the first arm's. Errors are fractions of 1. Negative: lower.
      ratio: Claimed effect: the arm's metric divided by the first arm's. Less than 1: lower.
      margin: Half-width of "no effect": a difference in the unit of the metric, or a factor of more than 1 if a ratio
        is claimed. None: half the claimed difference; 0.005 for errors without one; a factor of 1.25 for ratios.
    """
    return {
        "arm": arm,
        "metric": metric,
        "source": source,
        "difference": difference,
        "ratio": ratio,
        "margin": margin,
    }


def study(
    scale: str,
    arms: Mapping[str, Mapping[str, Any]],
    claims: Iterable[dict[str, object]] = (),
    changes: Mapping[str, Any] | None = None,
    seeds: Iterable[int] = (0, 1, 2),
) -> ConfigDict:
    """Return a study: the base config at a scale, run with every arm and every seed.

    Changes have dotted keys, as on the command line, or are nested dictionaries. A whole study:

        \"\"\"Does a wider first layer help?\"\"\"

        from alexnet_jax.configs import base

        ARMS = {
            "narrow": {},  # the reference: the base config as it is
            "wide": {"model.layers.conv1.features": 64},
            "wide_and_slow": {"model.layers.conv1.features": 64, "optim.learning_rate": 0.002},
        }

        def get_config(scale="embedded"):
            return base.study(scale, ARMS, seeds=range(5))

    Args:
      scale: One of `configs/scales.py`.
      arms: What each arm changes, by name. The first arm is the reference that the others are compared with.
      claims: What the paper claims (`claim`). Claims about arms that this study does not have are left out.
      changes: Changes to the base config for all arms.
      seeds: Random seeds; every arm runs with each of them.
    """
    return compare(get_config(scale, changes), arms, claims, seeds)


def compare(
    config: ConfigDict,
    arms: Mapping[str, Mapping[str, Any]],
    claims: Iterable[dict[str, object]] = (),
    seeds: Iterable[int] = (0, 1, 2),
) -> ConfigDict:
    """Return a study of a config, such as one of `configs/networks/`, which is changed; the rest is as in `study`."""
    config.arms = ConfigDict({arm: _nested(changed) for arm, changed in arms.items()}, sort_keys=False)
    config.claims = tuple(claimed for claimed in claims if claimed["arm"] in arms)
    config.seeds = tuple(seeds)
    return config


def _nested(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return changes as nested dictionaries."""
    nested: dict[str, Any] = {}
    for key, value in flatten(changes).items():
        *sections, field = key.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[field] = value
    return nested


def get_config(
    scale: str = "imagenet2012", changes: Mapping[str, Any] | None = None, among: Iterable[str] = scales.SCALES
) -> ConfigDict:
    """Return the base config at a scale, with changes (see `study`).

    Args:
      scale: One of `configs/scales.py`.
      changes: Changes to the config; dotted keys or nested dictionaries.
      among: The scales that the network can run at.

    Raises:
      ValueError: There is no such scale, or a change names a field that does not exist.
    """
    config = ConfigDict()

    config.model = ConfigDict()
    config.model.towers = 2  # section 3.2
    config.model.activation = "relu"  # section 3.1; "relu", "tanh", "scaled_tanh", "gelu" or "silu"
    config.model.init = "normal"  # section 5; distribution of the initial weights: "normal" or "uniform"
    # Precision of the computation: "float32" or "bfloat16". Parameters, their updates and the loss are always float32.
    config.model.dtype = "float32"

    # Figure 2. Kernels and neurons are those of both towers together.
    config.model.order = LAYERS
    config.model.layers = ConfigDict()
    layers = config.model.layers
    # 224 pixels become 55 with 3 pixels of padding: in the 2012 code the last window exceeds the right and bottom edge.
    layers.conv1 = conv(96, 11, stride=4, padding=(0, 3), then=("activation", "lrn", "max_pool"))
    layers.conv2 = conv(256, 5, padding=(2, 2), bias=1.0, then=("activation", "lrn", "max_pool"))
    layers.conv3 = conv(384, 3, padding=(1, 1), sees="all")
    layers.conv4 = conv(384, 3, padding=(1, 1), bias=1.0)
    layers.conv5 = conv(256, 3, padding=(1, 1), bias=1.0, then=("activation", "max_pool"))
    layers.fc6 = dense(4096, bias=1.0)
    layers.fc7 = dense(4096, bias=1.0)
    layers.fc8 = dense(None, then=())

    # "lrn": local response normalisation over neighbouring channels, section 3.3.
    config.model.lrn = ConfigDict()
    config.model.lrn.enabled = True  # False: "lrn" and "spatial_lrn" do nothing
    config.model.lrn.n = 5  # channels in the window
    config.model.lrn.k = 2.0
    config.model.lrn.alpha = 1e-4  # multiplies the sum of squares, which is not divided by n
    config.model.lrn.beta = 0.75
    config.model.lrn.sees = "own"  # "all": the window crosses the border between towers, as in Caffe
    # "spatial_lrn": the same over neighbouring pixels of one feature map; in the 2012 code only.
    config.model.lrn.spatial = ConfigDict()
    config.model.lrn.spatial.window = 5  # pixels
    config.model.lrn.spatial.k = 1.0
    config.model.lrn.spatial.alpha = 4e-5  # multiplies the sum of squares: the 2012 code's 0.001 / 25
    config.model.lrn.spatial.beta = 0.75

    # "batch_norm": batch normalisation per channel (Ioffe and Szegedy, 2015), with a learned scale and bias.
    config.model.batch_norm = ConfigDict()
    config.model.batch_norm.momentum = 0.9  # of the running mean and variance
    config.model.batch_norm.epsilon = 1e-5  # added to the variance

    # "max_pool" and "avg_pool", section 3.4. They overlap if the stride is smaller than the window.
    config.model.pool = ConfigDict()
    config.model.pool.window = 3  # pixels
    config.model.pool.stride = 2  # pixels
    config.model.pool.ceil = False  # True: the last window may exceed the edge; no difference for 55, 27 and 13 pixels

    # "dropout", section 4.2.
    config.model.dropout = ConfigDict()
    config.model.dropout.rate = 0.5  # fraction of the outputs set to 0 in training; 0: off
    config.model.dropout.inverted = False  # True: scale up in training; False: scale down in evaluation, as the paper

    config.data = ConfigDict()
    config.data.name = "imagenet2012"  # "mnist5k" (embedded) or a dataset prepared by `alexnet-jax prepare` or TFDS
    config.data.data_dir = ""  # folder of the prepared datasets; empty: TFDS's default
    config.data.train_split = "train"
    config.data.eval_split = "validation"  # the split whose errors are reported
    # Split for decisions during training (optim.plateau, tuning): a name, or "1/20" for every 20th training image,
    # which is then not trained on. Empty: none.
    config.data.validation_split = ""
    config.data.image_size = 256  # pixels; the shorter side is resized to it, then the centre is cropped, section 2
    config.data.crop = 224  # pixels; side of the network's input, section 4.1
    # Subtracted from the input: "mean_image" of the training images, section 2; "central_mean_image", its centre for
    # every crop, as in the 2012 code; "mean_pixel", one value per channel; or "mean", the constant below.
    config.data.subtract = "mean_image"
    config.data.mean = (0.0,)  # grey levels of 0-255, per channel or one for all
    config.data.std = (1.0,)  # the input is divided by it, per channel or one for all; the paper does not scale
    config.data.augment = ConfigDict()  # in training only, section 4.1
    config.data.augment.random_crop = True  # False: the centre crop
    config.data.augment.flip = True  # mirror half of the images, at random
    # Noise along the principal axes of the training images' colours: per axis, a normal random number with this
    # standard deviation times the standard deviation of the colours along the axis.
    config.data.augment.colour = ConfigDict()
    config.data.augment.colour.noise = 0.1  # 0: off
    # Use the eigenvalue (variance) instead of the standard deviation, as the paper's text has it, of colours divided by
    # this many grey levels: 255 for colours of 0 to 1. None: the standard deviation, as the 2012 code.
    config.data.augment.colour.eigenvalue_unit = placeholder(float)
    # Details of the 2012 code that the paper does not mention.
    config.data.augment.code2012 = ConfigDict()
    config.data.augment.code2012.images_per_crop = 1  # consecutive images that share one random crop and flip
    config.data.augment.code2012.shrink_noise = False  # divide the image by 1 + colour.noise after adding the noise
    config.data.augment.code2012.noise_until_epoch = placeholder(float)  # no colour noise from then on; None: never
    # Decoded images of all splits together stay on the devices if they take at most this many bytes there (per device;
    # of a CPU's devices together); otherwise in the host's memory if at most that many; otherwise they are streamed.
    config.data.resident_bytes = 4 * 2**30
    config.data.host_bytes = 8 * 2**30
    config.data.threads = 2  # threads that decode streamed images
    config.data.prefetch = 8  # batches read ahead, of images that are not on the devices

    # Section 5.
    config.optim = ConfigDict()
    # "paper": momentum with the learning rate inside the velocity; "sgd": outside, as in PyTorch; or "adamw".
    config.optim.name = "paper"
    config.optim.learning_rate = 0.01
    config.optim.momentum = 0.9  # of "paper" and "sgd"
    config.optim.betas = (0.9, 0.999)  # of "adamw"
    config.optim.weight_decay = 0.0005
    config.optim.schedule = "step"  # "step": decay at decay_epochs; "cosine": to 0 at the end of training
    config.optim.warmup_epochs = 0.0  # linear warm-up from 0, before either schedule
    config.optim.decay_epochs = (23.0, 51.0, 78.0)  # the paper's "three times", at the epochs of the 2012 log
    config.optim.decay_factor = 0.1  # the learning rate is multiplied by it at each decay step
    # Decay, too, when the validation error has not improved for `patience` evaluations.
    config.optim.plateau = ConfigDict()
    config.optim.plateau.patience = 0  # evaluations; 0: off
    config.optim.plateau.max_decays = 3
    # All parameters but the layers' kernels. The paper treats them alike; its code, and Caffe, do not.
    config.optim.biases = ConfigDict()
    config.optim.biases.learning_rate = 1.0  # multiplies the kernels' learning rate
    config.optim.biases.weight_decay = 1.0  # multiplies the kernels' weight decay
    config.optim.biases.decay_epochs = placeholder(tuple)  # None: optim.decay_epochs
    config.optim.biases.decay_factor = placeholder(float)  # None: optim.decay_factor

    config.train = ConfigDict()
    # How towers run: "vmap": all on one device; "pmap": one device each; "shard_map": each on several devices, which
    # shard the batch; "auto": the last of these that can use several devices, else "vmap".
    config.train.executor = "auto"
    # What each of the towers' devices computes: "towers": its tower's part of every layer, as the paper; or
    # "one_weird_trick": before the first dense layer all towers, of its part of the images (Krizhevsky, 2014).
    config.train.layout = "towers"
    # Precision of products of float32 on GPUs and TPUs: "float32"; "tensorfloat32", with 10 bits of mantissa (on TPUs 3
    # passes in bfloat16); or "default", whatever is fastest on the device. CPUs always compute in float32.
    config.train.matmul_precision = "tensorfloat32"
    # Steps in one program, if images are on the devices: saves launches on GPUs. None: 1 on CPUs, else 25.
    config.train.steps_per_dispatch = placeholder(int)
    config.train.init_from = ""  # run or file of weights to start from, also --init_from; empty: initial values
    config.train.new_head = False  # with init_from: the last layer has initial values, also --new_head
    config.train.batch_size = 128
    config.train.epochs = 90.0
    # Stop after the first evaluation whose train_eval/top1_error is at most this, as for figure 1. None: never.
    config.train.stop_at_error = placeholder(float)
    config.train.label_smoothing = 0.0  # probability spread over all classes (Szegedy et al., 2015); 0: off
    config.train.log_every = 100  # steps
    config.train.profile = 0  # steps recorded by jax.profiler in the run's folder; 0: none
    config.train.checkpoint_every = 2000  # steps; the last step is always saved
    config.train.keep_checkpoints = 2

    config.eval = ConfigDict()
    config.eval.batch_size = 250
    config.eval.views = 1  # 1: the centre crop; 10: centre, corners and their mirror images, averaged, section 4.1
    config.eval.every_epochs = 1.0
    config.eval.train_images = 1000  # training images that are evaluated, too, for the generalisation gap

    # A study runs every arm with every seed. An arm is a set of changes to the above; the first is the reference.
    config.arms = ConfigDict({"base": {}}, sort_keys=False)
    config.seeds = (0,)
    config.claims = ()  # what the paper claims about the arms
    # A field that each arm tunes for itself, before the study's seeds run.
    config.tuning = ConfigDict()
    config.tuning.key = ""  # dotted key, such as "optim.learning_rate"; empty: no tuning
    config.tuning.choices = ()  # the values to try
    config.tuning.choices_by_arm = ConfigDict()  # other values for the arms that need them, by name
    # The lowest mean wins. "epochs_to_25" or "train_eval_epochs_to_25": epochs to 25 % training error, of the training
    # batches or of a pass over `eval.train_images` training images at each evaluation.
    config.tuning.metric = "validation/top1_error"
    config.tuning.epochs = placeholder(float)  # length of each trial; None: train.epochs
    config.tuning.seeds = (1000,)  # of the trials; none of the study's

    scales.apply(config, scale, among)
    apply_changes(config, changes or {})
    return config
