"""Every field there is. As it stands: the paper's net on ImageNet; the other configs are small differences to it.

Sections, tables and figures are those of Krizhevsky, Sutskever, Hinton: ImageNet Classification with Deep
Convolutional Neural Networks (NIPS 2012). Where the text is silent, the authors' 2012 code decides.
"""

from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder

from configs import scales


def conv(
    features: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    crosses: bool = False,
    weight_std: float = 0.01,
    bias: float = 0.0,
    then: tuple[str, ...] = ("activation",),
) -> ConfigDict:
    """A convolution. `kind="local"` makes it one whose weights are not shared between positions.

    Args:
      features: kernels of all towers together.
      kernel: height and width, in pixels.
      stride: in pixels.
      padding: zeros before (left, top) and after (right, bottom), in pixels.
      crosses: whether it sees the maps of all towers or of its own only.
      weight_std: standard deviation of the initial weights, whose mean is 0.
      bias: mean of the initial biases.
      then: what follows, in order: of "activation", "lrn", "spatial_lrn", "max_pool", "avg_pool" and "dropout".
    """
    return ConfigDict({"kind": "conv", **locals()} | _of_its_own())


def dense(
    features: int | FieldReference | None,
    *,
    crosses: bool = True,
    weight_std: float = 0.01,
    bias: float = 0.0,
    then: tuple[str, ...] = ("activation", "dropout"),
) -> ConfigDict:
    """A fully connected layer; arguments as for `conv`."""
    return ConfigDict({"kind": "dense", **locals()} | _of_its_own())


def _of_its_own() -> dict[str, object]:
    """What a layer may have of its own; None is what the other layers have."""
    return {
        "bias_std": 0.0,  # standard deviation of the initial biases
        "weight_decay": placeholder(float),  # of its weights; None: optim.weight_decay
        "cut_epochs": placeholder(tuple),  # of its weights' rate; None: optim.cut_epochs
        "freeze_epoch": placeholder(float),  # from here on its rates are 0; None: never
    }


def claim(
    arm: str, metric: str, source: str, *, difference: float | None = None, ratio: float | None = None
) -> dict[str, object]:
    """What the paper says of an arm: that its metric is higher than the first arm's, and by how much, if it says so.

    Args:
      metric: a column of results.csv.
      source: where the paper says it.
      difference: the arm's less the first arm's; errors are fractions of 1.
      ratio: the arm's over the first arm's; it may say, by being less than 1, that the arm's is lower.
    """
    return locals()


def study(
    scale: str,
    arms: dict[str, Any],
    claims: tuple[dict[str, object], ...] = (),
    changes: dict[str, Any] | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
) -> ConfigDict:
    """A study at a scale.

    Args:
      arms: what each changes; the first is what the others are held against.
      claims: what the paper says of them.
      changes: of the base, for all arms.
    """
    config = get_config(scale)
    config.update(changes or {})
    config.arms = ConfigDict(arms, sort_keys=False)
    config.claims = tuple(said for said in claims if said["arm"] in arms)
    config.seeds = seeds
    return config


def get_config(scale: str = "imagenet2012", among: Iterable[str] = scales.SCALES) -> ConfigDict:
    """The base at one of the scales of `configs/scales.py`; a net may be for some of them only."""
    config = ConfigDict()

    config.model = ConfigDict()
    config.model.towers = 2  # section 3.2
    config.model.activation = "relu"  # section 3.1; or "tanh"
    config.model.init = "normal"  # section 5; or "uniform": what initial weights are drawn from
    # What is computed in. With "bfloat16", parameters, their updates and the loss stay float32; CPUs are slower so.
    config.model.dtype = "float32"

    # Figure 2. Kernels and neurons are those of both towers together.
    config.model.order = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
    config.model.layers = ConfigDict()
    layers = config.model.layers
    # 224 to 55 takes three more pixels: in the 2012 code the last window hangs over the right and bottom edge.
    layers.conv1 = conv(96, 11, stride=4, padding=(0, 3), then=("activation", "lrn", "max_pool"))
    layers.conv2 = conv(256, 5, padding=(2, 2), bias=1.0, then=("activation", "lrn", "max_pool"))
    layers.conv3 = conv(384, 3, padding=(1, 1), crosses=True)
    layers.conv4 = conv(384, 3, padding=(1, 1), bias=1.0)
    layers.conv5 = conv(256, 3, padding=(1, 1), bias=1.0, then=("activation", "max_pool"))
    layers.fc6 = dense(4096, bias=1.0)
    layers.fc7 = dense(4096, bias=1.0)
    layers.fc8 = dense(placeholder(int), then=())  # left open: one neuron for each class

    # Local response normalisation, section 3.3: within a tower; alpha times the plain sum of squares.
    config.model.lrn = ConfigDict()
    config.model.lrn.enabled = True
    config.model.lrn.n = 5  # channels
    config.model.lrn.k = 2.0
    config.model.lrn.alpha = 1e-4
    config.model.lrn.beta = 0.75
    config.model.lrn.crosses = False  # whether the neighbours beyond the tower's border count, as in Caffe
    # Where a layer has "spatial_lrn", which the paper does not mention: over the pixels around, in the same map.
    config.model.lrn.spatial = ConfigDict()
    config.model.lrn.spatial.window = 5  # pixels
    config.model.lrn.spatial.k = 1.0
    config.model.lrn.spatial.alpha = 4e-5  # the 2012 code's 0.001 / 25: times the plain sum, too
    config.model.lrn.spatial.beta = 0.75

    # Section 3.4. Overlapping: the stride is less than the window.
    config.model.pool = ConfigDict()
    config.model.pool.window = 3  # pixels
    config.model.pool.stride = 2  # pixels
    config.model.pool.ceil = False  # whether a last window may hang over the edge; no difference to maps of 55, 27, 13

    config.model.dropout = ConfigDict()
    config.model.dropout.rate = 0.5  # share of the outputs that is dropped, section 4.2; 0 is off
    config.model.dropout.inverted = False  # True: the rest is scaled up in training, instead of all down in testing

    config.data = ConfigDict()
    config.data.name = "imagenet2012"  # "mnist5k", which is embedded, or what alexnet_jax.prepare or TFDS has prepared
    config.data.data_dir = ""  # where data sets are; empty: TFDS's own default
    config.data.train_split = "train"
    config.data.eval_split = "validation"  # the errors reported are on this split
    # What decides on cuts of the rate (optim.stall): a split, or, where empty, every 20th training image, which is then
    # not trained on.
    config.data.validation_split = ""
    config.data.validation_every = 20
    config.data.image_size = 256  # pixels: shorter side scaled to it, then the central square, section 2
    config.data.crop = 224  # pixels: side of the squares the net sees, section 4.1
    # "mean_image" of the training images, section 2; "central_mean_image": its centre wherever the crop is, as in the
    # 2012 code; "mean_pixel", one for each channel; or "mean", the one below.
    config.data.subtract = "mean_image"
    config.data.mean = (0.0,)  # grey levels of 0-255, per channel or for all
    config.data.std = (1.0,)  # divides after that, per channel or all; the paper leaves the pixels as they are
    config.data.augment = ConfigDict()  # training only, section 4.1
    config.data.augment.random_crop = True
    config.data.augment.flip = True
    config.data.augment.chunk = 1  # images in a row that are cropped and flipped alike
    # Noise along the principal axes of the training images' colours: a normal number of this deviation, times the
    # axis's standard deviation, as in the 2012 code.
    config.data.augment.colour = ConfigDict()
    config.data.augment.colour.noise = 0.1  # 0 is off
    # Times the axis's eigenvalue, as in the paper's text, when colours are measured in this many grey levels: 255 makes
    # them 0 to 1. None: times the standard deviation, which has no such choice.
    config.data.augment.colour.eigenvalue_unit = placeholder(float)
    config.data.augment.colour.shrink = False  # whether the image is then divided by 1 + noise
    config.data.augment.colour.until_epoch = placeholder(float)  # when it ends; None: never
    config.data.threads = 2  # that decode images
    config.data.prefetch = 8  # batches read ahead

    # Section 5.
    config.optim = ConfigDict()
    config.optim.learning_rate = 0.01
    config.optim.momentum = 0.9
    config.optim.weight_decay = 0.0005
    config.optim.cut_epochs = (23.0, 51.0, 78.0)  # when the rate is cut: "three times", here as the 2012 log has it
    config.optim.cut_divisor = 10.0
    # Or when the error on the held-out images has not fallen for so many evaluations; 0 is off.
    config.optim.stall = ConfigDict()
    config.optim.stall.evaluations = 0
    config.optim.stall.cuts = 3  # at most
    # The text has the same rate and decay for all parameters; its code, and Caffe, treat biases otherwise.
    config.optim.biases = ConfigDict()
    config.optim.biases.rate = 1.0  # times the weights'
    config.optim.biases.decay = 1.0  # times the weights'
    config.optim.biases.cut_epochs = placeholder(tuple)  # None: the weights'
    config.optim.biases.cut_divisor = placeholder(float)  # None: the weights'

    config.train = ConfigDict()
    # Where towers are: "vmap": on one device; "pmap": each on its own; "shard_map": each on several, which share the
    # batch; "auto": the last of these that has devices enough.
    config.train.executor = "auto"
    config.train.batch_size = 128
    config.train.epochs = 90.0
    config.train.log_every = 100  # steps
    # Steps that jax.profiler records in the run's folder, for TensorBoard's profile plugin or ui.perfetto.dev; 0: none.
    config.train.profile = 0
    config.train.checkpoint_every = 2000  # steps; there is always one at the end, too
    config.train.keep_checkpoints = 2

    config.eval = ConfigDict()
    config.eval.batch_size = 250
    config.eval.views = 1  # the centre crop; or 10: corners, centre and their mirror images, averaged, section 4.1
    config.eval.every_epochs = 1.0
    # Training images, evaluated as the held-out ones are, to tell fitting from generalising.
    config.eval.train_images = 1000
    config.eval.validation = False  # whether images to decide on are kept apart; optim.stall has them in any case

    # A study runs every arm with every seed. An arm is what it changes of the above; the first is the reference.
    config.arms = ConfigDict({"base": {}}, sort_keys=False)
    config.seeds = (0,)
    config.claims = ()  # what the paper says of the arms
    # A field that each arm first chooses for itself, by the lowest error on validation images.
    config.tuning = ConfigDict()
    config.tuning.key = ""  # such as "optim.learning_rate"; empty: none
    config.tuning.choices = ()  # its values
    config.tuning.epochs = placeholder(float)  # that each of them is tried for; None: train.epochs
    config.tuning.seed = 1000

    scales.apply(config, scale, among)
    return config
