"""PyTorch as where it is not installed."""

raise ImportError("hidden from the commands of the tests")
