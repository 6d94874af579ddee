"""Chat templates of the kinds that Llama 3.1, Qwen3, Mistral and ChatML models have, and tokenizers for them."""

from __future__ import annotations

import copy

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# BOS, a header before each turn, tools before the first words of the user, calls as JSON, results under "ipython".
LLAMA31 = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set turns = messages[1:] %}
{%- else %}{% set system = '' %}{% set turns = messages %}{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none and tools is defined %}{{- "Environment: ipython\n" }}{% endif %}
{{- system + "<|eot_id|>" }}
{%- for m in turns %}
{%- if loop.first and tools is not none and tools is defined %}
{{- "<|start_header_id|>user<|end_header_id|>\n\nFunctions:\n" }}
{%- for t in tools %}{{- t | tojson }}{{- "\n" }}{% endfor %}{{- m.content | trim + "<|eot_id|>" }}
{%- elif m.tool_calls is defined %}
{%- set call = m.tool_calls[0].function %}
{{- "<|start_header_id|>assistant<|end_header_id|>\n\n" }}
{{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- "}<|eot_id|>" }}
{%- elif m.role == 'tool' %}
{{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}{{- m.content | tojson }}{{- "<|eot_id|>" }}
{%- else %}
{{- "<|start_header_id|>" + m.role + "<|end_header_id|>\n\n" + m.content | trim + "<|eot_id|>" }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start_header_id|>assistant<|end_header_id|>\n\n" }}{% endif %}"""

# Thoughts stand in turns after the last question only; there the last turn has them even if they are empty.
QWEN3 = """{%- if tools %}{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{% endif %}{{- "# Tools" }}
{%- for t in tools %}{{- "\n" }}{{- t | tojson }}{% endfor %}{{- "<|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- set content = m.content if m.content is string else '' %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>' + '\n' }}
{%- elif m.role == 'assistant' %}
{%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}{{- content }}{% endif %}
{%- if m.tool_calls %}
{%- for c in m.tool_calls %}
{%- if (loop.first and content) or not loop.first %}{{- '\n' }}{% endif %}
{%- set f = c.function if c.function else c %}
{{- '<tool_call>\n{"name": "' + f.name + '", "arguments": ' }}
{%- if f.arguments is string %}{{- f.arguments }}{% else %}{{- f.arguments | tojson }}{% endif %}
{{- '}\n</tool_call>' }}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""

# No generation prompt; the system text goes into the first turn of the user; an answer ends with EOS.
MISTRAL = """{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- for m in messages %}
{%- if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}
{%- elif m.role == 'user' %}
{%- if tools is defined and tools is not none and loop.index0 < 2 %}
{{- '[AVAILABLE_TOOLS]' }}{{- tools | tojson }}{{- '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST]' + ns.system + m.content + '[/INST]' }}{% set ns.system = '' %}
{%- elif m.tool_calls is defined %}
{{- '[TOOL_CALLS]' }}{% for c in m.tool_calls %}{{- c.function | tojson }}{% endfor %}{{- eos_token }}
{%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}
{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}
{%- else %}{{- raise_exception('unknown role') }}{% endif %}
{%- endfor %}"""

# Template, BOS, EOS, the other control tokens.
KINDS = {
    "chatml": (CHATML, None, "<|im_end|>", ["<|im_start|>"]),
    "llama31": (LLAMA31, "<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "qwen3": (QWEN3, None, "<|im_end|>", ["<|im_start|>"]),
    "mistral": (MISTRAL, "<s>", "</s>", ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
                                         "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]),
}  # fmt: skip


def tokenizer_of(kind: str, pad_is_eos: bool = True) -> PreTrainedTokenizerFast:
    """Bytes and a few merges, and a template of that kind. Plain text gets a BOS where the kind has one."""
    template, bos, eos, more = KINDS[kind]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [token for token in (bos, eos, *more) if token] + ["<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(["what is good", "another answer, another hat: understand?"] * 20, trainer)
    if bos is not None:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=eos if pad_is_eos else "<pad>",
        additional_special_tokens=more,
    )  # fmt: skip
    tokenizer.chat_template = template
    return copy.deepcopy(tokenizer)
