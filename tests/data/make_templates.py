#!/usr/bin/env python3
"""Makes templates.json: chat templates in the style of well-known families, conversations, and what Jinja2 makes of them.

    python -m venv .venv && .venv/bin/pip install jinja2==3.1.6
    .venv/bin/python tests/data/make_templates.py

The environment is that of Hugging Face's apply_chat_template: sandboxed, trim_blocks, lstrip_blocks, loop controls, `tojson`
that is json.dumps without escaping for HTML, raise_exception, and `{% generation %}` blocks.
"""
import json
import os

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = os.path.dirname(os.path.abspath(__file__))

SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>

'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>

' }}{% endif %}"""

LLAMA31 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{#- System message + builtin tools #}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}

{%- if tools_in_user_message and not tools is none %}
    {#- Extract the first user message so we can plug it in here #}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("Cannot put tools in the first user message when there's no first user message!") }}
{%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' -}}
    {{- "Given the following functions, please respond with a JSON for a function call.\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}

{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\nYou may call one or more functions.\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n\\nReturn a json object within <tool_call></tool_call> XML tags.<|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}

{#- This block checks for alternating user/assistant messages, skipping tool calling messages #}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- else %}
                {{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + ", " }}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}"""

RAG = """{%- macro show(doc, number) -%}
    [{{ number }}] {{ doc['title'] | default('untitled', true) | title }}
{% for line in doc.text.splitlines() %}
    {{ line }}
{% endfor %}
{%- endmacro %}
{%- if documents is not none %}
Documents:
{% for doc in documents %}
{{ show(doc, loop.index) }}
{%- endfor %}
{% endif %}
{% for m in messages %}
{% if m.role == 'system' %}{% continue %}{% endif %}
{{ m.role | upper }}: {% generation %}{{ m.content | trim }}{% endgeneration %}

{% if loop.index > 3 %}{% break %}{% endif %}
{% endfor %}
"""

PYTHONISMS = """{% set d = {'b': 1, 'a': [1, 2.5, true, none, 'it\\'s'], 'c': {'x': 1e16, 'y': 1e-5, 'z': 0.1}} %}
{{ d }}|{{ d.a }}|{{ d['c'] }}|{{ d.missing }}|{{ d.get('zz') }}|{{ d.get('zz', 3) }}
{{ true }} {{ false }} {{ none }} {{ 1.0 }} {{ 3 / 2 }} {{ 7 // 2 }} {{ 7 % 3 }} {{ 2 ** 10 }} {{ -7 // 2 }} {{ 1e22 }} {{ 123456789.0 }}
{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}
{% for k in d %}{{ k }},{% endfor %}|{{ d.keys() | list }}|{{ d.values() | list | length }}|{{ d | dictsort | map('first') | join('-') }}
{{ 'abc'[1:] }} {{ 'abc'[::-1] }} {{ 'abc'[-1] }} {{ [1,2,3][-2:] }} {{ 'abc' * 2 }} {{ [1] + [2] }} {{ 'a' ~ 1 ~ true ~ none }}
{{ ' x '.strip() }}|{{ 'xxaxx'.strip('x') }}|{{ 'xxa'.lstrip('x') }}|{{ 'axx'.rstrip('x') }}|{{ 'a,b,c'.split(',') }}|{{ 'a b  c'.split() }}|{{ 'a,b,c'.split(',', 1) }}
{{ 'Hello'.upper() }} {{ 'Hello'.lower() }} {{ 'hello world'.title() }} {{ 'hELLO'.capitalize() }} {{ 'aXb'.replace('X', '--') }} {{ 'abc'.find('c') }} {{ 'abcabc'.count('b') }}
{{ 'abc'.startswith('ab') }} {{ 'abc'.endswith('bc') }} {{ 'abc'.startswith(('x', 'a')) }} {{ '12'.isdigit() }} {{ 'ab' in 'cabd' }} {{ 3 not in [1, 2] }} {{ ', '.join(['a', 'b']) }}
{{ 'x' is string }} {{ 1 is number }} {{ 1 is integer }} {{ 1.5 is float }} {{ d is mapping }} {{ [] is sequence }} {{ 'x' is sequence }} {{ 'x' is iterable }} {{ 1 is iterable }} {{ none is none }} {{ zz is defined }} {{ zz is undefined }} {{ true is boolean }} {{ 3 is odd }} {{ 4 is divisibleby 2 }} {{ 1 is eq 1 }} {{ true is true }} {{ 0 is false }}
{{ [3, 1, 2] | sort }} {{ [1, 2, 3] | sum }} {{ [1, 2, 3] | max }} {{ [1, 1, 2] | unique | list }} {{ [1, 2, 3] | first }} {{ [1, 2, 3] | last }} {{ [1, 2, 3] | reverse | list }} {{ 'abc' | list }} {{ [1, 2, 3, 4] | batch(2) | list }} {{ 'a' | default('b') }} {{ zz | default('b') }} {{ '' | default('b', true) }}
{{ [{'n': 1, 'k': true}, {'n': 2, 'k': false}] | selectattr('k') | map(attribute='n') | list }} {{ [{'n': 1}, {'n': 2}] | rejectattr('n', 'equalto', 1) | list }} {{ ['a', 'b'] | map('upper') | join }} {{ [1, 2, 3] | select('odd') | list }}
{{ 3.7 | int }} {{ '42' | int }} {{ 3.14159 | round(2) }} {{ -3 | abs }} {{ '1.5' | float }} {{ 5 | string }} {{ [1, 'a'] | string }} {{ 'a b' | replace(' ', '_') }} {{ 'text' | length }} {{ 'Ab' | lower }}{{ 'ab' | upper }}{{ 'ab cd' | capitalize }}{{ ' x ' | trim }}
{{ d | tojson }}
{{ d | tojson(indent=2) }}
{{ [] | tojson(indent=2) }}{{ {} | tojson(indent=2) }}{{ 'é"<b>&\\n\\t\\\\' | tojson }}{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}{{ [1, 2] | tojson(separators=(',', ':')) }}{{ 'é' | tojson(ensure_ascii=true) }}{{ {1: 2} | tojson }}
{{ 'a\\nb\\n\\nc' | indent }}|{{ 'a\\nb' | indent(2, true) }}|{{ 'a\\n\\nb' | indent(width=3, blank=true) }}
{% set ns = namespace(n=0, items=[]) %}{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{% set ns.n = ns.n + i %}{% set ns.items = ns.items + [i] %}{% endfor %}{{ ns.n }} {{ ns.items }}
{% for x in [1, 2, 3] if x != 2 %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{% else %}empty{% endfor %}{% for x in [] %}{% else %} empty{% endfor %}
{% for x in 'abc' %}{{ loop.cycle('1', '2') }}{{ x }}{{ loop.previtem }}{{ loop.nextitem }}{% endfor %}
{% macro m(a, b='B', c=none) %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ m(1) }} {{ m(1, c=2) }} {% macro n() %}<{{ caller('called') }}>{% endmacro %}{% call(x) n() %}{{ x }}{% endcall %}
{% set x %}block {{ 1 + 1 }}{% endset %}{{ x }} {{ 'yes' if x else 'no' }} {% raw %}{{ raw }}{% endraw %} {# comment #}{% filter upper %}filtered{% endfilter %} {% with y = 5 %}{{ y }}{% endwith %}
{%- if 1 < 2 <= 2 and not false or x %} chained{% endif %}
  {% if true %}
  block lines
  {% endif %}
{{- '  trimmed' -}}
   end
{% for a, b in [(1, 2), (3, 4)] %}{{ a + b }} {% endfor %}{{ (1, 2) }} {{ (1,) }} {{ [(1, 'a')] }} {{ () }} {{ dict(a=1) }} {{ range(3) | list }} {{ '%s-%d' | format('a', 5) }} {{ "%.2f" | format(2.5) }}
"""

SYSTEM = {"role": "system", "content": "  Be brief. "}
CHAT = [{"role": "user", "content": " Hi! "}, {"role": "assistant", "content": "Hello\n"}, {"role": "user", "content": "What's 2+2?\n\nThanks, é 東京 👍"}]
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "The \"weather\" of a city <now> & here", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 3}, "unit": {
            "enum": ["°C", "°F", None], "scale": 1.5}}, "required": ["city"]}}},
    {"type": "function", "function": {"name": "stop", "parameters": {}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "abc123def", "type": "function", "function": {
    "name": "get_weather", "arguments": {"city": "Köln", "days": 2, "exact": True, "x": 0.25}}}]}
RESULT = {"role": "tool", "content": "18 degrees", "tool_call_id": "abc123def"}
THINK = [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA1"}, {"role": "user", "content": "q2"},
         {"role": "assistant", "content": "<think>\nhm2\n</think>\n\nA2", "reasoning_content": None}]
DOCS = [{"title": "first paper", "text": "Line 1\nLine 2"}, {"title": "", "text": "Only"}]

FAMILIES = {
    "smollm2": (SMOLLM2, "<|im_start|>", "<|im_end|>"), "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
    "llama3.1": (LLAMA31, "<|begin_of_text|>", "<|eot_id|>"), "qwen3": (QWEN3, None, "<|im_end|>"),
    "mistral": (MISTRAL, "<s>", "</s>"), "gemma": (GEMMA, "<bos>", "<eos>"), "rag": (RAG, "<s>", "</s>"),
    "pythonisms": (PYTHONISMS, "<s>", "</s>"),
}
CONVERSATIONS = {
    "chat": {"messages": CHAT, "add_generation_prompt": True},
    "system": {"messages": [SYSTEM] + CHAT, "add_generation_prompt": True},
    "closed": {"messages": CHAT[:2]},
    "tools": {"messages": [SYSTEM, CHAT[0]], "tools": TOOLS, "add_generation_prompt": True},
    "called": {"messages": [CHAT[0], CALL, RESULT, {"role": "assistant", "content": "It is 18."}, CHAT[2]], "tools": TOOLS,
               "add_generation_prompt": True},
    "thinking": {"messages": THINK},
    "not thinking": {"messages": THINK[:3], "add_generation_prompt": True, "variables": {"enable_thinking": False}},
    "documents": {"messages": [SYSTEM] + CHAT * 2, "documents": DOCS},
    "twice user": {"messages": [CHAT[0], CHAT[2]]},
    "unknown role": {"messages": [CHAT[0], {"role": "narrator", "content": "x"}]},
}


class Generation(Extension):
    tags = {"generation"}

    def parse(self, parser):
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.If(nodes.Const(True), body, [], [], lineno=lineno)


def environment():
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise TemplateError(message)

    env.globals["raise_exception"] = raise_exception
    return env


def main():
    cases = []
    for family, (source, bos, eos) in FAMILIES.items():
        template = environment().from_string(source)
        for name, conversation in CONVERSATIONS.items():
            if family == "pythonisms" and name != "chat":
                continue
            context = {"bos_token": bos, "eos_token": eos}
            context = {k: v for k, v in context.items() if v is not None}
            context |= {k: v for k, v in conversation.items() if k != "variables"} | conversation.get("variables", {})
            context = {"tools": None, "documents": None, "add_generation_prompt": False} | context
            case = {"family": family, "conversation": name}
            try:
                case["text"] = template.render(**context)
            except TemplateError as error:
                case["error"] = str(error)
            cases.append(case)
    families = {k: {"source": s, "bos": b, "eos": e} for k, (s, b, e) in FAMILIES.items()}
    path = os.path.join(HERE, "templates.json")
    with open(path, "w") as f:
        json.dump({"families": families, "conversations": CONVERSATIONS, "cases": cases}, f, ensure_ascii=True, indent=1)
        f.write("\n")
    print(path, len(cases), "cases,", sum("error" in c for c in cases), "errors")


main()
