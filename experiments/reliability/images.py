"""Mutate image files of every format that Pillow writes: python experiments/reliability/images.py [--count=20000]

Every file must be read, or be named as bad by an OSError, in 10 s of a core and 2 GiB. Prints how many were read and
named by format, the most time and memory, and whatever else happened; exit status 1 if anything did. A file is a
function of its number: --start=NUMBER --count=1 tries one again.
"""

import argparse
import collections
import concurrent.futures
import functools
import io
import itertools
import os
import random
import resource
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from alexnet_jax.data import image_io

SECONDS, BYTES = 10, 2**31  # limits of one file
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr", "LAB")
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "JPEG": [{}, {"progressive": True}],
    "TIFF": [
        {"compression": kind} for kind in ("raw", "packbits", "tiff_lzw", "tiff_deflate", "jpeg", "group4", "webp")
    ],
    "DDS": [{}, *({"pixel_format": kind} for kind in ("DXT1", "DXT3", "DXT5", "BC2", "BC3", "BC5"))],
    "WEBP": [{}, {"lossless": True}],
    "GIF": [{}, {"save_all": True, "append_images": [Image.new("P", (30, 20))]}],
    "TGA": [{}, {"compression": "tga_rle"}],
    "BLP": [{"blp_version": version} for version in ("BLP1", "BLP2")],
}
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


class Result(NamedTuple):
    """What became of one mutated file."""

    number: int
    kind: str
    outcome: str  # "read" or "named"; else the error
    seconds: float


class TooSlow(BaseException):
    """The time of a file is over; no handler of exceptions may take this for an error of the file."""


@functools.cache
def originals() -> list[tuple[str, bytes]]:
    """Return small image files of every format, mode and compression, as far as Pillow writes and reads them."""
    Image.init()
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    files = {}
    for kind, mode in itertools.product(sorted(Image.SAVE), MODES):
        for options in OPTIONS.get(kind, [{}]):
            for metadata in ({}, {"exif": exif}):
                content = io.BytesIO()
                try:
                    image = Image.fromarray(noise).convert("L" if mode in ("I;16", "LAB") else mode).convert(mode)
                    image.save(content, kind, **options, **metadata)
                    Image.open(content).load()
                except Exception:  # of any kind: this combination does not exist
                    continue
                files[content.getvalue()] = kind
    return [(kind, content) for content, kind in files.items()]


def mutate(content: bytes, generator: random.Random) -> bytes:
    """Return a file with one to four changes, most of them near its start, where the headers are."""
    changed = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        near = generator.choice((len(changed), min(len(changed), 200), min(len(changed), 40)))
        place = generator.randrange(max(near, 1))
        match generator.randrange(6):
            case 0:
                changed[place : place + 1] = bytes([generator.randrange(256)])
            case 1:  # a number of a header
                size = generator.choice((1, 2, 4))
                number = generator.choice(EXTREMES) % 256**size
                changed[place : place + size] = number.to_bytes(size, generator.choice(("big", "little")))
            case 2:
                del changed[place:]
            case 3:
                del changed[place : place + generator.randint(1, 16)]
            case 4:
                changed[place:place] = generator.randbytes(generator.randint(1, 16))
            case _:  # what is elsewhere
                other = generator.randrange(max(len(changed), 1))
                changed[place : place + 8] = changed[other : other + 8]
    return bytes(changed)


def attempt(number: int) -> Result:
    """Read one mutated file in all ways; the operating system limits its memory, a timer its time."""
    generator = random.Random(number)
    kind, original = generator.choice(originals())
    content = mutate(original, generator)
    outcomes = set()
    start = time.process_time()
    signal.signal(signal.SIGPROF, too_slow)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        for read in (lambda: image_io.encode_jpeg(content, 16), lambda: image_io.decode(content, 3)):
            try:
                read()
                outcomes.add("read")
            except OSError as error:
                if isinstance(error.__cause__, MemoryError):
                    raise
                outcomes.add("named")
    except BaseException as error:
        outcomes = {f"{type(error).__name__}: {error}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return Result(number, kind, "read" if "read" in outcomes else outcomes.pop(), time.process_time() - start)


def too_slow(*_: object) -> None:
    """Handle the timer's signal."""
    raise TooSlow(f"more than {SECONDS} s")


def prepare_process() -> None:
    """Limit the memory of a worker."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))


def attempt_all(start: int, count: int) -> Iterator[Result]:
    """Try mutated files in all cores; a process that dies ends this with the numbers that it may have had."""
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), initializer=prepare_process) as pool:
        yield from pool.map(attempt, range(start, start + count), chunksize=50)


def main() -> None:
    """Try mutated files, and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="mutated files (default: 20000)")
    parser.add_argument("--start", type=int, default=0, help="number of the first file")
    arguments = parser.parse_args()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # libtiff prints there
    warnings.simplefilter("ignore")
    originals()  # before the workers are forked, so that all have the same
    outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    wrong, slowest = [], Result(-1, "", "", 0.0)
    for result in attempt_all(arguments.start, arguments.count):
        outcomes[result.kind][result.outcome if result.outcome in ("read", "named") else "other"] += 1
        if result.outcome not in ("read", "named"):
            wrong.append(result)
            print(result, flush=True)
        slowest = max(slowest, result, key=lambda each: each.seconds)
    for kind, counts in sorted(outcomes.items()):
        print(f"{kind:<10}{counts['read']:>7} read{counts['named']:>7} named{counts['other']:>7} other")
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
    total = sum(outcomes.values(), collections.Counter())
    print(
        f"{arguments.count} files: {total['read']} read, {total['named']} named, "
        f"{total['other']} other; slowest {slowest.seconds:.2f} s (number {slowest.number}, {slowest.kind}), "
        f"at most {memory:.0f} MiB in a process"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
