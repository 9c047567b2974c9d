"""The program `llama2` as scripts use it: arguments in, text or JSON out, exit codes."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from commands import typed
from llama2.cli.main import run

QUESTION = "Name the capital of Japan."  # its greedy answer wins by a wide margin at every token


class Program:
    """Runs `llama2` in a process of its own, with the default model and a home that lasts for the session."""

    def __init__(self, model: Path, home: Path) -> None:
        self.model = str(model)
        self.environment = os.environ | {"LLAMA2_HOME": str(home), "PYTHONUNBUFFERED": ""}

    def command(self, *words: str) -> list[str]:
        model = ["-m", self.model] if words[0] in {"chat", "generate", "bench"} else []
        return [sys.executable, "-m", "llama2", words[0], *model, *words[1:]]

    def run(
        self, *words: str, stdin: str | bytes = b"", status: int = 0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*words),
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            capture_output=True,
            env=self.environment | environment,
            timeout=120,
            check=False,
        )
        text = subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())
        assert done.returncode == status, text
        return text

    def json(self, *words: str, **options: Any) -> dict[str, Any]:
        done = self.run(*words, "--json", **options)
        assert done.stdout.count("\n") == 1
        record: dict[str, Any] = json.loads(done.stdout)
        return record


@pytest.fixture(scope="session")
def llama2(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Program:
    return Program(model_path, tmp_path_factory.mktemp("home"))


def test_chat_prints_the_answer_and_nothing_else(llama2: Program) -> None:
    done = llama2.run("chat", QUESTION, "--temperature", "0")
    assert done.stdout == "The capital of Japan is Tokyo.\n"
    assert done.stderr == ""
    record = llama2.json("chat", *QUESTION.split(), "--temperature", "0", "--seed", "5")
    # 36 tokens: the template's system prompt and marks around the question's 6
    assert (record["text"] + "\n", record["finish_reason"]) == (done.stdout, "stop")
    assert (record["prompt_tokens"], record["seed"], record["model"]) == (36, 5, llama2.model)
    assert 0 < record["first_token_seconds"] < record["seconds"]


def test_questions_come_from_files_and_pipes_too(llama2: Program, tmp_path: Path) -> None:
    (tmp_path / "question").write_text(QUESTION + "\n")
    piped = llama2.run("chat", "--temperature", "0", stdin=QUESTION + "\n")
    named = llama2.run("chat", "--temperature", "0", f"@{tmp_path / 'question'}")
    assert piped.stdout == named.stdout == "The capital of Japan is Tokyo.\n"
    both = llama2.json("chat", "Answer briefly:", "-", "--max-tokens", "1", stdin=QUESTION)
    assert both["prompt_tokens"] > 36


def test_generate(llama2: Program) -> None:
    words = ("generate", "Once upon a time", "--max-tokens", "12")
    record = llama2.json(*words, "--temperature", "0", "--logprobs", "2")
    assert (record["finish_reason"], len(record["token_ids"]), record["prompt_tokens"]) == ("length", 12, 4)
    assert [place["token"] for place in record["logprobs"]] == record["token_ids"]
    for place in record["logprobs"]:
        assert place["top"][0] == [place["token"], place["logprob"]]  # greedy takes the likeliest
        assert 0 > place["top"][0][1] >= place["top"][1][1]

    text = record["text"]
    assert llama2.run(*words, "--temperature", "0", "--echo").stdout == f"Once upon a time{text}\n"
    word = text.split()[3]
    cut = llama2.json(*words, "--temperature", "0", "--stop", "nowhere", "--stop", word)
    assert (cut["text"], cut["finish_reason"]) == (text[: text.index(word)], "stop")

    drawn = llama2.json(*words, "--temperature", "1")
    assert llama2.json(*words, "--temperature", "1", "--seed", str(drawn["seed"]))["token_ids"] == drawn["token_ids"]
    assert "logprobs" not in drawn


def test_lookup_gives_the_same_answer(llama2: Program) -> None:
    words = ("generate", "One, two, three, four. " * 3 + "One, two", "--max-tokens", "24", "--temperature", "0")
    plain, drafted = llama2.json(*words), llama2.json(*words, "--lookup", "8")
    assert (drafted["text"], drafted["token_ids"]) == (plain["text"], plain["token_ids"])
    assert (plain["drafted_tokens"], plain["accepted_tokens"]) == (0, 0)
    assert drafted["drafted_tokens"] >= drafted["accepted_tokens"] >= 3  # it goes on with three, four


def test_generate_starts_from_bos(llama2: Program) -> None:
    assert llama2.json("generate", "", "--max-tokens", "3")["prompt_tokens"] == 1


def test_runners_agree(llama2: Program, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("generate", "-m", llama2.model, "The capital of France is", "--max-tokens", "1", "--temperature", "0")
    records = []
    for runner in ("native", "numpy", "torch"):
        code, out, error = typed(capsys, *words, "--json", "--runner", runner)
        assert (code, error) == (0, "")
        records.append(json.loads(out))
    native, *others = records
    assert [other["token_ids"] for other in others] == [native["token_ids"]] * 2


def test_bench(llama2: Program) -> None:
    record = llama2.json("bench", "--prompt", "40", "--generate", "8", "--repeat", "3", "--threads", "1")
    assert (record["threads"], record["prompt"], record["generate"], len(record["runs"])) == (1, 40, 8, 3)
    assert record["parameters"] == 134_515_008
    assert record["formats"] == {"Q4_1": 210, "Q8_0": 1, "F32": 61}
    for name in record["runs"][0]:
        assert record[name] == statistics.median(run[name] for run in record["runs"]) > 0
    # 30 layers of q, o 576 x 576, k, v 192 x 576, w1, w2, w3 1536 x 576; head of 49,152 x 576 for the last token
    layers, head = 30 * 576 * (2 * 576 + 2 * 192 + 3 * 1536), 49_152 * 576
    # Q4_1: 20 bytes for 32 weights, Q8_0: 34; 61 norms of 576 floats
    read = layers * 20 // 32 + head * 34 // 32 + 61 * 576 * 4
    for run_ in record["runs"]:
        prefill = 2 * (layers + head / 40) * run_["prefill_tokens_per_second"] / run_["int8_operations_per_second"]
        assert run_["prefill_share_of_int8"] == pytest.approx(prefill)
        decode = read * run_["decode_tokens_per_second"] / run_["read_bytes_per_second"]
        assert run_["decode_share_of_read"] == pytest.approx(decode)
    if os.name != "nt":
        assert 98_362_432 < record["peak_memory_bytes"] < 2**30  # more than the model's file
    table = llama2.run("bench", "--prompt", "8", "--generate", "1", "--repeat", "1").stdout
    assert re.search(r"prefill +8 tokens.*% of \d+ G int8/s\ndecode +1 tokens.*% of [\d.]+ GB/s\n$", table)


def test_bench_of_a_batch(llama2: Program, capsys: pytest.CaptureFixture[str]) -> None:
    record = llama2.json("bench", "--prompt", "9", "--generate", "4", "--depth", "7", "--batch", "3", "--repeat", "1")
    assert [record[name] for name in ("prompt", "generate", "depth", "batch")] == [9, 4, 7, 3]
    read = 30 * 576 * (2 * 576 + 2 * 192 + 3 * 1536) * 20 // 32 + 49_152 * 576 * 34 // 32 + 61 * 576 * 4
    steps = record["decode_tokens_per_second"] / 3  # one reading of the weights for all three
    decode = read * steps / record["read_bytes_per_second"]
    assert record["decode_share_of_read"] == pytest.approx(decode)
    words = ("bench", "-m", llama2.model, "--prompt", "8", "--generate", "1", "--batch", "3", "--repeat", "1")
    code, table, _ = typed(capsys, *words)
    assert code == 0
    assert ", 3 sequences at once, medians of 1\n" in table


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_ctrl_c_leaves_what_there_is(llama2: Program, form: tuple[str, ...]) -> None:
    endless = ("generate", "One, two, three,", "--logit-bias", "0=-inf", "--logit-bias", "2=-inf")
    for seconds in (3, 12, 48):  # JSON comes at the end only, and Ctrl-C before the first token leaves nothing
        process = subprocess.Popen(
            llama2.command(*endless, *form), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=llama2.environment
        )
        assert process.stdout is not None
        begun = b"" if form else process.stdout.read(20)
        if form:
            time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (130, b"")
        if begun + out:
            break
    if form:
        record = json.loads(out)
        assert record["finish_reason"] == "cancelled"
        assert record["text"]
    else:
        assert len(begun + out) > 20


@pytest.mark.skipif(os.name == "nt", reason="/dev/full and SIGPIPE of POSIX")
@pytest.mark.parametrize("words", [("generate", "a", "--max-tokens", "1"), ("list",)], ids=" ".join)
def test_output_that_goes_nowhere(llama2: Program, words: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as closed, open("/dev/full", "wb") as full:
        for output, complaint in ((closed, b""), (full, b"llama2: error: No space left on device\n")):
            done = subprocess.run(
                llama2.command(*words), stdout=output, stderr=subprocess.PIPE, env=llama2.environment, check=False
            )
            assert (done.returncode, done.stderr) == (1, complaint)


def test_a_narrow_encoding_does_not_end_an_answer(llama2: Program) -> None:
    words = ("generate", "é", "--echo", "--max-tokens", "1")
    assert llama2.run(*words, PYTHONIOENCODING="ascii").stdout.startswith("\\xe9")


@pytest.mark.parametrize("command", ["chat", "generate", "embed", "serve", "bench", "pull", "list", "show", "rm"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        run([command, "--help"])
    shown = capsys.readouterr().out
    assert done.value.code == 0
    assert f"Example: llama2 {command} " in shown
    assert "--json" in shown


def test_help_lists_the_commands(llama2: Program) -> None:
    shown = llama2.run("--help").stdout
    names = ("chat", "generate", "embed", "serve", "bench", "pull", "list", "show", "rm")
    assert all(f"\n  {name} " in shown for name in names)
    assert llama2.run("--version").stdout == f"llama2 {version('whole-llama')}\n"


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        (["--help"], {"torch", "transformers", "numpy", "prompt_toolkit", "rich", "jinja2", "huggingface_hub"}),
        (["chat", QUESTION, "--max-tokens", "1"], {"torch", "transformers", "prompt_toolkit", "rich", "sentencepiece"}),
        (["plan", "7B", "--on", "H100"], {"torch", "transformers", "numpy", "prompt_toolkit", "rich", "jinja2"}),
    ],
)
def test_a_command_imports_only_what_it_needs(words: list[str], absent: set[str], llama2: Program) -> None:
    script = (
        "import sys\nfrom llama2.cli.main import run\n"
        "try:\n    run(sys.argv[1:])\nfinally:\n    print(*sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, *llama2.command(*words)[3:]]
    done = subprocess.run(command, capture_output=True, text=True, env=llama2.environment, check=True)
    loaded = set(done.stderr.split())
    assert "llama2.cli.main" in loaded
    assert not loaded & absent


MODEL = "{model}"


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        (["chta"], 2, "No such command 'chta'. Did you mean 'chat'?"),
        (["chat", "hi", "--temprature", "1"], 2, "No such option.*--temprature.*--temperature"),
        (["chat", "hi", "--temperature", "hot"], 2, "--temperature"),
        (["chat", "hi", "--temperature", "-1"], 2, "temperature=-1.0 must be between 0.0 and 100.0"),
        (["chat", "hi", "--max-tokens", "0"], 2, "max_tokens=0"),
        (["chat", "hi", "--max-tokens", "9" * 400], 2, "max_tokens"),
        (["chat", "hi", "--lookup", "1025"], 2, "lookup=1025 must be a whole number between 0 and 1024"),
        (["chat", "hi", "--threads", "0"], 2, "--threads"),
        (["chat", "hi", "--runner", "abacus"], 2, "--runner.*native"),
        (["chat", "hi", "--logit-bias", "a=b"], 2, "logit_bias 'a=b' must be"),
        (["generate", "hi", "--logprobs", "2"], 2, "--logprobs needs --json"),
        (["bench", "--repeat", "0"], 2, "--repeat"),
        (["bench", "--batch", "65"], 2, "--batch 65 is more than the 64 sequences that run at once"),
        (["chat", "@nowhere.txt"], 1, r"@nowhere\.txt: cannot be read \(No such file or directory\); @@ begins a word"),
        (["chat", "@."], 1, r"@\.: cannot be read \(Is a directory\); @@ begins a word"),
        (["chat", "--resume", "nowhere.json", "hi"], 1, "nowhere.json: No such file or directory"),
        (["chat", "-m", "smolm2-135m-instruct", "hi"], 1, "smolm2-135m-instruct: .*smollm2-135m-instruct"),
        (["chat", "-m", "nowhere.gguf", "hi"], 1, "nowhere.gguf"),
        (["chat", "-m", "notes.gguf", "hi"], 1, "notes.gguf"),
        (["chat", "-m", "empty.gguf", "hi"], 1, "empty.gguf"),
        (["chat", "-m", MODEL, ""], 1, "the question is empty"),
        (["chat", "-m", MODEL, "hi", "--context", "9000"], 1, "context=9000 must be from 1 to 8192"),
        (["chat", "-m", MODEL, "hi", "--context", "20"], 1, "prompt of 31 tokens.* 20"),
        (["generate", "-m", MODEL, "hi", "--max-tokens", "8192"], 1, "prompt of 1 tokens and answer of 8192"),
        (["bench", "-m", MODEL, "--context", "9", "--prompt", "9"], 1, "prompt of 9 tokens and answer of 1 .* 9;"),
        (["bench", "-m", MODEL, "--context", "9", "--prompt", "1"], 1, "--depth 1 and --generate 128 do not fit"),
        (["generate", "-m", MODEL, "hi", "--logit-bias", "49152=1"], 1, "logit_bias: 49152"),
        (["generate", "-m", MODEL, "hi\udcff"], 1, "."),
        (["show", "notes.gguf"], 1, "notes.gguf"),
    ],
)
def test_wrong_use_is_one_line(
    *,
    words: list[str],
    status: int,
    reason: str,
    model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = str(model_path.absolute())
    (tmp_path / "notes.gguf").write_text("Dear diary,\n" * 99)
    (tmp_path / "empty.gguf").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        run([word.format(model=model) for word in words])
    out, err = capsys.readouterr()
    assert (done.value.code, out) == (status, "")
    assert re.fullmatch(rf"llama2: error: .*{reason}.*\n", err)


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(["chat", "@nowhere.txt", "--debug"])
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith(
        "llama2: error: @nowhere.txt: cannot be read (No such file or directory); @@ begins a word with @\n"
    )


def test_errors_do_not_depend_on_assertions(llama2: Program) -> None:
    command = [sys.executable, "-O", *llama2.command("generate", "hi", "--max-tokens", "9000")[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=llama2.environment, check=False)
    assert done.returncode == 1
    assert re.fullmatch("llama2: error: prompt of 1 tokens and answer of 9000 .*\n", done.stderr)
