"""The Auto classes know the Motif models once motifarch.models is imported."""

import json

import pytest

from helpers.models import tiny_model
from helpers.python_process import run_python

IMPORTS = {
    "motifarch first": "import motifarch.models\nfrom transformers import AutoModelForCausalLM",
    "transformers first": "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM\n"
    "import motifarch.models",
    "the classes": "from motifarch.models.motif import MotifConfig",
}

LOAD = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

for folder in sys.argv[1:]:
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    from motifarch.models.motif import MotifConfig, MotifForCausalLM, MotifModel

    assert type(config) is MotifConfig, type(config)
    assert type(model) is MotifForCausalLM, type(model)
    assert type(AutoModel.from_pretrained(folder)) is MotifModel
    assert type(AutoModelForCausalLM.from_config(config)) is MotifForCausalLM
    print(sum(p.double().sum().item() for p in model.parameters()))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model twice: the config says "Motif", as the released files do, and "motif"."""
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


def test_importing_motifarch_alone_imports_nothing_else():
    out = run_python(
        """
        import sys
        import motifarch
        print([name for name in ("torch", "transformers", "motif_kernels") if name in sys.modules])
        """
    )
    assert out.strip() == "[]"
