"""Programs that torch.export, ONNX and torch.jit.trace make of the models, without motifarch's
operators.
"""

import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.export import Dim
from transformers.integrations.executorch import (
    TorchExportableModuleForDecoderOnlyLM,
    convert_and_export_with_cache,
)

from helpers import compatibility
from helpers.compatibility import cells
from helpers.host_models import EXPERTS, HEADS, ONLY_EXPERTS, RATIOS, host_model, left_padded, moved, token_ids
from helpers.models import VARIANTS, tiny_model
from motifarch.integrations import patch

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {0: Dim("batch", min=2, max=16), 1: Dim("length", min=2, max=64)}
nightly = pytest.mark.nightly


def build(name: str) -> Any:
    """A column's model, a Motif model of another variant, or a patched model of another family."""
    if name in compatibility.COLUMNS:
        return compatibility.build(name)
    torch.manual_seed(0)
    if name in VARIANTS:
        return tiny_model(name, **({"rope_parameters": YARN} if name == "gda window" else {})).eval()
    model = host_model(name)
    experts = {"experts": "swap" if name in ONLY_EXPERTS else "keep"} if name in EXPERTS else {}
    patch(model, ratio=RATIOS[name], feed_forward="polynorm", sub_norm=True, **experts)
    return moved(model)


def batches() -> list[dict[str, Tensor]]:
    """Of two shapes, with padding on the left, on the right, and none."""
    left, other = left_padded([token_ids(17, seed=n) for n in (1, 2, 3)]), left_padded([token_ids(9), token_ids(4)])
    left["attention_mask"][0, :6] = left["attention_mask"][1, 11:] = 0
    return [left, other]


def assert_agrees(found: Tensor, expected: Tensor, mask: Tensor) -> None:
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], atol=5e-5, rtol=1e-4)


def exported(model: Any, inputs: dict[str, Any]) -> Any:
    if Version(torch.__version__) < Version("2.12"):
        pytest.skip("torch 2.11 exports differential attention for one length only")
    shapes = {name: DYNAMIC if isinstance(value, Tensor) else None for name, value in inputs.items()}
    return torch.export.export(model, (), inputs, dynamic_shapes=shapes)


FEW = ["gda window", "gemma2"]
EVERY = dict.fromkeys((*compatibility.COLUMNS, *VARIANTS, *HEADS))


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=nightly) for n in EVERY])
@torch.no_grad()
def test_torch_export(name: str) -> None:
    model = build(name)
    first, second = batches()
    expected = [model(**batch, use_cache=False).logits for batch in (first, second)]
    program = exported(model, {**first, "use_cache": False})
    operators = {node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")}
    assert operators - {"transformers"} == {"aten"}  # hosts' routed experts have an operator of their own
    for batch, logits in zip((first, second), expected, strict=True):
        found = program.module()(**batch, use_cache=False).logits
        assert_agrees(found, logits, batch["attention_mask"])
        torch.testing.assert_close(model(**batch, use_cache=False).logits, logits)  # nothing of the tracing stays


@pytest.mark.parametrize("name", [pytest.param(n, marks=nightly) for n in ("gda", "softmax", "llama")])
@torch.no_grad()
def test_packed_documents_of_an_exported_program_do_not_see_each_other(name: str) -> None:
    model = build(name)
    ids = token_ids(2, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1).clone()
    program = exported(model, {"input_ids": ids, "position_ids": positions, "use_cache": False})
    positions = torch.cat([torch.arange(8), torch.arange(4)]).expand(2, -1).clone()
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    assert_agrees(program.module()(**inputs).logits, model(**inputs).logits, torch.ones(2, 12))


@cells("gda")
def test_export_static_cache(name: str) -> None:
    """The two recipes of transformers: a token at a time, and prompts of any length."""
    model, ids, places = build(name), token_ids(1, 19), 24
    model.generation_config.cache_implementation = "static"
    model.generation_config.cache_config = {"batch_size": 1, "max_cache_len": places}
    length = Dim("length", max=places - 1)
    shapes = {"input_ids": {1: length}, "cache_position": {0: length}}
    recipe = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=places)
    by_token = convert_and_export_with_cache(model).module()
    by_chunk = recipe.export(ids[:, :3], cache_position=torch.arange(3), dynamic_shapes=shapes).module()
    for program, bounds in ((by_token, range(20)), (by_chunk, (0, 7, 11, 19))):
        for tokens in (ids, ids.flip(1)):  # the second overwrites what the first left
            with torch.no_grad():
                found = [
                    program(input_ids=tokens[:, start:end], cache_position=torch.arange(start, end))
                    for start, end in pairwise(bounds)
                ]
                assert_agrees(torch.cat(found, dim=1), model(tokens).logits, torch.ones(1, 19))


@pytest.mark.parametrize("name", ["gda", "llama"])
@torch.no_grad()
def test_a_static_cache_that_a_program_would_forget_is_refused(name: str) -> None:
    """With strict=False it is a constant to torch.export, and logits are wrong without a word."""
    model, ids = build(name), token_ids(1, 4)
    model.generation_config.cache_implementation = "static"
    recipe = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=8)
    with pytest.raises(ValueError, match="export with strict=True"):
        recipe.export(ids[:, :1], strict=False)


class Plain(nn.Module):
    """From tensors to logits, as torch.jit.trace wants it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


@pytest.mark.parametrize(
    "name", ["gda window", "llama", *(pytest.param(n, marks=nightly) for n in ("diff_v2", "qwen3"))]
)
@torch.no_grad()
def test_a_traced_model_computes_what_the_model_does(name: str) -> None:
    model = build(name)
    first, second = batches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes that are checked while it is traced, and of its deprecation
        traced = torch.jit.trace(Plain(model), tuple(first.values()), check_trace=False)
    for batch in (first, second):
        assert_agrees(traced(**batch), model(**batch, use_cache=False).logits, batch["attention_mask"])


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["gda window", "diff_v2 gated", "softmax", "llama"])
@torch.no_grad()
def test_an_onnx_program_computes_what_the_model_does(name: str, tmp_path: Path) -> None:
    model = build(name)
    first, second = batches()
    shapes = {"input_ids": DYNAMIC, "attention_mask": DYNAMIC}
    program = torch.onnx.export(
        Plain(model).eval(), (), kwargs=first, dynamic_shapes=shapes, dynamo=True, verbose=False
    )
    assert program is not None
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch in (first, second):
        found = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})[0]
        assert_agrees(torch.from_numpy(found), model(**batch, use_cache=False).logits, batch["attention_mask"])
