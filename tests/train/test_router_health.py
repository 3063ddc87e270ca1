"""What a run says of its experts' health: figures by hand's formulas, and warnings."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

from helpers.distributed import train
from helpers.tiny import MOTIF_3, SHORT_RUN, write_recipe
from motifarch.layers import MixtureOfExperts
from motifarch.optim import update_expert_biases
from motifarch.train.plots import draw_router
from motifarch.train.router_health import RouterHealth
from motifarch.train.run_folder import read_metrics

EXPERTS, SIZE = 5, 8


def experts(seed: int = 0) -> MixtureOfExperts:
    torch.manual_seed(seed)
    return MixtureOfExperts(SIZE, num_experts=EXPERTS, top_k=2, intermediate_size=12, route_scale=2.0).train()


def test_figures_are_those_of_what_the_layer_computed() -> None:
    layer = experts()
    health = RouterHealth({1: layer}, num_layers=3)
    batches = [torch.randn(2, 6, SIZE) for _ in range(2)]
    counts = torch.zeros(EXPERTS)
    for last, x in enumerate(batches):
        health.record_outputs(bool(last))
        bias = layer.expert_bias.clone()
        selected = layer.router(x.flatten(0, 1), bias=bias).selected
        counts += selected.flatten().bincount(minlength=EXPERTS)
        layer(x)
        health.add(update_expert_biases([layer], rate=0.01))
    figures = health.read()

    assert all(values[0] is None and values[2] is None for values in figures.values())
    found = {name: values[1] for name, values in figures.items()}
    assert found["router_load_max_mean"] == pytest.approx(counts.max() / counts.mean())
    assert found["router_load_min_median"] == pytest.approx(counts.min() / counts.median())
    assert found["router_bias_range"] == pytest.approx(layer.expert_bias.max() - layer.expert_bias.min())
    norms = layer.experts.down_proj.detach().flatten(1).norm(dim=1)
    assert found["router_weight_min_median"] == pytest.approx(norms.min() / norms.median())

    # Of the last batch, in which alone outputs were recorded; each expert by itself.
    layer.expert_bias.copy_(bias)
    x = batches[-1].flatten(0, 1)
    selected = layer.router(x, bias=bias).selected
    rows = [torch.tensor([0] * k + [len(x)] * (EXPERTS - k), dtype=torch.int32) for k in range(EXPERTS)]
    means = [layer.experts(x, rows[k])[(selected == k).any(dim=1)].mean(dim=0) for k in range(EXPERTS)]
    cosines = [cosine_similarity(means[i], means[j], dim=0).item() for i in range(EXPERTS) for j in range(i)]
    assert found["router_output_cosine"] == pytest.approx(max(cosines), abs=1e-5)
    y = layer.eval()(x).hidden_states
    peaks = y.abs().amax(dim=1) / y.square().mean(dim=1).sqrt()
    assert found["router_output_peak"] == pytest.approx(peaks.mean().item(), rel=1e-5)


def test_each_report_begins_anew() -> None:
    layer = experts()
    health = RouterHealth({0: layer}, num_layers=1)
    assert health.read() == {}
    for x in torch.randn(2, 1, 7, SIZE):
        layer(x)
        health.add(update_expert_biases([layer], rate=0.0))
        figures = health.read()
        assert "router_output_cosine" not in figures  # nothing was recorded
        fresh = experts()
        fresh.load_state_dict(layer.state_dict())
        fresh(x)
        assert figures["router_entropy"][0] == pytest.approx(fresh.statistics().entropy.item())
    assert RouterHealth({}, num_layers=2).read() == {}


def test_a_warning_is_said_once_until_the_layer_has_recovered() -> None:
    health = RouterHealth({}, num_layers=4)

    def said(*loads: float | None) -> list[str]:
        return health.warnings({"router_load_min_median": list(loads)})

    (line,) = said(None, 0.25, 0.5, 0.1)
    assert "layer 3" in line
    assert "0.1" in line
    assert "below 0.3" in line
    assert "experts.bias_rate" in line
    assert said(None, 0.0, 0.31, 0.29) == []
    (line,) = said(None, 0.1, 0.2, 0.1)
    assert "layer 2" in line
    assert said(None, 0.75, 0.5, 0.5) == []
    (line,) = said(None, 0.2, 0.2, 0.2)
    assert "layer 1" in line
    assert [*health.warnings({"router_output_peak": [None, 11.0]}), *health.warnings({"router_output_cosine": [0.9]})]
    assert not health.warnings({"router_routed_shared_rms": [None, 0.35], "router_weight_min_median": [0.6]})


def test_one_expert_that_takes_all_is_starvation() -> None:
    layer = experts()
    layer.expert_bias[:2] += 100.0
    health = RouterHealth({0: layer}, num_layers=1)
    layer(torch.randn(1, 9, SIZE))
    health.add(update_expert_biases([layer], rate=0.0))
    figures = health.read()
    assert figures["router_load_min_median"] == [0.0]
    assert figures["router_load_max_mean"] == [EXPERTS / 2]
    assert any("starves" in line for line in health.warnings(figures))


def test_the_plot_is_drawn_of_runs_with_experts_alone(tmp_path: Path) -> None:
    path = tmp_path / "router.png"
    dense = [{"step": step, "loss": 1.0} for step in range(5)]
    assert not draw_router(dense, path, "a run")
    assert not path.exists()
    names = ("load_max_mean", "load_min_median", "entropy", "bias_range")
    values = [None, *(0.5 for _ in range(20))]
    rows = [{"step": step} | {f"router_{name}": values for name in names} for step in range(5, 10)]
    assert draw_router(dense + rows, path, "a run")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_ranks_and_one_process_report_the_same(data: Path, tmp_path: Path) -> None:
    """Experts are sharded over the ranks, and so are rows; figures are of all."""
    recipe = write_recipe(tmp_path, data, model=MOTIF_3 | {"initializer_range": 0.1})
    figures = []
    for ranks in (1, 2):
        output = tmp_path / f"{ranks}"
        said = train(ranks, tmp_path, recipe, *SHORT_RUN, "--log.every", "2", "--run.output", output)
        assert str(output / "router.png") in said
        assert (output / "router.png").is_file()
        rows = read_metrics(output / "metrics.jsonl")
        assert not any(name.startswith("router") for name in (*rows[0], *rows[2]))
        figures.append([{k: v for k, v in row.items() if k.startswith("router")} for row in (rows[1], rows[3])])
    for alone, both in zip(*figures, strict=True):
        assert len(alone) == 8
        assert alone.keys() == both.keys()
        for name, values in alone.items():
            assert values[0] is None
            assert both[name][1:] == pytest.approx(values[1:], rel=1e-4), name
