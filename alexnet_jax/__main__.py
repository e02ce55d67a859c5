"""The command `alexnet-jax VERB`, which is also `python -m alexnet_jax VERB`."""

import argparse
import importlib
import logging
import os
import sys
from pathlib import Path
from typing import NamedTuple

from alexnet_jax import __version__
from alexnet_jax.config import load_study, split_spec


class Verb(NamedTuple):
    """A verb's module, which has `add_arguments(parser)` and `main(arguments)`, and one line of help."""

    module: str
    help: str


VERBS = {
    "run": Verb("alexnet_jax.main", "train and evaluate every run of a study"),
    "prepare": Verb("alexnet_jax.data.prepare", "make a dataset from a folder of images, an archive or TFDS"),
    "evaluate": Verb("alexnet_jax.evaluate", "evaluate runs on held-out images, alone and averaged"),
    "predict": Verb("alexnet_jax.tools.predict", "classify image files and draw the paper's figure 4"),
    "summary": Verb("alexnet_jax.tools.summary", "print a network layer by layer"),
    "convert": Verb("alexnet_jax.tools.convert", "convert weights from and to Caffe, torchvision, StableHLO"),
    "report": Verb("alexnet_jax.studies.report", "write a study's tables and report.html again"),
}


def run_verb(name: str, argv: list[str]) -> None:
    """Run a verb; bad input is one line on standard error and exit status 1, a wrong command line exit status 2."""
    try:
        try:
            _run(name, argv)
        finally:
            sys.stdout.flush()  # a closed pipe may be noticed only now
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it ends
        sys.exit(f"alexnet-jax {name}: standard output is closed")
    except (ValueError, OSError) as error:
        sys.exit(f"alexnet-jax {name}: {error}")
    except KeyboardInterrupt as stopped:
        sys.exit(f"alexnet-jax {name}: {stopped or 'interrupted'}\nre-run the command to resume")


def _run(name: str, argv: list[str]) -> None:
    """Parse a verb's arguments and run it."""
    module = importlib.import_module(VERBS[name].module)  # only this verb's: `--help` and `report` start at once
    parser = argparse.ArgumentParser(
        prog=f"alexnet-jax {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    arguments, rest = parser.parse_known_args(argv)
    overrides = [argument for argument in rest if argument.startswith("--config.")]
    if unknown := [argument for argument in rest if argument not in overrides]:
        parser.error(f"unknown argument {unknown[0]!r}")
    logging.getLogger().setLevel(logging.ERROR)  # JAX, Orbax and TFDS log more than the command itself
    if getattr(arguments, "config", None) is not None:
        arguments.config_name = Path(split_spec(arguments.config)[0]).stem
        arguments.config = load_study(arguments.config, overrides)
    elif overrides:
        parser.error(f"{overrides[0]}: needs --config")
    module.main(arguments)


def main() -> None:
    """Run the verb that the command line names."""
    verbs = "\n".join(f"  {name:<10}{verb.help}" for name, verb in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="alexnet-jax",
        description=f"AlexNet (2012) as it was, in JAX.\n\nverbs:\n{verbs}\n\nalexnet-jax VERB --help explains a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"alexnet_jax {__version__}")
    parser.add_argument("verb", choices=VERBS, metavar="VERB")
    arguments = parser.parse_args(sys.argv[1:2] or ["--help"])
    run_verb(arguments.verb, sys.argv[2:])


if __name__ == "__main__":
    main()
