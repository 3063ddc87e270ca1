"""Encoders that are patched: every token sees all others, on both sides."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForSpeechSeq2Seq

from helpers.encoders import ENCODERS, TEXT, encoder, inputs_of, output_of
from helpers.host_models import moved, token_ids
from helpers.plain_attention import plain_diff_attention
from motifarch.integrations import load_patched, patch
from motifarch.integrations.families import FAMILIES, Forward

FAMILIES_OF_ENCODERS = [f if f == "modernbert" else pytest.param(f, marks=pytest.mark.slow) for f in ENCODERS]
PER_FAMILY = pytest.mark.parametrize("family", FAMILIES_OF_ENCODERS)
NO_POLY_NORM = {"bert"}
"""Their feed-forward is in two modules."""


def patched(family: str, **options: Any) -> tuple[Any, Any]:
    model = encoder(family)
    feed_forward = None if family in NO_POLY_NORM else "polynorm"
    return model, patch(model, **({"ratio": 2, "merge_kv": True, "feed_forward": feed_forward} | options))


@PER_FAMILY
def test_the_table_says_how_an_encoders_forward_goes(family: str) -> None:
    model, _ = patched(family)
    assert {Forward(**forward) for forward in model.config.motifarch_patch["forwards"].values()} == {FAMILIES[family]}


@PER_FAMILY
@pytest.mark.parametrize("attention", ["gda", "diff_v2"])
def test_an_encoder_starts_as_its_host(family: str, attention: str) -> None:
    host = encoder(family)
    host.set_attn_implementation("eager")
    model, report = patched(family, attention=attention, ratio=1, feed_forward=None)
    assert report.exact
    inputs = inputs_of(family)
    batches = [inputs]
    if family in TEXT:
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, 11:] = 0
        batches += [inputs | {"attention_mask": mask}, inputs | {"attention_mask": mask.flip(1)}]
    with torch.no_grad():
        assert output_of(host, **inputs).std() > 0.1
        for batch in batches:
            expected, out = output_of(host, **batch), output_of(model, **batch)
            if "attention_mask" in batch:
                expected, out = expected[batch["attention_mask"].bool()], out[batch["attention_mask"].bool()]
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


@PER_FAMILY
def test_the_rows_of_a_batch_and_their_padding_do_not_matter(family: str) -> None:
    model, _ = patched(family)
    moved(model)
    inputs = inputs_of(family)
    with torch.no_grad():
        together = output_of(model, **inputs)
        for i in range(2):
            alone = output_of(model, **{name: tensor[i : i + 1] for name, tensor in inputs.items()})
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-4)
        if family in TEXT:
            mask = torch.ones_like(inputs["input_ids"])
            mask[0, 11:] = 0
            padded = output_of(model, **inputs, attention_mask=mask)[0, :11]
            torch.testing.assert_close(
                padded, output_of(model, input_ids=inputs["input_ids"][:1, :11])[0], atol=1e-5, rtol=1e-4
            )


def test_attention_is_the_formula_on_both_sides() -> None:
    model = encoder("siglip_vision_model")
    patch(model, ratio=2, merge_kv=True, lambda_init=0.4)
    layer = [m for m in moved(model).double().modules() if hasattr(m, "lambda_vectors")][1]
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    with torch.no_grad():
        heads = [p(x).unflatten(-1, (-1, 8)) for p in (layer.q_proj, layer.k_proj, layer.v_proj)]
        (q, noise), k, v = heads[0].split([4, 2], dim=2), *heads[1:]
        expected = plain_diff_attention(q, k, noise, k, v, layer.compute_lambda(x), causal=False).flatten(2)
        torch.testing.assert_close(layer(x)[0], layer.out_proj(expected), atol=1e-10, rtol=1e-10)


@PER_FAMILY
@pytest.mark.parametrize("attention", ["gda", "diff_v2"])
def test_an_encoder_learns_with_a_gradient_in_every_new_parameter(family: str, attention: str) -> None:
    model, report = patched(family, attention=attention)
    model.train()
    inputs = inputs_of(family)
    target = torch.randn(output_of(model, **inputs).shape, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = (output_of(model, **inputs) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert {n for n in report.added if gradients[n] is None or not gradients[n].abs().max() > 0} == set()


@PER_FAMILY
def test_an_encoder_is_saved_and_loaded(family: str, tmp_path: Path) -> None:
    model, _ = patched(family)
    moved(model).save_pretrained(tmp_path)
    inputs = inputs_of(family)
    expected = output_of(model, **inputs)
    for loaded in (load_patched(tmp_path), ENCODERS[family][0].from_pretrained(tmp_path)):
        assert type(loaded) is type(model)
        assert torch.equal(output_of(loaded, **inputs), expected)


@PER_FAMILY
def test_an_adapter_of_an_encoder_is_saved_and_merges(family: str, tmp_path: Path) -> None:
    model, _ = patched(family)
    bare = copy.deepcopy(moved(model))
    inputs = inputs_of(family)
    # torch's own attention, in SigLIP's pooling, reads its parts' weights, not what they give.
    without = r".*head\.attention.*" if family == "siglip_vision_model" else None
    config = LoraConfig(r=2, target_modules="all-linear", exclude_modules=without, init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        expected = output_of(adapted.base_model.model, **inputs)
        assert not torch.allclose(expected, output_of(bare, **inputs), atol=1e-2)
        adapted.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(bare, tmp_path).eval()
        torch.testing.assert_close(output_of(loaded.base_model.model, **inputs), expected)
        torch.testing.assert_close(output_of(adapted.merge_and_unload(), **inputs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_decoder_beside_an_encoder_starts_as_its_host_and_generates() -> None:
    """Whisper's: causal attention, and attention to the encoder's tokens."""

    def whisper() -> Any:
        torch.manual_seed(0)
        config = AutoConfig.for_model("whisper", **ENCODERS["whisper"][1], max_target_positions=32)
        return AutoModelForSpeechSeq2Seq.from_config(config).eval()

    host, model = whisper(), whisper()
    assert patch(model, ratio=1).exact
    inputs = inputs_of("whisper") | {"decoder_input_ids": token_ids(2, 9)}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, host(**inputs).logits, atol=1e-5, rtol=1e-4)
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
        features = inputs["input_features"]
        assert torch.equal(model.generate(features, **options), host.generate(features, **options))
