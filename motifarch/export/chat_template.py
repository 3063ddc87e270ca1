"""A chat template for tokenizers that have none: roles as words, an end of text after each answer.

A model that was pretrained on plain text has seen no such conversations. The template lets servers
take messages; fine-tuning on it, whose loss reads the ``generation`` marks, makes a chat model.
An answer begins on a line of its own: after a space, its first word would be another token in
training than after a prompt.
"""

from transformers import PreTrainedTokenizerBase

from motifarch.tokenizer.encoding import begin_tokens

_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- 'Assistant:\\n' -}}
{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{{- message['role'] | capitalize + ':\\n' + message['content'] + '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}
"""


def plain_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template for a tokenizer: it begins as a text of the tokenizer's does."""
    begin = tokenizer.convert_ids_to_tokens(begin_tokens(tokenizer))
    return "".join(f"{{{{- {token!r} -}}}}\n" for token in begin) + _TEMPLATE
