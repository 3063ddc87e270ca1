"""Each head's largest logit, recorded by the layers for QK-clip."""

import pytest
import torch

from helpers.models import packed, random_ids, tiny_model


@pytest.mark.parametrize("variant", ["gda 4:1", "gda narrow", "diff_v1", "diff_v2 gated", "softmax", "gda window"])
def test_records_the_largest_over_calls_until_cleared(variant):
    """Against one head's logits, one by one; packed documents give what each gives alone."""
    model = tiny_model(variant, dtype=torch.float64).train()
    attention = model.model.layers[0].self_attn
    attention.record_max_logits = True
    documents = [random_ids(n, seed=n) for n in (12, 5)]
    with torch.no_grad():
        model(**packed(documents), use_cache=False)
        together, attention.max_logits = attention.max_logits, None
        for document in documents:
            model(input_ids=document[None], use_cache=False)
    for found, expected in zip(attention.max_logits, together, strict=True):
        if expected is None:
            assert variant == "softmax"
            assert found is None
            continue
        torch.testing.assert_close(found, expected)

    window = model.config.sliding_window if model.config.use_sliding_window else 99
    largest = -torch.inf
    for document in documents:
        captured = []
        attention.attention_hook = lambda inputs, batch, to=captured: to.append(inputs)
        with torch.no_grad():
            model(input_ids=document[None], use_cache=False)
        q, k = captured[0].q1, captured[0].k1
        for i in range(len(document)):
            for j in range(max(0, i + 1 - window), i + 1):
                largest = max(largest, float(q[0, i, 0] @ k[0, j, 0]) * model.config.head_dim**-0.5)
    assert float(together[0][0]) == pytest.approx(largest, abs=1e-5)


def test_nothing_is_recorded_unasked():
    model = tiny_model()
    first, second = (layer.self_attn for layer in model.model.layers)
    model.train()(input_ids=random_ids(1, 4))
    first.record_max_logits = True
    model.eval()(input_ids=random_ids(1, 4))
    assert first.max_logits is second.max_logits is None
