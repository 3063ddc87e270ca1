"""Grouped differential attention in a Qwen3: patch, train a few steps, save, load.

    python examples/patch_qwen3.py [FOLDER]

Without FOLDER, a small Qwen3 with random weights stands in for a pretrained one.
"""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from motifarch.integrations import patch

torch.manual_seed(0)
if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)
else:
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
    )
    model = AutoModelForCausalLM.from_config(config)

ids = torch.randint(model.config.vocab_size, (4, 64))
with torch.no_grad():
    before = model(input_ids=ids).logits
print(patch(model, attention="gda", ratio=4))
with torch.no_grad():
    after = model(input_ids=ids).logits
print(f"logits moved by {(after - before).abs().max():.1e}")  # the same function: rounding alone

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(10):
    loss = model(input_ids=ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}  loss {loss.item():.3f} nats/token")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
print(f"loaded: {type(loaded).__name__}")
