"""The chat templates that a recipe may name: Jinja texts of common formats, under mergekit's names."""

from dsee_jax.errors import InputError, did_you_mean

AUTO = "auto"

TEMPLATES = {
    "chatml": """\
{%- for turn in messages -%}
{{ '<|im_start|>' ~ turn['role'] ~ '\\n' ~ turn['content'] ~ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
""",
    "llama3": """\
{{- bos_token -}}
{%- for turn in messages -%}
{{ '<|start_header_id|>' ~ turn['role'] ~ '<|end_header_id|>\\n\\n' ~ turn['content'] | trim ~ '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}
""",
    "mistral": """\
{%- set system = messages[0]['content'] ~ '\\n\\n' if messages[0]['role'] == 'system' else '' -%}
{%- set turns = messages[1:] if system else messages -%}
{{- bos_token -}}
{%- for turn in turns -%}
{%- if turn['role'] != ('user' if loop.index0 is even else 'assistant') -%}
{{ raise_exception('the turns after the system message must alternate between user and assistant, from user') }}
{%- endif -%}
{%- if turn['role'] == 'user' -%}
{{ ' [INST] ' ~ (system if loop.first else '') ~ turn['content'] ~ ' [/INST]' }}
{%- else -%}
{{ ' ' ~ turn['content'] ~ eos_token }}
{%- endif -%}
{%- endfor -%}
""",
    "alpaca": """\
{%- set titles = {'user': '### Instruction:\\n', 'assistant': '### Response:\\n', 'user_context': '### Input:\\n'} -%}
{%- for turn in messages -%}
{{ titles.get(turn['role'], '') ~ turn['content'] | trim ~ ('' if loop.last else '\\n\\n') }}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1]['role'] != 'assistant' -%}{{ '\\n\\n### Response:\\n' }}{%- endif -%}
""",
    "exaone": """\
{%- if messages[0]['role'] != 'system' -%}{{ '[|system|][|endofturn|]\\n' }}{%- endif -%}
{%- for turn in messages -%}
{{ '[|' ~ turn['role'] ~ '|]' ~ turn['content'] ~ ('\\n' if turn['role'] == 'user' else '[|endofturn|]\\n') }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '[|assistant|]' }}{%- endif -%}
""",
}


def resolve(where: str, choice: str) -> str:
    """Return the text of a template, or ``auto``.

    Args:
      where: recipe path and key path, for errors.
      choice: ``auto``, a key of `TEMPLATES`, or the text of a Jinja template.

    Raises:
      InputError: ``choice`` is neither; the message begins with ``where``.
    """
    if "{" in choice or choice == AUTO:
        return choice
    if choice not in TEMPLATES:
        names = (AUTO, *TEMPLATES)
        raise InputError(
            f"{where} is {choice[:100]!r}{did_you_mean(choice[:100], names)}; expected one of {', '.join(names)}, "
            "or the text of a Jinja template"
        )
    return TEMPLATES[choice]
