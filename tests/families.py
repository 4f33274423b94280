"""Small tokenizers and chat templates of our own in the formats of model families.

What a format fixes is theirs (special tokens, roles, where a call and its result stand, what is dropped from the
history); wording and code are ours. Each template's docstring names the quirks it has.
"""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_HERMES_BODY = r"""
{%- macro calls(m) %}
    {%- for call in m.tool_calls %}
        {{- ('\n' if not loop.first or m.content else '') + '<tool_call>\n{"name": "' + call.function.name }}
        {{- '", "arguments": ' + (call.function.arguments | tojson) + '}\n</tool_call>' }}
    {%- endfor %}
{%- endmacro %}
{%- macro results(m, before, after) %}
    {{- '<|im_start|>user' if before != 'tool' }}
    {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
    {{- '<|im_end|>\n' if after != 'tool' }}
{%- endmacro %}
"""

QWEN25 = (
    _HERMES_BODY
    + r"""
{%- set system = messages[0].content if messages[0].role == 'system' else 'You are a friendly model.' %}
{{- '<|im_start|>system\n' + system }}
{%- if tools %}
    {{- '\n\nTools, to be called as {"name", "arguments"} in <tool_call></tool_call>:' }}
    {%- for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for m in messages if m.role != 'system' %}
    {%- if m.role == 'tool' %}
        {{- results(m, loop.previtem.role, loop.nextitem.role if not loop.last) }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + calls(m) + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}"""
)
"""Qwen2.5: ChatML. A system message is invented where none is given; a call is JSON in <tool_call>; a result is a
user's message in <tool_response>, and results in a row share one message."""

QWEN3 = (
    _HERMES_BODY
    + r"""
{%- if tools or messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + (messages[0].content + '\n\n' if messages[0].role == 'system' else '') }}
    {%- for tool in tools %}{{ (tool | tojson) + '\n' }}{% endfor %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- set asked = namespace(at=0) %}
{%- for m in messages %}
    {%- if m.role == 'user' and not m.content.startswith('<tool_response>') %}
        {%- set asked.at = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- results(m, loop.previtem.role, loop.nextitem.role if not loop.last) }}
    {%- elif m.role == 'assistant' %}
        {%- set thought, said = '', m.content %}
        {%- if '</think>' in m.content %}
            {%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set said = m.content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > asked.at and (loop.last or thought) %}
            {{- '<think>\n' + thought + '\n</think>\n\n' }}
        {%- endif %}
        {{- said + calls(m) + '<|im_end|>\n' }}
    {%- elif m.role == 'user' or not loop.first %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {{- '<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking }}
{%- endif %}"""
)
"""Qwen3: as Qwen2.5, but thoughts are dropped from every turn before the user's last message (a hint after an invalid
turn is such a message), the last turn gets an empty thought if it has none, and enable_thinking=false opens a turn with
an empty thought."""

QWEN3_THINKING = QWEN3.replace(
    """{{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking }}""",
    """{{- '<think>\\n' }}""",
)
"""QwQ, Qwen3-Thinking-2507: the template opens the thought, so that a sampled turn has only its end."""

LLAMA31 = r"""{{- bos_token }}
{%- set system = messages[0].content | trim if messages[0].role == 'system' else '' %}
{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' + ('Environment: ipython\n' if tools) }}
{{- 'Today Date: ' + (date_string or '26 Jul 2024') + '\n\n' + system + '<|eot_id|>' }}
{%- for m in rest %}
    {%- set role = 'ipython' if m.role == 'tool' else m.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}
    {%- if m.tool_calls %}
        {%- if m.tool_calls | length > 1 %}{{ raise_exception('one call a turn') }}{% endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}' }}
    {%- elif role == 'ipython' %}
        {{- m.content | tojson }}
    {%- else %}
        {%- if loop.first and tools %}
            {{- 'Functions, to be called as {"name", "parameters"}:\n' }}
            {%- for tool in tools %}{{ (tool | tojson(indent=4)) + '\n\n' }}{% endfor %}
        {%- endif %}
        {{- m.content | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt }}"""
"""Llama 3.1: the template writes the start token itself, puts the tools into the first user message, trims contents,
writes calls as bare JSON with ``parameters``, and results as a JSON string in the role ipython. It ends every message
with <|eot_id|>; the model may end a call with <|eom_id|> and begin it with <|python_tag|>."""

LLAMA32 = LLAMA31.replace("(date_string or '26 Jul 2024')", "strftime_now('%d %b %Y')")
"""Llama 3.2: as 3.1, but the system message names today's date."""

CHATML = dict(
    eos_token="<|im_end|>", pad_token="<|endoftext|>",
    extra_special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
)  # fmt: skip
HEADERS = dict(
    bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
    extra_special_tokens=[
        "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>",
        "<|end_of_text|>",
    ],
)  # fmt: skip
FAMILIES = {
    "qwen2.5": (QWEN25, CHATML),
    "qwen3": (QWEN3, CHATML),
    "qwen3-thinking": (QWEN3_THINKING, CHATML),
    "llama3.1": (LLAMA31, HEADERS),
    "llama3.2": (LLAMA32, HEADERS),
}


@cache
def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the family's special tokens and template."""
    template, special = FAMILIES[family]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(["search for the query and answer it: who wrote what, where and when"] * 3, trainer)
    # In Qwen's vocabulary these are tokens of their own, but not special ones.
    tags = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
    core.add_tokens([AddedToken(tag, normalized=False) for tag in tags] if special is CHATML else [])
    core.add_special_tokens([AddedToken(token, normalized=False) for token in special["extra_special_tokens"]])
    if "bos_token" in special:  # tokenising adds it, the template writes it: a prompt must not have both
        bos = special["bos_token"]
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **special)
