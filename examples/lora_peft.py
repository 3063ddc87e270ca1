"""Train a LoRA adapter of an exported model on a text file, with PEFT, and merge it.

    motifarch export runs/tiny_cpu
    python examples/lora_peft.py runs/tiny_cpu/export TEXT.txt OUTPUT

OUTPUT/adapter then holds the adapter alone, OUTPUT/merged a folder as the first is.
"""

import sys
from pathlib import Path

from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

import motifarch.models  # noqa: F401  # the Auto classes then know the Motif models

BLOCK = 64  # tokens of a training row

folder, text, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
ids = tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"]
rows = [ids[i : i + BLOCK] for i in range(0, len(ids) - BLOCK + 1, BLOCK)]
data = Dataset.from_dict({"input_ids": rows, "labels": rows})  # the model shifts the labels

base = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
# The projections of signal and noise heads, of keys and values, and the feed-forward blocks.
lora = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(base, lora)
model.print_trainable_parameters()

arguments = TrainingArguments(
    output_dir=output,
    max_steps=20,
    per_device_train_batch_size=4,
    learning_rate=1e-2,
    logging_steps=5,
    save_strategy="no",
    report_to="none",
    use_cpu=True,  # leave this out on a GPU
)
Trainer(model=model, args=arguments, train_dataset=data, data_collator=default_data_collator).train()
model.save_pretrained(f"{output}/adapter")

# Later: the adapter's config says which folder it belongs to.
loaded = AutoPeftModelForCausalLM.from_pretrained(f"{output}/adapter")
loaded.merge_and_unload().save_pretrained(f"{output}/merged")
tokenizer.save_pretrained(f"{output}/merged")
