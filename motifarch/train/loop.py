"""The training loop: from a recipe to a trained run, top to bottom."""

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from motifarch.counted import counted
from motifarch.data import AttentionWork, BatchLoader
from motifarch.decoder_layers import decoder_layers
from motifarch.environment import cpu
from motifarch.errors import UserError
from motifarch.files import remove
from motifarch.ledger.signing import Signer
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.optim import SpikeGuard, build_optimizer, offload_state
from motifarch.parallel import (
    Mesh,
    Watchdog,
    World,
    check_context_parallel,
    check_expert_parallel,
    check_low_precision,
    check_tensor_parallel,
    initialize,
    parallelize,
    shard_sequence,
)
from motifarch.storage import is_url
from motifarch.train.annealing import Annealing, set_expert_losses
from motifarch.train.checkpoint import Checkpointer, TrainState, load_state
from motifarch.train.fetching import fetch_folder
from motifarch.train.init_from import config_differences, load_weights
from motifarch.train.inputs import Inputs, bytes_per_token, find_parent
from motifarch.train.learning_rate import learning_rates
from motifarch.train.lineage import Lineage
from motifarch.train.lora import add_adapters, init_adapters
from motifarch.train.manifest import checkpoint_name, checkpoints_folder, read_manifest
from motifarch.train.memory import check_memory
from motifarch.train.metrics import MetricsLog, bits_per_byte
from motifarch.train.plots import LOSS_PLOT, ROUTER_PLOT, draw_loss, draw_router
from motifarch.train.precision import choose_compute
from motifarch.train.progress import Progress, outcome
from motifarch.train.random_draws import seed_draws
from motifarch.train.read_recipe import to_dict
from motifarch.train.recipe import Recipe
from motifarch.train.record import (
    about_checkpoint,
    check_parent,
    device_name,
    row_kernels,
    write_record,
)
from motifarch.train.remote_run import claim_mirror
from motifarch.train.restart_from_average import average_due, restart_from_average
from motifarch.train.router_health import RouterHealth
from motifarch.train.run_folder import METRICS, RECORD, TENSORBOARD, note_end, read_metrics, set_damaged_record_aside
from motifarch.train.saved_hashes import weights_root
from motifarch.train.step import count_targets, train_step, validation_loss
from motifarch.train.stop import SIGNALS, StopSignals
from motifarch.train.trackers import open_trackers

FETCHED = ".fetched"
"""Where, in the run's folder, first weights from a URL lie until they are read."""


@dataclass(frozen=True)
class Start:
    """What rank 0 decided before the model is built."""

    parent: Path | None
    """The checkpoint that the run continues."""
    compute: str
    warnings: list[str]
    place: dict[str, Any] | None = None
    """How far in the data the parent is."""
    first_weights: str | None = None
    """`run.init_from`, or the folder that a URL's was copied to."""


def train(recipe: Recipe, inputs: Inputs, world: World) -> int:
    """Trains as a recipe says, collectively.

    Returns:
        The exit status: 0 for a finished run; 128 plus the signal's number for one that SIGTERM
        (143), Ctrl-C (130) or another of SIGNALS stopped after saving, which the same command
        resumes.

    Raises:
        UserError: naming what went wrong and the fix. What was saved stays.
    """
    output = Path(recipe.run.output)
    start = world.run_on_main_and_broadcast(lambda: _decide(recipe, inputs, world))
    mesh = Mesh(world.device.type, recipe.parallel.resolve(world.size))
    check_memory(inputs.model_config, mesh.layout, world, frozen=bool(recipe.lora.rank))
    from_disk = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, init_from=start.first_weights))
    state, flops_per_token = build_state(
        from_disk, inputs.model_config, world, mesh, seq_len=inputs.seq_len, compute=start.compute
    )
    if world.is_main:
        remove(output / FETCHED)  # every rank has read it
    if start.parent:
        load_state(start.parent, state)
        # A row of skipped steps that stopped the last start must not stop this one at once.
        state.nonfinite[1:] = 0
    lineage = _open_lineage(recipe, inputs, world, mesh, state, start)
    if world.is_main:
        parameters = sum(p.numel() for p in state.model.parameters())
        entry = lineage.newest if lineage else None
        write_record(recipe, inputs, world, start.compute, start.parent, parameters=parameters, ledger_entry=entry)
    if start.place:
        inputs.mixture.go_on(state.step, start.place)
    learning_rate = learning_rates(recipe)
    annealing = Annealing(state.model, recipe, world.device)
    annealing.set(state.step)
    decoder: Any = state.model.model
    health = RouterHealth(decoder.expert_layers(), len(decoder.layers))
    loader = BatchLoader(
        inputs.mixture,
        rank=mesh.data_rank,
        world_size=mesh.layout.data_parallel_size,
        micro_batch_size=recipe.batch.micro_size,
        start_step=state.step,
        stop_step=stop_step(recipe),
        row_work=AttentionWork(_windows(state.model)) if recipe.batch.balance else None,
    )
    goes_on = start.parent is not None and start.parent.parent == checkpoints_folder(output)
    checkpointer = Checkpointer(
        output,
        keep_last=recipe.checkpoint.keep_last,
        asynchronous=recipe.checkpoint.asynchronous,
        about=partial(about_checkpoint, recipe, inputs, world.device, start.compute),
        saved_step=state.step if goes_on else None,
        mirror=recipe.checkpoint.mirror,
        lineage=lineage,
        say=lambda line: print(line, flush=True),
    )
    trackers = []
    if world.is_main:
        trackers = open_trackers(recipe.log, output, start_step=state.step, recipe=to_dict(recipe))
    metrics = MetricsLog(
        output,
        start_step=state.step,
        flops_per_token=flops_per_token,
        device=world.device,
        write=world.is_main,
        begun=goes_on,
        trackers=trackers,
        bytes_per_token=bytes_per_token(inputs.training, [entry.weight for entry in recipe.data.datasets]),
    )
    progress = Progress(recipe.run.steps, state.step, show=world.is_main)
    for line in [*start.warnings, *metrics.warnings, *(lineage.warnings if lineage else ())]:
        progress.say(f"warning: {line}")
    progress.say(_greeting(recipe, state, world, start))
    if recipe.compile:
        progress.say("the first step compiles the decoder layers, which takes minutes for large ones")

    stopped_by = 0
    with (
        StopSignals() as signals,
        contextlib.closing(progress),
        contextlib.closing(metrics),
        contextlib.closing(iter(loader)) as batches,  # type: ignore[type-var]
        # Last, so that after a timeout nothing else is waited for.
        Watchdog(
            world, output, first_s=recipe.distributed.timeout_first_s, limit_s=recipe.distributed.timeout_s
        ) as watchdog,
    ):
        watchdog.heartbeat(f"the data of step {state.step + 1}")
        for step, micro_batches in batches:
            micro_batches = [shard_sequence(b, mesh.context_rank, mesh.layout.context) for b in micro_batches]
            watchdog.heartbeat(f"step {step + 1}")
            # One small message a step: the global number of targets, and whether anyone must stop.
            targets, failed, *flags = world.all_reduce_sum(
                [count_targets(micro_batches), int(checkpointer.failed), *signals.flags()]
            )
            if failed:
                checkpointer.wait()
            stopped_by = max((n for n, flag in zip(SIGNALS, flags, strict=True) if flag), default=0)
            if stopped_by:
                break
            if average_due(recipe, state.step):
                with watchdog.long_work("the mean of the last checkpoints"), metrics.paused():
                    checkpointer.wait()
                    steps = restart_from_average(state, recipe, start.parent, world)
                progress.say(f"going on from the mean of the checkpoints of steps {', '.join(map(str, steps))}")
            targets //= mesh.layout.tensor  # those ranks counted the same ones
            lr = learning_rate(step)
            seed_draws(recipe.run.seed, step, mesh.token_rank)
            health.record_outputs((step + 1) % recipe.log.every == 0)
            result = train_step(
                state,
                micro_batches,
                world=world,
                targets=targets,
                lr=lr,
                clip=recipe.optim.clip,
                z_loss_weight=recipe.optim.z_loss,
                mtp_loss_weight=recipe.optim.mtp_loss,
                expert_bias_rate=recipe.experts.bias_rate,
                layout=mesh.layout,
                qk_clip=recipe.optim.qk_clip,
            )
            annealing.set(state.step)
            health.add(result.expert_loads)
            metrics.add(
                result,
                tokens=inputs.mixture.batch_schedule.batch_size(step) * inputs.seq_len,
                step=state.step,
                learning_rate=lr,
                targets=state.tokens,
                epoch=inputs.mixture.epochs(state.step),
            )
            last = state.step == stop_step(recipe)
            validate = bool(inputs.validation) and (last or state.step % recipe.validation.every == 0)
            save = last or state.step % recipe.checkpoint.every == 0
            if validate:
                with watchdog.long_work(f"the validation after step {state.step}"), metrics.paused():
                    metrics.update_last(**_validate(state, inputs, recipe, world, mesh))
            if validate or save or state.step % recipe.log.every == 0:
                _report(metrics, progress, state, recipe, checkpointer, health)
            if save:
                with watchdog.long_work(f"the checkpoint of step {state.step}"), metrics.paused():
                    checkpointer.save(state)
            watchdog.first_step_done(keep=[checkpointer.group])
            watchdog.heartbeat(f"the data of step {state.step + 1}")
        with watchdog.long_work("the last checkpoint"):
            _report(metrics, progress, state, recipe, checkpointer, health)
            checkpointer.save(state)
            checkpointer.wait()
            # The others wait: torchrun ends all ranks once one has left with a signal's status.
            if world.is_main:
                progress.close()
                _finish(recipe, state, stopped_by)
            checkpointer.finish(lambda: watchdog.heartbeat("the last checkpoint's copy", no_timeout=True))
    return 128 + stopped_by if stopped_by else 0


def _open_lineage(
    recipe: Recipe, inputs: Inputs, world: World, mesh: Mesh, state: TrainState, start: Start
) -> Lineage | None:
    """The run's ledger, on rank 0, which then knows what the state stands on."""
    first = None if start.parent else weights_root(state.model)
    if not world.is_main:
        return None
    key = recipe.checkpoint.sign_with
    machine = {
        "devices": device_name(world.device),
        "ranks": world.size,
        "layout": dataclasses.asdict(mesh.layout),
        "compute": start.compute,
        **row_kernels(world.device),
        **(cpu() | {"threads": torch.get_num_threads()} if world.device.type == "cpu" else {}),
    }
    lineage = Lineage(recipe, inputs, machine, Signer(Path(key)) if key else None)
    if start.parent:
        lineage.go_on(start.parent)
    else:
        assert first is not None
        lineage.begin(first, recipe.run.seed, Path(start.first_weights) if start.first_weights else None)
    return lineage


def stop_step(recipe: Recipe) -> int:
    """The step after which a start ends."""
    return min(recipe.run.steps, recipe.run.stop_at or recipe.run.steps)


def _first_weights(model: nn.Module, device: torch.device, seed: int) -> None:
    initialize(model, device, seed)
    init_adapters(model, seed)


def build_state(
    recipe: Recipe,
    config: MotifConfig,
    world: World,
    mesh: Mesh,
    *,
    seq_len: int,
    compute: str,
    initialize: Callable[[nn.Module, torch.device, int], None] = _first_weights,
) -> tuple[TrainState, float]:
    """Builds model and optimizer, sharded from the start; first weights do not depend on the ranks.

    The recipe's model is `config` (`motifarch.train.inputs.model_config`) for sequences of
    `seq_len` tokens; `compute` names the dtype that matrices are multiplied in, and `initialize`
    gives a sharded model on the meta device its first weights, from a seed.

    Returns:
        The state at step 0, and the model FLOPs of one token, forward and backward.

    Raises:
        UserError: the model or its sequences can't be cut as the recipe asks.
    """
    layout = mesh.layout
    check_tensor_parallel(config, layout.tensor)
    check_context_parallel(config, seq_len, layout.context, layout.tensor)
    check_expert_parallel(config, layout.expert)
    with torch.device("meta"):
        model = MotifForCausalLM(config).train()
        flops_per_token = model.flops_per_token(seq_len)
        if recipe.lora.rank:
            add_adapters(model, recipe.lora)
    check_low_precision(
        recipe.precision.matmul,
        device=world.device,
        compute_dtype=getattr(torch, compute),
        tokens=seq_len // layout.context,
        model=model,
        tensor=layout.tensor,
    )
    parallelize(
        model,
        mesh,
        compute_dtype=getattr(torch, compute),
        matmul=recipe.precision.matmul,
        activation_checkpointing=recipe.activation_checkpointing,
        compile=recipe.compile,
    )
    initialize(model, world.device, recipe.run.seed)
    set_expert_losses(model, recipe, seq_len)
    for layer in decoder_layers(model):
        layer.self_attn.record_max_logits = recipe.optim.qk_clip is not None  # type: ignore[union-attr]
    if recipe.run.init_from:
        load_weights(Path(recipe.run.init_from), model)
    optim = recipe.optim
    optimizer = build_optimizer(
        model,
        name=optim.name,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        decay_embeddings=optim.decay_embeddings,
        momentum=optim.momentum,
        muon_lr_ratio=optim.muon_lr_ratio,
        ns_coefficients=optim.ns_coefficients,
        ns_dtype=getattr(torch, optim.ns_dtype),
        muon_chunk_mib=optim.muon_chunk_mib,
    )
    if optim.offload:
        offload_state(optimizer)
    nonfinite = torch.zeros(3, dtype=torch.int64, device=world.device)
    run, guard = recipe.run, None
    if run.spike_sigma is not None:
        guard = SpikeGuard(run.spike_sigma, run.spike_window, max_in_row=run.spike_max_in_row, device=world.device)
    return TrainState(model, optimizer, nonfinite=nonfinite, spike_guard=guard), flops_per_token


def _windows(model: nn.Module) -> list[tuple[int, int]]:
    return [layer.self_attn.window_size for layer in decoder_layers(model)]  # type: ignore[misc, union-attr]


def _decide(recipe: Recipe, inputs: Inputs, world: World) -> Start:
    """Rank 0's part before the start: the folder, the parent, the precision."""
    output = Path(recipe.run.output)
    try:
        checkpoints_folder(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.output is {output}, which can't be made: {error.strerror}") from None
    warnings: list[str] = []
    parent = find_parent(recipe, warnings)
    if recipe.checkpoint.mirror:
        claim_mirror(recipe.checkpoint.mirror, recipe.run.resume, parent)
    compute: str = recipe.precision.compute
    place = None
    if parent:
        warnings += check_parent(parent, recipe, inputs, world.device)
        about = read_manifest(parent)["about"]
        place = about.get("samples")
        if compute == "auto":
            compute = about["compute"]
    first_weights = recipe.run.init_from
    if first_weights and is_url(first_weights):
        # What goes on from a checkpoint has its weights from there.
        first_weights = None if parent else str(fetch_folder(first_weights, output / FETCHED))
    if first_weights and not parent:
        warnings += config_differences(Path(first_weights), inputs.model_config)
    if compute == "auto":
        compute = choose_compute(world.device)
    warnings += set_damaged_record_aside(output)
    return Start(parent, compute, warnings, place, first_weights)


def _validate(state: TrainState, inputs: Inputs, recipe: Recipe, world: World, mesh: Mesh) -> dict[str, float]:
    loss = validation_loss(
        state.model,
        inputs.validation,
        world=world,
        sequences=recipe.validation.sequences,
        micro_size=recipe.batch.micro_size,
        mesh=mesh,
    )
    text = bytes_per_token(inputs.validation)
    return {"validation_loss": loss} | ({"validation_bits_per_byte": bits_per_byte(loss, text)} if text else {})


def _report(
    metrics: MetricsLog,
    progress: Progress,
    state: TrainState,
    recipe: Recipe,
    checkpointer: Checkpointer,
    health: RouterHealth,
) -> None:
    """Reads the device and shows the last step; stops a run whose steps are skipped too often.

    Raises:
        UserError: too many skipped steps; the state, which they left untouched, is saved first.
    """
    total, _, longest = state.nonfinite.tolist()
    spikes = int(state.spike_guard.counts[2]) if state.spike_guard else 0
    metrics.update_pending(skipped_total=total + spikes)
    if figures := health.read():
        metrics.update_last(**figures)
        if state.step > recipe.optim.warmup_steps:  # first weights know no balance
            for line in health.warnings(figures):
                progress.say(f"warning: after step {state.step}, {line}")
    rows = metrics.flush()
    if rows:
        progress.update(rows)
    limits: dict[str, tuple[int, int]] = {
        "run.max_nonfinite_in_row": (longest, recipe.run.max_nonfinite_in_row),
        "run.max_nonfinite_total": (total, recipe.run.max_nonfinite_total),
    }
    for name, (count, limit) in limits.items():
        if count >= limit:
            checkpointer.save(state)
            checkpointer.finish()
            in_row, higher = (" in a row", "") if name.endswith("row") else ("", f", with a higher --{name}")
            skipped = counted(count, f"step{in_row}")
            raise UserError(
                f"skipped {skipped}, with a non-finite loss or gradient ({name} is {limit}); "
                f"the weights before them are saved as step {state.step} in {recipe.run.output}. "
                f"Lower optim.lr or look into the data, then start the same command again to resume{higher}"
            )
    state.nonfinite[2] = state.nonfinite[1]


def _greeting(recipe: Recipe, state: TrainState, world: World, start: Start) -> str:
    parameters = sum(p.numel() for p in state.model.parameters())
    trained = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    count = f"{parameters:,} parameters" + (f", {trained:,} of them trained" if trained < parameters else "")
    where = f"{counted(world.size, 'rank')} on {world.device.type}, {start.compute}"
    begin = f"with the weights of {recipe.run.init_from}" if recipe.run.init_from else "from scratch"
    if start.parent:
        begin = f"resuming after step {state.step} from {start.parent}"
    return f"{count}, {where}, {begin}, into {recipe.run.output}"


def _finish(recipe: Recipe, state: TrainState, stopped_by: int) -> None:
    """Says how well it went, draws the loss plot and names the files."""
    output = Path(recipe.run.output)
    cut = state.step < recipe.run.steps
    note_end(output, "stopped" if cut else "complete")
    if not cut:
        print(f"finished {counted(state.step, 'step')}")
    elif stopped_by:
        print(f"stopped after step {state.step}; the same command resumes")
    else:
        print(f"stopped after step {state.step}, as run.stop_at says; the same command without it goes on")
    rows = read_metrics(output / METRICS)
    for line in outcome(rows, recipe.log.every):
        print(f"  {line}")
    files: dict[str, Any] = {
        "checkpoint": checkpoints_folder(output) / checkpoint_name(state.step),
        "metrics": output / METRICS,
        "record": output / RECORD,
    }
    try:
        draw_loss(rows, output / LOSS_PLOT, f"{output.name}: {state.tokens:,} tokens")
        files["curve"] = output / LOSS_PLOT
        if draw_router(rows, output / ROUTER_PLOT, f"{output.name}: experts"):
            files["experts"] = output / ROUTER_PLOT
    except OSError as error:  # all that matters is saved
        print(f"warning: the loss can't be drawn into {output / LOSS_PLOT}: {error.strerror}")
    if recipe.log.tensorboard:
        files["TensorBoard"] = output / TENSORBOARD
    for name, path in files.items():
        print(f"  {name:<12}{path}", flush=True)
