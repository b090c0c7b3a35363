"""Chat templates of the supported families, as far as text turns go: the tool and image branches are left out.

For conversations of system, user and assistant turns they render what the published tokenizer configurations render,
including what makes them differ: default system prompts, trimming, folded or refused system turns, BOS.
"""

_ALTERNATE = (
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif %}"
)
_CHATML_TURNS = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

# HuggingFaceTB/SmolLM2-135M-Instruct
SMOLLM2 = (
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}{%- endif %}" + _CHATML_TURNS
)

# Qwen/Qwen2.5-7B-Instruct
QWEN2 = (
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. "
    "You are a helpful assistant.<|im_end|>\n' }}{%- endif %}" + _CHATML_TURNS
)

# meta-llama/Llama-3.1-8B-Instruct: always a system turn with two dates, contents trimmed
LLAMA31 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: ' }}"
    "{{- date_string + '\n\n' + system + '<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
    "{{- message.content | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)

_GEMMA_TURN = (
    _ALTERNATE + "{%- set role = 'model' if message.role == 'assistant' else message.role %}"
    "{{- '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}"
    "{{- message.content | trim + '<end_of_turn>\n' }}"
)
_GEMMA_END = "{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"

# google/gemma-2-9b-it: a system turn is refused
GEMMA2 = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}"
    "{%- endif %}{%- set prefix = '' %}{%- for message in messages %}" + _GEMMA_TURN + "{%- endfor %}" + _GEMMA_END
)

# google/gemma-3-1b-it: a system turn is folded into the first user turn
GEMMA3 = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{%- set prefix = messages[0].content + '\n\n' %}"
    "{%- set turns = messages[1:] %}{%- else %}{%- set prefix = '' %}{%- set turns = messages %}{%- endif %}"
    "{%- for message in turns %}" + _GEMMA_TURN + "{%- endfor %}" + _GEMMA_END
)

# mistralai/Mistral-7B-Instruct-v0.3: the system text stands in the last user turn, and only if no answer follows it
MISTRAL = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set turns = messages %}{%- endif %}{{- bos_token }}{%- for message in turns %}" + _ALTERNATE
    + "{%- if message.role == 'user' %}{%- if loop.last and system is defined %}"
    "{{- '[INST] ' + system + '\n\n' + message.content + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message.content + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message.content + eos_token }}{%- endif %}{%- endfor %}"
)

# Qwen/Qwen3-8B in outline: an empty reasoning block stands before the last answer, but not in the generation prompt
REASONING = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- message.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
