"""Training on the assistant's tokens alone: the loss by hand, ranks that hold unequal numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.distributed import on_ranks
from helpers.fine_tuning import SEQ_LEN, fine_tune
from helpers.layouts import Case, train_cases
from helpers.sharded_training import CLIP, LR, Z_LOSS, build_model, train_sharded
from helpers.tiny import write_recipe
from motifarch.data import BatchSchedule, Block, Mixture, MixtureComponent, PackedDataset, collate
from motifarch.export import export
from motifarch.optim import build_adamw
from motifarch.parallel import Layout, Mesh, open_world, parallelize
from motifarch.train.checkpoint import TrainState
from motifarch.train.step import count_targets, train_step


def by_hand(model: torch.nn.Module, blocks: list[Block]) -> tuple[float, float, int]:
    """Loss, z-loss and targets in plain PyTorch: every document alone, its mask shifted."""
    losses, squares = [], []
    for block in blocks:
        bounds = np.cumsum(block.doc_lengths)[:-1]
        for ids, mask in zip(np.split(block.input_ids, bounds), np.split(block.loss_mask, bounds), strict=True):
            if mask[1:].any():
                tokens = torch.from_numpy(ids.astype(np.int64))
                logits = model(input_ids=tokens[None, :-1]).logits[0].double()
                trained = torch.from_numpy(mask[1:].copy())
                losses.append(torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")[trained])
                squares.append(logits.logsumexp(-1).square()[trained])
    loss = torch.cat(losses)
    return float(loss.mean()), float(Z_LOSS * torch.cat(squares).mean()), len(loss)


@pytest.mark.slow
def test_the_loss_is_the_mean_over_trained_tokens_of_all_ranks(chats: Path, tmp_path: Path) -> None:
    mixture = Mixture([MixtureComponent(PackedDataset.open(chats))], seed=0, batch_schedule=BatchSchedule(8))
    rows = [mixture.components[0].dataset[row] for _, row in mixture.global_batch(0)]
    halves = [count_targets([collate(rows[:4])]), count_targets([collate(rows[4:])])]
    assert halves[0] != halves[1]
    with torch.no_grad():
        loss, z_loss, targets = by_hand(build_model(), rows)  # type: ignore[arg-type]
    assert targets == sum(halves)
    histories, weights = [], []
    # One rank with a micro-batch of all rows, and two with several of one row each.
    for ranks, micro in ((1, 8), (2, 1)):
        on_ranks(ranks, train_sharded, chats, tmp_path / "out.pt", micro, {})
        history, after = torch.load(tmp_path / "out.pt")
        assert history[0][:2] == pytest.approx([loss, z_loss], rel=1e-5)
        histories.append(torch.tensor(history))
        weights.append(after)
    torch.testing.assert_close(*histories, rtol=1e-5, atol=1e-5)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-5, msg=name)


def test_a_block_without_a_trained_token_adds_nothing(chats: Path) -> None:
    block = PackedDataset.open(chats)[0]
    masked = Block(block.input_ids, block.doc_lengths, np.zeros(SEQ_LEN + 1, dtype=bool))
    gradients: list[dict[str, torch.Tensor]] = []
    with open_world() as world:
        for blocks in ([block], [block, masked]):
            model = parallelize(build_model().train(), Mesh("cpu", Layout().resolve(world.size)))
            state = TrainState(model, build_adamw(model, lr=LR))
            batches = [collate([b]) for b in blocks]
            targets = count_targets(batches)
            result = train_step(state, batches, world=world, targets=targets, lr=LR, clip=CLIP, z_loss_weight=Z_LOSS)
            weights = {k: v.full_tensor() for k, v in model.state_dict().items()}
            gradients.append(weights | {"norm": result.grad_norm, "loss": result.loss})
        # Alone it moves nothing either: no loss, no gradient, nothing that is not a number.
        model = parallelize(build_model().train(), Mesh("cpu", Layout().resolve(world.size)))
        state = TrainState(model, build_adamw(model, lr=LR, weight_decay=0.0))
        alone = train_step(state, [collate([masked])], world=world, targets=0, lr=LR, clip=CLIP, z_loss_weight=Z_LOSS)
        assert (alone.loss.item(), alone.grad_norm.item(), alone.skipped.item()) == (0, 0, 0)
        untouched = build_model().state_dict()
        for name, value in model.state_dict().items():
            assert torch.equal(value.full_tensor(), untouched[name]), name
    with torch.no_grad():
        loss, _, _ = by_hand(build_model(), [block])
    assert gradients[0]["loss"].item() == pytest.approx(loss, rel=1e-5)
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.slow
def test_fine_tuning_resumes_bitwise_and_exports(chats: Path, base: Path, data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, data)
    whole = fine_tune(2, recipe, tmp_path / "a" / "run", chats, base)
    fine_tune(2, recipe, tmp_path / "b" / "run", chats, base, "--run.steps", "4")
    resumed = fine_tune(2, recipe, tmp_path / "b" / "run", chats, base)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in whole]
    alone = fine_tune(1, recipe, tmp_path / "c" / "run", chats, base)
    assert [row["loss"] for row in alone] == pytest.approx([row["loss"] for row in whole], abs=1e-4)
    # What is counted are the trained tokens, the same for any number of ranks.
    assert [row["targets"] for row in alone] == [row["targets"] for row in whole]
    data_set = PackedDataset.open(chats)
    counts = [count_targets([collate([data_set[i]])]) for i in range(len(data_set))]
    assert 0 < whole[0]["targets"] <= sum(sorted(counts)[-8:]) < 8 * SEQ_LEN
    assert whole[-1]["validation_loss"] < whole[0]["loss"]

    folder = export(tmp_path / "a" / "run")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "alpha beta"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generate(**prompt, max_new_tokens=2, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.slow
def test_layouts_are_equal(chats: Path, tmp_path: Path) -> None:
    layouts = {"tensor 2": Layout(tensor=2), "context 2": Layout(context=2)}
    on_ranks(1, train_cases, chats, tmp_path / "one.pt", [Case("one", "gda", Layout(), steps=3)])
    cases = [Case(name, "gda", layout, steps=3) for name, layout in layouts.items()]
    on_ranks(2, train_cases, chats, tmp_path / "two.pt", cases)
    (expected,) = torch.load(tmp_path / "one.pt").values()
    for name, found in torch.load(tmp_path / "two.pt").items():
        for ours, theirs in zip(found[:2], expected[:2], strict=True):
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-5, msg=name)
