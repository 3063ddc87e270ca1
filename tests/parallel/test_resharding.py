"""One state on different meshes: checkpoints, first weights, weights from a folder."""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.distributed import on_ranks
from helpers.layouts import MUON_AND_STREAMS, NO_GRADIENT, STEPS, Case, train_cases
from helpers.tiny import MOTIF_3
from motifarch.export import export
from motifarch.models.motif import MotifForCausalLM
from motifarch.parallel import Layout
from motifarch.train.checkpoint import load_model_state
from motifarch.train.manifest import checkpoint_name, checkpoints_folder

FSDP, TENSOR = Layout(), Layout(tensor=2)  # of 4 ranks, the second is TP 2 x FSDP 2
# Tied matrices and Muon in one of them.
RUNS = {"gda": "adamw", "gda window": "muon"}


def step(folder: Path) -> Path:
    """Where a run leaves its checkpoint."""
    return checkpoints_folder(folder) / checkpoint_name(STEPS // 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resharding")


@pytest.fixture(scope="module")
def source(folder: Path) -> MotifForCausalLM:
    """A model in a Hugging Face folder of several files."""
    torch.manual_seed(1)
    model = MotifForCausalLM(Case("", "gda", FSDP).config)
    model.save_pretrained(folder / "source", max_shard_size="20KB")
    assert len(list((folder / "source").glob("*.safetensors"))) > 2
    return model


@pytest.fixture(scope="module")
def four(data: Path, folder: Path, source: MotifForCausalLM) -> dict[str, Any]:
    """What four ranks make: runs that save, runs that go on, models at their start."""
    cases = []
    for variant, optimizer in RUNS.items():
        cases.append(Case(f"{variant}, straight", variant, FSDP, optimizer, save=folder / variant))
        cases.append(Case(f"{variant}, tensor", variant, TENSOR, optimizer, load=step(folder / variant)))
    cases.append(Case("gda, offloaded", "gda", TENSOR, load=step(folder / "gda"), offload=True))
    for name, layout in {"fsdp 4": FSDP, "hsdp 2x2": Layout(replicate=2), "tensor 2 x fsdp 2": TENSOR}.items():
        cases.append(Case(f"start, {name}", "gda", layout, steps=0))
    cases.append(Case("start, tensor 2 x context 2", "gda", Layout(tensor=2, context=2), steps=0))
    cases.append(Case("from folder", "gda", TENSOR, steps=0, init_from=folder / "source"))
    for variant in RUNS:
        cases.append(Case(f"from checkpoint, {variant}", variant, TENSOR, steps=0, init_from=step(folder / variant)))
    on_ranks(4, train_cases, data, folder / "four.pt", cases)
    return torch.load(folder / "four.pt")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def one(data: Path, folder: Path, four: dict[str, Any]) -> dict[str, Any]:
    """What one process makes of the same checkpoints, and its own start."""
    cases = [Case(v, v, FSDP, optimizer, load=step(folder / v)) for v, optimizer in RUNS.items()]
    on_ranks(1, train_cases, data, folder / "one.pt", [*cases, Case("start", "gda", FSDP, steps=0)])
    return torch.load(folder / "one.pt")  # type: ignore[no-any-return]


@pytest.mark.parametrize("variant", RUNS)
@pytest.mark.parametrize("where", ["tensor 2 x fsdp 2", "one process"])
def test_a_checkpoint_of_fsdp_goes_on_elsewhere(
    four: dict[str, Any], one: dict[str, Any], variant: str, where: str
) -> None:
    losses, validation, weights, *_ = four[f"{variant}, straight"]
    resumed = one[variant] if where == "one process" else four[f"{variant}, tensor"]
    assert len(losses) == STEPS
    rest = torch.tensor(losses)[STEPS // 2 :]
    assert rest[0, 0] - rest[-1, 0] > 0.1
    torch.testing.assert_close(torch.tensor(resumed[0]), rest, rtol=1e-5, atol=1e-5)
    assert resumed[1] == pytest.approx(validation, abs=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(resumed[2][name], value, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_offloaded_moments_change_no_bit_of_a_sharded_run(four: dict[str, Any]) -> None:
    assert four["gda, offloaded"][:2] == four["gda, tensor"][:2]
    torch.testing.assert_close(four["gda, offloaded"][2], four["gda, tensor"][2], rtol=0, atol=0)


def test_first_weights_are_the_same_bits_on_one_two_and_four_ranks(
    data: Path, folder: Path, four: dict[str, Any], one: dict[str, Any]
) -> None:
    two = [Case("start, fsdp 2", "gda", FSDP, steps=0), Case("start, tensor 2", "gda", TENSOR, steps=0)]
    on_ranks(2, train_cases, data, folder / "two.pt", two)
    starts = {n: r[2] for n, r in (four | torch.load(folder / "two.pt")).items() if n.startswith("start")}
    assert len(starts) == 6
    for weights in starts.values():
        torch.testing.assert_close(weights, one["start"][2], rtol=0, atol=0)


def test_a_hugging_face_folder_becomes_sharded_weights(four: dict[str, Any], source: MotifForCausalLM) -> None:
    torch.testing.assert_close(four["from folder"][2], dict(source.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("variant", RUNS)
def test_a_checkpoint_becomes_sharded_weights(folder: Path, four: dict[str, Any], variant: str) -> None:
    model = MotifForCausalLM(Case("", variant, FSDP).config)
    load_model_state(step(folder / variant), model)
    torch.testing.assert_close(four[f"from checkpoint, {variant}"][2], dict(model.state_dict()), rtol=0, atol=0)
    start, later = four["start, fsdp 4"][2], four[f"from checkpoint, {variant}"][2]
    assert not torch.equal(start["model.embed_tokens.weight"], later["model.embed_tokens.weight"])


EXPERT_4 = Layout(expert=4)
ELSEWHERE: dict[str, tuple[int, Layout]] = {
    "fsdp 4": (4, FSDP),
    "expert 2 x fsdp 2": (4, Layout(expert=2)),
    "tensor 2": (2, TENSOR),
    "one process": (1, FSDP),
}


@pytest.mark.slow
def test_a_checkpoint_of_shared_experts_goes_on_elsewhere_and_exports_alike(data: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = MUON_AND_STREAMS | {"variant": "gda", "qk_clip": 0.5}
    common["model"] = MOTIF_3 | {"qk_norm": False, "num_experts": 8}
    on_ranks(4, train_cases, data, tmp_path / "out.pt", [Case("", layout=EXPERT_4, save=tmp_path / "run", **common)])
    straight = torch.load(tmp_path / "out.pt")[""]
    rest = torch.tensor(straight[0])[STEPS // 2 :]
    folders = {"expert 4": tmp_path / "run"}
    for ranks in (4, 2, 1):
        cases = []
        for name, (needed, layout) in ELSEWHERE.items():
            if needed == ranks:
                folders[name] = tmp_path / name.replace(" ", "_")
                cases.append(Case(name, layout=layout, load=step(tmp_path / "run"), save=folders[name], **common))
        on_ranks(ranks, train_cases, data, tmp_path / "out.pt", cases)
        for name, (losses, validation, weights, *_) in torch.load(tmp_path / "out.pt").items():
            torch.testing.assert_close(
                torch.tensor(losses), rest, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
            assert validation == pytest.approx(straight[1], abs=1e-5)
            for path in weights.keys() - {NO_GRADIENT}:
                torch.testing.assert_close(
                    weights[path], straight[2][path], rtol=0, atol=1e-5, msg=lambda m, p=path: f"{p}: {m}"
                )
    exported = {}
    for name, folder in folders.items():
        written = export(step(folder), tmp_path / "exported", tokenizer=str(data / "tokenizer"))
        # The rest names the checkpoint.
        files = [path for path in sorted(written.iterdir()) if path.name not in ("README.md", "export.json", "ledger")]
        exported[name] = {path.name: path.read_bytes() for path in files}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= exported["expert 4"].keys()
    for name, files_ in exported.items():
        assert files_ == exported["expert 4"], name
