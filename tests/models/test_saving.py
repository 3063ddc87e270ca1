"""Folders: what is written, what comes back, tied weights and float32 tables."""

import pytest
import torch

from helpers.models import VARIANTS, random_ids, tiny_config, tiny_model
from helpers.released import YARN
from motifarch.models.motif import MotifForCausalLM


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, variant, dtype):
    model = tiny_model(variant, dtype=dtype)
    model.save_pretrained(tmp_path)
    loaded, report = MotifForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == dtype
    ids = random_ids(2, 19)
    assert torch.equal(model(input_ids=ids).logits, loaded.eval()(input_ids=ids).logits)
    ours, theirs = ({k: v for k, v in m.config.to_dict().items() if k != "_name_or_path"} for m in (model, loaded))
    assert ours == theirs


def test_tied_weights_come_back_tied(tmp_path):
    model = tiny_model("gda tied")
    model.save_pretrained(tmp_path)
    loaded = MotifForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    loaded.train()(input_ids=random_ids(1, 9), labels=random_ids(1, 9)).loss.backward()
    assert loaded.lm_head.weight.grad is loaded.model.embed_tokens.weight.grad
    assert len(list(loaded.parameters())) == len(list(loaded.state_dict())) - 1


def test_tied_gradient_is_the_sum_of_both_uses():
    tied, ids = tiny_model("gda tied", dtype=torch.float64).train(), random_ids(1, 9)
    untied = tiny_model("gda tied", dtype=torch.float64, tie_word_embeddings=False).train()
    untied.load_state_dict(tied.state_dict())
    for model in (tied, untied):
        model(input_ids=ids, labels=ids).loss.backward()
    both = untied.lm_head.weight.grad + untied.model.embed_tokens.weight.grad
    torch.testing.assert_close(tied.lm_head.weight.grad, both, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("move", [lambda m: m.to_empty(device="cpu"), lambda m: m.bfloat16(), lambda m: m.to("cpu")])
def test_meta_construction_and_moves_keep_weights_tied(move):
    with torch.device("meta"):
        model = MotifForCausalLM(tiny_config("gda tied"))
    if move(torch.nn.Linear(1, 1)).weight.dtype != torch.bfloat16:
        model.to_empty(device="cpu")
    model = move(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_materialised_meta_model_computes_like_its_source():
    source = tiny_model("gda tied")
    with torch.device("meta"):
        model = MotifForCausalLM(tiny_config("gda tied"))
    model.to_empty(device="cpu").eval().load_state_dict(source.state_dict())
    ids = random_ids(2, 11)
    assert torch.equal(model(input_ids=ids).logits, source(input_ids=ids).logits)


@pytest.mark.parametrize("rope", [{}, {"rope_theta": 5e5, "rope_scaling": dict(YARN)}], ids=["default", "yarn"])
def test_rotary_tables_stay_in_float32(tmp_path, rope):
    source = tiny_model(**rope)
    source.save_pretrained(tmp_path)
    loaded = MotifForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    positions = torch.arange(200)[None]
    exact = source.model.rotary_embs["full_attention"](positions)
    for model in (loaded, source.bfloat16()):
        assert model.lm_head.weight.dtype == torch.bfloat16
        for ours, theirs in zip(
            model.model.rotary_embs["full_attention"](positions, torch.bfloat16), exact, strict=True
        ):
            assert ours.dtype == torch.float32
            assert torch.equal(ours, theirs)


def test_a_pass_on_the_meta_device_leaves_scaled_rotary_tables_whole():
    rotary, positions = tiny_model(rope_scaling=dict(YARN)).model.rotary_embs["full_attention"], torch.arange(9)[None]
    before = rotary(positions)
    assert rotary(positions.to("meta"))[0].is_meta
    for ours, expected in zip(rotary(positions), before, strict=True):
        assert torch.equal(ours, expected)
