"""Chat formats by name, by the formats' published prompts worked by hand; named templates; what ends an answer."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest

import llama2
from commands import typed
from llama2 import checkpoint
from llama2.checkpoint import gguf_writer, hf_folder
from llama2.checkpoint.checkpoint import Checkpoint
from llama2.engine.request import Request
from llama2.errors import DialogError, TemplateError
from llama2.text import bpe, chat_formats, template
from llama2.text.calls import call_format
from llama2.text.dialog import Dialog
from llama2.text.tokenizer import CONTROL, END_OF_TURN, NORMAL, Ends, Tokenizer, from_merges
from models import write_tiny_gguf
from texts import llama2_tokenizer

SYSTEM = [{"role": "system", "content": "S"}]
TURNS = [{"role": role, "content": text} for role, text in (("user", "U1"), ("assistant", "A1"), ("user", "U2"))]
CURIOUS = (
    "A chat between a curious {} and an artificial intelligence assistant. The assistant gives helpful, detailed, "
)
CURIOUS += "and polite answers to the {}'s questions."
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"

#: Format: the prompt of system message and three turns, and what the first question alone begins with without a system.
PUBLISHED = {
    "llama2": ("<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU1 [/INST] A1 </s><s>[INST] U2 [/INST]", "<s>[INST] U1 [/INST]"),
    "llama3": (
        f"<s>{HEAD.format('system')}S<|eot_id|>{HEAD.format('user')}U1<|eot_id|>{HEAD.format('assistant')}A1<|eot_id|>"
        f"{HEAD.format('user')}U2<|eot_id|>{HEAD.format('assistant')}",
        f"<s>{HEAD.format('user')}U1<|eot_id|>{HEAD.format('assistant')}",
    ),
    "chatml": (
        "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n",
        "<s><|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\n",
    ),
    "vicuna": (
        "<s>S USER: U1 ASSISTANT: A1</s>USER: U2 ASSISTANT:",
        f"<s>{CURIOUS.format('user', 'user')} USER: U1 ASSISTANT:",
    ),
    "vicuna-v0": (
        "<s>S\n### Human: U1\n### Assistant: A1\n### Human: U2\n### Assistant:",
        f"<s>{CURIOUS.format('human', 'human')}\n### Human: U1\n### Assistant:",
    ),
    "vicuna-orca": ("<s>SYSTEM: S\nUSER: U1\nASSISTANT: A1</s>\nUSER: U2\nASSISTANT:", "<s>USER: U1\nASSISTANT:"),
    "alpaca": (
        "<s>S\n\n### Instruction:\nU1\n\n### Response:\nA1</s>\n\n### Instruction:\nU2\n\n### Response:\n",
        f"<s>{ALPACA}\n\n### Instruction:\nU1\n\n### Response:\n",
    ),
    "mistral-v1": ("<s>[INST] S\n\nU1 [/INST] A1</s>[INST] U2 [/INST]", "<s>[INST] U1 [/INST]"),
    "mistral-v3": ("<s>[INST] S\n\nU1[/INST] A1</s>[INST] U2[/INST]", "<s>[INST] U1[/INST]"),
    "mistral-v3-tekken": ("<s>[INST]S\n\nU1[/INST]A1</s>[INST]U2[/INST]", "<s>[INST]U1[/INST]"),
    "mistral-v7-tekken": (
        "<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]U1[/INST]A1</s>[INST]U2[/INST]",
        "<s>[INST]U1[/INST]",
    ),
    "zephyr": (
        "<s><|system|>\nS</s>\n<|user|>\nU1</s>\n<|assistant|>\nA1</s>\n<|user|>\nU2</s>\n<|assistant|>\n",
        "<s><|user|>\nU1</s>\n<|assistant|>\n",
    ),
    "tulu": (
        "<s><|system|>\nS\n<|user|>\nU1\n<|assistant|>\nA1</s>\n<|user|>\nU2\n<|assistant|>\n",
        "<s><|user|>\nU1\n<|assistant|>\n",
    ),
    "phi3": (
        "<s><|system|>\nS<|end|>\n<|user|>\nU1<|end|>\n<|assistant|>\nA1<|end|>\n<|user|>\nU2<|end|>\n<|assistant|>\n",
        "<s><|user|>\nU1<|end|>\n<|assistant|>\n",
    ),
    "openchat": (
        "<s>S<|end_of_turn|>GPT4 Correct User: U1<|end_of_turn|>GPT4 Correct Assistant: A1<|end_of_turn|>"
        "GPT4 Correct User: U2<|end_of_turn|>GPT4 Correct Assistant:",
        "<s>GPT4 Correct User: U1<|end_of_turn|>GPT4 Correct Assistant:",
    ),
    "deepseek-coder": (
        "<s>S\n### Instruction:\nU1\n### Response:\nA1\n<|EOT|>\n### Instruction:\nU2\n### Response:\n",
        "<s>You are an AI programming assistant, utilizing the DeepSeek Coder model",
    ),
    "pygmalion": ("<s><|system|>S<|user|>U1<|model|>A1</s><|user|>U2<|model|>", "<s><|user|>U1<|model|>"),
}
NAMED = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools | length }}{{ messages[0].content }}"}
TOOL = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


@cache
def bytes_and(*control: str, add_bos: bool = True) -> Tokenizer:
    """A byte a token, BOS, EOS and `control` tokens."""
    pieces = ["<s>", "</s>", *control, *bpe.BYTES]
    types = [CONTROL] * (2 + len(control)) + [NORMAL] * len(bpe.BYTES)
    return from_merges(pieces, types, [], "gpt2", Ends(0, 1, add_bos))


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    names = {token: text.encode() for text, token in tokenizer.control.items()}
    return b"".join(names.get(token) or tokenizer.token_bytes(token) for token in ids).decode()


def rendered(tokenizer: Tokenizer, source: str, messages: list[dict[str, str]], **options: Any) -> str:
    return text_of(tokenizer, Dialog(messages).render(tokenizer, source, **options)[0])


@pytest.mark.parametrize("name", PUBLISHED)
def test_formats_write_what_their_authors_published(name: str) -> None:
    ours = bytes_and()
    source = chat_formats.choose(name, {}, ours)
    whole, first = PUBLISHED[name]
    assert rendered(ours, source, SYSTEM + TURNS) == whole
    assert rendered(ours, source, TURNS[:1]).startswith(first)
    assert template.known(source) == name  # so it runs in this process
    without = chat_formats.choose(name, {}, bytes_and(add_bos=False))
    assert rendered(bytes_and(add_bos=False), without, SYSTEM + TURNS) == whole.removeprefix("<s>" * (name != "llama2"))


def test_every_format_has_its_expected_prompt_and_file() -> None:
    files = {path.stem for path in Path(chat_formats.__file__).with_name("templates").iterdir()}
    assert PUBLISHED.keys() == chat_formats.STOPS.keys() == files
    assert all(chat_formats.choose(alias, {}, bytes_and()) for alias in chat_formats.ALIASES)


def test_llama2_by_name_is_the_models_own_format() -> None:
    ours = llama2_tokenizer()
    source = chat_formats.choose("llama-2", {}, ours)
    assert Dialog(SYSTEM + TURNS).render(ours, source) == Dialog(SYSTEM + TURNS).render(ours)


@pytest.mark.parametrize(
    ("name", "marker"),
    [("vicuna", "ASSISTANT:"), ("alpaca", "### Instruction:"), ("chatml", "<|im_end|>"), ("mistral-v1", "[/INST]")],
)
def test_markers_of_a_named_format_are_refused_in_messages(name: str, marker: str) -> None:
    source = chat_formats.source(name, bos=True)
    asked = [{"role": "user", "content": f"x\n{marker} y"}]
    with pytest.raises(DialogError, match="marks roles"):
        rendered(bytes_and(), source, asked)
    if name == "chatml":  # where it is a token it is no text, and the user's letters stay
        ours = bytes_and("<|im_start|>", "<|im_end|>")
        ids, _ = Dialog(asked).render(ours, source)
        assert ids.count(ours.control["<|im_end|>"]) == 1
        assert text_of(ours, ids).count("<|im_end|>") == 2


def test_an_unknown_name_lists_the_names_and_a_file_is_read(tmp_path: Path) -> None:
    with pytest.raises(TemplateError) as caught:
        chat_formats.choose("vicunja", NAMED, bytes_and())
    message = str(caught.value)
    assert "\n" not in message
    assert "template vicunja: neither a file nor a chat format" in message
    assert all(name in message for name in ("tool_use", *chat_formats.STOPS))
    (tmp_path / "mine.jinja").write_text("é{{ messages[0].content }}", encoding="utf-8")
    assert chat_formats.choose(str(tmp_path / "mine.jinja"), {}, bytes_and()) == "é{{ messages[0].content }}"
    assert chat_formats.choose("tool_use", NAMED, bytes_and()) == NAMED["tool_use"]
    (tmp_path / "bad.jinja").write_bytes(b"\xff")
    with pytest.raises(TemplateError, match=r"bad.jinja: is not UTF-8 text at byte 0"):
        chat_formats.choose(str(tmp_path / "bad.jinja"), {}, bytes_and())
    (tmp_path / "long.jinja").write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(TemplateError, match="has 1048577 bytes"):
        chat_formats.choose(str(tmp_path / "long.jinja"), {}, bytes_and())


# What ends an answer


@pytest.mark.parametrize("text", ["<|end_of_turn|>", "<|EOT|>", "▁<EOT>", "<|im_end|>", "<end_of_turn>", "<|eot_id|>"])
def test_known_ends_of_turns_end_an_answer(text: str) -> None:
    assert text in END_OF_TURN
    ours = bytes_and(text)
    assert ours.stop_ids == {1, ours.control[text]}


def test_the_token_behind_an_answer_ends_one() -> None:
    ours = bytes_and("<|over|>", "<|user|>")
    source = "{% for m in messages %}<|user|>{{ m.content }}\n<|over|>{% endfor %}"
    assert template.ends(source, ours) == {1, ours.control["<|over|>"]}
    assert template.ends(source.replace("<|over|>", " and <|over|>"), ours) == {1}  # text stands between
    assert template.ends("{{ raise_exception('no') }}", ours) == {1}
    ids, said = Dialog(TURNS[:2]).render(ours, source)
    assert text_of(ours, [token for token, has_loss in zip(ids, said, strict=True) if has_loss]) == "A1\n<|over|>"


def test_an_end_of_turn_that_is_not_a_token_is_trained_as_text() -> None:
    for ours in (bytes_and(), bytes_and("<|im_start|>", "<|im_end|>")):
        ids, said = Dialog(TURNS).render(ours, chat_formats.source("chatml", bos=True))
        assert text_of(ours, [token for token, has_loss in zip(ids, said, strict=True) if has_loss]) == "A1<|im_end|>"


def test_an_answer_ends_by_the_format(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    with llama2.load(tmp_path / "tiny.gguf", runner="numpy", template="vicuna") as model:
        request = model.answering(Request((), stop=("x",)), model.prompt("hello"))
        assert (request.stop, request.stop_tokens) == (("x", "USER:"), {2})
        assert model.tokenizer.decode(list(request.prompt)).endswith("USER: hello ASSISTANT:")
        assert model.checkpoint.assumes_format is None
    with llama2.load(tmp_path / "tiny.gguf", runner="numpy") as model:
        assert model.answering(Request(()), model.prompt("hello")).stop == ()


# Named templates


def written(tmp_path: Path, settings: dict[str, Any], generation: dict[str, Any] | None = None) -> Checkpoint:
    """A tiny folder with these `settings` of its tokenizer and of generation."""
    write_tiny_gguf(tmp_path / "source.gguf")
    hf_folder.write(checkpoint.open(tmp_path / "source.gguf"), tmp_path / "model")
    for name, values in (("tokenizer", settings), ("generation", generation or {})):
        path = tmp_path / "model" / f"{name}_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return checkpoint.open(tmp_path / "model")


def test_named_templates_of_a_folder(tmp_path: Path) -> None:
    model = written(tmp_path, {"chat_template": [{"name": name, "template": text} for name, text in NAMED.items()]})
    assert (model.template, model.templates) == (NAMED["default"], NAMED)
    assert model.template_for(tools=False) == NAMED["default"]
    assert model.template_for(tools=True) == NAMED["tool_use"]

    (tmp_path / "model" / "additional_chat_templates").mkdir()
    (tmp_path / "model" / "additional_chat_templates" / "rag.jinja").write_text("rag")
    (tmp_path / "model" / "chat_template.jinja").write_text("own")
    model = checkpoint.open(tmp_path / "model")
    assert model.templates == {"default": "own", "rag": "rag"}  # what transformers takes then
    assert model.template_for(tools=True) == "own"
    chosen = checkpoint.open(tmp_path / "model", template="rag")
    assert (chosen.template, chosen.templates) == ("rag", {"default": "rag"})

    (tmp_path / "model" / "chat_template.jinja").unlink()
    model = checkpoint.open(tmp_path / "model")
    with pytest.raises(DialogError, match=r"has the chat templates rag, .* choose one with --template NAME"):
        model.template_for(tools=False)


def test_conversions_keep_named_templates(tmp_path: Path) -> None:
    write_tiny_gguf(
        tmp_path / "tiny.gguf",
        edit=lambda writer: writer.add_chat_template(
            [{"name": name, "template": text} for name, text in NAMED.items()]
        ),
    )
    source = checkpoint.open(tmp_path / "tiny.gguf")
    assert source.templates == NAMED
    hf_folder.write(source, tmp_path / "folder")
    folder = checkpoint.open(tmp_path / "folder")
    assert folder.templates == NAMED
    gguf_writer.write(folder, tmp_path / "again.gguf")
    assert checkpoint.open(tmp_path / "again.gguf").templates == NAMED
    reader = gguf.GGUFReader(tmp_path / "again.gguf")
    assert reader.fields["tokenizer.chat_templates"].contents() == ["tool_use"]
    assert reader.fields["tokenizer.chat_template.tool_use"].contents() == NAMED["tool_use"]
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "folder").chat_template == NAMED


def test_a_template_that_goes_through_tools_unasked() -> None:
    ours = bytes_and()
    source = "tools:{% for tool in tools %} {{ tool.function.name }}{% endfor %}; {{ messages[0].content }}"
    assert rendered(ours, source, TURNS[:1]) == "tools:; U1"
    assert rendered(ours, source, TURNS[:1], tools=TOOL) == "tools: f; U1"
    with pytest.raises(TemplateError, match="NoneType"):  # which has nothing to do with tools
        rendered(ours, "{% for d in documents %}{% endfor %}{{ messages[0].content }}", TURNS[:1])
    asks = "{{ 'none' if tools is none else 'some' }}{{ messages[0].content }}"
    assert rendered(ours, asks, TURNS[:1]) == "noneU1"


def test_a_template_that_takes_arguments_as_text() -> None:
    ours = bytes_and("<|call|>")
    source = (
        "{% for m in messages %}{% if m.tool_calls %}<|call|>{{ m.tool_calls[0].function.name + ' ' + "
        "m.tool_calls[0].function.arguments }}{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{# tools #}"
    )
    call = {"id": "1", "function": {"name": "f", "arguments": '{"city": "Köln"}'}}
    asked = [TURNS[0], {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "R"}]
    assert rendered(ours, source, asked) == 'U1<|call|>f {"city": "Köln"}</s>R'
    assert call_format(source, ours).opening == "<|call|>"
    null = source.replace("m.tool_calls %}", "m.content is none %}").replace("arguments }}", "arguments | tojson }}")
    assert rendered(ours, null, asked) == 'U1<|call|>f {"city": "Köln"}</s>R'


def test_an_empty_text_stays_empty_for_a_template_that_asks() -> None:
    ours = bytes_and("<|call|>", "<|said|>")
    source = (
        "{% for m in messages %}{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
        "{% if m.content or f.arguments.values() | list | first %}<|said|>{% endif %}"
        "<|call|>{{ f | tojson }}{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{# tools #}"
    )
    call = {"id": "1", "function": {"name": "f", "arguments": {"a": ""}}}
    asked = [TURNS[0], {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "R"}]
    assert rendered(ours, source, asked) == 'U1<|call|>{"name": "f", "arguments": {"a": ""}}</s>R'


# Hostile ones


def test_a_template_with_too_many_role_markers() -> None:
    markers = "".join(f"[{chr(65 + i % 26)}{'A' * (i // 26 + 1)}]" for i in range(2000))
    source = "{# " + markers + " #}{{ messages[0].content }}"
    with pytest.raises(TemplateError, match=r"it has 2000 role markers, and the limit is 1024"):
        rendered(bytes_and(), source, TURNS[:1])


def test_a_lone_surrogate_in_a_template_or_beside_it(tmp_path: Path) -> None:
    model = written(tmp_path, {"chat_template": "\ud800{{ messages[0].content }}"}, {"note": "\udfff"})
    wrong = "chat template: character 0 is a lone surrogate, U\\+D800; remove it"
    with pytest.raises(TemplateError, match=wrong):
        Dialog(TURNS[:1]).render(model.tokenizer, model.template)
    for write, path in ((hf_folder.write, "folder"), (gguf_writer.write, "file.gguf")):
        with pytest.raises(TemplateError, match=wrong):
            write(model, tmp_path / path)
    model.template, model.templates = None, {}
    hf_folder.write(model, tmp_path / "other")
    assert json.loads((tmp_path / "other" / "generation_config.json").read_text())["note"] == "\udfff"


def test_long_control_tokens_take_little_memory() -> None:
    ours = bytes_and(*(f"<|{chr(97 + i) * 1000}" for i in range(20)))
    spelled = template._spellings(ours)
    texts = (*spelled._tokens, *spelled._backwards, *spelled._folded)
    assert sum(map(len, texts)) < 100_000  # and not a beginning for each letter
    assert template._break_tokens("z <|" + "c" * 500, "\ue000", ours) == "z <|" + "c" * 500 + "\ue000"


# What `show` and `chat` say


def test_what_a_model_without_a_template_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    note = "Tiny names no chat format; Llama 2's is used; --template NAME chooses another"
    with llama2.load(tmp_path / "tiny.gguf", runner="numpy") as model:
        with warnings.catch_warnings(record=True, action="always") as caught:
            model.chat("hello", max_tokens=1)
            model.chat("hello", max_tokens=1)
        assert [str(warning.message) for warning in caught] == [note]
        assert [warning.filename for warning in caught] == [__file__]
    words = ("chat", "-m", tmp_path / "tiny.gguf", "--runner", "numpy", "--max-tokens", "1", "hello")
    assert typed(capsys, *words)[2] == f"llama2: {note}\n"
    assert typed(capsys, *words, "--template", "vicuna")[::2] == (0, "")
    status, _, error = typed(capsys, *words, "--template", "nothing")
    assert status == 1
    assert error.startswith("llama2: error: template nothing: neither a file nor a chat format")
    assert error.count("\n") == 1


def test_llama_2_chat_is_known_by_vocabulary_and_name(tmp_path: Path) -> None:
    def note(name: str, size: int, metadata: dict[str, str]) -> str | None:
        tokenizer = llama2_tokenizer()
        tokenizer.vocab_size = size
        path = tmp_path / name
        return Checkpoint(
            path, "gguf", None, {}, metadata, name=name, tokenizer_source=lambda: tokenizer
        ).assumes_format  # type: ignore[arg-type]

    assert note("Llama-2-7b-chat-hf", 32000, {}) is None
    assert note("llama-2-13b-chat.Q4_K_M.gguf", 32000, {}) is None
    assert note("mine", 32000, {"_name_or_path": "meta-llama/Llama-2-70b-chat-hf"}) is None
    assert "names no chat format" in (note("Llama-2-7b-hf", 32000, {}) or "")
    assert "names no chat format" in (note("vicuna-13b", 32000, {}) or "")
    assert "names no chat format" in (note("Llama-2-7b-chat-chatml", 32002, {}) or "")


def test_show_says_how_a_model_is_talked_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def rows(*words: object) -> dict[str, str]:
        status, out, error = typed(capsys, "show", *words)
        assert (status, error) == (0, "")
        return {line[:13].strip(): line[14:] for line in out.splitlines()}

    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    assert rows(path)["template"] == "none; chat uses Llama 2's format, --template NAME chooses another"
    assert rows(path)["ends"] == "at </s>"
    assert rows(path, "--template", "alpaca")["template"] == "by --template, alpaca"
    assert rows(path, "--template", "alpaca")["ends"] == "at </s>; before ### Instruction:"
    chatml = "{%- for m in messages %}<|im_start|>{{ m.role + '\\n' + m.content }}<|im_end|>\n{% endfor %}"
    chatml += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    write_tiny_gguf(
        path,
        tokenizer="bpe",
        edit=lambda writer: writer.add_chat_template(
            [{"name": "default", "template": chatml}, {"name": "rag", "template": "r"}]
        ),
    )
    assert rows(path)["template"] == "its own, chatml; by name also rag"
    chat = json.loads(typed(capsys, "show", path, "--json")[1])["chat"]
    assert (chat["format"], chat["templates"], chat["assumed"]) == ("chatml", ["default", "rag"], False)
    assert "<|im_end|>" in chat["end_tokens"]
    write_tiny_gguf(path, tokenizer="bpe")
    assert rows(path)["template"] == "none; chat needs --template"
