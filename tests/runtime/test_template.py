import time

import fakes
import pytest

from forerun.errors import TemplateError
from forerun.runtime import template as module
from forerun.runtime.template import render_chat

USER = [{"role": "user", "content": "hi"}]


def render(template, messages=USER, **options):
    return render_chat(template, messages, **options)


def test_chatml():
    text = render(fakes.CHATML, bos_token="<bos>")
    assert text == "<bos><turn>user\nhi<end>\n<turn>assistant\n"
    assert render(fakes.CHATML, add_generation_prompt=False) == "<turn>user\nhi<end>\n"


def test_what_templates_in_the_wild_use():
    template = (
        "{%- if messages[0]['role'] == 'system' %}\n    {%- set ns = namespace(n=0) %}\n"
        "{%- endif %}\n"
        "{%- set ns = namespace(found=false, text='') -%}\n"
        "{%- for m in messages[::-1] %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
        "{%- set ns.text = ns.text ~ (m.content | trim | upper) + '|' -%}"
        "{%- generation %}{{ m.content.split('x')[-1].strip('\\n').replace('a', 'b') }}"
        "{% endgeneration %}{%- endfor -%}"
        "{{ tools | tojson(indent=2) }}{{ ns.text }}{{ range(3) | list | join('-') }}"
        "{{ '%s:%d' % ('a', 2) }}{{ 'x{}'.format(5) }}{{ missing is defined }}{{ undefined_name }}"
        "{% macro twice(s) %}{{ s }}{{ s }}{% endmacro %}{{ twice('q') }}{{ eos_token }}"
    )
    text = render(template, [*USER, {"role": "tool", "content": "no"}], tools=[{"é": 1}])
    # eos_token is empty here.
    assert text == 'hi[\n  {\n    "é": 1\n  }\n]HI|0-1-2a:2x5Falseqq'


def test_loop_variables_and_filters_work():
    text = render(
        "{% for m in messages if m.role != 'x' %}{{ loop.index0 }}{{ loop.last }}"
        "{{ m | tojson }}{% else %}none{% endfor %}{{ messages | map(attribute='role') | list }}"
    )
    assert text == '0True{"role": "user", "content": "hi"}[\'user\']'


def test_raise_exception_is_told():
    with pytest.raises(TemplateError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_strftime_now():
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")


@pytest.mark.parametrize(
    "template",
    [
        "{% for x in %}",
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{% include 'x' %}",
        "{{ messages | nosuchfilter }}",
        "{{ 'a' + 1 }}",
        "{{ nosuch() }}",
        "{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    ],
)
def test_broken_templates_are_one_error(template):
    with pytest.raises(TemplateError) as caught:
        render(template)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__",
        "''.__class__.__mro__",
        "''['__class__']",
        "''|attr('__class__')",
        "messages.__class__.__base__.__subclasses__()",
        "raise_exception.__globals__",
        "tojson.__globals__",
        "strftime_now.__globals__['sys']",
        "cycler.__init__.__globals__.os.popen('id').read()",
        "namespace.__init__.__globals__",
        "self.__init__",
        "self._TemplateReference__context",
        "'{0.__class__}'.format('')",
        "('{0.__class__}'|string).format_map({'0': 1})",
        "range.__self__.budget",
        "messages|map(attribute='__class__')|list",
        "(messages|map('upper')).gi_frame",
        "loop.__class__",
    ],
)
def test_python_internals_are_out_of_reach(expression):
    try:
        text = render("{{ " + expression + " }}")
    except TemplateError:
        return
    assert text == "" or "undefined" in text.lower(), text


def test_internals_are_refused_at_once_and_named():
    # Plain jinja shows nothing here, and a template could go on probing.
    with pytest.raises(TemplateError, match="__class__"):
        render("{{ ''.__class__ }}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**9) %}{{ i }}{% endfor %}",
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "{% for i in range(9999) %}{% for j in range(9999) if j == i * 9999 + 9999 %}"
        "{% endfor %}{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ [1] * 10**10 }}",
        "{{ 9**(9**9) }}",
        "{{ (9**999) * (9**999) }}",
        "{% set ns = namespace(s='aa') %}{% for i in range(99) %}"
        "{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s='aa') %}{% for i in range(99) %}"
        "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='aa') %}{% for i in range(99) %}"
        "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
        "{% set ns = namespace(s='aa') %}{% for i in range(99) %}"
        "{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}",
        "{% set ns = namespace(s='aa') %}{% for i in range(99) %}"
        "{% set ns.s = ns.s | replace('a', 'aa') %}{% endfor %}",
        "{% set ns = namespace(s='aa') %}{% for i in range(99) %}"
        "{% set ns.s = ns.s.replace('', 'aa') %}{% endfor %}",
        "{% set ns = namespace(s='aa') %}{% for i in range(99) %}"
        "{% set ns.s = ns.s.join([ns.s, ns.s]) %}{% endfor %}",
        "{% set ns = namespace(s=['aa']) %}{% for i in range(99) %}"
        "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
        "{% set ns = namespace(s=['aa']) %}{% for i in range(99) %}"
        "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s | tojson }}",
        "{{ ([range(9999)] * 9999) | map('list') | list | length }}",
        "{{ 'a'.center(10**10) }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, 9999999999) }}",
        "{{ 'a' | center(10**10) }}",
        "{{ lipsum(n=10**9) }}",
        "{{ strftime_now('%9999999999Y') }}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{% for i in range(9999) %}" + "x" * 9000 + "{% endfor %}",
        "{% for m in messages %}" * 200 + "{% endfor %}" * 200,
        "x" * 300_000,
    ],
)
def test_hostile_templates_end_quickly(template, monkeypatch):
    monkeypatch.setattr("forerun.runtime.template_guard.MAX_SECONDS", 0.3)
    started = time.perf_counter()
    with pytest.raises(TemplateError) as caught:
        render(template)
    assert time.perf_counter() - started < 5
    assert "\n" not in str(caught.value)


def test_rounds_are_limited():
    with pytest.raises(TemplateError, match=r"rounds|seconds"):
        render("{% for i in range(999) %}{% for j in range(999) %}{% endfor %}{% endfor %}")


def test_time_is_limited(monkeypatch):
    monkeypatch.setattr("forerun.runtime.template_guard.MAX_SECONDS", -1.0)
    with pytest.raises(TemplateError, match="seconds"):
        render("{% for i in range(1000) %}{{ i }}{% endfor %}")


def test_output_is_limited(monkeypatch):
    monkeypatch.setattr(module, "MAX_OUTPUT_CHARS", 100)
    with pytest.raises(TemplateError, match="100 characters"):
        render("{% for i in range(60) %}ab{% endfor %}")


def test_a_long_conversation_is_within_the_limits():
    long = [{"role": "user", "content": "word " * 2000}] * 200
    assert len(render(fakes.CHATML, long)) > 2_000_000


@pytest.mark.parametrize(
    "messages",
    [
        ["hi"],
        [{"content": "x"}],
        [{"role": 1, "content": "x"}],
        [{"role": "user", "content": object()}],
    ],
)
def test_bad_messages_are_refused(messages):
    with pytest.raises(TemplateError, match="message 0"):
        render(fakes.CHATML, messages)


def test_templates_cannot_change_the_caller_s_messages():
    messages = [{"role": "user", "content": ["a"]}]
    with pytest.raises(TemplateError):
        render("{{ messages[0].content.append('b') }}", messages)
    assert messages == [{"role": "user", "content": ["a"]}]
