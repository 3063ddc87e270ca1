"""Every family of kernels at the widths and row lengths of every entry of the launch tables.

    TRITON_INTERPRET=0 python -m tests.kernels.ptx.suite poly_norm combine

Prints an object a line: the case, its seconds, its errors, and what is wrong with it or null.
"""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from tests.kernels.ptx import cases
from tests.kernels.ptx.launching import emulated

BF16, F16 = torch.bfloat16, torch.float16
Case = tuple[str, dict[str, Any]]


def attention() -> Iterator[Case]:
    """Each pair of widths, which is each entry, in either precision."""
    for d, dv in ((64, 64), (64, 128), (96, 192), (128, 128), (128, 256), (192, 128)):
        yield "attention", {"d": d, "dv": dv, "group": 1 + 3 * (dv == 256), "tokens": 200, "keys": 520, "dtype": BF16}
        yield "attention", {"d": d, "dv": dv, "tokens": 200, "keys": 520, "dtype": F16}


def masks() -> Iterator[Case]:
    """What else attention is asked for."""
    for group, softmax in ((1, False), (2, True)):
        packed = {"lengths": (30, 0, 41, 1), "softmax": softmax, "group": group, "epilogue": "none"}
        yield "attention", packed
        yield "attention", {"tokens": 200, "window": 50, "softmax": softmax, "group": group, "backward": not softmax}
    yield "attention", {"group": 3, "epilogue": "gate", "softcap": 20.0, "causal": False, "deterministic": False}
    yield "attention", {"shared_keys": True, "lam": "token", "epilogue": "gate", "d": 64, "dv": 64, "batch": 2}
    latent = {"d": 192, "dv": 128, "group": 4, "shared_keys": True, "lam": "token", "epilogue": "gate"}
    yield "attention", latent | {"tokens": 200, "keys": 330}
    yield "attention", latent | {"lengths": (140, 0, 60, 1), "window": 128}
    yield "attention", {"tokens": 33, "keys": 97, "lam": "one", "noise": 2, "key_heads": 1}
    yield "attention", {"tokens": 97, "keys": 33, "dtype": F16}
    # Gradients of keys and values that are sums of 1,200 products in float32.
    yield "attention", {"d": 16, "dv": 16, "group": 8, "tokens": 150, "epilogue": "none", "dtype": torch.float32}


def decoding() -> Iterator[Case]:
    for d, dv in ((64, 128), (128, 256)):
        yield "decoding", {"d": d, "dv": dv, "dtype": BF16}
        yield "decoding", {"d": d, "dv": dv, "dtype": F16, "paged": True, "queries": 2}
        yield "decoding", {"d": d, "dv": dv, "softmax": True, "group": 1, "noise": 2}
    yield "latent_decoding", {"dtype": BF16}
    yield "latent_decoding", {"dtype": F16, "paged": True, "signals": 24, "noises": 8}
    yield "latent_decoding", {"noises": 0, "signals": 8, "queries": 2, "latent": 96, "rotated": 16}


def poly_norm() -> Iterator[Case]:
    """Rows of up to 2 KB, 4 KB and so on, and such as take two passes."""
    for columns in (1000, 2048, 4096, 8192, 16384, 32768, 40000):
        yield "poly_norm", {"columns": columns, "rows": 2, "dtype": BF16}
        yield "poly_norm", {"columns": columns, "rows": 2, "dtype": F16, "up": False}
    yield "poly_norm", {"columns": 1000, "clamp": 1.0}
    for columns in (1280, 40000):
        yield "grouped_poly_norm", {"columns": columns, "dtype": BF16}
    yield "grouped_poly_norm", {"columns": 992, "dtype": F16, "one_tensor": False}


def combine() -> Iterator[Case]:
    for dtype in (BF16, F16):
        for width, group, epilogue in ((64, 1, "none"), (128, 4, "norm"), (256, 3, "gate")):
            yield "combine", {"width": width, "group": group, "epilogue": epilogue, "dtype": dtype}


def hyper_connections() -> Iterator[Case]:
    """Of several chunks of tokens, of widths that tiles divide and do not, and of three streams."""
    yield "hyper_connections", {"dtype": BF16}
    yield "hyper_connections", {"dtype": BF16, "width": 33, "streams": 3}
    yield "hyper_connections", {"dtype": BF16, "width": 130, "tokens": 70}
    yield "hyper_connections", {"dtype": F16, "width": 33}
    yield "hyper_connections", {"dtype": torch.float32, "width": 40}
    yield "hyper_connections", {"dtype": torch.float32, "width": 33, "streams": 2, "tokens": 1}


def expert_rows() -> Iterator[Case]:
    """Rows of one block and of several, which end within one."""
    for dtype in (BF16, F16):
        for width, slots in ((256, 1), (1000, 3), (5000, 2)):
            yield "expert_rows", {"width": width, "slots": slots, "dtype": dtype}


def blackwell() -> Iterator[Case]:
    """Of sm_100, whose attention needs tensor memory, what does not."""
    yield "poly_norm", {"arch": 100}
    yield "poly_norm", {"arch": 100, "columns": 16384, "rows": 2}
    yield "combine", {"arch": 100}
    yield "combine", {"arch": 100, "width": 256, "epilogue": "gate", "dtype": F16}
    yield "decoding", {"arch": 100}
    yield "decoding", {"arch": 100, "d": 128, "dv": 256, "paged": True, "dtype": F16}


GROUPS = {
    "attention": attention,
    "masks": masks,
    "decoding": decoding,
    "poly_norm": poly_norm,
    "combine": combine,
    "hyper_connections": hyper_connections,
    "expert_rows": expert_rows,
    "blackwell": blackwell,
}


def run(family: str, options: dict[str, Any]) -> dict[str, Any]:
    """A case's line."""
    begun = time.perf_counter()
    with emulated(options.get("arch", 90)) as launches:
        results = cases.CASES[family](**{name: value for name, value in options.items() if name != "arch"})
    problems = []
    for name, result in results.items():
        try:
            result.check(options.get("dtype", BF16))
        except AssertionError as error:
            problems.append(f"{name}: {error}")
    return {
        "case": f"{family} {options}",
        "kernels": sorted({launch.kernel for launch in launches}),
        "emulated_s": round(sum(launch.seconds for launch in launches), 2),
        "seconds": round(time.perf_counter() - begun, 2),
        "errors": {name: float(f"{result.error():.1e}") for name, result in results.items()},
        "problem": "; ".join(problems) or None,
    }


if __name__ == "__main__":
    for group in sys.argv[1:] or GROUPS:
        for family, options in GROUPS[group]():
            try:
                line = run(family, options)
            except Exception as error:
                line = {"case": f"{family} {options}", "problem": f"{type(error).__name__}: {error}"}
            print(json.dumps(line), flush=True)
