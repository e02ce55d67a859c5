"""AlexNet (Krizhevsky, Sutskever, Hinton, 2012) as it was: two towers on two devices, in JAX."""
