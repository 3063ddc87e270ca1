"""Softmax models of transformers become differential ones that compute the same function."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.agreement import assert_agrees, randomise
from helpers.models import random_ids, tiny_model
from motifarch.commands.grow import main
from motifarch.errors import UserError
from motifarch.growth import SourceFolder, describe, write
from motifarch.growth.from_softmax import from_softmax
from motifarch.growth.from_softmax_probe import closest, probe_ids
from motifarch.growth.from_softmax_sources import as_motif
from motifarch.models.motif import MotifForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": [95, 96],
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}

# Head ratios of the families: Llama 3 and Mistral 32:8, Qwen2.5-7B 28:4, Qwen3-0.6B 16:8 with heads
# wider than E / H.
MODELS: dict[str, dict[str, Any]] = {
    "llama 3": {"num_attention_heads": 8, "num_key_value_heads": 2, "rope_parameters": LLAMA3},
    "llama with biases, all heads' own keys": {"num_attention_heads": 4, "num_key_value_heads": 4}
    | {"attention_bias": True, "mlp_bias": True, "rope_parameters": LINEAR, "tie_word_embeddings": True},
    "mistral": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 7},
    "mistral without a window": {"num_attention_heads": 8, "num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"hidden_size": 56, "num_attention_heads": 14, "num_key_value_heads": 2}
    | {"rope_parameters": YARN, "tie_word_embeddings": True},
    "qwen2 with windows": {"num_attention_heads": 8, "num_key_value_heads": 2}
    | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
}


def make(folder: Path, name: str = "llama 3", dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A random model of the family that the name begins with, and its saved folder."""
    config = AutoConfig.for_model(name.split()[0], **(SIZES | MODELS[name] | fields))
    model = AutoModelForCausalLM.from_config(config).eval()
    randomise(model, std=0.2)
    model.to(dtype).save_pretrained(folder)
    return model


def convert(source: Path, output: Path, to: Any, **options: Any) -> MotifForCausalLM:
    folder = SourceFolder(source)
    description = describe(folder)
    measured = write(from_softmax(description, to, **options), folder, output, base=as_motif(description))
    assert measured is not None
    assert measured.largest < 1e-5 * max(1, measured.spread)
    model = AutoModelForCausalLM.from_pretrained(output)
    assert isinstance(model, MotifForCausalLM)
    return model.eval()


KINDS = {"diff_v2": {"to": "diff_v2"}, "gda": {"to": "gda"}, "gda 1:1": {"to": "gda", "ratio": 1}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_the_converted_model_is_the_same_function(tmp_path: Path, name: str, kind: str) -> None:
    """Logits, also of left-padded rows, and tokens generated with a cache."""
    theirs = make(tmp_path / "source", name)
    ours = convert(tmp_path / "source", tmp_path / "output", **KINDS[kind])
    ids, mask = random_ids(2, 33), torch.ones(2, 33, dtype=torch.long)
    mask[1, :9] = 0
    with torch.no_grad():
        assert_agrees(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        rows = [m(input_ids=ids, attention_mask=mask, position_ids=positions).logits[1, 9:] for m in (ours, theirs)]
    assert_agrees(*rows)
    options: dict[str, Any] = {
        "max_new_tokens": 24,
        "min_new_tokens": 24,
        "do_sample": False,
        "repetition_penalty": 1.5,
    }
    prompts = {"input_ids": ids[:, :11], "attention_mask": torch.ones_like(ids[:, :11])}
    found, expected = (m.generate(**prompts, **options) for m in (ours, theirs))
    assert torch.equal(found, expected)
    assert len(set(found[0, 11:].tolist())) > 5


def test_a_converted_model_has_what_the_papers_say(tmp_path: Path) -> None:
    theirs = make(tmp_path / "source")
    v2 = convert(tmp_path / "source", tmp_path / "v2", "diff_v2").model.layers[0].self_attn
    old = theirs.model.layers[0].self_attn
    pairs = v2.q_proj.weight.view(8, 2, 4, 32)
    assert torch.equal(pairs[:, 0], pairs[:, 1])
    assert torch.equal(pairs[:, 0].reshape(32, 32), old.q_proj.weight)
    assert torch.equal(v2.o_proj.weight, 2 * old.o_proj.weight)
    assert not v2.lambda_proj.weight.any()
    gda = convert(tmp_path / "source", tmp_path / "gda", "gda").model.layers[0].self_attn
    groups = gda.q_proj.weight.view(2, 5, 4, 32)
    torch.testing.assert_close(groups[:, 4], groups[:, :4].mean(1))
    assert torch.equal(gda.o_proj.weight, old.o_proj.weight)
    assert gda.compute_lambda().item() == 0.0
    # Keys, values and so the cache are the softmax model's.
    for layer in (v2, gda):
        assert torch.equal(layer.k_proj.weight, old.k_proj.weight)
        assert torch.equal(layer.v_proj.weight, old.v_proj.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_every_new_parameter_learns(tmp_path: Path, kind: str) -> None:
    """From the first step, but for GDA's noise queries and lambda_k, which zeros multiply."""
    make(tmp_path / "source", "qwen2")
    model = convert(tmp_path / "source", tmp_path / "output", **KINDS[kind]).train()
    config, ids = model.config, random_ids(4, 24)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses, gradients = [], []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2

    later = ("lambda_k1", "lambda_k2") if config.attention_type == "gda" else ()
    for name, gradient in gradients[0].items():
        # A key's bias moves all of a row's logits alike, but for the rotation.
        assert gradient.any() != name.endswith(later), name
    for layer in range(config.num_hidden_layers):
        for step, learns in ((0, config.attention_type != "gda"), (1, True)):
            rows = gradients[step][f"model.layers.{layer}.self_attn.q_proj.weight"]
            noise = rows.view(config.noise_heads, -1, config.head_dim, config.hidden_size)[:, -1]
            assert bool((noise.flatten(1).abs().amax(1) > 0).all()) == learns
    assert all(gradient.any() for gradient in gradients[1].values())
    assert (model.last_lambdas() - (0.5 if config.attention_type == "diff_v2" else 0)).abs().min() > 1e-4


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    """Copies, doubling and zeros round nothing."""
    make(tmp_path / "source", dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    for kind in ("diff_v2", "gda"):
        config = convert(tmp_path / "source", tmp_path / kind, kind).config
        held = load_file(tmp_path / kind / "model.safetensors")
        assert {t.dtype for t in held.values()} == {torch.bfloat16}
        assert config.dtype == torch.bfloat16
        ids = random_ids(2, 20)
        with torch.no_grad():
            loaded = MotifForCausalLM.from_pretrained(tmp_path / kind, dtype=torch.float32)
            assert_agrees(loaded(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_the_folder_carries_what_belongs_to_the_model(tmp_path: Path) -> None:
    make(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    before = {f.name: f.read_bytes() for f in (tmp_path / "source").iterdir()}
    config = convert(tmp_path / "source", tmp_path / "output", "diff_v2").config
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == ([95, 96], 1, 0)
    assert (config.rms_norm_eps, config.max_position_embeddings, config.hidden_act) == (1e-5, 64, "silu")
    assert config.rope_parameters["factor"] == 8.0
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "output" / name).read_bytes() == before[name]
    assert {f.name: f.read_bytes() for f in (tmp_path / "source").iterdir()} == before
    saved = json.loads((tmp_path / "output" / "config.json").read_text())
    assert saved["architectures"] == ["MotifForCausalLM"]


def test_tensors_that_older_folders_hold_besides_are_left_out(tmp_path: Path) -> None:
    theirs = make(tmp_path / "source", "qwen3")
    file = tmp_path / "source" / "model.safetensors"
    held = load_file(file)
    extra = {
        "lm_head.weight": held["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    save_file(held | extra, file, metadata={"format": "pt"})
    ours = convert(tmp_path / "source", tmp_path / "output", "gda")
    ids = random_ids(1, 12)
    assert_agrees(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("llama 3", {"model_type": "gemma2"}, "'gemma2'; softmax models of llama, mistral, qwen2, qwen3 can be"),
        ("llama 3", {"model_type": None}, "model_type None; softmax models of llama"),
        ("llama 3", {"hidden_act": "gelu"}, "hidden_act 'gelu', .* silu can be converted"),
        ("llama 3", {"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ("llama 3", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        (
            "llama 3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5",
        ),
        ("llama 3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("llama 3", {"num_hidden_layers": 3}, "LlamaForCausalLM .* it lacks model.layers.2.input_layernorm.weight"),
        ("llama 3", {"num_hidden_layers": 1}, "it has, in addition, model.layers.1.input_layernorm.weight"),
        ("llama 3", {"intermediate_size": 40}, "it has another shape for model.layers.0.mlp.down_proj.weight"),
        ("llama 3", {"tie_word_embeddings": False, "vocab_size": 98}, "another shape for lm_head.weight, model.embed"),
        ("llama 3", {"num_attention_heads": 7}, "config.json is no valid llama config"),
        (
            "qwen2 with windows",
            {"max_window_layers": 1, "layer_types": None},
            "full_attention, sliding_attention .* max_window_layers",
        ),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types of full_attention, sliding"),
    ],
    ids=str,
)
def test_what_motif_cannot_honour_is_refused_by_name(
    tmp_path: Path, name: str, fields: dict[str, Any], message: str
) -> None:
    make(tmp_path, name)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(UserError, match=message):
        from_softmax(describe(SourceFolder(tmp_path)), "diff_v2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "gda", "ratio": 3}, "--ratio is 3, .* each of the 2 serves 4 of the 8 heads; it may be 1, 2, 4"),
        ({"to": "gda", "ratio": 8}, "it may be 1, 2, 4"),
        ({"to": "gda", "ratio": 0}, "it may be 1, 2, 4"),
        ({"to": "diff_v2", "ratio": 2}, "with --ratio 2 a noise query cannot be a copy .* --to gda.*--approximate"),
        ({"to": "gda", "sub_norm": True}, "a sub-norm rescales every head's output .* --approximate takes"),
        ({"to": "diff_v2", "sub_norm": True}, "a sub-norm rescales every head's output"),
    ],
    ids=str,
)
def test_what_is_not_exact_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        from_softmax(describe(SourceFolder(tmp_path)), **options)


@pytest.mark.parametrize(
    "options",
    [{"to": "gda", "sub_norm": True}, {"to": "diff_v2", "sub_norm": True}, {"to": "diff_v2", "ratio": 2}],
    ids=str,
)
def test_an_approximation_says_how_far_it_is(tmp_path: Path, options: dict[str, Any]) -> None:
    """By the models' own numbers; behind a sub-norm the gains bring it nearer."""
    theirs = make(tmp_path / "source")
    source = SourceFolder(tmp_path / "source")
    ids = probe_ids(source)
    assert ids.shape == (4, 64)
    description = closest(source, describe(source), ids=ids, **options)
    write(description, source, tmp_path / "output", check=False)
    ours = MotifForCausalLM.from_pretrained(tmp_path / "output").eval()
    with torch.no_grad():
        before, after = theirs(input_ids=ids).logits, ours(input_ids=ids).logits
        moved = (after - before).abs().mean().item()
        loss = description.steps[-1].loss
        assert loss is not None
        assert f"on a probe of 256 tokens logits move by {moved:.3g} on average" in loss
        assert f"standard deviation of {before.std().item():.3g}" in loss
        if options.get("sub_norm"):
            plain_description = from_softmax(describe(source), approximate=True, **options)
            write(plain_description, source, tmp_path / "plain", check=False)
            plain = MotifForCausalLM.from_pretrained(tmp_path / "plain").eval()
            assert moved < 0.9 * (plain(input_ids=ids).logits - before).abs().mean().item()


def test_a_probe_of_text_is_the_text_s_first_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    make(tmp_path / "source")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "source")
    source, text = SourceFolder(tmp_path / "source"), tmp_path / "text"
    text.write_text(" ".join(f"w{i}" for i in range(10)))
    assert probe_ids(source, text).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    text.write_text("w1 w2")
    with pytest.raises(UserError, match="has 2 tokens; give a text of at least 8"):
        probe_ids(source, text)


def test_a_motif_model_with_softmax_attention_is_a_source_too(tmp_path: Path) -> None:
    """With PolyNorm, norms of queries and keys and a window: all of that stays."""
    options = {"qk_norm": True, "use_sliding_window": True, "sliding_window": 5, "lambda_init_depth_offset": 1}
    theirs = tiny_model("softmax", hidden_act="poly_norm", num_attention_heads=4, num_key_value_heads=4, **options)
    theirs.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    kept = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("head_dim", "num_key_value_heads")}
    file.write_text(json.dumps(kept))
    ids = random_ids(2, 20)
    for kind in ("diff_v2", "gda"):
        ours = convert(tmp_path / "source", tmp_path / kind, kind)
        assert (ours.config.attention_type, ours.config.sliding_window) == (kind, 5)
        with torch.no_grad():
            assert_agrees(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
        with pytest.raises(UserError, match=f"attention_type '{kind}', which is differential already"):
            from_softmax(describe(SourceFolder(tmp_path / kind)), kind)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = make(tmp_path / "source")
    source = str(tmp_path / "source")
    assert main([source, str(tmp_path / "gda"), "--to", "gda", "--ratio", "2"]) == 0
    out, err = capsys.readouterr()
    assert f"grown to {tmp_path / 'gda'}" in out
    assert "softmax attention -> gda: 8 signal and 4 noise heads over 2 key/value heads" in err
    assert "logits of both models differ by at most" in err
    ids = random_ids(1, 9)
    with torch.no_grad():
        ours = MotifForCausalLM.from_pretrained(tmp_path / "gda")
        assert_agrees(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    assert main([source, str(tmp_path / "v1"), "--to", "gda", "--sub-norm", "--approximate"]) == 0
    assert "not exact: a sub-norm rescales every head's output" in capsys.readouterr().err
    record = json.loads((tmp_path / "v1" / "growth.json").read_text())
    assert "on a probe of 256 tokens logits move by" in record["steps"][-1]["loss"]
    for arguments, message in (
        (["--to", "gda", "--sub-norm"], "--approximate takes"),
        (["--to", "gda", "--layers", "4"], "--to changes the attention and grows nothing"),
        (["--to", "gda", "--probe", "text"], "--probe is measured on with --approximate only"),
        (["--ratio", "2", "--sub-norm", "--layers", "4"], "--ratio, --sub-norm works with --to diff_v2, gda or gdla"),
    ):
        with pytest.raises(UserError, match=message):
            main([source, str(tmp_path / "none"), *arguments])
    assert not (tmp_path / "none").exists()
