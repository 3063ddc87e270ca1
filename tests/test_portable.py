"""Folders with the model code in them compute what motifarch's own classes do."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorWithFlattening, StaticCache

from helpers.models import VARIANTS, packed, random_ids, tiny_model
from helpers.python_process import run_python
from motifarch.cli import run
from motifarch.errors import UserError
from motifarch.models.motif import MotifForCausalLM
from motifarch.portable import CODE_FILE, add_code
from motifarch.portable.modeling_motif import MotifForCausalLM as PortableMotif

YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "gda yarn": ("gda", {"rope_parameters": YARN}),
    "gda unpaired": ("gda", {"paired_kv": False, "num_key_value_heads": 2, "lambda_init": 0.3}),
    "gda without sub-norm": ("gda", {"sub_norm": False, "lambda_init_depth_offset": 2}),
    "gda silu": ("gda", {"hidden_act": "silu", "use_bias": True}),
    "diff_v2 sub-norm": ("diff_v2", {"sub_norm": True}),
    "softmax poly_norm": ("softmax", {"hidden_act": "poly_norm", "sliding_window": 5, "use_sliding_window": True}),
}
ALL = [*VARIANTS, *MORE]

ISOLATED = """
    import os, sys
    from pathlib import Path

    class Nothing:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("motifarch", "motif_kernels"):
                raise ModuleNotFoundError(f"no {name} here")

    sys.meta_path.insert(0, Nothing())
    root = Path(sys.argv[1])
    os.environ["HF_MODULES_CACHE"] = str(root / "modules")
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    given, found = load_file(root / "given.safetensors"), {}
    ids, mask = given["ids"], given["mask"]
    for folder in sorted((root / "models").iterdir()):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype="auto", output_loading_info=True
        )
        assert not any(report.values()), (folder.name, report)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        with torch.no_grad():
            found[f"{folder.name} logits"] = model(ids, attention_mask=mask).logits
            found[f"{folder.name} tokens"] = model.generate(
                ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0
            )
            hidden = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="auto")(ids, attention_mask=mask)
            same = model.lm_head(hidden.last_hidden_state)
        assert torch.equal(same, found[f"{folder.name} logits"])
        if (folder / "tokenizer.json").exists():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
            assert tokenizer.decode(tokenizer("alpha beta = gamma").input_ids) == "alpha beta = gamma"
    save_file(found, root / "found.safetensors")
    assert not [name for name in sys.modules if name.partition(".")[0] in ("motifarch", "motif_kernels")]
"""


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def trained_like(variant: str, **overrides: Any) -> MotifForCausalLM:
    """A model none of whose vectors (norms, lambda, PolyNorm) has its first, telltale values."""
    base, more = MORE.get(variant, (variant, {}))
    model = tiny_model(base, **(more | overrides))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.1, 0.9)
    return model


def portable(model: MotifForCausalLM, folder: Path) -> PortableMotif:
    model.save_pretrained(folder)
    loaded, report = PortableMotif.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(report.values())
    return loaded.eval()


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids = random_ids(3, 21)
    mask = torch.ones_like(ids)
    mask[0, :9], mask[2, :1] = 0, 0
    return ids.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("variant", ALL)
def test_logits_and_generated_tokens_are_motifarchs(tmp_path, variant):
    model = trained_like(variant)
    other = portable(model, tmp_path)
    ids, mask = left_padded()
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids).logits, atol=2e-5, rtol=1e-5)
        logits = [m(ids, attention_mask=mask).logits[mask.bool()] for m in (other, model)]
        torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-5)
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    assert torch.equal(other.generate(ids, **options), expected)
    assert torch.equal(other.generate(ids, **options, use_cache=False), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("scaling", [None, {"factor": 4.0}, {"factor": 8.0, "beta_fast": 16, "truncate": False}])
def test_logits_at_position_16384_are_motifarchs(tmp_path, scaling, dtype):
    """A rounded frequency shows there: it is multiplied by the distance between two tokens."""
    rope = {"rope_type": "default", "rope_theta": 500_000.0}
    if scaling is not None:
        rope |= {"rope_type": "yarn", "original_max_position_embeddings": 4096} | scaling
    model = trained_like("gda", rope_parameters=rope, max_position_embeddings=32_768, head_dim=64).to(dtype)
    other = portable(model, tmp_path)
    positions = torch.arange(9)[None] * 2048
    assert positions[0, -1] == 16_384
    inputs = {"input_ids": random_ids(2, 9), "attention_mask": torch.ones(2, 9), "position_ids": positions}
    with torch.no_grad():
        logits, expected = other(**inputs).logits, model(**inputs).logits
    tolerance = {"atol": 2e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 1e-12}
    torch.testing.assert_close(logits, expected, **tolerance)


@pytest.mark.parametrize("variant", ["gda", "gda window", "diff_v2 gated"])
def test_a_static_cache_gives_the_same_tokens(tmp_path, variant):
    other = portable(trained_like(variant), tmp_path)
    ids, mask = left_padded()
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cache = StaticCache(config=other.config, max_cache_len=40)
    assert torch.equal(other.generate(ids, **options, past_key_values=cache), other.generate(ids, **options))


@pytest.mark.parametrize("variant", ALL)
def test_loss_and_gradients_are_motifarchs(tmp_path, variant):
    # In float64: PolyNorm's bias has one number for a gradient, a sum that cancels.
    model = trained_like(variant).double()
    other = portable(model, tmp_path).double()
    ids = random_ids(2, 19)
    labels = ids.clone()
    labels[0, :5] = -100
    losses = [m.train()(ids, labels=labels).loss for m in (other, model)]
    torch.testing.assert_close(*losses, check_dtype=False)  # one is in float32 always
    for loss in losses:
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert gradients.keys() == {name for name, _ in other.named_parameters()}
    for name, parameter in other.named_parameters():
        scale = gradients[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4 * scale, rtol=1e-4, msg=name)


def test_packed_documents_and_padding_are_motifarchs(tmp_path):
    """Logits with the default cache, and losses: no target across documents or out of padding."""
    model = trained_like("gda window")
    other = portable(model, tmp_path)
    batch = packed([random_ids(n, seed=n) for n in (9, 3, 11)])
    by_positions = {name: batch[name] for name in ("input_ids", "position_ids")}
    bounds = {name: tensor for name, tensor in batch.items() if name != "position_ids"}
    ids, mask = left_padded()
    for inputs in (batch, by_positions, bounds, {"input_ids": ids, "attention_mask": mask}):
        with torch.no_grad():
            found, expected = (m(**inputs, labels=inputs["input_ids"]) for m in (other, model))
        torch.testing.assert_close(found.loss, expected.loss)
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        torch.testing.assert_close(found.logits[real], expected.logits[real], atol=2e-5, rtol=1e-5)
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(other(ids, shift_labels=shifted).loss, model(ids, shift_labels=shifted).loss)


def test_packed_batches_train_as_their_documents_apart(tmp_path):
    """As transformers' collator packs them, with gradient checkpointing."""
    other = portable(trained_like("gda window"), tmp_path).train()
    documents = [random_ids(n, seed=n) for n in (9, 2, 3, 11)]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collator([{"input_ids": document.tolist()} for document in documents])
    apart = [other(d[None], labels=d[None]).loss * (len(d) - 1) for d in documents]
    expected = torch.stack(apart).sum() / sum(len(d) - 1 for d in documents)
    expected.backward()
    gradients = [p.grad.clone() for p in other.parameters()]
    other.zero_grad()
    other.gradient_checkpointing_enable()
    loss = other(**batch).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for parameter, gradient in zip(other.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-3)


def test_an_adapter_trains_and_merges(tmp_path):
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model, ids = get_peft_model(portable(trained_like("diff_v2 gated"), tmp_path), lora), random_ids(2, 13)
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        expected = model.eval()(ids).logits
        torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_arguments_that_nothing_reads_are_refused(tmp_path):
    other, ids = portable(trained_like("gda"), tmp_path), random_ids(1, 5)
    for name, value in (("s_aux", torch.zeros(6)), ("z_loss_weight", 0.1), ("output_attentions", True)):
        with pytest.raises(ValueError, match=f"{name} was given, which this model does not have"):
            other(ids, **{name: value})
    with pytest.raises(ValueError, match="is_causal was given"):
        other(ids, is_causal=False)
    other(ids, s_aux=None, output_attentions=False, token_type_ids=torch.zeros_like(ids))


def test_gradient_checkpointing_changes_nothing(tmp_path):
    other = portable(trained_like("gda"), tmp_path).train()
    ids = random_ids(2, 19)
    gradients = []
    for _ in range(2):
        other.zero_grad()
        other(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in other.parameters()])
        other.gradient_checkpointing_enable()
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(second, first)


@pytest.mark.parametrize("variant", ["gda 4:1", "diff_v2 gated", "softmax"])
def test_bfloat16_is_as_close_to_float32_as_motifarchs(tmp_path, variant):
    ids = random_ids(4, 40)
    exact = trained_like(variant).to(torch.bfloat16).float()
    half = trained_like(variant, seed=0)
    half.load_state_dict(exact.state_dict())
    half = half.to(torch.bfloat16)
    with torch.no_grad():
        wanted = exact(ids).logits
        errors = [(m(ids).logits.float() - wanted).abs().mean() for m in (portable(half, tmp_path), half)]
    assert errors[0] < 2 * errors[1]


def test_a_model_made_from_a_config_has_finite_first_weights(tmp_path):
    tiny_model("gda").config.save_pretrained(tmp_path)
    config = PortableMotif.config_class.from_pretrained(tmp_path)
    loss = PortableMotif(config)(random_ids(2, 9), labels=random_ids(2, 9)).loss
    assert torch.isfinite(loss)


def test_where_motifarch_is_not_installed(finished_run, tmp_path):
    ids, mask = left_padded()
    save_file({"ids": ids, "mask": mask}, tmp_path / "given.safetensors")
    wanted, models = {}, tmp_path / "models"
    gda = [f"gda {kind}" for kind in ("4:1", "tied", "window", "yarn", "unpaired")]
    for variant in (*gda, "diff_v1", "diff_v2 gated", "softmax"):
        trained_like(variant).save_pretrained(models / variant.replace(":", "-"))
    trained_like("gda").to(torch.bfloat16).save_pretrained(models / "half", max_shard_size="20KB")
    for folder in models.iterdir():
        add_code(folder)
    assert run(["export", str(finished_run), "--output", str(models / "exported"), "--with-code"]) == 0
    for folder in models.iterdir():
        # In bfloat16 the two round at other places, which the test above bounds: here one and the
        # same code.
        own = PortableMotif if folder.name == "half" else MotifForCausalLM
        model = own.from_pretrained(folder, dtype="auto").eval()
        with torch.no_grad():
            wanted[f"{folder.name} logits"] = model(ids, attention_mask=mask).logits
        wanted[f"{folder.name} tokens"] = model.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0
        )
    run_python(ISOLATED, tmp_path)
    found = load_file(tmp_path / "found.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if name.endswith("tokens"):
            assert torch.equal(found[name], tensor), name
        else:
            torch.testing.assert_close(found[name][mask.bool()], tensor[mask.bool()], atol=2e-5, rtol=1e-5, msg=name)


def test_motifarchs_own_classes_come_first_where_it_is_imported(tmp_path):
    trained_like("gda").save_pretrained(tmp_path)
    add_code(tmp_path)
    for trust in (None, True):
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)) is MotifForCausalLM


def test_the_code_goes_along_where_a_folder_is_saved_again(tmp_path):
    first, second, third = (tmp_path / name for name in "abc")
    trained_like("gda").save_pretrained(first)
    assert "auto_map" not in json.loads((first / "config.json").read_text())
    assert AutoConfig.from_pretrained(first).auto_map == {}  # which TRL reads
    code = add_code(first)
    model = AutoModelForCausalLM.from_pretrained(first)
    model.save_pretrained(second)
    assert (second / CODE_FILE).read_text() == code.read_text()
    saved = [json.loads((folder / "config.json").read_text()) for folder in (first, second)]
    assert saved[0]["auto_map"] == saved[1]["auto_map"]
    code.unlink()
    with pytest.warns(UserWarning, match="--with-code"):
        model.save_pretrained(third)
    assert "auto_map" not in json.loads((third / "config.json").read_text())


def test_a_released_folder_gets_the_code_and_keeps_all_else(tmp_path, capsys):
    trained_like("gda").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # As the released folders have it: older rotary fields, and heads that follow from others.
    for name in ("rope_parameters", "num_noise_heads", "attention_type", "layer_types", "paired_kv", "sub_norm"):
        del config[name]
    config |= {"num_attention_heads": 4, "rope_theta": 500.0, "auto_map": {"AutoModel": "modeling_gone.MotifModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = tiny_model("gda", num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    before = (tmp_path / "model.safetensors").read_bytes()

    assert run(["export", str(tmp_path), "--with-code"]) == 0
    assert "loads without motifarch" in capsys.readouterr().out
    assert run(["export", str(tmp_path), "--with-code"]) == 0  # and again, as after an update
    assert (tmp_path / "model.safetensors").read_bytes() == before
    after = json.loads((tmp_path / "config.json").read_text())
    assert {name: value for name, value in after.items() if name != "auto_map"} == {
        name: value for name, value in config.items() if name != "auto_map"
    }
    assert after["auto_map"]["AutoModelForCausalLM"] == "modeling_motif.MotifForCausalLM"
    ids = random_ids(2, 17)
    with torch.no_grad():
        loaded = PortableMotif.from_pretrained(tmp_path).eval()(ids).logits
        torch.testing.assert_close(loaded, model(ids).logits, atol=2e-5, rtol=1e-5)


def test_vllms_keys_of_yarn_are_read_as_motifarch_reads_them(tmp_path):
    model = trained_like("gda yarn")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for keys in (
        {"attn_factor": 1.5},
        {"attn_factor": 1.5, "apply_yarn_scaling": False},
        {"apply_yarn_scaling": False},
    ):
        (tmp_path / "config.json").write_text(
            json.dumps(config | {n: config[n] | keys for n in ("rope_scaling", "rope_parameters")})
        )
        with torch.no_grad():
            logits = [
                c.from_pretrained(tmp_path).eval()(random_ids(2, 17)).logits for c in (PortableMotif, MotifForCausalLM)
            ]
        torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-5)
        assert not torch.allclose(logits[0], model(random_ids(2, 17)).logits, atol=1e-3)


def test_refuses_with_a_reason_and_leaves_the_folder_alone(tmp_path):
    folder = tmp_path / "model"
    tiny_model("gda").save_pretrained(folder)
    with pytest.raises(UserError, match="add --with-code"):
        run(["export", str(folder)])
    with pytest.raises(UserError, match="leave --dtype out"):
        run(["export", str(folder), "--with-code", "--dtype", "bfloat16"])
    with pytest.raises(UserError, match="can't be read"):
        add_code(tmp_path)

    config = json.loads((folder / "config.json").read_text())
    for changed, reason in (
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"k_ratio": 2}, "k_ratio=2"),
        ({"num_noise_heads": 5}, "num_noise_heads=5"),
        ({"num_attention_heads": "six"}, "is of no model that motifarch can compute"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(UserError, match=reason):
            add_code(folder)
    (folder / "config.json").write_text('{"model_type": "Mot')
    with pytest.raises(UserError, match="can't be read"):
        add_code(folder)
    assert not (folder / CODE_FILE).exists()


@pytest.mark.parametrize("name", [CODE_FILE, "their_model.py"])
def test_code_that_the_folder_came_with_is_not_replaced(tmp_path, name):
    tiny_model("gda").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    text = json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "their_model.MotifForCausalLM"}})
    (tmp_path / "config.json").write_text(text)
    (tmp_path / name).write_text("class MotifForCausalLM: ...\n")
    with pytest.raises(UserError, match="was not written by motifarch"):
        add_code(tmp_path)
    assert (tmp_path / "config.json").read_text() == text
    assert (tmp_path / name).read_text() == "class MotifForCausalLM: ...\n"
    shutil.move(tmp_path / name, tmp_path / "away.py")
    add_code(tmp_path)
