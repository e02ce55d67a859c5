"""AlexNet (Krizhevsky, Sutskever, Hinton, 2012) as it was: two towers on two devices, in JAX."""

__version__ = "0.2.0"
