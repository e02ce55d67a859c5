"""AlexNet (Krizhevsky, Sutskever, Hinton, 2012) as it was: two towers on two devices, in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alexnet_jax.checkpoint import load_run
    from alexnet_jax.model import AlexNet
    from alexnet_jax.tools.predict import predict
    from alexnet_jax.train import train_and_evaluate

__all__ = ["AlexNet", "load_run", "predict", "train_and_evaluate"]
__version__ = "0.3.0.dev0"

_MODULES = {"AlexNet": "model", "load_run": "checkpoint", "predict": "tools.predict", "train_and_evaluate": "train"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: the report and `--help` need no JAX."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
