"""Continue training a Motif model on a text file, with transformers.Trainer.

    python examples/continue_with_trainer.py models/Motif-2.6B TEXT.txt OUTPUT
    python examples/continue_with_trainer.py runs/tiny_cpu/export TEXT.txt OUTPUT

The first folder is a released model's, the second what `motifarch export runs/tiny_cpu` writes.

`recipes/trainer/train.py` trains a whole recipe under Trainer, with packed documents.
"""

import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

import motifarch.models  # noqa: F401  # the Auto classes then know the Motif models

BLOCK = 64  # tokens of a training row

folder, text, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

ids = tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"]
rows = [ids[i : i + BLOCK] for i in range(0, len(ids) - BLOCK + 1, BLOCK)]
data = Dataset.from_dict({"input_ids": rows, "labels": rows})  # the model shifts the labels

arguments = TrainingArguments(
    output_dir=output,
    max_steps=20,
    per_device_train_batch_size=4,
    learning_rate=1e-3,
    logging_steps=5,
    save_strategy="no",
    report_to="none",
    use_cpu=True,  # leave this out on a GPU
)
trainer = Trainer(
    model=model,
    args=arguments,
    train_dataset=data,
    data_collator=default_data_collator,
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model(output)
