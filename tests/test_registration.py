"""transformers' Auto classes know the Motif models, whichever of the two is imported first."""

import json

import pytest

from helpers.models import tiny_model
from helpers.python_process import run_python

IMPORTS = {
    # transformers imports its Auto modules lazily, and its model modules import them in turn.
    "motifarch first": "import motifarch\nfrom transformers import AutoModelForCausalLM",
    "motifarch, then a model": "import motifarch\nfrom transformers import LlamaForCausalLM",
    "transformers first": "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM\nimport motifarch",
    "transformers' name first": "import transformers, motifarch",
}

LOAD = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from motifarch.models.motif import MotifConfig, MotifForCausalLM, MotifModel

for folder in sys.argv[1:]:
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is MotifConfig, type(config)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is MotifForCausalLM, type(model)
    assert type(AutoModel.from_pretrained(folder)) is MotifModel
    assert type(AutoModelForCausalLM.from_config(config)) is MotifForCausalLM
    print(sum(p.double().sum().item() for p in model.parameters()))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same model saved twice: its config says "Motif", as the released files do, and
    "motif".
    """
    made = []
    for model_type in ("Motif", "motif"):
        folder = tmp_path_factory.mktemp("saved")
        tiny_model().save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == "Motif"
        config["model_type"] = model_type
        (folder / "config.json").write_text(json.dumps(config))
        made.append(folder)
    return made


@pytest.mark.parametrize("order", IMPORTS)
def test_saved_folders_load_through_the_auto_classes(folders, order):
    first, second = map(float, run_python(f"{IMPORTS[order]}\n{LOAD}", *folders).split())
    assert first == second == sum(p.double().sum().item() for p in tiny_model().parameters())


def test_motifarch_alone_is_enough():
    """Auto classes know the models by their name before any of motifarch's model modules is
    named.
    """
    out = run_python(
        """
        import motifarch
        from transformers import AutoConfig, AutoModelForCausalLM
        config = AutoConfig.for_model("motif", num_hidden_layers=1, hidden_size=32, intermediate_size=48,
            num_attention_heads=2, num_noise_heads=1, num_key_value_heads=2, head_dim=8, vocab_size=11)
        print(type(config).__name__, type(AutoModelForCausalLM.from_config(config)).__name__)
        """
    )
    assert out.split() == ["MotifConfig", "MotifForCausalLM"]
