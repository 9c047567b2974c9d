"""Chat templates that know tools, in the style of three families."""

_JSON_CALL = """{"name": "{{ call.function.name }}", "KEY": {{ call.function.arguments | tojson }}"""

#: ChatML; declarations in the system message, each call between tags, answers as the user's, several calls at once.
HERMES = (
    """{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}You may call functions. <tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools><|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}<|im_start|>"""
    """{{ message.role }}
{{ message.content }}<|im_end|>
{% elif message.role == 'assistant' %}<|im_start|>assistant
{%- if message.content %}{{ '\\n' + message.content }}{% endif %}
{%- for call in message.tool_calls %}{{ '\\n' }}<tool_call>
"""
    + _JSON_CALL.replace("KEY", "arguments")
    + """}
</tool_call>
{%- endfor %}<|im_end|>
{% elif message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
)

#: Llama 3.1: declarations in the first question, a call is a whole answer, one at a time, answers of role ipython.
LLAMA3 = (
    """{{- bos_token }}
{%- macro head(role) %}<|start_header_id|>{{ role }}<|end_header_id|>

{% endmacro %}
{%- for message in messages %}
{%- if message.role == 'tool' %}{{ head('ipython') }}{{ message.content | tojson }}<|eot_id|>
{%- elif 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set call = message.tool_calls[0] %}{{ head('assistant') }}"""
    + _JSON_CALL.replace("KEY", "parameters")
    + """}<|eot_id|>
{%- else %}{{ head(message.role) }}
{%- if loop.first and tools is not none and tools %}Answer with a call.
{% for tool in tools %}{{ tool | tojson(indent=4) }}
{% endfor %}{% endif %}{{ message.content | trim }}<|eot_id|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ head('assistant') }}{% endif %}"""
)

#: Mistral: a control token or text before a list of calls, each with an id of nine letters and digits.
MISTRAL = (
    """{{- bos_token }}
{%- if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}[INST] {{ message.content }}[/INST]
{%- elif message.role == 'tool' %}[TOOL_RESULTS] {"content": {{ message.content | tojson }}, "call_id": "{{
message.tool_call_id }}"}[/TOOL_RESULTS]
{%- elif message.tool_calls %}[TOOL_CALLS] [
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('an id must have nine letters') }}{% endif %}"""
    + _JSON_CALL.replace("KEY", "arguments")
    + """, "id": "{{ call.id }}"}
{%- if not loop.last %}, {% endif %}
{%- endfor %}]{{ eos_token }}
{%- else %} {{ message.content }}{{ eos_token }}
{%- endif %}
{%- endfor %}"""
)
