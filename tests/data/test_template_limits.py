"""A chat template that loops, or takes memory, without end is one line; usual templates are not disturbed."""

import resource
import sys
import time

import pytest

import tiny
from dsee_jax.ckpt.tokenizer import load_tokenizer
from dsee_jax.data import responses, template_limits
from dsee_jax.data.examples import Prompts
from dsee_jax.errors import InputError

HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}x"
    "{% endfor %}{% endfor %}{% endfor %}",
    "empty loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "a long text": "{{ 'x' * 10 ** 11 }}",
    "a power": "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "a wide text": "{{ 'x'.ljust(10 ** 11) }}",
}


def chat(folder, template):
    if not folder.exists():
        tiny.bert(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    message = [{"role": "user", "content": "the cat"}]
    return responses.encode(tokenizer, Prompts([message], [" a dog"], ["f:1"]), ends=[3], vocab_size=99)


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on memory")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_is_one_line(tmp_path, monkeypatch, name):
    monkeypatch.setattr(template_limits, "SECONDS", 0.3)
    begin, before = time.monotonic(), resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(InputError, match="f:1: the tokenizer's chat template rejects these messages") as caught:
        chat(tmp_path / "model", HOSTILE[name])
    assert time.monotonic() - begin < 60
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert "\n" not in str(caught.value)


def test_usual_template_and_the_tracer_of_a_debugger_are_kept(tmp_path):
    before = sys.gettrace()
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }} {% endfor %}"
    ((prompt, response),) = chat(tmp_path / "model", template)
    assert prompt
    assert response
    assert sys.gettrace() is before
