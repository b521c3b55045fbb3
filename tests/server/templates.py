"""Small chat templates with the rules of published ones: what they write, keep, leave out and refuse.

Those of the Qwen family are ChatML; QWEN3_NEXT and QWEN3 write calls as JSON between tags, QWEN3_CODER and
QWEN35 as tags, LLAMA31 as bare JSON.
"""

from __future__ import annotations

from collections.abc import Mapping

_LIST = """
{%- macro list_tools(system) %}
    {{- '<|im_start|>system\\n' ~ (system ~ '\\n\\n' if system else '') ~ '# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' ~ (tool | tojson) }}{% endfor %}
    {{- '\\n</tools>\\n' ~ HOW ~ '<|im_end|>\\n' }}
{%- endmacro %}
{%- set head = messages[0].content if messages and messages[0].role == 'system' else '' %}
"""
_JSON_CALL = """'<tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call>'"""
_TAG_CALL = (
    "'<tool_call>\\n<function=NAME>\\n<parameter=NAME>\\nVALUE\\n</parameter>\\n</function>\\n</tool_call>'"
)
_JSON_CALLS = """
{%- macro calls(m) %}
    {%- for call in m.tool_calls or [] %}
        {{- '\\n' if m.content or not loop.first }}
        {{- '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
        {%- set given = call.function.arguments %}
        {{- given if given is string else given | tojson }}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
{%- endmacro %}
"""
_TAG_CALLS = """
{%- macro calls(m) %}
    {%- for call in m.tool_calls or [] %}
        {{- '\\n\\n' if m.content and loop.first else '' if loop.first else '\\n' }}
        {{- '<tool_call>\\n<function=' ~ call.function.name ~ '>\\n' }}
        {%- for name, value in call.function.arguments | items %}
            {{- '<parameter=' ~ name ~ '>\\n' }}
            {{- value | tojson if value is mapping or value is sequence and value is not string else value }}
            {{- '\\n</parameter>\\n' }}
        {%- endfor %}
        {{- '</function>\\n</tool_call>' }}
    {%- endfor %}
{%- endmacro %}
"""
_RESULTS = """
{%- if tools %}{{- list_tools(head) }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' }}
        {{- '\\n<tool_response>\\n' ~ m.content ~ '\\n</tool_response>' }}
        {{- '<|im_end|>\\n' if loop.last or messages[loop.index0 + 1].role != 'tool' }}
"""
#: The thoughts of an answer are written only after the last question.
_LAST_QUERY = """
{%- set ns = namespace(query=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' and not m.content.startswith('<tool_response>') %}
        {%- set ns.query = loop.index0 %}
    {%- endif %}
{%- endfor %}
"""

_PLAIN_TURNS = (
    _RESULTS
    + """
    {%- elif not (tools and loop.first and m.role == 'system') %}
        {{- '<|im_start|>' ~ m.role ~ '\\n' ~ (m.content or '') ~ calls(m) ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
)
_THINKING_TURNS = (
    _RESULTS
    + """
    {%- elif m.role in ('system', 'user') %}
        {%- if not (tools and loop.first and m.role == 'system') %}
            {{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}
        {%- endif %}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.query and THINKS %}
            {{- '<think>\\n' ~ (m.reasoning_content or '').strip('\\n') ~ '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- m.content ~ calls(m) ~ '<|im_end|>\\n' }}
    {%- else %}{{- raise_exception('Unexpected message role.') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}
    {%- else %}{{- OPENED }}{% endif %}
{%- endif %}
"""
)

QWEN3_NEXT = _LIST.replace("HOW", _JSON_CALL) + _JSON_CALLS + _PLAIN_TURNS
QWEN3_CODER = _LIST.replace("HOW", _TAG_CALL) + _TAG_CALLS + _PLAIN_TURNS
QWEN3 = (
    _LIST.replace("HOW", _JSON_CALL)
    + _JSON_CALLS
    + _LAST_QUERY
    + _THINKING_TURNS.replace("THINKS", "(loop.last or m.reasoning_content)").replace("OPENED", "''")
)
QWEN35 = (
    _LIST.replace("HOW", _TAG_CALL)
    + _TAG_CALLS
    + _LAST_QUERY
    + """
{%- if ns.query < 0 %}{{- raise_exception('No user query found in messages.') }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'system' and not loop.first %}
        {{- raise_exception('System message must be at the beginning.') }}
    {%- endif %}
{%- endfor %}
"""
    + _THINKING_TURNS.replace("THINKS", "true").replace("OPENED", "'<think>\\n'")
)
LLAMA31 = """
{%- macro turn(role, text) %}
    {{- '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' ~ text ~ '<|eot_id|>' }}
{%- endmacro %}
{{- '<|begin_of_text|>' }}
{%- if messages[0].role == 'system' %}
    {%- set system, messages = messages[0].content | trim, messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- turn('system', system) }}
{%- if tools %}
    {%- if not messages %}{{- raise_exception('There is no first user message to put tools in') }}{% endif %}
    {%- set listed = tools | map('tojson') | join('\\n\\n') %}
    {%- set how = 'Call with {"name": function name, "parameters": dictionary of arguments}.\\n\\n' %}
    {{- turn('user', how ~ listed ~ '\\n\\n' ~ messages[0].content | trim) }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
    {%- if m.role in ('tool', 'ipython') %}{{- turn('ipython', m.content) }}
    {%- elif m.tool_calls %}
        {%- if m.tool_calls | length != 1 %}
            {{- raise_exception('This model only supports single tool-calls at once!') }}
        {%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {%- set given = call.arguments | tojson %}
        {{- turn('assistant', '{"name": "' ~ call.name ~ '", "parameters": ' ~ given ~ '}') }}
    {%- else %}{{- turn(m.role, m.content | trim) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
TEMPLATES: Mapping[str, str] = {
    "qwen3-next": QWEN3_NEXT,
    "qwen3-coder": QWEN3_CODER,
    "qwen3": QWEN3,
    "qwen3.5": QWEN35,
    "llama-3.1": LLAMA31,
}
