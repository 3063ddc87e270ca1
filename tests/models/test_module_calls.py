"""Every parameter of a Motif model is used by calling its module, in all ways to run the model."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.models import VARIANTS, packed, random_ids, tiny_model
from helpers.module_calls import Run, assert_calls_are_enough, assert_hooks_take_effect, owners
from helpers.motif_3 import tiny_motif_3
from motifarch.layers import cross_entropy

OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {"hidden_act": "poly_norm"},
    "normed": {"qk_norm": True, "hidden_act": "silu", "use_bias": True},
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of them in a batch of a few tokens."""
    monkeypatch.setattr(cross_entropy, "_CHUNK_TOKENS", (7, 7))
    monkeypatch.setattr(cross_entropy, "_FLOAT32_ELEMENTS", 1)


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def everything(model: Any, **words: int) -> Run:
    """Logits of a batch, of a padded one, of packed documents and of a token after a cache; the
    loss in evaluation and in training, and the embedding's gradient.
    """
    ids, mask, embedding = (
        random_ids(2, 12, **words),
        torch.ones(2, 12, dtype=torch.long),
        model.model.embed_tokens.weight,
    )
    mask[1, :3] = 0

    def run() -> list[Tensor]:
        with torch.no_grad():
            whole = model.eval()(input_ids=ids, labels=ids, use_cache=True)
            padded = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
            documents = model(**packed([ids[0], ids[1, :5]])).logits
            next_token = model(input_ids=ids[:, :1], past_key_values=whole.past_key_values).logits
        embedding.grad = None
        trained = model.train()(input_ids=ids, labels=ids)
        trained.loss.backward()
        loss = trained.loss - sum(t for t in (trained.mtp_loss, trained.expert_loss) if t is not None)
        for value in (loss, whole.loss):
            torch.testing.assert_close(value, loss_of(whole.logits, ids))
        return [whole.logits, padded, documents, next_token, loss.detach(), embedding.grad]

    return run


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_module_is_called_and_none_is_read(variant: str, options: str) -> None:
    model = tiny_model(variant, num_hidden_layers=1, initializer_range=0.2, **OPTIONS[options])
    assert_hooks_take_effect(model, everything(model))
    assert_calls_are_enough(model, everything(model))


@pytest.mark.slow
def test_every_module_of_motif_3_is_called_and_none_is_read() -> None:
    """Latent attention, experts and hyper-connections; what is predicted after the next token."""
    model = tiny_motif_3(dtype=torch.float32, num_hidden_layers=2)
    ids, run = random_ids(2, 12, vocab_size=61), everything(model, vocab_size=61)

    def run_mtp() -> list[Tensor]:
        with torch.no_grad():
            return [model.eval()(ids, return_mtp_logits=True).mtp_logits, model.train()(ids, labels=ids).loss]

    of_mtp = [name for name in owners(model) if ".mtp_layers." in name]
    # The first mixes streams that are equal, and mixing changes no mean, which follows the last.
    mixes = ["model.layers.0.mhc_attn.proj_res", "model.layers.1.mhc_ffn.proj_res"]
    without = {*of_mtp, *mixes}
    assert_hooks_take_effect(model, run, [name for name in owners(model) if name not in without])
    assert_hooks_take_effect(model, run_mtp, of_mtp)
    assert_calls_are_enough(model, lambda: run() + run_mtp())


class TwoLayerHead(nn.Module):
    """A head that has no weight of its own, and dropout."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, words))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def test_another_head_is_trained_by_the_loss_of_its_logits() -> None:
    model, ids = tiny_model("gda").train(), random_ids(2, 12)
    model.lm_head = TwoLayerHead(97)
    out = model(input_ids=ids, labels=ids, return_logits=True)
    torch.testing.assert_close(out.loss, loss_of(out.logits, ids))  # the same dropout in both
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.lm_head.parameters())


def test_gradients_under_float16_and_a_loss_scale_are_as_near_as_those_of_whole_logits() -> None:
    """What a GradScaler does: its factor comes after the loss. Here each token's gradient is far
    below float16's numbers without it.
    """
    model, ids, items, scale = tiny_model("gda", vocab_size=4096).train(), random_ids(2, 12), 3e5, 2.0**16

    def gradients(logits_loss: bool, dtype: torch.dtype | None) -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            if logits_loss:
                loss = loss_of(model(input_ids=ids).logits, ids) * (ids[:, 1:].numel() / items)
            else:
                loss = model(input_ids=ids, labels=ids, num_items_in_batch=items).loss
        (loss * scale).backward()
        return {n: p.grad.double() / scale for n, p in model.named_parameters()}

    exact, plain, found = gradients(True, None), gradients(True, torch.float16), gradients(False, torch.float16)
    for name in ("lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"):
        error, of_plain = ((g[name] - exact[name]).norm() / exact[name].norm() for g in (found, plain))
        assert error < 2 * of_plain + 1e-3, f"{name}: {error:.4f}, {of_plain:.4f} from whole logits"
