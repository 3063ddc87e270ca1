"""TRL's trainers and PEFT's adapters, given a folder's path or a model."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from helpers.chats import CHATS, chat_tokenizer, encoded, log_probabilities, mean_loss
from helpers.host_models import RATIOS, host_model, moved
from helpers.models import tiny_model
from helpers.python_process import run_python
from motifarch.integrations import patch
from motifarch.portable import add_code

MESSAGES = Dataset.from_list([{"messages": chat} for chat in CHATS])

# How a batch of conversations is laid out.
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 40},
}

# Motif, and patched hosts, one of which multiplies its logits: TRL reads that from its config.
MODELS = ["motif", "llama", "hyperclovax"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Saves a model and its tokenizer, once."""
    made: dict[str, str] = {}

    def save(name: str) -> str:
        if name not in made:
            made[name] = str(tmp_path_factory.mktemp(name))
            model: Any = tiny_model("gda window") if name == "motif" else host_model(name)
            if name != "motif":
                patch(model, ratio=RATIOS[name])
                moved(model)
            model.save_pretrained(made[name])
            chat_tokenizer().save_pretrained(made[name])
        return made[name]

    return save


def options(kind: Any, output: Path, **more: Any) -> Any:
    """For a few steps on a CPU, each on all that there is."""
    common: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": len(CHATS),
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return kind(str(output), **(common | more))


def loss_of_first_batch(trainer: Any) -> torch.Tensor:
    return trainer.compute_loss(trainer.model.train(), next(iter(trainer.get_train_dataloader())))


def logged_losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapter() -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(encoded(CHATS[1])[0][None]).logits


# Supervised fine-tuning


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_trained_on_what_the_assistant_wrote(layout, name, folder_of, tmp_path):
    folder = folder_of(name)
    arguments = options(SFTConfig, tmp_path, assistant_only_loss=True, **LAYOUTS[layout])
    trainer = SFTTrainer(folder, arguments, train_dataset=MESSAGES)
    alone = AutoModelForCausalLM.from_pretrained(folder)
    assert type(trainer.model) is type(alone)
    loss, expected = loss_of_first_batch(trainer), mean_loss(alone, assistant_only=True)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for (key, parameter), other in zip(trainer.model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-5, msg=key)
    trainer.train()
    first, *_, last = logged_losses(trainer)
    assert last < first
    trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(saved), logits(trainer.model))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_trained_on_all_tokens(name, folder_of, tmp_path):
    model, alone = (AutoModelForCausalLM.from_pretrained(folder_of(name)) for _ in range(2))
    trainer = SFTTrainer(model, options(SFTConfig, tmp_path), train_dataset=MESSAGES, processing_class=chat_tokenizer())
    torch.testing.assert_close(loss_of_first_batch(trainer), mean_loss(alone, assistant_only=False))
    trainer.train()
    first, *_, last = logged_losses(trainer)
    assert last < first


# Adapters


@pytest.mark.parametrize("name", ["motif", "llama"])
def test_an_adapter_is_trained_saved_loaded_and_merged(name, folder_of, tmp_path):
    folder = folder_of(name)
    arguments = options(SFTConfig, tmp_path / "adapter", packing=True, max_length=40, assistant_only_loss=True)
    trainer = SFTTrainer(folder, arguments, train_dataset=MESSAGES, peft_config=adapter())
    trainer.train()
    first, *_, last = logged_losses(trainer)
    assert last < first
    trainer.save_model()
    base, trained = logits(AutoModelForCausalLM.from_pretrained(folder)), logits(trainer.model)
    assert not torch.allclose(trained, base, atol=1e-2)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), trained)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), trained)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), trained, atol=1e-4, rtol=1e-4)
    with trainer.model.disable_adapter():
        torch.testing.assert_close(logits(trainer.model), base)


# Preference optimisation


def preferences() -> Dataset:
    """The right answer before one that is wrong and of another length."""
    wrong = {"role": "assistant", "content": "what is 9 + 9"}
    rows = [{"prompt": chat[:1], "chosen": chat[1:2], "rejected": [wrong]} for chat in CHATS]
    return Dataset.from_list(rows)


def preference_loss(model: Any, reference: Any, beta: float) -> torch.Tensor:
    """DPO's (arXiv 2305.18290, equation 7), by one sequence after another."""
    losses = []
    for row in preferences():
        margin = torch.zeros(())
        for sign, answer in ((1, row["chosen"]), (-1, row["rejected"])):
            ids, written = encoded(row["prompt"] + answer)
            ratio = log_probabilities(model, ids) - log_probabilities(reference, ids).detach()
            margin = margin + sign * ratio[written[1:]].sum()
        losses.append(-F.logsigmoid(beta * margin))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapter"])
@pytest.mark.parametrize("name", ["motif", "llama"])
def test_a_folder_is_trained_on_preferences(name, adapted, folder_of, tmp_path):
    folder = folder_of(name)
    arguments, lora = options(DPOConfig, tmp_path, beta=0.5), adapter() if adapted else None
    trainer = DPOTrainer(folder, args=arguments, train_dataset=preferences(), peft_config=lora)
    torch.testing.assert_close(loss_of_first_batch(trainer), torch.tensor(math.log(2)))
    trainer.train()
    first, *_, last = logged_losses(trainer)
    assert last < first
    reference = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = preference_loss(trainer.model, reference, 0.5)
        torch.testing.assert_close(loss_of_first_batch(trainer), expected, atol=1e-4, rtol=1e-4)


# A folder with the code in it, where motifarch is not installed

WITHOUT_MOTIFARCH = """
    import os, sys
    from pathlib import Path

    class Nothing:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("motifarch", "motif_kernels"):
                raise ModuleNotFoundError(f"no {name} here")

    sys.meta_path.insert(0, Nothing())
    folder, output, tests = sys.argv[1:]
    os.environ["HF_MODULES_CACHE"] = str(Path(output) / "modules")
    sys.path.insert(0, tests)
    import torch
    from datasets import Dataset
    from peft import AutoPeftModelForCausalLM, LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    from helpers.chats import CHATS, encoded

    options = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    options |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False, "trust_remote_code": True}
    packed = {"packing": True, "max_length": 40, "assistant_only_loss": True}
    chats = Dataset.from_list([{"messages": chat} for chat in CHATS])
    ids = encoded(CHATS[1])[0][None]

    trainer = SFTTrainer(folder, SFTConfig(f"{output}/whole", **options, **packed), train_dataset=chats)
    trainer.train()
    print("loss", trainer.state.log_history[0]["loss"])
    trainer.save_model()
    again = AutoModelForCausalLM.from_pretrained(f"{output}/whole", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, trainer.model.eval()(ids).logits)

    lora = LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = SFTConfig(f"{output}/adapter", **options, **packed)
    trainer = SFTTrainer(folder, arguments, train_dataset=chats, peft_config=lora)
    trainer.train()
    trainer.save_model()
    loaded = AutoPeftModelForCausalLM.from_pretrained(f"{output}/adapter", trust_remote_code=True).eval()
    with torch.no_grad():
        wanted = trainer.model.eval()(ids).logits
        torch.testing.assert_close(loaded(ids).logits, wanted)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, wanted, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(f"{output}/merged")

    pairs = [{"prompt": chat[:1], "chosen": chat[1:2], "rejected": CHATS[0][1:]} for chat in CHATS[1:]]
    trainer = DPOTrainer(folder, args=DPOConfig(f"{output}/dpo", **options), train_dataset=Dataset.from_list(pairs))
    trainer.train()
    print("preference loss", trainer.state.log_history[0]["loss"])
    assert not [name for name in sys.modules if name.partition(".")[0] in ("motifarch", "motif_kernels")]
"""


def test_a_folder_with_code_is_trained_where_motifarch_is_not_installed(tmp_path):
    model = tiny_model("gda window")
    model.save_pretrained(tmp_path / "model")
    chat_tokenizer().save_pretrained(tmp_path / "model")
    add_code(tmp_path / "model")
    tests = Path(__file__).parent.parent
    printed = run_python(WITHOUT_MOTIFARCH, tmp_path / "model", tmp_path / "out", tests)
    first, preference = (float(x) for x in re.findall(r"^(?:preference )?loss ([\d.]+)$", printed, re.MULTILINE))
    assert first == pytest.approx(float(mean_loss(model, assistant_only=True)), rel=1e-4)
    assert preference == pytest.approx(math.log(2), abs=1e-3)
    for name in ("whole", "merged"):  # with motifarch, the same folders load as its own classes
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name)) is type(model)
