"""llama.cpp's and vLLM's native routes, as their own documents describe them."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from gguf import GGUFWriter, TokenType

from models import tiny_config, write_tiny_gguf
from serving import ENDLESS, Server, events, serving, write_model

TEXT = "to be or not"
COMPLETION = "/completion"
#: Of a last event or a whole completion, by llama.cpp's document.
FIELDS = {
    *("index", "content", "tokens", "id_slot", "stop", "model", "tokens_predicted", "tokens_evaluated", "prompt"),
    *("generation_settings", "has_new_line", "truncated", "stop_type", "stopping_word", "tokens_cached", "timings"),
}
INFILL = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Random models: `tiny` with BOS before its texts, `coder` with tokens for infills, `long` for long answers."""
    folder = tmp_path_factory.mktemp("models")

    def for_infills(writer: GGUFWriter) -> None:
        data = writer.kv_data[0]
        data["tokenizer.ggml.tokens"].value[-3:] = INFILL
        data["tokenizer.ggml.token_type"].value[-3:] = [int(TokenType.CONTROL)] * 3

    write_tiny_gguf(folder / "tiny.gguf", config=tiny_config(context_length=512))
    write_tiny_gguf(folder / "coder.gguf", config=tiny_config(), tokenizer="bpe", edit=for_infills)
    write_model(folder, "long")
    with serving([folder / f"{name}.gguf" for name in ("tiny", "coder", "long")], "--temperature", "0.3") as server:
        yield server


def complete(server: Server, **fields: Any) -> Any:
    """The body of a greedy completion, which goes on to its limit."""
    body = {"prompt": TEXT, "n_predict": 8, "temperature": 0, "ignore_eos": True, "logit_bias": [[0, False]], **fields}
    status, _, answer = server.post(COMPLETION, body)
    assert status == 200, answer
    return answer


def test_a_completion_says_what_it_did(server: Server) -> None:
    whole = complete(server, return_tokens=True, seed=7, stop=["never said", ""])
    assert set(whole) == FIELDS
    openai = server.post(
        "/v1/completions",
        {"model": "tiny", "prompt": TEXT, "max_tokens": 8, "temperature": 0, "logit_bias": ENDLESS, "logprobs": 0},
    )[2]
    assert (whole["content"], whole["tokens_evaluated"]) == (
        openai["choices"][0]["text"],
        openai["usage"]["prompt_tokens"],
    )
    assert whole["prompt"] == "<s>" + TEXT
    assert len(whole["tokens"]) == whole["tokens_predicted"] == 8
    detokenized = server.post("/detokenize", {"tokens": whole["tokens"]})[2]["content"]
    assert whole["content"].endswith(detokenized.lstrip())
    assert (whole["stop"], whole["stop_type"], whole["stopping_word"]) == (True, "limit", "")
    assert (whole["truncated"], whole["has_new_line"]) == (False, "\n" in whole["content"])
    settings = whole["generation_settings"]
    wanted = {"n_predict": 8, "temperature": 0, "seed": 7, "ignore_eos": True, "stop": ["never said"], "stream": False}
    assert wanted.items() <= settings.items()
    assert {"token": 0, "bias": None} in settings["logit_bias"]
    timings = whole["timings"]
    assert timings["prompt_n"] + timings["cache_n"] == whole["tokens_evaluated"]
    assert timings["predicted_n"] == 8
    for name, steps in (("prompt", timings["prompt_n"]), ("predicted", 7)):  # the first comes with the prompt
        assert timings[f"{name}_per_token_ms"] == pytest.approx(timings[f"{name}_ms"] / steps)
        assert timings[f"{name}_per_second"] == pytest.approx(1e3 * steps / timings[f"{name}_ms"])
    assert complete(server)["tokens"] == []


def test_what_nobody_says_is_the_servers_default(server: Server) -> None:
    defaults = {"temperature": 0.3, "top_k": 0, "top_p": 0.9, "min_p": 0.0, "repeat_penalty": 1.0, "n_predict": -1}
    said = server.post(COMPLETION, {"prompt": TEXT})[2]["generation_settings"]
    assert defaults.items() <= said.items()
    assert defaults.items() <= server.get("/props")[2]["default_generation_settings"]["params"].items()


def test_a_completion_streams(server: Server) -> None:
    whole = complete(server, return_tokens=True, n_probs=2)
    *parts, last = events(server.post(COMPLETION, streamed := {
        "prompt": TEXT, "n_predict": 8, "temperature": 0, "ignore_eos": True, "logit_bias": {"0": False},
        "n_probs": 2, "stream": True, "timings_per_token": True,
    })[2])  # fmt: skip
    assert "".join(part["content"] for part in parts) == whole["content"]
    assert list(itertools.chain(*(part["tokens"] for part in parts))) == whole["tokens"]
    assert [part["tokens_predicted"] for part in parts] == list(range(1, 9))
    assert [part["timings"]["predicted_n"] for part in parts] == list(range(1, 9))
    assert not any(part["stop"] for part in parts)
    scored = list(itertools.chain(*(part["completion_probabilities"] for part in parts)))
    assert scored == whole["completion_probabilities"]
    assert (set(last), last["content"], last["tokens"], last["stop"]) == (FIELDS, "", [], True)
    assert (last["stop_type"], last["tokens_predicted"]) == ("limit", 8)
    assert last["generation_settings"]["stream"] is streamed["stream"]


def test_probabilities_are_those_of_the_openai_route(server: Server) -> None:
    scored = complete(server, n_probs=3, return_tokens=True)
    rows = scored["completion_probabilities"]
    assert [row["id"] for row in rows] == scored["tokens"]
    body = {"model": "tiny", "prompt": TEXT, "max_tokens": 8, "temperature": 0, "logit_bias": ENDLESS, "logprobs": 3}
    theirs = server.post("/v1/completions", body)[2]["choices"][0]["logprobs"]
    assert [row["logprob"] for row in rows] == pytest.approx(theirs["token_logprobs"])
    for row in rows:
        tops = [top["logprob"] for top in row["top_logprobs"]]
        assert len(tops) == 3
        assert tops == sorted(tops, reverse=True)
        assert sum(map(math.exp, tops)) <= 1
        assert all(set(top) == {"id", "token", "bytes", "logprob"} for top in row["top_logprobs"])
        assert bytes(row["bytes"]).decode(errors="ignore") == row["token"]


def test_prompts_in_every_form(server: Server) -> None:
    ids = server.post("/tokenize", {"content": TEXT, "add_special": True})[2]["tokens"]
    text = complete(server)["content"]
    assert complete(server, prompt=ids)["content"] == text
    assert complete(server, prompt={"prompt_string": TEXT})["content"] == text
    assert complete(server, prompt=[1, TEXT])["content"] == text
    assert complete(server, prompt="<s>" + TEXT)["tokens_evaluated"] == len(ids)  # BOS once
    several = complete(server, prompt=[TEXT, ids, {"prompt_string": TEXT}, [1, TEXT]])
    assert [(row["index"], row["content"]) for row in several] == [(i, text) for i in range(4)]
    assert [row["index"] for row in complete(server, prompt=[TEXT])] == [0]
    drawn = complete(server, n_cmpl=3, temperature=2, seed=1)
    assert len({row["content"] for row in drawn}) > 1
    assert complete(server, prompt="")["tokens_evaluated"] == 1
    for prompt in ([], [[]], [9999], [-1], {"prompt_string": TEXT, "multimodal_data": ["AA=="]}):
        assert server.post(COMPLETION, {"prompt": prompt})[0] == 400


def test_what_ends_a_completion(server: Server) -> None:
    whole = complete(server)["content"]
    word = whole[3:5]
    stopped = complete(server, stop=word)
    assert (stopped["stop_type"], stopped["stopping_word"]) == ("word", word)
    assert stopped["content"] == whole[: whole.index(word)]
    ended = complete(server, ignore_eos=False, logit_bias=[[2, 1000]])
    assert (ended["stop_type"], ended["content"], ended["tokens_predicted"]) == ("eos", "", 1)
    full = complete(server, n_predict=4000)
    used = full["tokens_evaluated"] + full["tokens_predicted"]
    assert (full["stop_type"], full["truncated"], used) == ("limit", True, 512)
    assert complete(server, n_predict=-1)["truncated"]
    nothing = complete(server, n_predict=0)
    assert (nothing["content"], nothing["tokens_predicted"], nothing["stop_type"]) == ("", 0, "limit")
    assert [
        part["stop"] for part in events(server.post(COMPLETION, {"prompt": TEXT, "n_predict": 0, "stream": True})[2])
    ]


def test_biases_in_every_form(server: Server) -> None:
    free = complete(server, n_predict=1, return_tokens=True)
    (token,) = free["tokens"]
    piece = server.post("/tokenize", {"content": "e"})[2]["tokens"]
    for bias in ([[token, False]], [[token, -1000]], {str(token): -1000}, {str(token): False}):
        assert complete(server, n_predict=1, return_tokens=True, logit_bias=bias)["tokens"] != [token]
    for given in ([["e", 1000.0]], {"e": 1000}):
        assert complete(server, n_predict=1, return_tokens=True, logit_bias=given)["tokens"][0] in piece
    for wrong in ([[1]], [[1, True]], [[1, "x"]], [[1.5, 1]], {"e": True}):
        status, _, answer = server.post(COMPLETION, {"prompt": TEXT, "logit_bias": wrong})
        assert (status, answer["error"]["message"].startswith("logit_bias")) == (400, True), wrong


def test_a_completion_follows_a_schema(server: Server) -> None:
    schema = {"type": "array", "items": {"enum": ["Rom", "Wien"]}, "minItems": 2, "maxItems": 2}
    body = {"prompt": TEXT, "json_schema": schema, "n_predict": 400, "seed": 3}
    answer = server.post(COMPLETION, body)[2]
    jsonschema.validate(json.loads(answer["content"]), schema)
    assert answer["stop_type"] == "eos"
    assert server.post(COMPLETION, {**body, "ignore_eos": True})[0] == 400
    _, headers, answer = server.post(COMPLETION, {**body, "json_schema": {**schema, "uniqueItems": True}})
    jsonschema.validate(json.loads(answer["content"]), schema)
    assert "uniqueItems" in headers["warning"]


def test_only_the_fields_that_are_wanted(server: Server) -> None:
    wanted = ["content", "generation_settings/n_predict", "no/such"]
    assert set(complete(server, response_fields=wanted)) == {"content", "generation_settings/n_predict"}


@pytest.mark.parametrize(
    "fields",
    [
        {"mirostat": 2},
        {"xtc_probability": 0.5},
        {"dry_multiplier": 1.0},
        {"samplers": ["top_k"]},
        {"lora": [{"id": 0}]},
    ],
)
def test_what_would_change_the_answer_is_refused(server: Server, fields: dict[str, Any]) -> None:
    status, _, answer = server.post(COMPLETION, {"prompt": TEXT, **fields})
    assert (status, answer["error"]["param"]) == (400, *fields)[:2]


def test_what_changes_nothing_is_taken(server: Server) -> None:
    off = {"mirostat": 0, "xtc_probability": 0.0, "dry_multiplier": 0.0, "lora": [], "n_keep": 0, "id_slot": -1}
    headers = server.post(COMPLETION, {"prompt": TEXT, "n_predict": 1, **off})[1]
    assert "warning" not in headers
    headers = server.post(COMPLETION, {"prompt": TEXT, "n_predict": 1, "dry_base": 2.0, "stop": ["", "never"]})[1]
    assert all(name in headers["warning"] for name in ("dry_base", "stop"))


def test_tokens_are_drawn_as_asked(server: Server) -> None:
    free = complete(server)["content"]
    assert complete(server, presence_penalty=-50, repeat_last_n=0)["content"] == free  # looks at nothing
    again = complete(server, presence_penalty=-50, repeat_last_n=1, return_tokens=True)["tokens"]
    assert again == again[:1] * 8  # the one before is by far the likeliest
    assert complete(server, temperature=-1)["content"] == free
    said = complete(server, repeat_penalty=1.5, repeat_last_n=8, top_k=-1)["generation_settings"]
    assert (said["repeat_penalty"], said["repeat_last_n"], said["top_k"]) == (1.5, 8, -1)
    hot = {"temperature": 5.0, "seed": 3}
    assert complete(server, **hot)["content"] != free
    assert complete(server, **hot)["content"] == complete(server, **hot)["content"]
    for one in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"typical_p": 1e-9, "temperature": 1e-3}):
        assert len({complete(server, **{**hot, **one, "seed": seed})["content"] for seed in range(3)}) == 1, one


def test_a_completion_follows_llama_cpps_grammar(server: Server) -> None:
    answer = server.post(COMPLETION, {"prompt": TEXT, "grammar": 'root ::= "yes" | "no"'})[2]
    assert (answer["content"] in ("yes", "no"), answer["stop_type"]) == (True, "eos")
    status, _, answer = server.post(COMPLETION, {"prompt": TEXT, "grammar": "root ::= ("})
    assert (status, answer["error"]["param"]) == (400, "grammar")


def test_an_infill_stands_between_two_texts(server: Server) -> None:
    asked = {"input_prefix": "to be", "input_suffix": "not", "prompt": "or", "temperature": 0, "n_predict": 4}
    status, _, answer = server.post("/infill", {"model": "coder", **asked})
    assert (status, answer["prompt"]) == (200, "<fim_prefix>to be<fim_suffix>not<fim_middle>or")
    begun = server.post(COMPLETION, {"model": "coder", "prompt": answer["prompt"], "temperature": 0, "n_predict": 4})
    assert begun[2]["content"] == answer["content"]
    status, _, answer = server.post("/infill", {"model": "tiny", **asked})
    assert (status, "no tokens for it" in answer["error"]["message"]) == (400, True)
    assert server.post("/infill", {"model": "coder", **asked, "input_extra": [{"text": "x"}]})[0] == 400


def test_slots_say_what_runs_and_nothing_of_its_texts(server: Server) -> None:
    idle = server.get("/slots")[2]
    assert len(idle) == server.get("/props")[2]["total_slots"]
    assert not any(slot["is_processing"] for slot in idle)
    body = {"model": "long", "prompt": TEXT, "stream": True, "ignore_eos": True, "stop": ["secret"], "n_cmpl": 2}
    with server.open(COMPLETION, {**body, "seed": 5}) as connection:
        assert connection.recv(1 << 16)
        assert server.get("/slots?fail_on_no_slot=1")[0] == 200
        slots = server.get("/slots?model=long")[2]
    busy = [slot for slot in slots if slot["is_processing"]]
    assert [slot["id"] for slot in slots] == list(range(len(idle)))
    assert [slot["params"]["seed"] for slot in busy] == [5, 5]
    (count,) = {slot["n_prompt_tokens"] for slot in busy}
    assert count == complete(server)["tokens_evaluated"]
    (state,) = busy[0]["next_token"]
    assert state["n_decoded"] + state["n_remain"] == 8192 - count
    assert "secret" not in json.dumps(busy)
    assert TEXT not in json.dumps(busy)


def test_tokens_of_texts_and_chats(server: Server) -> None:
    ids = server.post("/tokenize", {"content": TEXT})[2]["tokens"]
    answer = server.post("/tokenize", {"model": "tiny", "prompt": TEXT, "return_token_strs": True})[2]
    assert answer["tokens"] == [1, *ids]
    assert (answer["count"], answer["max_model_len"]) == (len(ids) + 1, 512)
    assert "".join(answer["token_strs"]) == "<s> " + TEXT
    assert server.post("/tokenize", {"prompt": TEXT, "add_special_tokens": False})[2]["tokens"] == ids
    messages = [{"role": "user", "content": "to be"}]
    chat = server.post("/tokenize", {"messages": messages})[2]
    answer = {"model": "tiny", "messages": messages, "max_tokens": 1}
    assert chat["count"] == server.post("/v1/chat/completions", answer)[2]["usage"]["prompt_tokens"]
    prompt = server.post("/apply-template", {"messages": messages})[2]["prompt"]
    assert complete(server, prompt=prompt)["tokens_evaluated"] == chat["count"]

    messages.append({"role": "assistant", "content": "or not"})
    whole = server.post("/tokenize", {"messages": messages, "add_generation_prompt": False})[2]["tokens"]
    rest = {"add_generation_prompt": False, "continue_final_message": True}
    begun = server.post("/tokenize", {"messages": messages, **rest})[2]["tokens"]
    assert whole[-1] == 2  # EOS
    assert whole[: len(begun)] == begun
    for wrong in ({}, {"content": "a", "prompt": "b"}, {"messages": messages[:1], "add_generation_prompt": False}):
        assert server.post("/tokenize", wrong)[0] == 400


def test_tokenizers_and_versions(server: Server) -> None:
    info = server.get("/tokenizer_info")[2]
    assert (info["tokenizer_class"], info["bos_token"], info["eos_token"]) == ("LlamaTokenizer", "<s>", "</s>")
    assert info["added_tokens_decoder"]["2"] == {"content": "</s>", "special": True}
    coder = server.get("/tokenizer_info?model=coder")[2]
    assert (coder["bos_token"], coder["model_max_length"]) == ("<|im_start|>", 256)
    assert server.get("/version")[2] == server.get("/api/version")[2]
    assert server.get("/ping")[0] == server.request("POST", "/ping")[0] == 200
