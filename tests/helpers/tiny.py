"""A recipe and prepared data small enough to train in seconds."""

import json
import random
from pathlib import Path
from typing import Any

import yaml

from motifarch.data.prepare import main as prepare

RECIPE = {
    "model": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_noise_heads": 2,
        "num_key_value_heads": 4,
        "head_dim": 8,
    },
    "batch": {"size": 8, "micro_size": 4},
    "optim": {"lr": 3e-3, "schedule": "constant", "warmup_steps": 5, "z_loss": 1e-4},
    "precision": {"compute": "float32"},
    "checkpoint": {"every": 10},
    "validation": {"every": 20, "sequences": 10},
    "log": {"every": 5, "tensorboard": False},
}

MOTIF_3 = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "attention_type": "gdla",
    "attention_gate": True,
    "num_attention_heads": 6,
    "num_noise_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "sliding_window": 8,
    "use_sliding_window": True,
    "sliding_window_period": 2,
    "num_experts": 6,
    "experts_top_k": 2,
    "moe_intermediate_size": 16,
    "n_dense_first_layers": 1,
    "route_scale": 2.0,
    "polynorm_sigmoid_weight": True,
    "polynorm_output_scale": 0.5,
    "polynorm_bias_clamp": 0.5,
    "mhc_enabled": True,
    "mhc_expansion_rate": 2,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
}
"""The model section of a recipe with all that Motif-3 has."""

SHORT_RUN = ("--run.steps", "4", "--checkpoint.every", "2", "--optim.warmup_steps", "1", "--validation.every", "0")
"""Options of a run of 4 steps with two checkpoints."""


def prepare_text(folder: Path, seed: int = 0, seq_len: int = 32) -> Path:
    """Prepares documents of random length, so that ranks hold different numbers of targets."""
    draw = random.Random(seed)
    source = folder / f"source{seed}"
    source.mkdir()
    words = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "(", ")", "=", "\n"]
    for i in range(30):
        text = " ".join(draw.choice(words) for _ in range(draw.randint(20, 300)))
        (source / f"{i}.txt").write_text(f"{i} {text}\n")
    output = folder / f"data{seed}"
    arguments = {"source": f"files:{source}/*.txt", "output": output, "vocab-size": 300, "seq-len": seq_len}
    options = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    assert prepare([*options, "--validation-fraction", "0.2", "--num-proc", "1"]) in (0, None)
    return output


CHAT = (Path(__file__).parents[2] / "recipes/sft/chat.jinja").read_text()
"""A chat template with generation marks."""


def write_conversations(path: Path, count: int = 60, seed: int = 0) -> list[list[dict[str, Any]]]:
    """Writes conversations of one to three turns and very different lengths as JSON lines."""
    draw = random.Random(seed)
    words = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "한글", "(", ")", "="]

    def say(role: str, most: int) -> dict[str, Any]:
        return {"role": role, "content": " ".join(draw.choice(words) for _ in range(draw.randint(1, most)))}

    conversations = [
        [say(role, 6) for _ in range(draw.randint(1, 3)) for role in ("user", "assistant")] for _ in range(count)
    ]
    path.write_text("".join(json.dumps({"messages": c}, ensure_ascii=False) + "\n" for c in conversations))
    return conversations


def prepare_conversations(folder: Path, tokenizer: Path, seq_len: int = 64) -> Path:
    """Prepares conversations with a loss mask, by a tokenizer that is there."""
    write_conversations(folder / "chats.jsonl", count=200)
    (folder / "chat.jinja").write_text(CHAT)
    arguments = {"source": f"files:{folder}/chats.jsonl", "tokenizer": tokenizer, "seq-len": seq_len}
    arguments |= {"chat-template": folder / "chat.jinja", "output": folder / "chats"}
    options = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    assert prepare(["--messages", *options, "--validation-fraction", "0.2", "--num-proc", "1"]) == 0
    return folder / "chats"


def write_recipe(folder: Path, data: Path, **sections: Any) -> Path:
    """Writes a recipe of 40 steps on prepared data, whose run goes into `folder / "run"`; sections
    take the place of RECIPE's.
    """
    path = folder / "tiny.yaml"
    own = {"run": {"steps": 40, "output": str(folder / "run")}, "data": {"datasets": [{"path": str(data)}]}}
    path.write_text(yaml.safe_dump(own | RECIPE | sections))
    return path
