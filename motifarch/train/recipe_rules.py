"""The rules that hold between a recipe's fields."""

from dataclasses import fields

from motifarch.errors import UserError
from motifarch.storage import is_url
from motifarch.train.recipe import RECIPES, ExpertsSection, OptimSection, Recipe


def check_recipe(recipe: Recipe, world_size: int = 1) -> None:
    """Refuses impossible values and combinations, of which one depends on the number of ranks.

    Raises:
        UserError: naming the field, its value and what is accepted.
    """
    RECIPES.check(recipe)
    run, batch, optim, data = recipe.run, recipe.batch, recipe.optim, recipe.data
    wait, checkpoint, average = recipe.distributed, recipe.checkpoint, recipe.average
    decay = optim.decay_steps or 0 if optim.schedule == "wsd" else 0
    shrinking = optim.weight_decay * optim.lr * max(1.0, optim.muon_lr_ratio if optim.name == "muon" else 1.0)
    rules = [
        *_lora_rules(recipe),
        *_sparse_rules(recipe),
        (
            wait.timeout_first_s < wait.timeout_s,
            f"distributed.timeout_first_s is {wait.timeout_first_s}, below distributed.timeout_s ({wait.timeout_s}); "
            "the first step takes longest, so give it at least as much",
        ),
        (
            average.every % checkpoint.every,
            f"average.every is {average.every}, which is no multiple of checkpoint.every ({checkpoint.every}): a mean "
            "is taken where a checkpoint has just been written",
        ),
        (
            average.every and 0 < checkpoint.keep_last < average.last,
            f"checkpoint.keep_last is {checkpoint.keep_last}, but average.last needs {average.last} checkpoints; keep "
            "at least as many, or 0 for all",
        ),
        (
            is_url(run.output),
            f"run.output is {run.output}, a URL, but logs, metrics and locks want a folder on disk; give one, and the "
            "URL as checkpoint.mirror",
        ),
        (
            is_url(run.resume),
            f"run.resume is {run.resume}, a URL; give the run's folder there as checkpoint.mirror, whose newest "
            "checkpoint run.resume auto goes on from, or copy the checkpoint to disk",
        ),
        (
            checkpoint.mirror is not None and not is_url(checkpoint.mirror),
            f"checkpoint.mirror is {checkpoint.mirror}, which is no URL; give one such as s3://bucket/run, gs://... or "
            "file:///folder",
        ),
        (not data.datasets, "data.datasets is empty; give at least one entry, for example {path: data/stdlib}"),
        (
            not any(entry.weight for entry in data.datasets),
            "data.datasets: every weight is 0; at least one must be above 0",
        ),
        (
            data.ramp_end < data.ramp_start,
            f"data.ramp_end is {data.ramp_end}, before data.ramp_start ({data.ramp_start}); let it be at least that",
        ),
        (
            optim.qk_clip is not None and recipe.model.qk_norm,
            f"optim.qk_clip is {optim.qk_clip} and model.qk_norm is on: normalised queries and keys have bounded "
            "logits, and their projections' scale changes nothing; use one or the other",
        ),
        (
            optim.schedule == "wsd" and optim.decay_shape == "inverse_sqrt" and not optim.min_lr_ratio,
            "optim.min_lr_ratio is 0, which optim.decay_shape inverse_sqrt never reaches; use a ratio above 0",
        ),
        (
            shrinking >= 1,
            f"optim.weight_decay is {optim.weight_decay}, which with optim.lr ({optim.lr}) takes {shrinking:g} of a "
            "weight in a step; let their product, with Muon's ratio too, be far below 1",
        ),
        (
            optim.warmup_steps + decay > run.steps,
            f"optim.warmup_steps ({optim.warmup_steps}) and optim.decay_steps ({decay}) together exceed "
            f"run.steps ({run.steps}); shorten them or lengthen the run",
        ),
        (
            (batch.warmup_start or 0) > batch.size,
            f"batch.warmup_start is {batch.warmup_start}, more than batch.size ({batch.size}); start with at most that",
        ),
        (
            run.resume not in ("auto", "none") and run.init_from,
            "run.resume names a checkpoint and run.init_from is set too; choose one of them",
        ),
    ]
    for broken, message in rules:
        if broken:
            raise UserError(message)
    ranks = recipe.parallel.resolve(world_size).data_parallel_size
    if batch.size % ranks:
        raise UserError(
            f"batch.size is {batch.size}, which {ranks} ranks can't share evenly; use a multiple of {ranks}"
        )


def _lora_rules(recipe: Recipe) -> list[tuple[object, str]]:
    """What does not go with adapters, and the message for each."""
    lora, run = recipe.lora, recipe.run
    if not lora.rank:
        return []
    has, or_none = f"lora.rank is {lora.rank}", "or set lora.rank to 0 to train all weights"
    return [
        (not lora.targets, f"{has} and lora.targets is empty; name linear layers such as q_proj, {or_none}"),
        (
            not run.init_from and run.resume in ("auto", "none"),
            f"{has} and run.init_from is empty, but adapters are for a trained model; name its folder, {or_none}",
        ),
        (
            recipe.parallel.tensor > 1,
            f"{has} and parallel.tensor is {recipe.parallel.tensor}: adapters are not cut over ranks of tensor "
            f"parallelism; use parallel.shard (or context) with parallel.tensor 1, {or_none}",
        ),
        (
            recipe.precision.matmul != "compute",
            f"{has} and precision.matmul is {recipe.precision.matmul}, whose layers take no adapters; use compute, "
            f"{or_none}",
        ),
        (
            recipe.model.num_experts and recipe.experts.bias_rate,
            f"{has} and experts.bias_rate is {recipe.experts.bias_rate}, which would move biases that adapters do not "
            f"hold; set it to 0, {or_none}",
        ),
        (
            recipe.optim.qk_clip is not None,
            f"{has} and optim.qk_clip is {recipe.optim.qk_clip}, which would scale weights that are not trained; set "
            f"it to null, {or_none}",
        ),
    ]


def _sparse_rules(recipe: Recipe) -> list[tuple[object, str]]:
    """What is set of parts that the model does not have, and the message for each."""
    model, experts, optim = recipe.model, recipe.experts, recipe.optim
    plain = ExpertsSection()
    given = [f.name for f in fields(experts) if getattr(experts, f.name) != getattr(plain, f.name)]
    name = given[0] if given else "bias_rate"
    first, period = model.n_dense_first_layers, model.interleave_moe_layer_step
    unknown = set(experts.balance_loss_by_layer) - set(range(first, model.num_hidden_layers, period))
    return [
        (
            not model.num_experts and given,
            f"experts.{name} is {getattr(experts, name)}, but model.num_experts is null: there are no experts; give "
            f"their number, or leave experts.{name} out",
        ),
        (
            unknown,
            f"experts.balance_loss_by_layer names layer {min(unknown, default=0)}, which has no experts: with "
            f"model.n_dense_first_layers {first}, interleave_moe_layer_step {period} and num_hidden_layers "
            f"{model.num_hidden_layers}, name others",
        ),
        (
            experts.router_noise_steps and not experts.router_noise,
            f"experts.router_noise_steps is {experts.router_noise_steps}, but experts.router_noise is 0; give the "
            "noise of the first step, or leave the steps out",
        ),
        (
            not model.num_nextn_predict_layers and optim.mtp_loss != OptimSection.mtp_loss,
            f"optim.mtp_loss is {optim.mtp_loss}, but model.num_nextn_predict_layers is 0: nothing predicts the token "
            "after the next one; set that to 1, or leave optim.mtp_loss out",
        ),
        (
            not model.mhc_enabled and optim.mhc_post_alpha_steps,
            f"optim.mhc_post_alpha_steps is {optim.mhc_post_alpha_steps}, but model.mhc_enabled is false: there are no "
            "hyper-connections; turn them on, or leave the steps out",
        ),
    ]
