"""8-bit products with torchao's emulation: what is replaced, stays, is not supported."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.distributed import on_ranks, torchrun
from helpers.layouts import VARIANTS, Case, train_cases
from helpers.models import tiny_config
from helpers.tiny import MOTIF_3, write_recipe
from motifarch.errors import UserError
from motifarch.models.motif import MotifForCausalLM
from motifarch.parallel import Layout, check_low_precision
from motifarch.parallel.low_precision import apply_low_precision
from motifarch.train.manifest import checkpoint_name, checkpoints_folder

pytest.importorskip("torchao", reason="needs torchao (pip install 'motifarch[low-precision]')")

# Sizes of which two ranks of tensor parallelism have multiples of 32 each.
MODEL = {"num_hidden_layers": 4, "intermediate_size": 64, "head_dim": 16}
STEPS = 4
GPU = torch.device("cuda", 0)


def model_of(variant: str, **overrides: Any) -> MotifForCausalLM:
    with torch.device("meta"):
        return MotifForCausalLM(tiny_config(variant, **VARIANTS[variant] | MODEL | overrides))


def latent(**overrides: Any) -> MotifForCausalLM:
    """Sizes of which two ranks have multiples of 16, and four do not."""
    sizes = {"num_hidden_layers": 3, "n_dense_first_layers": 2, "moe_intermediate_size": 32, "head_dim": 32}
    sizes |= {"qk_rope_head_dim": 16, "v_head_dim": 16, "kv_lora_rank": 16, "num_attention_heads": 8} | overrides
    return model_of("gda", **MOTIF_3 | {"qk_norm": False, "num_noise_heads": 2} | sizes)


def options(matmul: str) -> dict[str, Any]:
    return {"compute_dtype": torch.bfloat16, "matmul": matmul, "emulate_matmul": True}


@pytest.mark.parametrize(("matmul", "kind"), [("fp8", "Float8Linear"), ("mxfp8", "MXFP8Linear")])
@pytest.mark.parametrize("variant", ["gda", "diff_v2 gated"])
def test_inner_layers_are_replaced_and_nothing_else(variant: str, matmul: Any, kind: str) -> None:
    model = model_of(variant)
    before = dict(model.named_parameters())
    names = apply_low_precision(model, matmul, emulate=True)
    found = {name for name, module in model.named_modules() if type(module).__name__ == kind}
    projections = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    if variant == "diff_v2 gated":
        projections.append("self_attn.gate_proj")  # but not lambda_proj
    assert found == set(names) == {f"model.layers.{i}.{p}" for i in (1, 2) for p in projections}
    assert dict(model.named_parameters()) == before
    assert model.training == model.model.layers[1].mlp.up_proj.training


def test_compute_replaces_nothing() -> None:
    model = model_of("gda")
    assert apply_low_precision(model, "compute") == []
    assert {type(m) for n, m in model.named_modules() if n.endswith("_proj")} == {torch.nn.Linear}


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two ranks: each precision sharded and with tensor parallelism, and a switch halfway."""
    folder = tmp_path_factory.mktemp("low_precision")
    checkpoint = checkpoints_folder(folder) / checkpoint_name(STEPS // 2)
    common: dict[str, Any] = {"variant": "gda", "model": MODEL, "steps": STEPS}
    cases = [Case("bf16", layout=Layout(), options={"compute_dtype": torch.bfloat16}, save=folder, **common)]
    for matmul in ("fp8", "mxfp8"):
        cases.append(Case(matmul, layout=Layout(), options=options(matmul), **common))
        cases.append(Case(f"{matmul} tensor", layout=Layout(tensor=2), options=options(matmul), **common))
    cases.append(Case("bf16, then fp8", layout=Layout(), options=options("fp8"), load=checkpoint, **common))
    on_ranks(2, train_cases, data, folder / "trained.pt", cases)
    return torch.load(folder / "trained.pt")  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8", "mxfp8", "fp8 tensor", "mxfp8 tensor"])
def test_training_is_near_bfloat16_and_rounds(trained: dict[str, Any], name: str) -> None:
    (exact, _, exact_weights, *_), (rounded, _, weights, *_) = trained["bf16"], trained[name]
    losses = torch.tensor(rounded)[:, 0]
    # Three more bits are lost than in bfloat16, in two layers of four: losses of 4 to 6 agree to a
    # hundredth.
    torch.testing.assert_close(losses, torch.tensor(exact)[:, 0], rtol=0, atol=0.01)
    assert losses[0] - losses[-1] > 0.5
    assert rounded[0][2] != exact[0][2]
    assert weights.keys() == exact_weights.keys()
    assert {w.dtype for w in weights.values()} == {torch.float32}


@pytest.mark.slow
def test_a_checkpoint_goes_on_in_another_precision(trained: dict[str, Any]) -> None:
    exact, switched = trained["bf16"][0][STEPS // 2 :], trained["bf16, then fp8"][0]
    assert len(switched) == STEPS - STEPS // 2
    torch.testing.assert_close(torch.tensor(switched)[:, 0], torch.tensor(exact)[:, 0], rtol=0, atol=0.01)
    assert switched != exact


def check(matmul: Any = "fp8", **arguments: Any) -> None:
    defaults: dict[str, Any] = {"device": GPU, "compute_dtype": torch.bfloat16, "tokens": 64}
    check_low_precision(matmul, **defaults | arguments)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a Hopper")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("matmul", "arguments", "message"),
    [
        ("fp8", {"device": torch.device("cpu")}, r"fp8, which needs .*capability 9\.0 \(Hopper\).* on cpu"),
        ("mxfp8", {}, r"capability 10\.0 \(Blackwell\).*a Hopper has 9\.0; take precision.matmul fp8 or compute"),
        ("fp8", {"compute_dtype": torch.float32}, "precision.compute float32.*set precision.compute to bfloat16"),
        ("fp8", {"tokens": 40}, "multiple of 16 tokens .* there are 40"),
        ("fp8", {"model": model_of("gda", num_hidden_layers=2)}, "num_hidden_layers 2.*at least 3"),
        ("fp8", {"model": model_of("gda", intermediate_size=72)}, "layers.1.mlp.gate_proj is 32 by 72"),
        ("fp8", {"model": model_of("gda"), "tensor": 8}, "on each of parallel.tensor 8 ranks"),
        (
            "fp8",
            {"model": latent(), "tensor": 4},
            "on each of parallel.tensor 4 .*1.self_attn.wq_b_gate is 16 by 96",
        ),
        ("fp8", {"model": latent(q_lora_rank=24), "tensor": 2}, "multiples of 16, but .*1.self_attn.wq_a is 32 by 24"),
    ],
)
def test_what_does_not_fit_is_refused(matmul: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(matmul, **arguments)


@pytest.mark.usefixtures("hopper")
def test_what_fits_is_not() -> None:
    check(model=model_of("gda"), tensor=2)
    check(model=latent(), tensor=2)  # latents are as wide as on one rank
    check("compute", device=torch.device("cpu"), compute_dtype=torch.float32, tokens=5)


def test_a_run_without_the_hardware_says_so_and_leaves_nothing(data: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this GPU may have the hardware")
    recipe = write_recipe(tmp_path, data)
    done = torchrun(0, "-m", "motifarch.train", recipe, "--precision.matmul", "fp8")
    assert done.returncode == 2
    assert "error: precision.matmul is fp8, which needs a GPU of compute capability 9.0 (Hopper)" in done.stderr
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_blackwell_without_the_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    if torch.cuda.is_available() and torch.cuda.get_device_capability(0) >= (10, 0):
        pytest.skip("this GPU may have the kernels")
    with pytest.raises(UserError, match="without its MXFP8 kernels"):
        check("mxfp8")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("missing", "matmul", "message"),
    [
        ("torchao", "fp8", "none is installed; run pip install"),
        ("torchao.prototype.moe_training.mxfp8_linear", "mxfp8", r"torchao \d.* does not offer .* needs 0\.18"),
    ],
)
def test_torchao_that_lacks_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, missing: str, matmul: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=message):
        check(matmul)
