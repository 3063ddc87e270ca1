"""A recipe's model and data under transformers.Trainer and accelerate's FSDP2, for those whose
tools live there.

    motifarch data prepare --source stdlib --output data/stdlib --seq-len 128
    accelerate launch --config_file recipes/trainer/fsdp2.yaml \\
        recipes/trainer/train.py recipes/tiny_cpu.yaml

It takes what Trainer has a place for: model, data, batch sizes, AdamW and its schedule, clipping,
weights of losses, balance of experts, steps, checkpoints. Trainer draws the samples in an order of
its own, from all datasets alike. Muon, guards, mixtures, meshes, batch growth and resuming at the
exact sample are `motifarch train`'s.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from motifarch.data import collate
from motifarch.errors import UserError
from motifarch.models.motif import MotifForCausalLM
from motifarch.optim import update_expert_biases
from motifarch.parallel import launched_world_size
from motifarch.train.annealing import Annealing, set_expert_losses
from motifarch.train.inputs import open_inputs
from motifarch.train.learning_rate import decay_steps
from motifarch.train.read_recipe import read_recipe
from motifarch.train.recipe import Recipe
from motifarch.train.recipe_rules import check_recipe


class PackedTrainer(Trainer):
    """Counts a step's targets by `labels`, while the model takes the same tensor as
    `shift_labels`.

    Attributes:
        loss_weights: arguments of the model: weights of what its loss has besides the
            cross-entropy.
    """

    loss_weights: dict[str, float]

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a packed micro-batch; a sum over its targets divided by those of the whole
        step.
        """
        inputs = {k: v for k, v in inputs.items() if k != "labels"} | self.loss_weights
        return super().compute_loss(model, inputs, *args, **kwargs)


class AroundSteps(TrainerCallback):
    """What a step of `motifarch train` sets besides weights: the biases that experts are chosen by,
    noise on their scores, the factor of hyper-connections' outputs.
    """

    def __init__(self, model: MotifForCausalLM, recipe: Recipe, device: torch.device) -> None:
        self._experts = list(model.model.expert_layers().values())
        self._rate = recipe.experts.bias_rate
        self._annealing = Annealing(model, recipe, device)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first micro-batch."""
        self._annealing.set(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the last micro-batch's backward."""
        update_expert_biases(self._experts, rate=self._rate)


def with_labels(blocks: Sequence[Any]) -> dict[str, Any]:
    """A packed micro-batch (see `motifarch.data.collate`), with the targets under the name that
    Trainer counts by.
    """
    batch = collate(blocks)
    return batch | {"labels": batch["shift_labels"]}


def schedule(recipe: Recipe) -> dict[str, Any]:
    """Trainer's names for the recipe's schedule."""
    optim = recipe.optim
    common = {"warmup_steps": optim.warmup_steps}
    if optim.schedule == "constant":
        return common | {"lr_scheduler_type": "constant_with_warmup"}
    if optim.schedule == "cosine":
        ratio = {"min_lr_rate": optim.min_lr_ratio}
        return common | {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": ratio}
    if optim.decay_shape == "inverse_sqrt":
        raise UserError("optim.decay_shape is inverse_sqrt, which Trainer has not; use linear or cosine")
    decay = {
        "num_decay_steps": decay_steps(recipe),
        "decay_type": optim.decay_shape,
        "min_lr_ratio": optim.min_lr_ratio,
    }
    return common | {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": decay}


def build_trainer(recipe: Recipe, **arguments: Any) -> Trainer:
    """The Trainer of a recipe, ready to train.

    Args:
        recipe: checked already.
        **arguments: trainingArguments that take precedence.

    Raises:
        UserError: the recipe asks for what Trainer can't do, or names data that is not there.
    """
    optim, batch, world = recipe.optim, recipe.batch, launched_world_size()
    if optim.name != "adamw":
        raise UserError(f"optim.name is {optim.name}; with Trainer it must be adamw (motifarch train has muon)")
    if recipe.lora.rank:
        raise UserError(f"lora.rank is {recipe.lora.rank}; with Trainer it must be 0 (motifarch train has adapters)")
    if batch.size % (batch.micro_size * world):
        raise UserError(
            f"batch.size is {batch.size}, which {world} processes with batch.micro_size {batch.micro_size} can't make "
            f"in whole micro-batches; use a multiple of {batch.micro_size * world}"
        )
    inputs = open_inputs(recipe)
    set_seed(recipe.run.seed)
    model = MotifForCausalLM(inputs.model_config)
    set_expert_losses(model, recipe, inputs.seq_len)
    options: dict[str, Any] = {
        "output_dir": recipe.run.output,
        "max_steps": recipe.run.steps,
        "seed": recipe.run.seed,
        "per_device_train_batch_size": batch.micro_size,
        "gradient_accumulation_steps": batch.size // (batch.micro_size * world),
        "learning_rate": optim.lr,
        "adam_beta1": optim.betas[0],
        "adam_beta2": optim.betas[1],
        "adam_epsilon": optim.eps,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.clip or 0.0,
        "logging_steps": recipe.log.every,
        "save_steps": recipe.checkpoint.every,
        "save_total_limit": recipe.checkpoint.keep_last or None,
        "report_to": ["tensorboard"] if recipe.log.tensorboard else [],
        # The samples are blocks of tokens, without columns to choose from.
        "remove_unused_columns": False,
        **schedule(recipe),
    }
    args = TrainingArguments(**(options | arguments))
    trainer = PackedTrainer(
        model=model,
        args=args,
        train_dataset=ConcatDataset(inputs.training),  # type: ignore[arg-type]
        data_collator=with_labels,
        callbacks=[AroundSteps(model, recipe, args.device)],
    )
    trainer.loss_weights = {"z_loss_weight": optim.z_loss, "mtp_loss_weight": optim.mtp_loss}
    return trainer


def main(argv: Sequence[str]) -> None:
    """Trains as a recipe says, from the newest of Trainer's checkpoints where there is one."""
    recipe = read_recipe(argv)
    check_recipe(recipe, launched_world_size())
    trainer = build_trainer(recipe)
    trainer.train(resume_from_checkpoint=any(Path(recipe.run.output).glob("checkpoint-*")))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
