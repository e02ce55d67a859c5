"""The studies and networks: the top-level folder `configs/` of a checkout, or its copy in an installed package."""

from pathlib import Path

# The wheel carries the configs beside this file; a checkout has them at the top level, where people look for them.
_checkout = Path(__file__).parents[2] / "configs"
if (_checkout / "base.py").is_file():
    __path__.append(str(_checkout))
