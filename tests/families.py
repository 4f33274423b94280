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

QWEN3_CODER = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' + (messages[0].content + '\n\n' if messages[0].role == 'system' else '') }}
    {%- for tool in tools %}
        {{- '<function>\n<name>' + tool.function.name + '</name>\n<description>' }}
        {{- (tool.function.description | trim) + '</description>\n' }}
        {{- (tool.function.parameters | tojson) + '\n</function>\n' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for m in messages if m.role != 'system' %}
    {%- if m.role == 'tool' %}
        {{- '<|im_start|>user' if loop.previtem.role != 'tool' }}
        {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\n' + (m.content | trim) }}
        {%- for call in m.tool_calls or [] %}
            {{- '\n' if not loop.first or m.content }}
            {{- '<tool_call>\n<function=' + call.function.name + '>\n' }}
            {%- for key, value in call.function.arguments | items %}
                {%- set json = value is mapping or (value is sequence and value is not string) %}
                {{- '<parameter=' + key + '>\n' + ((value | tojson) if json else (value | string)) }}
                {{- '\n</parameter>\n' }}
            {%- endfor %}
            {{- '</function>\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}"""
"""Qwen3-Coder: ChatML. Arguments stand between tags as texts, which nothing escapes; only lists and objects are JSON, a
boolean is Python's ``True``. Contents are trimmed."""

QWEN35 = (
    QWEN3_CODER.replace(
        "{%- for m in messages if m.role != 'system' %}",
        """{%- set asked = namespace(at=0) %}
{%- for m in messages if m.role != 'system' %}{% if m.role == 'user' %}{% set asked.at = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages if m.role != 'system' %}""",
    )
    .replace(
        "'\\n' + (m.content | trim) }}",
        """'\\n' }}
        {%- set thought, said = '', m.content | trim %}
        {%- if '</think>' in said %}
            {%- set thought = (said.split('</think>')[0].split('<think>')[-1]) | trim %}
            {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<think>\\n' + thought + '\\n</think>\\n\\n' if m.role == 'assistant' and loop.index0 > asked.at }}
        {{- said }}""",
    )
    .replace("loop.first or m.content else", "loop.first or said else")
    .replace(
        "'<|im_start|>assistant\\n' if add_generation_prompt }}",
        """'<|im_start|>assistant\\n' if add_generation_prompt }}
{%- if add_generation_prompt %}
    {{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking else '<think>\\n' }}
{%- endif %}""",
    )
)
"""Qwen3.5 and 3.6: calls as Qwen3-Coder's. The template opens a thought, or with enable_thinking=false an empty one,
drops thoughts before the user's last message, and writes one, be it empty, into every later turn."""

GLM45 = r"""[gMASK]<sop>
{%- if tools %}
    {{- '<|system|>\nFunctions:\n' }}
    {%- for tool in tools %}{{ (tool | tojson) + '\n' }}{% endfor %}
{%- endif %}
{%- set asked = namespace(at=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set asked.at = loop.index0 %}{% endif %}{% endfor %}
{%- set silent = enable_thinking is defined and not enable_thinking %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '<|observation|>' if loop.previtem.role != 'tool' }}
        {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
    {%- elif m.role == 'assistant' %}
        {%- set thought, said = '', m.content %}
        {%- if '</think>' in said %}
            {%- set thought = (said.split('</think>')[0].split('<think>')[-1]) | trim %}
            {%- set said = said.split('</think>')[-1] %}
        {%- endif %}
        {{- '<|assistant|>\n<think>' + (thought if loop.index0 > asked.at else '') + '</think>' }}
        {{- '\n' + (said | trim) if said | trim }}
        {%- for call in m.tool_calls or [] %}
            {{- '\n<tool_call>' + call.function.name + '\n' }}
            {%- for key, value in call.function.arguments.items() %}
                {{- '<arg_key>' + key + '</arg_key>\n<arg_value>' }}
                {{- (value if value is string else (value | tojson)) + '</arg_value>\n' }}
            {%- endfor %}
            {{- '</tool_call>' }}
        {%- endfor %}
    {%- else %}
        {{- '<|' + m.role + '|>\n' + m.content + ('/nothink' if silent and m.role == 'user' else '') }}
    {%- endif %}
{%- endfor %}
{{- '<|assistant|>' + ('\n<think></think>' if silent else '') if add_generation_prompt }}"""
"""GLM-4.5 and 4.6: no token ends a message, the next role does: a call ends with <|observation|>, what the user answers
with <|user|>. Every turn of the history has a thought, be it empty; enable_thinking=false tells so in the user's
message and in the turn. Arguments stand between tags, texts as they are, others as JSON."""

GPT_OSS = r"""{{- '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}
{{- '<|start|>developer<|message|>' + (messages[0].content + '\n\n' if messages[0].role == 'system' else '') }}
{%- for tool in tools or [] %}
    {{- '// ' + tool.function.description + '\ntype ' + tool.function.name + ' = (_: {' }}
    {%- for key, of in (tool.function.parameters.properties or {}) | items %}
        {{- '\n// ' + (of.description or '') + '\n' + key + ': ' + (of.type or 'any') | string }}
    {%- endfor %}
    {{- '}) => any;\n' }}
{%- endfor %}
{{- '<|end|>' }}
{%- set last = namespace(call='') %}
{%- for m in rest %}
    {%- if m.role == 'assistant' and 'tool_calls' in m %}
        {%- set call = m.tool_calls[0].function %}
        {%- set last.call = call.name %}
        {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.content + '<|end|>' if m.content }}
        {{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
        {{- (call.arguments | tojson) + '<|call|>' }}
    {%- elif m.role == 'assistant' %}
        {%- if '<|channel|>' in m.content %}{{ raise_exception('thoughts have a field of their own') }}{% endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
        {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
    {%- elif m.role == 'tool' %}
        {%- if not last.call %}{{ raise_exception('a result without a call') }}{% endif %}
        {{- '<|start|>functions.' + last.call + ' to=assistant<|channel|>commentary<|message|>' }}
        {{- (m.content | tojson) + '<|end|>' }}
    {%- else %}
        {{- '<|start|>user<|message|>' + m.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{{- '<|start|>assistant' if add_generation_prompt }}"""
"""gpt-oss (harmony): thoughts and answers are messages of channels; a call is a message to its function and ends with
<|call|>, an answer with <|return|>, but in the history with <|end|>. One call a turn: others are left out. Results are
JSON strings, and go by the name of the last call."""

_DEEPSEEK_BODY = r"""{{- bos_token }}
{%- for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}
{%- if tools %}
    {{- '\n\n## Tools\n' }}
    {%- for tool in tools %}{{ (tool | tojson) + '\n' }}{% endfor %}
{%- endif %}
{%- set last = namespace(role='') %}
{%- for m in messages if m.role != 'system' %}
    {%- if m.role == 'user' %}
        {{- '<｜User｜>' + m.content }}
    {%- elif m.role == 'tool' %}
        {{- outputs_begin if last.role != 'tool' }}
        {{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
    {%- else %}
        {{- outputs_end if last.role == 'tool' }}
        {{- '<｜Assistant｜>' + no_thought if last.role == 'user' }}
        {{- m.content.split('</think>')[-1] }}
        {%- if m.tool_calls %}
            {{- '<｜tool▁calls▁begin｜>' }}
            {%- for call in m.tool_calls %}
                {{- between if not loop.first }}
                {{- '<｜tool▁call▁begin｜>' + CALL + '<｜tool▁call▁end｜>' }}
            {%- endfor %}
            {{- '<｜tool▁calls▁end｜>' }}
        {%- endif %}
        {{- '<｜end▁of▁sentence｜>' }}
    {%- endif %}
    {%- set last.role = m.role %}
{%- endfor %}
{{- outputs_end if last.role == 'tool' }}
{%- if add_generation_prompt and last.role == 'user' %}{{ '<｜Assistant｜>' + opening }}{% endif %}"""

DEEPSEEK_V3 = r"""{%- set no_thought, opening, between = '', '', '\n' %}
{%- set outputs_begin, outputs_end
    = '<｜tool▁outputs▁begin｜>', '<｜tool▁outputs▁end｜>' %}""" + _DEEPSEEK_BODY.replace(
    "CALL",
    r"'function<｜tool▁sep｜>' + call.function.name + '\n```json\n' + call.function.arguments + '\n```'",
)
"""DeepSeek-V3 with the tools shown: arguments are JSON, already a text, in a fence. No role opens the turn after a
result. (The released template shows no tools, and leaves out how a second turn of calls begins.)"""

DEEPSEEK_V31 = r"""{%- set thinking = enable_thinking is defined and enable_thinking %}
{%- set no_thought, opening, between = '</think>', '<think>' if thinking else '</think>', '' %}
{%- set outputs_begin, outputs_end = '', '' %}""" + _DEEPSEEK_BODY.replace(
    "CALL", "call.function.name + '<｜tool▁sep｜>' + call.function.arguments"
)
"""DeepSeek-V3.1: as V3 without the fence. </think> alone opens a turn that shall not think; none opens a turn after a
result."""

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
GLM_TOKENS = dict(
    eos_token="<|endoftext|>",
    extra_special_tokens=[
        "<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    ],
)  # fmt: skip
HARMONY = dict(
    eos_token="<|return|>",
    extra_special_tokens=[
        "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>",
        "<|endoftext|>",
    ],
)  # fmt: skip
DEEPSEEK = dict(
    bos_token="<｜begin▁of▁sentence｜>", eos_token="<｜end▁of▁sentence｜>",
    extra_special_tokens=["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
)  # fmt: skip
_TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
PLAIN_TOKENS = {
    "<|im_end|>": _TAGS,
    "<|endoftext|>": [*_TAGS, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"],
    "<｜end▁of▁sentence｜>": [
        "<think>", "</think>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁sep｜>",
        *(f"<｜tool▁{what}▁{side}｜>" for what in ("calls", "call", "outputs", "output") for side in ("begin", "end")),
    ],
}  # fmt: skip
"""In these vocabularies tokens of their own, but not special ones; by the token that ends a text."""
FAMILIES = {
    "qwen2.5": (QWEN25, CHATML),
    "qwen3": (QWEN3, CHATML),
    "qwen3-thinking": (QWEN3_THINKING, CHATML),
    "llama3.1": (LLAMA31, HEADERS),
    "llama3.2": (LLAMA32, HEADERS),
    "qwen3-coder": (QWEN3_CODER, CHATML),
    "qwen3.5": (QWEN35, CHATML),
    "glm4.5": (GLM45, GLM_TOKENS),
    "gpt-oss": (GPT_OSS, HARMONY),
    "deepseek-v3": (DEEPSEEK_V3, DEEPSEEK),
    "deepseek-v3.1": (DEEPSEEK_V31, DEEPSEEK),
}


@cache
def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the family's special tokens and template."""
    return small_tokenizer(*FAMILIES[family])


def small_tokenizer(template: str, special: dict) -> PreTrainedTokenizerFast:
    """Byte-level BPE with special tokens and a template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(["search for the query and answer it: who wrote what, where and when"] * 3, trainer)
    tags = PLAIN_TOKENS.get(special["eos_token"], ())
    core.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    core.add_special_tokens([AddedToken(token, normalized=False) for token in special["extra_special_tokens"]])
    if "bos_token" in special:  # tokenising adds it, the template writes it: a prompt must not have both
        bos = special["bos_token"]
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **special)
