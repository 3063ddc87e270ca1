"""Training steps under a layout of ranks: functions that ranks run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from helpers.models import tiny_config
from motifarch.data import BatchLoader, BatchSchedule, Mixture, MixtureComponent, PackedDataset
from motifarch.decoder_layers import decoder_layers
from motifarch.layers.router import Router, Routing
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.optim import build_optimizer, offload_state
from motifarch.parallel import Layout, Mesh, initialize, open_world, parallelize, shard_sequence
from motifarch.train.annealing import set_expert_losses
from motifarch.train.checkpoint import Checkpointer, TrainState, load_state
from motifarch.train.init_from import load_weights
from motifarch.train.recipe import ExpertsSection, Recipe
from motifarch.train.step import count_targets, train_step, validation_loss

# Where a gradient is no more than rounding, Adam's step would be as large as any: epsilon is above
# that.
STEPS, LR, EPSILON, CLIP, Z_LOSS = 10, 2e-3, 1e-6, 0.5, 1e-3

# Heads that two ranks of tensor and two of context parallelism can share together.
VARIANTS: dict[str, dict[str, Any]] = {
    "gda": {"num_attention_heads": 12, "num_noise_heads": 4, "num_key_value_heads": 8, "qk_norm": True}
    | {"vocab_size": 321},  # which ranks don't divide
    "gda window": {"num_attention_heads": 12, "num_noise_heads": 4, "num_key_value_heads": 8, "vocab_size": 323}
    | {"sliding_window": 7, "use_sliding_window": True, "tie_word_embeddings": True},
    "diff_v1": {"num_attention_heads": 8, "num_key_value_heads": 8},
    "diff_v2 gated": {"num_attention_heads": 12, "num_noise_heads": 4, "num_key_value_heads": 4},
    "softmax": {"num_attention_heads": 4, "num_key_value_heads": 4},
}


def optimizer_of(name: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": LR, "eps": EPSILON}
    if name == "muon":
        options |= {"ns_dtype": torch.float32, "muon_chunk_mib": 1}
    return build_optimizer(model, name=name, **options)  # type: ignore[arg-type]


MUON_AND_STREAMS: dict[str, Any] = {"optimizer": "muon", "lr": 5e-4}
"""With hyper-connections. A first layer's streams are copies, so the gradients of its projections
have rank one but for rounding, which Muon scales up to whole steps: these are small.
"""

# Losses that weigh something beside the cross-entropy.
EXPERTS = ExpertsSection(bias_rate=0.01, balance_loss=0.01, magnitude_loss=0.01, magnitude_threshold=0.1)


@dataclass
class Case:
    """One run: what is trained, on how many ranks of which kind."""

    name: str
    variant: str
    layout: Layout
    optimizer: str = "adamw"
    options: dict[str, Any] = field(default_factory=dict)  # arguments of parallelize
    model: dict[str, Any] = field(default_factory=dict)  # fields of the config besides the variant's
    qk_clip: float | None = None
    steps: int = STEPS
    lr: float = LR
    micro: int = 2  # rows of a micro-batch
    save: Path | None = None  # folder for a checkpoint after half of the steps, or of what was loaded
    load: Path | None = None  # a checkpoint to go on from
    init_from: Path | None = None  # a checkpoint or a Hugging Face folder, for the first weights
    offload: bool = False  # keep moments in CPU memory, the optimizer stepping in pieces

    @property
    def config(self) -> MotifConfig:
        """What the model is made from."""
        overrides = {"vocab_size": 320, "initializer_range": 0.1} | VARIANTS[self.variant] | self.model
        return tiny_config(self.variant, **overrides)


Routed = list[tuple[torch.Tensor, torch.Tensor]]
"""Of each micro-batch: each token's experts (T, k), in order of their numbers, and by how much the
last of them was preferred to the next one (T,)."""


def watch_routing(model: torch.nn.Module) -> dict[str, Routed]:
    """Notes from now on where every router sends the tokens that it trains on."""
    seen: dict[str, Routed] = {}

    def note(name: str, router: Router, given: dict[str, Any], routing: Routing) -> None:
        if router.training and torch._C._current_graph_task_id() == -1:  # not when computed again
            best = (routing.scores + given["bias"]).detach().topk(router.top_k + 1, dim=1).values
            seen[name].append((routing.selected.sort(dim=1).values, best[:, -2] - best[:, -1]))

    for name, module in model.named_modules():
        if isinstance(module, Router):
            seen[name] = []
            hook = lambda router, _, given, routing, n=name: note(n, router, given, routing)  # noqa: E731
            module.register_forward_hook(hook, with_kwargs=True)
    return seen


def gather_routing(seen: dict[str, Routed], layout: Layout, steps: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of every token in so many steps, in the order that one process has: experts and margin."""
    everyone: list[Any] = [None] * layout.ranks
    dist.all_gather_object(everyone, seen)
    gathered = {}
    for name in seen:
        # Ranks of tensor parallelism have the same tokens.
        ranks = [rank[name] for rank in everyone[:: layout.tensor]]
        micros = len(ranks[0]) // max(steps, 1)
        parts = [
            ranks[data * layout.context + part][step * micros + micro]
            for step in range(steps)
            for data in range(layout.data_parallel_size)
            for micro in range(micros)
            for part in range(layout.context)
        ]
        if parts:
            selected, margins = zip(*parts, strict=True)
            gathered[name] = torch.cat(selected), torch.cat(margins)
    return gathered


def build(case: Case, mesh: Mesh, seq_len: int) -> TrainState:
    with torch.device("meta"):
        model = MotifForCausalLM(case.config).train()
    parallelize(model, mesh, **case.options)
    initialize(model, torch.device("cpu"), seed=0)
    if case.init_from:
        load_weights(case.init_from, model)
    set_expert_losses(model, Recipe(experts=EXPERTS), seq_len)
    for layer in decoder_layers(model):
        layer.self_attn.record_max_logits = case.qk_clip is not None  # type: ignore[union-attr]
    optimizer = optimizer_of(case.optimizer, model)
    if case.offload:
        offload_state(optimizer, piece_bytes=8192)
    return TrainState(model, optimizer)


def checkpointer(case: Case, data: Path) -> Checkpointer:
    """Notes what an export needs."""
    assert case.save is not None
    about = {"seed": 0, "compute": "float32", "tokenizer": "", "model_config": case.config.to_dict()}
    about["data"] = [{"path": str(data), "fingerprint": "", "weight": 1.0}]
    return Checkpointer(case.save, asynchronous=not case.load, about=lambda _: about)


def train_cases(data: Path, output: Path, cases: list[Case]) -> None:
    """Trains every case; rank 0 saves losses, norms, validation, weights, routing, lambdas."""
    with open_world() as world:
        results = {}
        for case in cases:
            mesh = Mesh("cpu", case.layout.resolve(world.size))
            dataset = PackedDataset.open(data)
            state = build(case, mesh, dataset.seq_len)
            if case.load:
                load_state(case.load, state)
                if case.save:
                    checkpointer(case, data).save(state)
            component = MixtureComponent(dataset)
            mixture = Mixture([component], seed=0, batch_schedule=BatchSchedule(8))
            place = {"rank": mesh.data_rank, "world_size": mesh.layout.data_parallel_size}
            place["micro_batch_size"] = case.micro
            loader = BatchLoader(mixture, **place, start_step=state.step, stop_step=case.steps)
            history, lambdas, saver = [], None, None
            routing = watch_routing(state.model)
            for _, whole in loader:
                batches = [shard_sequence(b, mesh.context_rank, mesh.layout.context) for b in whole]
                (targets,) = world.all_reduce_sum([count_targets(batches)])
                options: dict[str, Any] = {"lr": case.lr, "clip": CLIP, "z_loss_weight": Z_LOSS, "layout": mesh.layout}
                targets //= mesh.layout.tensor
                result = train_step(
                    state,
                    batches,
                    world=world,
                    targets=targets,
                    qk_clip=case.qk_clip,
                    expert_bias_rate=EXPERTS.bias_rate,
                    **options,
                )
                history.append([result.loss.item(), result.z_loss.item(), result.grad_norm.item()])
                lambdas = result.lambdas
                if case.save and not case.load and state.step == case.steps // 2:
                    saver = checkpointer(case, data)
                    saver.save(state)
            if saver:
                saver.wait()
            datasets = [PackedDataset.open(data, "validation")]
            validation = validation_loss(state.model, datasets, world=world, sequences=7, micro_size=2, mesh=mesh)
            content = state.state_dict()["model"]
            weights = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in content.items()}
            routed = gather_routing(routing, mesh.layout, len(history))
            weights = {k: v.clone() for k, v in weights.items()}
            results[case.name] = (history, validation, weights, routed, lambdas)
        if world.is_main:
            torch.save(results, output)


NO_GRADIENT = "model.layers.0.mhc_attn.proj_res.weight"
"""The first hyper-connections mix equal streams, which no matrix with sums of 1 changes: their
gradient is rounding, of which Muon makes whole steps."""


def assert_same(found: Any, expected: Any, name: str) -> None:
    """Two results of `train_cases` agree: histories, validation loss and every weight."""
    for f, e, what in zip(found[:2], expected[:2], ("history", "validation"), strict=True):
        torch.testing.assert_close(
            torch.tensor(f), torch.tensor(e), rtol=1e-5, atol=1e-5, msg=lambda m, w=what: f"{name}, {w}: {m}"
        )
    assert found[2].keys() == expected[2].keys()
    for key in found[2].keys() - {NO_GRADIENT}:
        value = found[2][key]
        torch.testing.assert_close(value, expected[2][key], rtol=0, atol=1e-5, msg=lambda m, k=key: f"{name}, {k}: {m}")


def assert_routed_alike(found: Any, expected: Any, name: str) -> None:
    """Every token goes to the same experts, but where two are preferred alike; few are."""
    assert found[3].keys() == expected[3].keys()
    for layer, (selected, _) in found[3].items():
        truth, margins = expected[3][layer]
        assert len(truth) > 1000
        clear = margins > 1e-6
        assert (~clear).float().mean() < 1e-3, f"{name}, {layer}: {(~clear).sum()} tokens have no clear choice"
        assert torch.equal(selected[clear], truth[clear]), f"{name}, {layer}"
