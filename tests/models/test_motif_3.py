"""Motif-3 against an implementation in plain torch that was written before it, from what is
published alone: logits, gradients, choices of experts; and that planted mistakes are noticed.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import motif_3_reference as reference
from models import motif_3_reference_losses as losses

from helpers.motif_3 import TINY, tiny_motif_3
from motifarch.layers import HyperConnections
from motifarch.models.motif import MotifConfig, MotifForCausalLM

BATCH, TOKENS = 2, 14


def ids(seed: int = 1) -> torch.Tensor:
    return torch.randint(1, TINY["vocab_size"], (BATCH, TOKENS), generator=torch.Generator().manual_seed(seed))


def read_tensors(model: MotifForCausalLM) -> dict[str, torch.Tensor]:
    """The model's tensors for the reference, with gradients of their own."""
    tensors = {name: t.detach().clone().double() for name, t in model.state_dict().items()}
    return {name: t.requires_grad_("expert_bias" not in name) for name, t in tensors.items()}


def assert_close(found: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, atol=1e-10 * scale, rtol=0, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mhc_enabled": False, "num_nextn_predict_layers": 0},
        pytest.param(
            {"interleave_moe_layer_step": 2, "mhc_h_post_alpha_end": 0.6, "num_shared_experts": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"rope_scaling": None, "n_dense_first_layers": 5, "tie_word_embeddings": True}, marks=pytest.mark.slow
        ),
    ],
    ids=["published", "no hyper-connections", "every second layer", "dense, no scaling"],
)
def test_logits_choices_and_every_gradient(changes: dict[str, Any]) -> None:
    model, tokens = tiny_motif_3(**changes), ids()
    tensors = read_tensors(model)
    given = TINY | changes | {"mhc_h_post_alpha": changes.get("mhc_h_post_alpha_end", 0.0)}
    config = reference.read_config({k: v for k, v in given.items() if k != "mhc_h_post_alpha_end"})
    assert {
        n: tuple(t.shape) for n, t in tensors.items() if n != "lm_head.weight" or not config.tie_word_embeddings
    } == (reference.parameter_shapes(config))
    expected = reference.forward(config, tensors, tokens)
    selected: dict[int, torch.Tensor] = {}
    for index, experts in model.model.expert_layers().items():
        experts.router.register_forward_hook(
            lambda module, args, out, index=index: selected.__setitem__(index, out.selected)
        )
    with torch.no_grad():
        found = model(tokens, return_mtp_logits=True)
    assert_close(found.logits, expected.logits, "logits")
    for ours, theirs in zip([found.mtp_logits], expected.mtp_logits, strict=False):
        assert_close(ours[:, :-1], theirs, "MTP logits")
    assert selected.keys() == expected.routing.keys()
    for index, routing in expected.routing.items():
        assert torch.equal(selected[index].sort(dim=-1)[0].view(BATCH, TOKENS, -1), routing.choices.sort(dim=-1)[0])

    for experts in model.model.expert_layers().values():
        experts.balance_loss_coeff, experts.magnitude_loss_coeff, experts.magnitude_threshold = 0.03, 0.02, 0.5
    out = model.train()(tokens, labels=tokens, z_loss_weight=0.01)
    out.loss.backward()
    targets = losses.shifted_targets(tokens, 1)
    loss = losses.cross_entropy(expected.logits, targets) + losses.z_loss(expected.logits, targets, 0.01)
    for logits in expected.mtp_logits:
        after = losses.shifted_targets(tokens, 2)
        # DeepSeek-V3 divides by the number of the model's targets (equation 24).
        loss = loss + losses.mtp_loss(logits, after) * (after >= 0).sum() / (targets >= 0).sum()
    for index, routing in expected.routing.items():
        loss = loss + losses.balance_loss(routing.scores, routing.choices, 0.03)
        loss = loss + losses.ffn_magnitude_loss(expected.ffn_outputs[index], 0.02, 0.5)
    assert_close(out.loss, loss, "loss")
    loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, tensors[name].grad, f"gradient of {name}")


@pytest.mark.parametrize("padding", ["left", "packed"])
def test_padding_and_packed_documents(padding: str) -> None:
    model, tokens = tiny_motif_3(), ids()
    tensors, config = read_tensors(model), reference.read_config(TINY)
    with torch.no_grad():
        if padding == "left":
            mask = torch.ones_like(tokens)
            mask[0, :4] = 0
            found = model(tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
            expected = reference.forward(config, tensors, tokens, attention_mask=mask).logits
            found, expected = found[mask.bool()], expected[mask.bool()]
        else:
            document = torch.arange(TOKENS) // 5
            found = model(tokens, position_ids=(torch.arange(TOKENS) % 5)[None]).logits
            expected = reference.forward(config, tensors, tokens, document_ids=document.expand(BATCH, -1)).logits
    assert_close(found, expected)


@pytest.mark.parametrize("rows", [1, BATCH])
def test_multi_token_prediction_of_a_document_does_not_depend_on_the_next(rows: int) -> None:
    model, tokens = tiny_motif_3(), ids().view(rows, -1)
    bounds = torch.tensor([0, 5, 14, 18, 2 * TOKENS], dtype=torch.int32)
    with torch.no_grad():
        packed = model(tokens, cu_seq_lens_q=bounds, max_length_q=10, return_mtp_logits=True).mtp_logits.flatten(0, 1)
        for begin, end in bounds.unfold(0, 2, 1).tolist():
            alone = model(tokens.view(1, -1)[:, begin:end], return_mtp_logits=True).mtp_logits[0]
            assert_close(packed[begin:end], alone, f"document {begin} to {end}")


# Mistakes that others made, or could: each must be noticed.


def _gate_from_the_token(model: MotifForCausalLM) -> None:
    for layer in model.model.layers:
        attention: Any = layer.self_attn
        seen: list[torch.Tensor] = []
        attention.wq_a.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        attention.wq_b_gate.register_forward_pre_hook(lambda m, args, seen=seen: (seen.pop(),))


def _set(kind: str, name: str, value: Any) -> Callable[[MotifForCausalLM], None]:
    def change(model: MotifForCausalLM) -> None:
        found = [m for m in model.modules() if type(m).__name__ == kind and hasattr(m, name)]
        assert found
        for module in found:
            setattr(module, name, value)

    return change


def _window_without_the_token(model: MotifForCausalLM) -> None:
    for module in model.modules():
        if getattr(module, "window_size", (-1, -1))[0] > 0:
            module.window_size = (module.window_size[0] - 1, 0)


def _full_scale_on_windows(model: MotifForCausalLM) -> None:
    layers = model.model.layers
    layers[1].self_attn.softmax_scale = layers[0].self_attn.softmax_scale


def _yarn_on_windows(model: MotifForCausalLM) -> None:
    model.model.rotary_embs["sliding_attention"] = model.model.rotary_embs["full_attention"]


def _one_experts_poly_norm(model: MotifForCausalLM) -> None:
    for experts in model.model.expert_layers().values():
        act: Any = experts.experts.act_fn
        with torch.no_grad():
            act.weight.copy_(act.weight[:1].expand_as(act.weight))


def _no_selection_bias(model: MotifForCausalLM) -> None:
    for experts in model.model.expert_layers().values():
        experts.expert_bias.zero_()


def _no_final_norm_before_mtp(model: MotifForCausalLM) -> None:
    held: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda m, args: held.append(args[0]))
    model.model.mtp_layers[0].register_forward_pre_hook(lambda m, args: (held.pop(), *args[1:]))


def _exchanged_sinkhorn(model: MotifForCausalLM) -> None:
    for module in model.modules():
        if isinstance(module, HyperConnections):
            module.read = lambda streams, read=module.read: (*read(streams)[:2], read(streams)[2].mT)  # type: ignore[method-assign]


MISTAKES: dict[str, Callable[[MotifForCausalLM], None]] = {
    "no sigmoid in PolyNorm": _set("PolyNorm", "sigmoid_weight", False),
    "no 0.5 after PolyNorm": _set("GroupedPolyNorm", "output_scale", 1.0),
    "unclamped bias": _set("GroupedPolyNorm", "bias_clamp", None),
    "a window of one key less": _window_without_the_token,
    "the gate from the token": _gate_from_the_token,
    "the full layers' scale on windows": _full_scale_on_windows,
    "YaRN on windows": _yarn_on_windows,
    "one expert's PolyNorm for all": _one_experts_poly_norm,
    "no selection bias": _no_selection_bias,
    "weights not renormalised": _set("Router", "route_norm", False),
    "weights not scaled": _set("Router", "route_scale", 1.0),
    "twice the sublayers' part": _set("HyperConnections", "post_alpha", 1.0),
    "one Sinkhorn step": _set("HyperConnections", "sinkhorn_iters", 1),
    "rows and columns exchanged": _exchanged_sinkhorn,
    "MTP before the final norm": _no_final_norm_before_mtp,
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistake: str) -> None:
    model, tokens = tiny_motif_3(), ids()
    config, tensors = reference.read_config(TINY), read_tensors(model)
    MISTAKES[mistake](model)
    with torch.no_grad():
        found, expected = model(tokens, return_mtp_logits=True), reference.forward(config, tensors, tokens)
    wrong = max(
        (found.logits - expected.logits).abs().max().item(),
        (found.mtp_logits[:, :-1] - expected.mtp_logits[0]).abs().max().item(),
    )
    assert wrong > 1e-6


def test_the_released_model_has_its_tensors() -> None:
    config = reference.Motif3Config()
    released: dict[str, Any] = {name: getattr(config, name) for name in config.__dataclass_fields__}
    released.pop("mhc_h_post_alpha")
    released |= {key: value for key, value in TINY.items() if key not in released}
    released["rope_scaling"] |= {"rope_type": "yarn", "apply_yarn_scaling": False, "rope_theta": 10000}
    released |= {"max_position_embeddings": 262144, "rope_factor": 64, "original_seq_len": 4096, "mscale": 1}
    with torch.device("meta"):
        model = MotifForCausalLM(MotifConfig(**released))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == reference.parameter_shapes(config)
    assert len(shapes) == 2236
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 314_841_775_750
    scales = {layer.layer_type: layer.self_attn.softmax_scale for layer in model.model.layers}
    assert scales["full_attention"] == pytest.approx(0.14467963, abs=5e-9)
    plain = scales["sliding_attention"] or 192**-0.5
    assert plain == pytest.approx(0.07216878, abs=5e-9)
    assert [i for i, layer in enumerate(model.model.layers) if layer.layer_type == "full_attention"] == [
        *range(0, 53, 4)
    ]
    assert {layer.self_attn.window_size for layer in model.model.layers} == {(-1, -1), (128, 0)}
