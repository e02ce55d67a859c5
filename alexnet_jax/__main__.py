"""The command `alexnet-jax VERB`, which is also `python -m alexnet_jax VERB`."""

import argparse
import contextlib
import importlib
import io
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from alexnet_jax import __version__
from alexnet_jax.config import load_study, split_spec
from alexnet_jax.stop import Stopped


class Verb(NamedTuple):
    """A verb's module, which has `add_arguments(parser)` and `main(arguments)`, and one line of help."""

    module: str
    help: str


VERBS = {
    "run": Verb("alexnet_jax.studies.runner", "train and evaluate every run of a study"),
    "launch": Verb("alexnet_jax.tools.launch", "start several processes of `run` on this machine, as one job"),
    "prepare": Verb("alexnet_jax.data.prepare", "make a dataset from a folder of images, an archive or TFDS"),
    "evaluate": Verb("alexnet_jax.evaluate", "evaluate runs on held-out images, alone and averaged"),
    "predict": Verb("alexnet_jax.tools.predict", "classify image files and draw the paper's figure 4"),
    "summary": Verb("alexnet_jax.tools.summary", "print a network layer by layer"),
    "convert": Verb("alexnet_jax.tools.convert", "convert weights from and to Caffe, torchvision, StableHLO"),
    "report": Verb("alexnet_jax.studies.report", "write a study's tables and report.html again"),
}


def run_verb(name: str, argv: list[str]) -> None:
    """Run a verb, and exit with its status.

    0: done; 1: bad input, one line on standard error, or failed runs; 2: a wrong command line; 128 + N: stopped by
    signal N (130 for Ctrl-C, 143 for SIGTERM), and the command resumes when it is run again; 134, that is SIGABRT by
    JAX: a job of several processes has lost one, and resumes, too.
    """
    with contextlib.suppress(AttributeError):  # a stream of another kind
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # for any encoding
    try:
        with contextlib.redirect_stdout(_Output(sys.stdout)) as output:
            try:
                _run_verb(name, argv)
            finally:
                output.flush()
    except (ValueError, OSError) as error:
        sys.exit(f"alexnet-jax {name}: {error}")
    except KeyboardInterrupt as stopped:
        remedy = "\nre-run the command to resume" if name == "run" else ""
        print(f"alexnet-jax {name}: {str(stopped) or 'interrupted'}{remedy}", file=sys.stderr)
        sys.exit(stopped.exit_status if isinstance(stopped, Stopped) else 128 + signal.SIGINT)


def _run_verb(name: str, argv: list[str]) -> None:
    """Parse a verb's command line, and run it."""
    module = importlib.import_module(VERBS[name].module)  # only this verb's: `--help` and `report` start at once
    parser = argparse.ArgumentParser(
        prog=f"alexnet-jax {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    arguments, rest = parser.parse_known_args(argv, argparse.Namespace(argv=argv))
    overrides = [argument for argument in rest if argument.startswith("--config.")]
    if unknown := [argument for argument in rest if argument not in overrides]:
        parser.error(f"unknown argument {unknown[0]!r}")
    logging.getLogger().setLevel(logging.ERROR)  # JAX, Orbax and TFDS log more than the command itself
    if getattr(arguments, "config", None) is not None:
        path, scale = split_spec(arguments.config)
        arguments.config_name = "_".join(filter(None, (Path(path).stem, scale)))
        arguments.config = load_study(arguments.config, overrides)
    elif overrides:
        parser.error(f"{overrides[0]}: needs --config")
    module.main(arguments)


class _Output:
    """Standard output that drops text, instead of failing a run, once it is closed, as by `| head`."""

    def __init__(self, stream: Any):
        self._stream = io.StringIO() if stream is None else stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, as a stream does."""
        self._unless_closed(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush, as a stream does."""
        self._unless_closed(self._stream.flush)

    def _unless_closed(self, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            function(*arguments)
        except BrokenPipeError:
            # What the stream still holds, and all that follows, goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


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
