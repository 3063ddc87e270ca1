"""The Gluon kernels, compiled and emulated."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from motif_kernels import diff_attn_varlen_func
from motif_kernels.impl.gluon import availability

ROOT = Path(__file__).parents[3]
CASES: dict[str, dict[str, Any]] = {
    "DIFF V1": {"tokens": 140},
    "the released model's shape": {"d": 128, "dv": 256, "group": 4, "tokens": 150, "dtype": "float16"},
    "four signal heads, a gate, lambda of each token": {
        **{"group": 4, "noise": 2, "batch": 2, "tokens": 140, "epilogue": "gate", "lam": "token"},
    },
    "three signal heads, no mask": {"dv": 64, "group": 3, "tokens": 270, "causal": False, "epilogue": "none"},
    "softmax": {"noise": 3, "tokens": 140, "softmax": True, "epilogue": "none"},
    "softmax with a norm": {"d": 128, "dv": 128, "noise": 2, "tokens": 140, "softmax": True, "dtype": "float16"},
    "rows that see nothing": {"tokens": 190, "keys": 50, "dtype": "float16"},
    "more keys than queries, shared heads": {"noise": 4, "tokens": 77, "keys": 300, "key_heads": 2, "lam": "one"},
    "a window": {"d": 128, "dv": 256, "group": 2, "tokens": 400, "window": 70},
    "a narrow window, two tiles of queries, more keys": {"tokens": 200, "keys": 333, "window": 20, "dtype": "float16"},
    "a window without a mask on the right": {"tokens": 270, "window": 100, "causal": False},
    "packed documents": {"group": 2, "lengths": [5, 0, 140, 1, 233], "lam": "token"},
    "packed documents in a window": {
        **{"d": 128, "dv": 256, "group": 2, "lengths": [130, 0, 140], "window": 6, "dtype": "float16"},
    },
    "shared heads, no epilogue": {"noise": 2, "tokens": 90, "key_heads": 1, "epilogue": "none"},
    "one set of keys": {"dv": 64, "noise": 2, "group": 2, "tokens": 140, "shared_keys": True, "epilogue": "gate"},
    "tokens after the last document": {},
    "a cap on logits": {"d": 128, "dv": 128, "group": 4, "noise": 2, "tokens": 140, "softcap": 20.0, "key_heads": 1},
}


@pytest.mark.nightly
def test_both_passes_keep_the_error_rule() -> None:
    """In a process of its own: kernels are compiled there, and interpreted here."""
    command = [sys.executable, "-m", "tests.kernels.ptx.test_gluon"]
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    if found == [{"interface": False}]:
        pytest.skip("this Triton has another Gluon")
    assert len(found) == len(CASES), done.stderr
    assert not [line for line in found if line["problem"]]
    for line in found:  # the backward pass of packed documents is the Triton kernels'
        case = CASES[line["case"]]
        assert line["served"] == [1, int(bool(case) and "lengths" not in case)], line


def run(name: str) -> dict[str, Any]:
    """A case's line: how often Gluon served its two passes, its errors, what is wrong."""
    from motif_kernels.impl.gluon import diff_attention
    from tests.kernels.ptx import cases
    from tests.kernels.ptx.launching import emulated

    options = dict(CASES[name])
    options["dtype"] = getattr(torch, options.get("dtype", "bfloat16"))
    with pytest.MonkeyPatch.context() as patch, emulated():
        patch.setattr(availability, "runs_on", lambda device: True)
        served = [Mock(wraps=diff_attention.forward), Mock(wraps=diff_attention.backward)]
        patch.setattr(diff_attention, "forward", served[0])
        patch.setattr(diff_attention, "backward", served[1])
        results = cases.attention(**options) if CASES[name] else after_the_last_document()
    problems = []
    for of, result in results.items():
        try:
            result.check(options["dtype"])
        except AssertionError as error:
            problems.append(f"{of}: {error}")
    errors = {of: f"{result.error():.1e}" for of, result in results.items()}
    calls = [each.call_count for each in served]
    return {"case": name, "served": calls, "errors": errors, "problem": "; ".join(problems)}


def after_the_last_document() -> dict[str, Any]:
    """NaN there, in all that is read; zeros in the output and in the gradients."""
    from tests.kernels.ptx import cases

    kinds = {"q1": (2, 64), "k1": (1, 64), "q2": (1, 64), "k2": (1, 64), "v": (1, 128), "lam": (2,), "gate": (2, 128)}
    given = {name: cases.numbers(260, *of, dtype=torch.bfloat16, seed=i) for i, (name, of) in enumerate(kinds.items())}
    grad = cases.numbers(260, 2, 128, dtype=torch.bfloat16, seed=99)
    bounds = [torch.tensor(b, dtype=torch.int32) for b in ([0, 30, 200], [0, 50, 190])]

    def call(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        leaves = cases.leaves(given, dtype)
        *tensors, gate = leaves.values()
        out = diff_attn_varlen_func(*tensors, *bounds, 170, 140, causal=True, gate=gate, backend=backend)
        return [out, *torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))]

    exact, plain = call(torch.float64, "reference"), call(torch.bfloat16, "reference")
    for name, tensor in given.items():
        tensor[190 if name in ("k1", "k2", "v") else 200 :] = torch.nan
    names = ["out", *(f"d{name}" for name in given)]
    return cases.results(names, call(torch.bfloat16, "triton"), plain, exact)


if __name__ == "__main__":
    if not availability.interface_is_present():
        print(json.dumps({"interface": False}))
        sys.exit()
    for each in sys.argv[1:] or CASES:
        try:
            line = run(each)
        except Exception as error:
            line = {"case": each, "served": [], "problem": f"{type(error).__name__}: {error}"}
        print(json.dumps(line), flush=True)
