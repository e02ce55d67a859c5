"""The studies and networks: the top-level folder `configs/` of a checkout, or its copy in an installed package."""

from pathlib import Path

# The wheel carries the configs beside this file; a checkout has them at the top level, where people look for them.
FOLDER = Path(__file__).parents[2] / "configs"
if not (FOLDER / "base.py").is_file():
    FOLDER = Path(__file__).parent
__path__ = [str(FOLDER)]
