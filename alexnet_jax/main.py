"""The command of the paper's ablations: python -m alexnet_jax.main --config=configs/ablation_lrn.py.

It is the verb run of `alexnet-jax` (`studies/runner.py`).
"""

import sys

from alexnet_jax.__main__ import run_verb

if __name__ == "__main__":
    run_verb("run", sys.argv[1:])
