"""`motifarch grow`: the released layouts, memory, the record, and what does not fit."""

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import motifarch
from helpers.grown import largest_difference, loaded, saved
from helpers.models import random_ids, tiny_model
from helpers.python_process import run_python
from helpers.released import MOTIF_2B
from motifarch.commands.grow import main
from motifarch.errors import UserError
from motifarch.growth import Factors, SourceFolder, grow
from motifarch.growth.grow import plan
from motifarch.growth.layouts import read_layout
from motifarch.models.motif import MotifConfig, MotifForCausalLM

assert motifarch  # registers the model type

SMALL_RATIOS = {  # Motif-2.6B's layout, all sizes but the heads' numbers divided
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_noise_heads": None,
    "num_key_value_heads": 16,
    "head_dim": 8,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "initializer_range": 0.1,
}


def hollow_folder(folder: Path, fields: dict) -> Path:
    """A model's folder of any size: its weight file is a header before a hole."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    with torch.device("meta"):
        state = MotifForCausalLM(MotifConfig.from_dict(fields)).state_dict()
    if fields["tie_word_embeddings"]:
        del state["lm_head.weight"]
    header, at = {}, 0
    for name, tensor in state.items():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + 2 * tensor.numel()]}
        at += 2 * tensor.numel()
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return folder


def state_of(config: MotifConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in MotifForCausalLM(config).state_dict().items()}


@pytest.mark.parametrize(
    "factors", [read_layout("motif-2-12.7b"), Factors(2, 2, signal_heads=4, layers=40, untie=True)], ids=["like", "own"]
)
def test_the_2_6b_layout_becomes_the_12_7b_layout(tmp_path, factors):
    source = SourceFolder(hollow_folder(tmp_path / "small", MOTIF_2B))
    assert len(source.names) == 514
    description = plan(source, factors)
    assert {name: origin.shape for name, origin in description.tensors.items()} == state_of(MotifConfig())
    assert len(description.tensors) == 643
    assert sum(torch.Size(o.shape).numel() for o in description.tensors.values()) == 12_703_860_896
    assert {origin.dtype for origin in description.tensors.values()} == {torch.bfloat16}
    # Each tensor is made of one of the source, but for lambda's vectors and the new blocks' silent
    # outputs.
    assert {len(origin.sources) for origin in description.tensors.values()} == {0, 1, 4}
    config = MotifConfig.from_dict(description.config)
    assert (config.num_attention_heads, config.noise_heads, config.num_key_value_heads) == (40, 8, 16)
    assert not config.tie_word_embeddings
    assert config.rope_parameters["rope_theta"] == 500_000.0
    assert config.max_position_embeddings == 16_384
    assert description.config["loss_reduction"] == "mean"
    assert "auto_map" not in description.config
    losses = [step.loss for step in description.steps]
    assert [loss is None for loss in losses] == [True, True, False]  # doublings are exact; new depths round sub-norms
    assert all(step.loss is None for step in plan(source, factors, dtype=torch.float32).steps)


@pytest.mark.parametrize("how", ["like", "options"])
@pytest.mark.parametrize("noise", [[], ["--noise", "0.05", "--seed", "3"]], ids=["", "noise"])
def test_a_small_model_of_the_same_ratios_in_one_call(tmp_path, capsys, how, noise):
    source = saved(tmp_path / "small", **SMALL_RATIOS)
    target = MotifConfig(
        **SMALL_RATIOS
        | {
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 5,
            "num_attention_heads": 40,
            "num_noise_heads": 8,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        }
    )
    target.save_pretrained(tmp_path / "target")
    factors = ["--hidden", "2", "--feed-forward", "2", "--signal-heads", "4", "--layers", "5", "--untie"]
    options = ["--like", str(tmp_path / "target")] if how == "like" else factors
    assert main([str(source), str(tmp_path / "large"), *options, *noise]) == 0
    model = loaded(tmp_path / "large")
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == state_of(target)
    assert model.config.rope_parameters["rope_theta"] == 500_000.0
    assert largest_difference(source, tmp_path / "large") < 1e-5
    assert largest_difference(source, tmp_path / "large", torch.float64) < 1e-6
    said = capsys.readouterr()
    assert "hidden_size 16 -> 32, intermediate_size 64 -> 128, num_attention_heads 16 -> 40" in said.err
    assert "num_hidden_layers 4 -> 5, new blocks 4 start as the identity" in said.err
    assert "comparing" in said.err
    record = json.loads((tmp_path / "large" / "growth.json").read_text())
    assert record["logits"]["largest"] < 1e-5 < record["logits"]["spread"]


def fingerprint(folder: Path) -> dict[str, tuple[str, int]]:
    return {p.name: (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in folder.iterdir()}


def test_what_is_carried_over_and_recorded(tmp_path):
    source = saved(tmp_path / "small", dtype=torch.bfloat16)
    carried = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
        "generation_config.json": '{"eos_token_id": 7}',
        "chat_template.jinja": "hello",
    }
    for name, text in (carried | {"growth.json": "{}", "optimizer.pt": "x", "modeling_motif.py": "x"}).items():
        (source / name).write_text(text)
    before = fingerprint(source)
    output = tmp_path / "large"
    assert main([str(source), str(output), "--layers", "3", "--no-check"]) == 0
    assert fingerprint(source) == before
    made = {"config.json", "model.safetensors", "growth.json", "ledger"}
    assert {p.name for p in output.iterdir()} == {*carried, *made}
    assert all((output / name).read_text() == text for name, text in carried.items())
    record = json.loads((output / "growth.json").read_text())
    assert record["logits"] is None
    assert {n: f["sha256"] for n, f in record["source"]["files"].items()} == {
        name: before[name][0] for name in ("config.json", "model.safetensors")
    }
    (step,) = record["steps"]
    assert step["summary"].startswith("num_hidden_layers 2 -> 3")
    assert "0.39%" in step["loss"]


def test_what_is_not_exact_is_said_before_and_measured_after(tmp_path, capsys):
    source = saved(tmp_path / "small", dtype=torch.bfloat16, initializer_range=0.1)
    main([str(source), str(tmp_path / "large"), "--hidden", "3"])
    said = capsys.readouterr().err
    assert said.index("not exact: bfloat16 has no exact 1/3") < said.index("writing") < said.index("differ by at most")
    measured = json.loads((tmp_path / "large" / "growth.json").read_text())["logits"]["largest"]
    assert 1e-4 < measured < 0.5
    assert main([str(source), str(tmp_path / "exact"), "--hidden", "3", "--dtype", "float32"]) == 0
    assert json.loads((tmp_path / "exact" / "growth.json").read_text())["logits"]["largest"] < 1e-5
    assert "not exact" not in capsys.readouterr().err


def test_memory_holds_a_few_tensors_and_not_a_model(tmp_path):
    source = tmp_path / "small"
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 2000, "head_dim": 64}
    saved(source, **wide)
    # Linux counts the pages of files that are read, too: what is mapped must be let go again.
    code = """
    import sys, torch
    from pathlib import Path
    from rich.console import Console
    from motifarch.growth import Factors, SourceFolder
    from motifarch.growth.grow import plan, write
    torch.set_num_threads(1)
    def peak():
        return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
    source = SourceFolder(Path(sys.argv[1]))
    description = plan(source, Factors(hidden=2, feed_forward=2, signal_heads=2, layers=8))
    before = peak()
    write(description, source, Path(sys.argv[2]), max_shard_bytes=2**24)
    print(peak() - before)
    """
    taken = int(run_python(code, source, tmp_path / "large").split()[-1])
    size = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    assert size > 400 * 2**20
    # The largest tensor has 32 MiB; comparing holds a block of both models.
    assert taken < 0.4 * size


def change_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def without(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


REFUSED = [
    ([], "nothing grows: give a factor above 1"),
    (["--hidden", "0"], "--hidden is '0'; accepted: a whole number from 1"),
    (["--layers", "1"], "--layers is 1, but the model has 2"),
    (["--like", "motif-2-12.7b", "--hidden", "2"], "give it, or the factors, but not both"),
    (["--like", "motif-3"], "--like motif-3: .*; give motif-2-12.7b, or the folder"),
    (
        ["--like", "motif-2-12.7b"],
        "vocab_size is 97 and would have to be 219520; .*intermediate_size 48 does not grow to 16384 by a whole",
    ),
]
MISSING = "model.layers.1.mlp.up_proj.weight"
SPOILT = {
    "another family": (
        lambda f: change_config(f, model_type="llama"),
        "config.json is no Motif model's: its model_type is 'llama'",
    ),
    "heads that don't divide": (
        lambda f: change_config(f, num_noise_heads=4),
        "config.json: .*num_heads=6 .* num_noise_heads=4",
    ),
    "a word for a number": (
        lambda f: change_config(f, num_attention_heads="six"),
        "error for field 'num_attention_heads'",
    ),
    "a tensor too few": (
        lambda f: without(f, MISSING),
        f"does not hold what its config.json describes: {MISSING} is missing",
    ),
    "a layer too many": (lambda f: change_config(f, num_hidden_layers=1), "model.layers.1.*is no tensor of this model"),
    "another size": (
        lambda f: change_config(f, intermediate_size=64),
        r"mlp.gate_proj.weight is \(48, 32\), where \(64, 32\) is expected",
    ),
}


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [(None, *case) for case in REFUSED] + [(spoil, ["--hidden", "2"], message) for spoil, message in SPOILT.values()],
)
def test_what_does_not_fit_is_said_and_nothing_is_touched(tmp_path, spoil, options, message):
    source = tmp_path / "small"
    tiny_model().save_pretrained(source)
    if spoil:
        spoil(source)
    before = fingerprint(source)
    with pytest.raises(UserError, match=message):
        main([str(source), str(tmp_path / "large"), *options])
    assert fingerprint(source) == before
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize("place", [".", "inside", "deep/inside"])
def test_an_output_within_the_source(tmp_path, place):
    source = saved(tmp_path / "small")
    before = fingerprint(source)
    with pytest.raises(UserError, match=r"lies within the source|exists already"):
        grow(source, source / place, Factors(hidden=2))
    assert fingerprint(source) == before


def test_a_tied_matrix_that_is_saved_twice(tmp_path):
    source = saved(tmp_path / "small", "gda tied")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    grow(source, tmp_path / "large", Factors(hidden=2))
    assert "lm_head.weight" not in SourceFolder(tmp_path / "large").names


def test_a_grown_folder_is_a_run_s_first_weights(tmp_path):
    from motifarch.train.init_from import load_weights

    source = saved(tmp_path / "small", initializer_range=0.1)
    grow(source, tmp_path / "large", Factors(hidden=2, signal_heads=2, layers=3))
    model = MotifForCausalLM(MotifConfig.from_pretrained(tmp_path / "large")).eval()
    load_weights(tmp_path / "large", model)
    ids = random_ids(2, 19)
    with torch.no_grad():
        difference = model(input_ids=ids).logits - loaded(source)(input_ids=ids).logits
    assert float(difference.abs().max()) < 1e-5
