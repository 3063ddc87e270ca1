"""Compile what benchmarks/gpu.sh launches, on a machine without a GPU, into a cache that travels.

    python -m benchmarks.precompile                  # all cores, for an H100
    python -m benchmarks.precompile --parts tests attention --limit 60
    python -m benchmarks.precompile --wheel triton-3.6.0-cp312-cp312-LINUX.whl
    python -m benchmarks.precompile --moved          # on the machine with the GPU; gpu.sh does it

Kernels are compiled by their own launches, on CPU tensors of the shapes that the tests and the
benchmarks have on a GPU. Triton takes a compiled kernel from its cache if source, constants, types,
divisibility of arguments, GPU and its own build are the same; what differs is compiled there. A
release has a build for each release of Python: --wheel names the one of the machine with the GPU,
where it is another than the one that compiles. The release must be the same.

The cache is build/triton_cache. It keeps the machine code alone, and Triton notes where that lies:
after a move the notes are written anew. In build.txt stands for which build it is: elsewhere it is
of no use, and --moved says so.
"""

import argparse
import functools
import hashlib
import importlib
import json
import math
import os
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import cli
from benchmarks.lib.bench import reason_of
from benchmarks.lib.compile_pool import PROCESSORS, at_most, compile_pool, differentiated, draw_nothing
from benchmarks.lib.report import ROOT
from motifarch.errors import UserError

MODULE = "benchmarks.precompile"
CACHE = ROOT / "build" / "triton_cache"
BUILD = "build.txt"
LONGEST = 120.0
"""Seconds for a call's kernels."""

_CPU = torch.device("cpu")
Call = Callable[[], Any]


def _kernel_cases() -> Any:
    if str(ROOT / "tests") not in sys.path:
        sys.path.append(str(ROOT / "tests"))
    return importlib.import_module("helpers.kernel_cases")


def _run(make: Any, rows: int) -> None:
    make(draw_nothing, "bf16", _CPU, rows)()


def _tests() -> Iterator[Call]:
    """The cases that compute-sanitizer and tests run, at the rows of each."""
    for rows in (150, 1024):
        for make in _kernel_cases().CASES.values():
            yield functools.partial(_run, make, rows)


def _racecheck() -> Iterator[Call]:
    """Attention's cases, which racecheck runs without Gluon."""
    for make in _kernel_cases().FAMILIES["attention"].values():
        yield functools.partial(_run, make, 150)


def _attention() -> Iterator[Call]:
    from benchmarks.lib.shapes import TRAINED, attention_case
    from benchmarks.ops import attention

    for name in TRAINED:
        case = attention_case(name, "bf16", 4096, tokens=16384, head_divisor=1)
        for provider in ("triton", "triton_fast"):
            yield functools.partial(differentiated, attention.ours(case, provider, _CPU), dict(case.make(draw_nothing)))


def _rows() -> Iterator[Call]:
    """PolyNorm and the epilogue; kernels do not depend on the number of rows."""
    from benchmarks.ops import combine, poly_norm

    arguments = argparse.Namespace(device="cuda", quick=False, dtypes=["bf16"], rows=1024, columns=None)
    arguments.functions = ["poly_norm", "mul_poly_norm"]
    arguments.layouts, arguments.epilogues = list(combine.LAYOUTS), None
    for benchmark in (poly_norm.PolyNorm("poly_norm", ""), combine.Combine("combine", "")):
        for case in benchmark.cases(arguments):
            run = functools.partial(lambda case, t: case.ours(*t.values()), case)
            yield functools.partial(differentiated, run, dict(case.make(draw_nothing)))


def _decode() -> Iterator[Call]:
    from benchmarks.ops import decode

    for name in decode.DECODED:
        for batch, context in ((1, 32768), (8, 32768), (32, 8192), (128, 1024)):
            case = decode.decode_case(name, "bf16", batch, context)
            yield functools.partial(decode.ours(case, "triton", _CPU), case.make(draw_nothing))


PARTS: dict[str, Callable[[], Iterator[Call]]] = {
    "tests": _tests,
    "racecheck": _racecheck,
    "attention": _attention,
    "rows": _rows,
    "decode": _decode,
}


def compile_call(part: str, i: int, architecture: int, wheel: Path | None) -> tuple[str, int, str | None]:
    """Compile what a call of a part launches: the part, how many kernels, why not the others."""
    from benchmarks.lib.compiling import compile_only

    if wheel is not None:
        take_build_of(wheel)
    kernels: list[Any] = []
    try:
        gluon = architecture == 90 and part != "racecheck"
        with at_most(LONGEST), compile_only(architecture, gluon=gluon, read=False) as kernels:
            next(call for j, call in enumerate(PARTS[part]()) if j == i)()
    except Exception as error:  # whatever a compiler raises, the other calls' kernels are compiled
        return part, len(kernels), reason_of(error)
    return part, len(kernels), None


def compile_parts(options: argparse.Namespace, cache: Path) -> None:
    """Compile the calls in order, side by side, and say of each part what was compiled."""
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    calls = [(part, i) for part in options.parts for i in range(sum(1 for _ in PARTS[part]()))]
    began = time.monotonic()
    deadline = math.inf if options.limit is None else began + options.limit
    done: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    with compile_pool(options.jobs, PROCESSORS[options.architecture]) as pool:
        running = [pool.apply_async(compile_call, (*call, options.architecture, options.wheel)) for call in calls]
        while running and time.monotonic() < deadline:
            for finished in [r for r in running if r.ready()]:
                running.remove(finished)
                part, count, reason = finished.get()
                done[part] += 1
                kernels[part] += count
                if reason:
                    print(f"{part}: a call's kernels are left out: {reason}", flush=True)
            time.sleep(0.05)
    of_part = Counter(part for part, _ in calls)
    for part, count in of_part.items():
        print(f"{part}: {done[part]} of {count} calls, {kernels[part]} kernels for sm_{options.architecture}")
    print(f"{time.monotonic() - began:.0f} s")


@functools.cache
def take_build_of(wheel: Path) -> None:
    """From here on, what is compiled is noted as by the build of Triton in a wheel: the same
    release for another Python. Its library differs by how Python calls it alone.

    Raises:
        UserError: it is another release.
    """
    from triton import _C
    from triton.runtime import cache

    version = metadata.version("triton")
    if wheel.name.split("-")[:2] != ["triton", version]:
        raise UserError(f"--wheel {wheel.name}: compiled with triton {version}; take a wheel of that release")
    here = next(Path(next(iter(_C.__path__))).glob("libtriton*.so")).read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        there = archive.read("triton/_C/libtriton.so")
    key = cache.triton_key().replace(hashlib.sha256(here).hexdigest(), hashlib.sha256(there).hexdigest())
    cache.triton_key = lambda: key


def settle(cache: Path) -> None:
    """Keep the machine code and what describes it, and note where they lie now."""
    for note in cache.glob("*/__grp__*.json"):
        kept = {}
        for file in note.parent.iterdir():
            if file == note:
                continue
            if file.suffix in (".json", ".cubin"):
                kept[file.name] = str(file)
            else:
                file.unlink()
        note.write_text(json.dumps({"child_paths": kept}))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = cli.bare_parser(MODULE, __doc__)
    add = parser.add_argument
    add("--cache", type=Path, default=CACHE, help="default: build/triton_cache")
    add("--architecture", type=int, choices=PROCESSORS, default=90, help="default: 90, an H100 or H200")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--limit", type=float, help="seconds after which what is not compiled is left; default none")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="calls side by side; default %(default)s")
    add("--wheel", type=Path, help="of this release of Triton, for the Python of the machine with the GPU")
    add("--moved", action="store_true", help="compile nothing; note where the cache lies now")
    options = parser.parse_args(argv)
    return cli.exit_status(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """What the command line asks for; the exit status, 1 if a moved cache is of no use here."""
    from triton.runtime import cache as of_triton

    cache = options.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    if not options.moved:
        if options.wheel is not None:
            take_build_of(options.wheel)
        (cache / BUILD).write_text(of_triton.triton_key())
        compile_parts(options, cache)
    elif (cache / BUILD).read_text() != of_triton.triton_key():
        print(f"{cache} was compiled for another build of Triton: see --wheel")
        return 1
    settle(cache)
    size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    print(f"{cache}: {size / 2**20:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
