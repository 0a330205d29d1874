"""Chat formats: the exact texts, what is scored, and that no text of a user is a special token."""

from __future__ import annotations

import re
import resource
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from pairwise import each

from blockwright import registry
from blockwright.registry import ConfigError, Node, Scope
from blockwright.training.answering import Answering
from blockwright.training.data.chat import jinja, template
from blockwright.training.data.chat.formats import Chat, Piece, UnavailableError, encode
from blockwright.training.data.conversations import read_record
from blockwright.training.data.tokenizers.tokenizer import Bytes

WORDS = ["<|im_start|>", "<|im_end|>", "<｜User｜>", "<｜Assistant｜>", "<|begin_of_text|>", "<|start_header_id|>"]
WORDS += ["<|end_header_id|>", "<|eot_id|>", "<|User|>", "<|Assistant|>", "<s>", "</s>"]


class WithWords(Bytes):
    """Bytes, and special tokens after them."""

    companions: Mapping[str, str] = {}

    def __init__(self) -> None:
        super().__init__(257 + len(WORDS))
        self.eos = self.special_words["</s>"]

    @property
    def special_words(self) -> Mapping[str, int]:
        return {word: 257 + i for i, word in enumerate(WORDS)}

    @property
    def bos(self) -> int:
        return self.special_words["<s>"]


TOKENIZER = WithWords()
SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
TALK = [SYSTEM, USER, ANSWER, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Ciao"}]

TEMPLATE = """{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}\
<|im_end|>{% endif %}

{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def chat(name: str, template: str = TEMPLATE) -> Chat:
    built = registry.build("chat", Node(name, "data.chat"), Scope({}, {}))
    tokenizer = WithWords()
    tokenizer.companions = {"chat_template.jinja": template}
    built.prepare(tokenizer)
    return built


def written(pieces: list[Piece]) -> str:
    words = {"bos": "<s>", "eos": "</s>"}
    return "".join(words.get(p.text, p.text) if p.special else p.text for p in pieces)


EXPECTED = {
    "plain": "Be kind.HiHello</s>ByeCiao</s>",
    "deepseek_v2": "<s>Be kind.\n\nUser: Hi\n\nAssistant: Hello</s>User: Bye\n\nAssistant: Ciao</s>",
    "deepseek_v3": "<s>Be kind.<｜User｜>Hi<｜Assistant｜>Hello</s><｜User｜>Bye<｜Assistant｜>Ciao</s>",
    "deepseek_vl2": "<s>Be kind.<|User|>: Hi\n\n<|Assistant|>:Hello</s><|User|>: Bye\n\n<|Assistant|>:Ciao</s>",
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    "Hello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nCiao<|im_end|>\n",
    "llama3": "<|begin_of_text|>"
    + "".join(f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content']}<|eot_id|>" for m in TALK),
}
EXPECTED["jinja"] = "<s>" + EXPECTED["chatml"]
SCORED = {
    "plain": "Hello</s>Ciao</s>", "deepseek_v2": " Hello</s> Ciao</s>", "deepseek_v3": "Hello</s>Ciao</s>",
    "deepseek_vl2": "Hello</s>Ciao</s>", "chatml": "Hello<|im_end|>Ciao<|im_end|>",
    "llama3": "Hello<|eot_id|>Ciao<|eot_id|>", "jinja": "Hello<|im_end|>Ciao<|im_end|>",
}  # fmt: skip


def test_every_format_is_covered() -> None:
    assert set(EXPECTED) == set(SCORED) == set(registry.names("chat"))


@pytest.mark.parametrize("name", EXPECTED)
def test_text_what_is_scored_and_that_an_answer_continues_the_prompt(name: str) -> None:
    form = chat(name)
    pieces = form.render(TALK)
    assert written(pieces) == EXPECTED[name]
    assert written([piece for piece in pieces if piece.scored]) == SCORED[name]
    opened, _ = encode(form.open(TALK[:2]), TOKENIZER)
    ids, scored = encode(form.render(TALK[:3]), TOKENIZER)
    assert ids[: len(opened)].tolist() == opened.tolist() and not scored[: len(opened)].any()
    last = len(opened) + scored.sum()
    assert scored[len(opened) : last].all() and ids[last - 1] in form.ends(TOKENIZER)
    ids, scored = encode(form.render([USER, {**ANSWER, "scored": False}, *TALK[3:]]), TOKENIZER)
    assert TOKENIZER.decode(ids[scored]).strip() == "Ciao"


def test_texts_are_stripped_as_the_released_processor_of_deepseek_vl2_does() -> None:
    spaced = [{**turn, "content": f" {turn['content']}\n"} for turn in TALK]
    assert written(chat("deepseek_vl2").render(spaced)) == EXPECTED["deepseek_vl2"]


@pytest.mark.parametrize("name", EXPECTED)
def test_no_text_of_a_user_is_a_special_token(name: str) -> None:
    hostile = "".join(WORDS) + "<|im_<|im_end|>end|>\ue000\ue001\ue002"
    benign = "x" * len(hostile)
    form = chat(name)

    def special(content: str) -> list[int]:
        talk = [{**USER, "content": content}, {**ANSWER, "content": content}]
        ids, scored = encode(form.render(talk), TOKENIZER)
        assert scored.sum() > len(WORDS)
        return ids[ids > 256].tolist()

    assert special(hostile) == special(benign)
    ids, _ = encode(form.render([{**USER, "content": WORDS[0]}, ANSWER]), TOKENIZER)
    assert WORDS[0] in TOKENIZER.decode(ids)


def test_tokenizer_without_the_special_tokens_is_refused() -> None:
    for name in ("chatml", "deepseek_v3", "llama3"):
        built = registry.build("chat", Node(name, "data.chat"), Scope({}, {}))
        with pytest.raises(ConfigError):
            built.prepare(Bytes())


def refused(template: str) -> ConfigError:
    with pytest.raises(ConfigError) as refusal:
        built = chat("jinja", template)
        built.check_scores()
        built.render(TALK)
    return refusal.value


def test_templates_that_cannot_be_used_are_refused() -> None:
    marked = "{% generation %}{{ messages[0].content }}{% endgeneration %}"
    assert "marks no answers" in refused("{% for m in messages %}{{ m.content }}{% endfor %}").rule
    assert "is no Jinja template" in refused("{% generation %}{% for %}").rule
    assert "only users" in refused(marked + "{{ raise_exception('only users') }}").rule
    assert "refuses a conversation" in refused(marked + "{{ nothing.there }}").rule
    with pytest.raises(ConfigError, match="has no chat template beside it"):
        registry.build("chat", Node("jinja", "data.chat"), Scope({}, {})).prepare(Bytes())


UNMARKED = """{% if messages[0].role != 'system' %}<|im_start|>system
Give an answer.<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_template_without_marks_serves_where_nothing_is_scored() -> None:
    built = chat("jinja", UNMARKED)
    begun = "<|im_start|>system\nGive an answer.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert written(built.open([USER])) == begun
    assert built.ends(TOKENIZER) == TOKENIZER.ends | {TOKENIZER.special_words["<|im_end|>"]}


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ range(10**9)|list }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_hostile_templates_are_held_by_the_sandbox(attack: str) -> None:
    assert "the template refuses a conversation" in refused(f"{{% generation %}}{{% endgeneration %}}{attack}").rule


WITH_TOOLS = """{% if tools %}<s>{{ tools | tojson }}
{% endif %}{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}\
{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}</s>{% endgeneration %}{% else %}\
{{ m.content }}{% endif %}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""
CALL = {"function": {"name": "add", "arguments": {"a": "<b> é", "x": "</s>"}}}
ADDED = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}, ANSWER]
SCHEMA = [{"function": {"name": "add", "description": "adds </s>"}}]


def test_tools_reach_the_template_as_in_transformers() -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    form = chat("jinja", WITH_TOOLS)
    pieces = form.render(ADDED, SCHEMA)
    theirs, _ = utils.render_jinja_template([ADDED], tools=SCHEMA, chat_template=WITH_TOOLS)
    assert written(pieces) == theirs[0]
    scored = '{"name": "add", "arguments": {"a": "<b> é", "x": "</s>"}}</s>Hello</s>'
    assert written([piece for piece in pieces if piece.scored]) == scored
    assert [p.text for p in pieces if p.special] == ["<s>", "</s>", "</s>"]
    assert written(form.open(ADDED[:1])) == "user:Hiassistant:"  # a line end after a block is removed


GIVEN = ["ensure_ascii=False", "ensure_ascii=True", "True", "indent=4", "separators=(',', ':')", "sort_keys=True"]


@pytest.mark.parametrize("given", GIVEN)  # as published templates do: GLM-4.5 writes ``tojson(ensure_ascii=False)``
def test_json_is_written_as_in_transformers(given: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    template = WITH_TOOLS.replace("tojson", f"tojson({given})")
    schema = [{"function": {"name": "add", "description": "adds é"}}]
    theirs, _ = utils.render_jinja_template([ADDED], tools=schema, chat_template=template)
    assert written(chat("jinja", template).render(ADDED, schema)) == theirs[0]


THINKING = """{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}\
{% if m.reasoning_content is string %}<think>{{ m.reasoning_content }}|{{ m.thinking }}</think>{% endif %}\
{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"""


@pytest.mark.parametrize(
    ("key", "thoughts"), each(["reasoning_content", "reasoning", "thinking"], ["2 and 2 </s>", "", None])
)
def test_reasoning_reaches_the_template_as_in_transformers(key: str, thoughts: str | None) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    record = {"messages": [USER, {**ANSWER, key: thoughts}]}
    pieces = chat("jinja", THINKING).render(read_record(record, "chats:1").messages)
    theirs, _ = utils.render_jinja_template([record["messages"]], chat_template=THINKING)
    assert written(pieces) == theirs[0] and [p.text for p in pieces if p.special] == ["</s>"]


@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "jinja"])
def test_format_without_a_form_for_reasoning_or_tools_refuses_them(name: str) -> None:
    thinking = read_record({"messages": [USER, {**ANSWER, "thinking": "2 and 2"}]}, "chats:1").messages
    for given in ((thinking, ()), (ADDED, ()), ([USER, ANSWER], SCHEMA)):
        with pytest.raises(ConfigError) as refusal:
            chat(name).render(*given)
        assert refusal.value.path == "data.chat"


@pytest.mark.parametrize(
    "loops",
    [
        "{% set n = namespace(a=[0], b=[0]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}"
        "{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}",  # compiled code, which looks for no signal
        pytest.param("{{ 9 ** (9 ** 9) % 7 }}", marks=pytest.mark.slow),  # as it is compiled
    ],
)
def test_template_without_an_end_is_stopped(loops: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja.PROCESS, "seconds", 0.3)
    jinja.PROCESS.begin()
    assert "took longer than 0.3 seconds of computing" in refused("{% generation %}{% endgeneration %}" + loops).rule


def test_a_template_runs_nowhere_but_in_the_process_that_can_be_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    jinja2 = pytest.importorskip("jinja2")
    monkeypatch.setattr(jinja2.Environment, "from_string", lambda *_: pytest.fail("a template was compiled here"))
    form = chat("jinja")
    assert form.render(TALK) and form.open(TALK[:2]) and form.ends(TOKENIZER)
    monkeypatch.setattr(
        jinja, "PROCESS", Answering("doing_as_asked:refuse", seconds=9.0, within=9.0, start=9.0, longest=9)
    )
    asked = (lambda: form.render(TALK), lambda: form.open(TALK), lambda: form.ends(TOKENIZER), lambda: chat("jinja"))
    for ask in asked:
        with pytest.raises(UnavailableError):
            ask()


@pytest.mark.parametrize(
    "bomb",
    [
        "{{ 'a' * 10**11 }}",
        "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
        "{% for i in range(90000) %}{{ 'a' * 500 }}{% endfor %}",
    ],
)
def test_template_that_would_fill_memory_is_stopped(bomb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja.PROCESS, "seconds", 1.0)
    limits, before = resource.getrlimit(resource.RLIMIT_AS), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rule = refused("{% generation %}{% endgeneration %}" + bomb).rule
    assert re.match("is no Jinja template|the template refuses a conversation", rule)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 0.2 * 2**20  # KiB
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


@pytest.mark.skipif(not template.STATM.is_file(), reason="a limit of memory needs /proc")
def test_the_process_of_templates_is_small_and_may_take_little_more() -> None:
    chat("jinja").render(TALK)
    pid = jinja.PROCESS.pid
    assert pid is not None
    soft, hard = resource.prlimit(pid, resource.RLIMIT_AS)
    assert soft == hard and jinja.MEMORY < soft < jinja.MEMORY + 0.2 * 2**30


def test_adjacent_texts_are_encoded_as_one() -> None:
    seen: list[str] = []

    class Watched(WithWords):
        def encode(self, text: str) -> Any:
            seen.append(text)
            return super().encode(text)

    ids, scored = encode([Piece("a"), Piece("b"), Piece("c", scored=True), Piece("eos", True)], Watched())
    assert seen == ["ab", "c"] and np.array_equal(scored, [False, False, True, False]) and len(ids) == 4
