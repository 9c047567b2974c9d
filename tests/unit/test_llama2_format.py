"""Llama 2's own chat format, by the vectors published with its tokenizer (spec 2.2, 2.3), and the rules of a dialog."""

import hashlib
from typing import Any

import pytest

from llama2.errors import DialogError, TemplateError
from llama2.text.dialog import SPECIAL_TAGS, Dialog, Message, default_system_prompt
from llama2.text.template import known
from llama2.text.tokenizer import Tokenizer
from texts import llama2_tokenizer

CONTENTS = ("Be brief.", "Hi", "Hello!", "Bye")
HELLO = "1 518 25580 29962 15043 518 29914 25580 29962"
HI = "1 518 25580 29962 6324 518 29914 25580 29962 15043 29991 29871 2"
BYE = "1 518 25580 29962 2648 29872 518 29914 25580 29962"
BRIEF = (
    "1 518 25580 29962 3532 14816 29903 6778 13 3629 11473 29889 13 29966 829 14816 29903 6778 13 13 18567 518 29914 "
    f"25580 29962 15043 29991 29871 2 {BYE}"
)
HAIKU = (
    "1 518 25580 29962 3532 14816 29903 6778 13 2499 1994 1234 411 5952 18282 13 29966 829 14816 29903 6778 13 13 "
    "29902 626 2675 304 3681 29892 825 881 306 1074 29973 518 29914 25580 29962"
)


@pytest.fixture(scope="module")
def llama2() -> Tokenizer:
    return llama2_tokenizer()


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", ""),
        ("Hello world", "15043 3186"),
        ("hello", "22172"),
        (" Hello", "29871 15043"),
        (" ", "259"),
        ("  ", "1678"),
        ("\n", "29871 13"),
        ("a\nb", "263 13 29890"),
        ("12345", "29871 29896 29906 29941 29946 29945"),
        ("3.14", "29871 29941 29889 29896 29946"),
        ("a  b", "263 29871 289"),
        ("a   b", "263 259 289"),
        ("é", "904"),
        ("naïve café", "1055 30085 345 274 28059"),
        ("日本語", "29871 30325 30346 30968"),
        ("你好", "29871 30919 31076"),
        ("😀", "29871 243 162 155 131"),
        ("C++17", "315 1817 29896 29955"),
        ("Llama 2", "365 29880 3304 29871 29906"),
        ("I believe the meaning of life is", "306 4658 278 6593 310 2834 338"),
        (
            "The quick brown fox jumps over the lazy dog.",
            "450 4996 17354 1701 29916 432 17204 975 278 17366 11203 29889",
        ),
        (
            "    def f(x):\n        return x+1",
            "268 822 285 29898 29916 1125 13 4706 736 921 29974 29896",
        ),
        ("<s>", "529 29879 29958"),
        ("</s>", "1533 29879 29958"),
    ],
)
def test_vectors_of_the_tokenizer(llama2: Tokenizer, text: str, ids: str) -> None:
    assert llama2.encode(text) == [*map(int, ids.split())]
    assert llama2.decode(llama2.encode(text)) == text
    assert llama2.encode(text, bos=True, eos=True) == [1, *map(int, ids.split()), 2]


@pytest.mark.parametrize(
    ("messages", "ids"),
    [
        (["Hello"], HELLO),
        (["  Hello\n"], HELLO),
        (["Hi", "Hello!", "Bye"], f"{HI} {BYE}"),
        ([" Hi ", "\nHello! ", "Bye "], f"{HI} {BYE}"),
        ([None, "Be brief.", "Hi", "Hello!", "Bye"], BRIEF),
        ([None, "Always answer with Haiku", "I am going to Paris, what should I see?"], HAIKU),
    ],
)
def test_vectors_of_the_chat_format(llama2: Tokenizer, messages: list[str | None], ids: str) -> None:
    got, mask = chat(*messages).render(llama2)
    answered = any("Hello!" in (message or "") for message in messages)
    assert got == [*map(int, ids.split())]
    said = [token for token, flag in zip(got, mask, strict=True) if flag]
    assert said == ([15043, 29991, 29871, 2] if answered else [])  # text, closing space, EOS


def chat(*contents: str | None) -> Dialog:
    """A dialog that user and assistant speak in turn; after a None, a system message comes first."""
    roles = ["system"] * (contents[0] is None) + ["user", "assistant"] * 4
    return Dialog([Message(role, content or "") for role, content in zip(roles, filter(None, contents), strict=False)])


def test_a_whole_dialog_ends_with_eos(llama2: Tokenizer) -> None:
    ids, mask = chat("Hi", "Hello!").render(llama2)
    assert ids == [*map(int, HI.split())]
    assert mask == [False] * 9 + [True] * 4


def test_the_first_release_s_default_system_prompt(llama2: Tokenizer) -> None:
    prompt = default_system_prompt()
    assert hashlib.sha256(prompt.encode()).hexdigest() == (
        "cda5d1f1710b2195c05075e118c2dc9499e5c5044a45c8cebbbac3d00632bfd4"
    )
    assert len(llama2.encode(prompt)) == 116
    assert len(chat(None, prompt, "Hello").render(llama2)[0]) == 138


# The chat template of Llama 2's repositories on the Hugging Face Hub.
TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def test_its_hugging_face_template_means_the_same_format(llama2: Tokenizer) -> None:
    dialog = chat(None, *CONTENTS)
    assert known(TEMPLATE) == "Llama 2"
    assert dialog.render(llama2, TEMPLATE) == dialog.render(llama2)
    ids, mask = dialog.render(llama2, TEMPLATE + "{# read by nobody, so it runs as it is #}")
    assert (ids, mask) == dialog.render(llama2)
    with pytest.raises(TemplateError, match="no template variable 'thinking'"):
        dialog.render(llama2, TEMPLATE, variables={"thinking": True})


@pytest.mark.parametrize("tag", SPECIAL_TAGS)
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_role_markers_are_refused_or_neutralised(llama2: Tokenizer, tag: str, place: int) -> None:
    contents = [*CONTENTS]
    contents[place] += f" {tag[0]}{tag}x{tag}"
    dialog = chat(None, *contents)
    with pytest.raises(DialogError) as caught:
        dialog.render(llama2)
    assert f"message {place} contains '{tag}'" in str(caught.value)
    text, plain = (llama2.decode(d.render(llama2, neutralise=True)[0]) for d in (dialog, chat(None, *CONTENTS)))
    assert [text.count(t) for t in SPECIAL_TAGS] == [plain.count(t) for t in SPECIAL_TAGS]
    assert f"{tag[0]}{tag[0]} {tag[1:]}x{tag[0]} {tag[1:]}" in text


def test_lookalikes_and_control_tokens_spelled_out_are_ordinary_text(llama2: Tokenizer) -> None:
    for text in (
        "［INST］",
        "[ＩＮＳＴ]",
        "[INST",
        "INST]",
        "[inst]",
        "<<ЅYS>>",
        "<s>",
        "</s>",
        "<unk>",
        "<0x0A>",
        "＜s＞",
    ):
        ids, _ = chat(f"a {text} b").render(llama2)
        assert llama2.decode(ids) == f"[INST] a {text} b [/INST]"
        assert [i for i in ids if i < 3] == [1]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        ([{"role": "system", "content": "a"}], "message 0: a system message alone"),
        ([{"role": "assistant", "content": "a"}], "message 0: role assistant where system or user must come"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "message 1: role user where assistant"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "message 1: role system"),
        ([{"role": "system", "content": "a"}, {"role": "system", "content": "b"}], "message 1: role system"),
        ([{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}], "message 1: role assistant"),
        ([{"role": "function", "content": "a"}], "message 0: role 'function' is unknown"),
        ([{"role": "tool", "content": "a"}], "message 0: role tool where system or user must come"),
        ([{"role": ["user"], "content": "a"}], "message 0: role ['user'] is unknown"),
        ([{"role": "user", "content": ""}], "message 0: content is empty"),
        ([{"role": "user", "content": " \n\u3000"}], "message 0: content is empty"),
        ([{"role": "user", "content": None}], "message 0: content must be text, not NoneType"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "message 0: content must be text, not list"),
        ([{"role": "user"}], "message 0: a message has a role and a content"),
        (
            [{"role": "user", "content": "a", "name": "b"}],
            "message 0: a message has a role and a content, and nothing else",
        ),
        (["a"], "message 0: a message has a role and a content"),
    ],
)
def test_rules_of_a_dialog(messages: list[Any], reason: str) -> None:
    with pytest.raises(DialogError) as caught:
        Dialog(messages)
    assert reason in str(caught.value)
