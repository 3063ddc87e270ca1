"""Fine-tune an exported model on conversations, with TRL's SFTTrainer.

    motifarch export runs/tiny_cpu
    python examples/sft_trl.py runs/tiny_cpu/export CHATS.jsonl OUTPUT

A line of CHATS.jsonl holds one: {"messages": [{"role": "user", "content": "Hello"}, ...]}. They are
packed into rows without padding, do not see each other, and the loss is of the assistant's tokens.
"""

import sys

from datasets import load_dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import motifarch.models  # noqa: F401  # the Auto classes then know the Motif models

# For a tokenizer without a template. What is inside {% generation %} is learnt, its end included.
TEMPLATE = """
{%- for message in messages %}
    {{- message.role + ':\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + eos_token }}{% endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"""

folder, chats, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
tokenizer.chat_template = tokenizer.chat_template or TEMPLATE

arguments = SFTConfig(
    output_dir=output,
    assistant_only_loss=True,
    packing=True,
    max_length=256,
    max_steps=20,
    per_device_train_batch_size=4,
    learning_rate=1e-3,
    logging_steps=5,
    save_strategy="no",
    report_to="none",
    use_cpu=True,  # leave this and the next line out on a GPU
    bf16=False,
)
data = load_dataset("json", data_files=chats, split="train")
trainer = SFTTrainer(folder, arguments, train_dataset=data, processing_class=tokenizer)
trainer.train()
trainer.save_model()  # a folder as `folder` is, tokenizer and chat template included
