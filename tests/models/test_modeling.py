"""The model's call: inputs and outputs, checkpointing, metrics, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import motif_kernels.flops  # noqa: F401  (registers the attention operators' formulas)
from helpers.agreement import assert_agrees
from helpers.interpreter import require_interpreter
from helpers.models import VARIANTS, packed, random_ids, tiny_model


def gradients(model, **arguments):
    model.zero_grad()
    model(**arguments).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_is_torch_s_cross_entropy_of_the_logits(variant):
    model, ids = tiny_model(variant), random_ids(2, 17)
    labels = ids.masked_fill(ids % 5 == 0, -100)
    out = model(input_ids=ids, labels=labels)
    assert out.logits.shape == (2, 17, 97)
    assert_agrees(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
    shifted = model(input_ids=ids, shift_labels=F.pad(labels[:, 1:], (0, 1), value=-100))
    assert torch.equal(shifted.loss, out.loss)
    z = model(input_ids=ids, labels=labels, z_loss_weight=0.1)
    seen = labels[:, 1:] != -100
    assert_agrees(z.z_loss, 0.1 * out.logits[:, :-1].logsumexp(-1)[seen].square().mean())
    assert_agrees(z.loss, out.loss + z.z_loss)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_gives_the_same_gradients(variant, reentrant):
    model, ids = tiny_model(variant).train(), random_ids(2, 15)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    documents = packed([random_ids(1, n, seed=n)[0] for n in (6, 1, 8)])
    cases = [
        {"input_ids": ids, "labels": ids},
        {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask},
        {**documents, "labels": documents["input_ids"]},
    ]
    before = [gradients(model, **case) for case in cases]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    handle = model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda *_: calls.append(1))
    after = [gradients(model, **case) for case in cases]
    handle.remove()
    assert len(calls) == 2 * len(cases)  # forward, and again in backward
    for a, b in zip(before, after, strict=True):
        for name in a:
            assert torch.equal(a[name], b[name]), name


def test_embeddings_instead_of_ids():
    model, ids = tiny_model(), random_ids(2, 9)
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(input_ids=ids).logits)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**wrong)


@pytest.mark.parametrize("by_config", [False, True])
def test_hidden_states(by_config):
    model, ids = tiny_model(), random_ids(2, 9)
    if by_config:
        model.config.output_hidden_states = True
    out = model(input_ids=ids, **({} if by_config else {"output_hidden_states": True}))
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    first = model.model.layers[0](
        out.hidden_states[0], model.model.rotary_embs["full_attention"](torch.arange(9)[None])
    )
    assert torch.equal(first, out.hidden_states[1])
    model.config.output_hidden_states = False
    assert model(input_ids=ids).hidden_states is None


def test_logits_to_keep():
    model, ids = tiny_model(), random_ids(2, 9)
    whole = model(input_ids=ids).logits
    assert_agrees(model(input_ids=ids, logits_to_keep=2).logits, whole[:, -2:], 1e-6)
    assert_agrees(model(input_ids=ids, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]], 1e-6)


def test_logits_are_made_only_where_they_are_asked_for():
    model, ids = tiny_model(), random_ids(2, 9)
    assert model(input_ids=ids, labels=ids).logits is not None
    assert model(input_ids=ids, shift_labels=ids).logits is None
    assert model(input_ids=ids, labels=ids, return_logits=False).logits is None
    assert model.train()(input_ids=ids, labels=ids).logits is None
    assert model(input_ids=ids, labels=ids, return_logits=True).logits is not None
    assert model(input_ids=ids).logits is not None


def test_caches_are_made_in_evaluation_only():
    model, ids = tiny_model(), random_ids(2, 9)
    assert model(input_ids=ids).past_key_values.get_seq_length() == 9
    assert model(input_ids=ids, use_cache=False).past_key_values is None
    assert model.train()(input_ids=ids).past_key_values is None


def test_eager_and_sdpa_agree():
    ids = random_ids(2, 21)
    eager, sdpa = (tiny_model(attn_implementation=name) for name in ("eager", "sdpa"))
    assert_agrees(sdpa(input_ids=ids).logits, eager(input_ids=ids).logits)
    for name in ("eager", "sdpa"):
        sdpa.set_attn_implementation(name)
        sdpa(input_ids=ids)
        assert sdpa.model.layers[0].self_attn.backend == {"eager": "reference", "sdpa": "sdpa"}[name]


def test_bfloat16_is_as_close_to_float64_as_bfloat16_is():
    ids = random_ids(2, 33)
    exact = tiny_model(dtype=torch.float64)(input_ids=ids).logits
    out = tiny_model(dtype=torch.bfloat16)(input_ids=ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    relative = (out.logits.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert relative < 0.03


@pytest.mark.parametrize("variant", VARIANTS)
def test_last_lambdas(variant):
    model = tiny_model(variant)
    assert model.last_lambdas() is None
    model(input_ids=random_ids(2, 9))
    lambdas = model.last_lambdas()
    if variant == "softmax":
        assert lambdas is None
        return
    assert lambdas.shape == (2,)
    assert lambdas.dtype == torch.float32
    assert not lambdas.requires_grad
    if variant.startswith("diff_v2"):
        assert ((lambdas > 0) & (lambdas < 1)).all()
        assert lambdas.tolist() != pytest.approx([0.5, 0.5], abs=1e-3)
    else:
        expected = [layer.self_attn.compute_lambda().item() for layer in model.model.layers]
        assert lambdas.tolist() == pytest.approx(expected)


def test_shift_labels_win_over_labels():
    """Trainer's context parallelism and DeepSpeed's sequence parallelism give both."""
    model, ids = tiny_model(), random_ids(2, 9)
    targets = random_ids(2, 9, seed=3)
    both = model(input_ids=ids, labels=ids, shift_labels=targets)
    assert both.loss == model(input_ids=ids, shift_labels=targets).loss
    assert both.loss != model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("by_config", [False, True])
def test_outputs_as_a_tuple(by_config):
    model, ids = tiny_model(), random_ids(2, 9)
    named = model(input_ids=ids, labels=ids, use_cache=False, output_hidden_states=True)
    model.config.return_dict = not by_config
    loss, logits, hidden_states, z_loss = model(
        input_ids=ids,
        labels=ids,
        use_cache=False,
        output_hidden_states=True,
        **({} if by_config else {"return_dict": False}),
    )
    assert torch.equal(loss, named.loss)
    assert torch.equal(logits, named.logits)
    assert len(hidden_states) == len(named.hidden_states)
    assert z_loss == 0
    assert isinstance(model.model(input_ids=ids, **({} if by_config else {"return_dict": False})), tuple)


def test_wrong_calls_are_refused():
    model, ids = tiny_model(), random_ids(2, 9)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 8\); it must be \(2, 9\): 0 cached and 9 new"):
        model(input_ids=ids, attention_mask=torch.ones(2, 8))
    cache = model(input_ids=ids).past_key_values
    with pytest.raises(ValueError, match=r"it must be \(2, 10\): 9 cached and 1 new tokens in each of 2 rows"):
        model(input_ids=ids[:, :1], past_key_values=cache, attention_mask=torch.ones(2, 1))


def test_unsupported_attention_is_refused():
    for name, words in (("flash_attention_2", "no flash-attn is installed"), ("unheard_of", "unheard_of")):
        with pytest.raises(ValueError, match=words):
            tiny_model(attn_implementation=name)
        with pytest.raises(ValueError, match=words):
            tiny_model().set_attn_implementation(name)


@pytest.mark.parametrize("variant", ["gda", "diff_v1", "diff_v2 gated"])
def test_fused_kernels_carry_the_model(variant):
    """Padded batch, logits and gradients, in Triton's interpreter."""
    require_interpreter()
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    results = []
    for name in ("triton", "eager"):
        model = tiny_model(variant, attn_implementation=name).train()
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for fused, eager in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "window" not in v])
def test_flops_per_token_are_those_that_torch_counts(variant):
    """The counter sees the eager backend's full map; causal needs (S + 1) / 2 pairs a token."""
    length = 24
    model, ids = tiny_model(variant, attn_implementation="eager").train(), random_ids(1, 24)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    config = model.config
    pair = 3 * 2 * (config.head_dim + config.v_head_dim) * config.num_attention_heads * config.num_hidden_layers
    hidden_pairs = length - (length + 1) / 2
    assert counter.get_total_flops() / length == model.flops_per_token(length) + pair * hidden_pairs


@pytest.mark.parametrize("length", [4, 7, 30])
def test_flops_of_a_window_count_visible_pairs(length):
    windowed, full = tiny_model("gda window"), tiny_model()
    pair = 3 * 2 * (8 + 16) * 6 * 2
    visible = sum(min(i + 1, 7) for i in range(length)) / length
    everything = sum(i + 1 for i in range(length)) / length
    difference = full.flops_per_token(length) - windowed.flops_per_token(length)
    assert difference == pytest.approx(pair * (everything - visible))


def test_arguments_that_nothing_reads_are_refused():
    model, ids = tiny_model("gda"), random_ids(1, 5)
    with pytest.raises(ValueError, match="attention was given s_aux, which"):
        model(ids, s_aux=torch.zeros(6))
    with pytest.raises(ValueError, match="is_causal is False"):
        model(ids, is_causal=False)
    for name in ("s_aux", "token_type_ids", "num_items_in_batch"):
        model(ids, **{name: None})
