"""The command: python -m alexnet_jax.main --config=configs/ablation_lrn.py[:scale] [--config.KEY=VALUE ...]

Kept short: everything it does is a function that a notebook can call.
"""

from alexnet_jax import huge_pages

if __name__ == "__main__":
    huge_pages.restart_with("-m", "alexnet_jax.main")  # before anything that takes long to import

import os
import sys
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from alexnet_jax import config, dry_run, logs, study, towers

_WORKDIR = flags.DEFINE_string("workdir", None, "The study's folder; by default runs/, then the config's name.")

_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Prints the runs, their size and an estimate of the time; runs none.")
_ONLY = flags.DEFINE_list("only", [], "Arms to run, with commas; by default all.")
_SEEDS = flags.DEFINE_string("seeds", None, "Seeds to run, as 0:5 or 0,2,4; by default the study's.")


def main(argv: list[str]) -> None:
    """Runs the study that the flags name."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}: flags begin with two dashes")
    if config.FLAG.value is None:
        raise app.UsageError("say which study: --config=configs/ablation_lrn.py")
    logs.quiet_libraries()
    folder = Path(_WORKDIR.value or Path("runs") / Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem)
    towers.ensure_host_devices(config.FLAG.value.model.towers)
    _keep_compiled()
    try:
        if _SEEDS.value is not None:
            config.FLAG.value.seeds = study.parse_seeds(_SEEDS.value)
        if _DRY_RUN.value:
            dry_run.print_plan(config.FLAG.value, folder, _ONLY.value)
        elif failed := study.run_study(config.FLAG.value, folder, _ONLY.value):
            names = "; ".join(run.name for run in failed)
            sys.exit(f"{len(failed)} run(s) failed: {names}. The same command tries them again")
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt as stopped:
        sys.exit(f"{stopped}\nthe same command goes on from there")


def _keep_compiled() -> None:
    """What one run has compiled, neither the next one nor the same command again need compile.

    It is kept in the user's cache, unless JAX_COMPILATION_CACHE_DIR says where.
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "alexnet_jax"))


if __name__ == "__main__":
    app.run(main, flags_parser=config.parse_flags)
