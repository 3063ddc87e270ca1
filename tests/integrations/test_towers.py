"""Models with a language model and towers: the language model is patched."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from helpers.host_models import host_config, moved, token_ids, uneven
from motifarch.integrations import load_patched, patch

pytestmark = pytest.mark.slow
IMAGE = 60
"""The id of a token that stands for a part of an image."""


def exaone(**options: Any) -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 4, "num_key_value_heads": 2}
    text = host_config("exaone4").to_dict()
    vision |= {"out_hidden_size": text["hidden_size"], "patch_size": 4, "fullatt_block_indexes": [0]}
    ids = {"image_token_id": IMAGE, "video_token_id": IMAGE - 1}
    config = AutoConfig.for_model("exaone4_5", text_config=text, vision_config=vision, **ids)
    torch.manual_seed(0)
    return uneven(AutoModelForImageTextToText.from_config(config).eval())


def test_the_language_model_of_exaone_4_5_is_patched(tmp_path: Path) -> None:
    host, model = exaone(), exaone()
    report = patch(model, ratio=5)
    assert report.exact
    assert [m.name for m in report if m.what == "as it was"] == ["model.visual"]
    ids = token_ids(2, 17).clamp(max=50)
    image = {"image_grid_thw": torch.tensor([[1, 4, 4]]), "pixel_values": torch.randn(16, 3 * 2 * 4 * 4)}
    with_image = torch.cat((ids[:1, :5], torch.full((1, 4), IMAGE), ids[:1, 5:]), dim=1)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, host(ids).logits, atol=1e-5, rtol=1e-5)
        expected = host(with_image, **image).logits
        torch.testing.assert_close(model(with_image, **image).logits, expected, atol=1e-5, rtol=1e-5)
    moved(model).save_pretrained(tmp_path)
    loaded = load_patched(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(loaded(with_image, **image).logits, model(with_image, **image).logits)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **options), model.generate(ids, **options))
    with pytest.raises(Exception, match=r"patched by motifarch|num_hidden_layers"):
        type(host).from_pretrained(tmp_path)
