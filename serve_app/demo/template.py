"""The chat template: ChatML as Qwen2.5-VL writes it, with tools as Hermes and Qwen2.5 write them."""

from collections.abc import Mapping

# `@PART@` stands for a text or a medium. The loop over `message.content` stays in the open, not in a macro: vLLM looks for
# exactly that to decide that the template takes lists of parts.
_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}
{%- if messages[0].content is string %}{{- messages[0].content }}
{%- else %}
{%- for part in messages[0].content %}
@PART@
{%- endfor %}
{%- endif %}
{%- else %}{{- 'You are a helpful assistant.' }}
{%- endif %}
{{- '\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
{{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' }}
{{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n' }}
{{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if not (tools and loop.first and message.role == 'system') %}
{%- set is_tool = message.role == 'tool' %}
{%- if is_tool %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' }}
{%- endif %}
{%- if message.content is string %}{{- message.content }}
{%- elif message.content %}
{%- for part in message.content %}
@PART@
{%- endfor %}
{%- endif %}
{%- for call in message.tool_calls or [] %}
{%- set function = call.function or call %}
{%- if message.content or not loop.first %}{{- '\\n' }}{%- endif %}
{{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
{{- function.arguments if function.arguments is string else function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{%- if is_tool %}
{{- '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- else %}{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def chat_template(media: Mapping[str, str]) -> str:
    """Return the Jinja source. `media` maps a kind of part ("image") to the text that stands for one of it.

    A part counts as an image if its type says so, or if it has the field `image` or `image_url`.
    """
    branches = "".join(
        f"{{%- elif part.type in ('{kind}', '{kind}_url', 'input_{kind}') or '{kind}' in part or '{kind}_url' in part %}}"
        f"{{{{- '{marker}' }}}}\n"
        for kind, marker in media.items()
    )
    part = "{%- if part.type == 'text' or 'text' in part %}{{- part.text }}\n" + branches + "{%- endif %}"
    return _TEMPLATE.replace("@PART@", part)
