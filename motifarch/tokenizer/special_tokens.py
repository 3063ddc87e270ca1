"""Tokens that no text gives, and the chat template that uses some of them."""

from dataclasses import dataclass

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
BEGIN_OF_TEXT = "<|begin_of_text|>"
FILL_IN_THE_MIDDLE = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
TURN_BEGIN, TURN_END = "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a vocabulary, which get the first ids.

    Args:
        whole: whether there are more than an end of text and padding: a beginning of text, those of
            filling in the middle and of a chat's turns.
        reserved: how many more there are, for later use.
    """

    whole: bool = True
    reserved: int = 16

    @property
    def tokens(self) -> list[str]:
        """In the order of their ids."""
        found = [END_OF_TEXT, PAD]
        if self.whole:
            found += [BEGIN_OF_TEXT, *FILL_IN_THE_MIDDLE, TURN_BEGIN, TURN_END]
        return found + [f"<|reserved_{i}|>" for i in range(self.reserved)]

    @property
    def named(self) -> dict[str, str]:
        """By the names that transformers gives them."""
        named = {"eos_token": END_OF_TEXT, "pad_token": PAD}
        return named | {"bos_token": BEGIN_OF_TEXT} if self.whole else named


# What an assistant says is marked: its tokens alone are trained on. It ends as texts do, so that
# whatever generates stops there.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{{- '\\n' }}
{%- else %}
{{- message['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
