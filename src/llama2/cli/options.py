"""What several commands share, each option declared once; and where a prompt comes from."""

from __future__ import annotations

import errno
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from llama2.cli.output import warn
from llama2.engine.request import Request, Sampling
from llama2.engine.runtime import Runtime
from llama2.errors import Llama2Error, RequestError
from llama2.native import CacheType

if TYPE_CHECKING:
    from llama2.api import Model
    from llama2.safety.moderation import Moderator

_DEFAULT = Sampling()
_LONGEST = 1 << 26  # bytes of a prompt


def _sampling(name: str, help: str) -> Any:
    return typer.Option(help=help, show_default=str(getattr(_DEFAULT, name)), rich_help_panel="Sampling")


Tokenizer = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="tokenizer.model, tokenizer.json or tokenizer.bin.", show_default="the model's own"
    ),
]
TokenizerMode = Annotated[
    Literal["auto", "file", "legacy"],
    typer.Option(help="Where spaces are put in front: as tuned, as the files say, or before each part of a text."),
]
Adapter = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DIR",
        help="A LoRA adapter (peft's folder, or GGUF) to merge into the model; DIR:0.5 halves it; may be repeated.",
    ),
]
SignedBy = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Refuse weights that are not signed by this public key or certificate (`llama2 sign`), adapters too.",
        show_default="no signature is needed",
    ),
]
SignAs = Annotated[
    str,
    typer.Option(
        "--sign", metavar="NAME", help="Sign with NAME.pem and NAME.crt, which `llama2 sign key --out NAME` makes."
    ),
]
Sign = Annotated[
    str | None,
    typer.Option(
        "--sign",
        metavar="NAME",
        help="Sign the answer with NAME.pem and NAME.crt of `llama2 sign key`: a C2PA manifest that nobody sees.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Threads = Annotated[
    int | None, typer.Option(min=1, max=1024, help=Runtime.meaning("threads"), show_default="every core")
]
Context = Annotated[int | None, typer.Option(min=1, help=Runtime.meaning("context"), show_default="the model's own")]

Template = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|NAME",
        help="Chat template: a Jinja file, one of the model's by name, or "
        "llama2, llama3, chatml, vicuna, alpaca, mistral-v1, zephyr …; an unknown name lists all.",
        show_default="the model's own",
    ),
]

RecipeSettings = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings in place of the recipe's.")
]


PolicyFile = Annotated[
    Path | None,
    typer.Option(
        "--policy",
        metavar="FILE",
        help="A policy in TOML: what is judged, and what is done about it.",
        show_default="harassment from 0.9 on is refused",
    ),
]


def signing_files(name: str) -> tuple[Path, Path]:
    """The private key and the certificates of `--sign NAME`."""
    return Path(f"{name}.pem"), Path(f"{name}.crt")


def signer(name: str | None, model: ModelOptions, request: Request) -> Callable[[str], str] | None:
    """What signs an answer of a model, if it is to be signed: text → text with its manifest. Raises SafetyError."""
    if name is None:
        return None
    from llama2 import hub
    from llama2.safety import keys, manifest, signing

    key, chain = signing_files(name)
    signing.private_key(key)
    signing.certificates(chain)
    marked = request.watermark is not None and request.sampling.temperature > 0
    scheme = keys.scheme_of(request.watermark) if marked and request.watermark else None
    weights = hub.locate(model.name)
    return lambda text: manifest.embed(text, manifest.describe(model.name, weights, scheme), key, chain)


def demand_signature(key: Path | None, *models: str) -> None:
    """Check models and adapters against the key that must have signed them, if any. Raises SafetyError, HubError."""
    if key is None:
        return
    from llama2 import hub
    from llama2.checkpoint.adapter import split
    from llama2.safety import signing

    for name in models:
        signing.verify(hub.locate(split(name)[0]), key)


def moderator(policy: Path | None, guard: str | None = None, threads: int | None = None) -> Moderator:
    """The moderator of a policy's file, by its judge or a guard. Raises RecipeError, SafetyError, or as `api.load`."""
    from llama2.safety import policy as policies
    from llama2.safety.moderation import Moderator

    found = policies.default() if policy is None else policies.load(policy)
    name = guard or found.judge
    if name == "classifiers":
        return Moderator(found)
    from llama2.safety import guard as guards

    return Moderator(found, guards.load(name, Runtime(threads=threads)))


def _show_settings(context: typer.Context, requested: bool) -> None:
    if requested:
        from llama2.cli.settings import show  # here, because it brings pydantic to commands that have no recipe

        show(context.command_path)
        raise typer.Exit


ShowSettings = Annotated[
    bool,
    typer.Option("--settings", is_eager=True, callback=_show_settings, help="Show every setting, and what it means."),
]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it runs."""

    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="NAME", help="Name, file or Hugging Face repository; see `llama2 list`."),
    ] = None
    tokenizer: Tokenizer = None
    tokenizer_mode: TokenizerMode = "auto"
    adapter: Adapter = None
    threads: Threads = None
    runner: Annotated[Literal["native", "numpy", "torch"], typer.Option(help=Runtime.meaning("runner"))] = "native"
    compile: Annotated[bool, typer.Option("--compile", help=Runtime.meaning("compile"))] = False
    context: Context = None
    signed_by: SignedBy = None

    @property
    def name(self) -> str:
        """The chosen model, or the default one."""
        from llama2 import hub

        return self.model or hub.DEFAULT

    def load(self, *, sequences: int = 1, template: str | None = None, cache_type: CacheType = "auto") -> Model:
        """The model, ready for so many answers of the whole context at once; fetched first if need be."""
        if self.runner != "numpy":  # NumPy multiplies no matrices then, and its threads would only be in the way
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        from llama2 import api

        demand_signature(self.signed_by, self.name, *(self.adapter or ()))
        loaded = api.load(
            self.name,
            Runtime(
                threads=self.threads,
                runner=self.runner,
                compile=self.compile,
                context=self.context,
                sequences=sequences,
                cache_type=cache_type,
            ),
            tokenizer=self.tokenizer,
            template=template,
            tokenizer_mode=self.tokenizer_mode,
            adapter=self.adapter or (),
        )
        for note in loaded.checkpoint.notes:
            warn(note)
        return loaded


@dataclass(frozen=True)
class AnswerOptions:
    """How long an answer is, and how its tokens are drawn; None where nothing is given.

    Raises typer.BadParameter for a value out of range.
    """

    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the answer at most.", show_default="what the context holds")
    ] = None
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End the answer before this text; may be repeated.")
    ] = None
    lookup: Annotated[
        int,
        typer.Option(
            metavar="N", help="Draft up to N tokens a step from earlier text: the same answer, faster if it repeats."
        ),
    ] = 0
    watermark: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Mark the answer by this key of `llama2 watermark key`."),
    ] = None
    temperature: Annotated[float | None, _sampling("temperature", "Temperature; 0 takes the likeliest token.")] = None
    top_p: Annotated[
        float | None, _sampling("top_p", "Nucleus sampling: keep the likeliest tokens up to this probability.")
    ] = None
    top_k: Annotated[int | None, _sampling("top_k", "Keep this many of the likeliest tokens; 0 keeps all.")] = None
    min_p: Annotated[
        float | None, _sampling("min_p", "Drop tokens below this fraction of the likeliest's probability.")
    ] = None
    repetition_penalty: Annotated[
        float | None,
        _sampling("repetition_penalty", "Penalty for tokens of prompt and answer; above 1, they repeat less."),
    ] = None
    presence_penalty: Annotated[
        float | None, _sampling("presence_penalty", "Subtracted from the logit of each token in the answer.")
    ] = None
    frequency_penalty: Annotated[
        float | None,
        _sampling("frequency_penalty", "Subtracted from a token's logit for each occurrence in the answer."),
    ] = None
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID=BIAS", help="Bias added to a token's logit; may be repeated.")
    ] = None
    seed: Annotated[
        int | None, typer.Option(help="Same seed, same answer.", show_default="drawn anew for each answer")
    ] = None

    def __post_init__(self) -> None:
        try:
            Request((0,), **self.limits(), sampling=Sampling(**self.sampling()))
        except RequestError as error:
            raise typer.BadParameter(str(error)) from error

    def limits(self) -> dict[str, Any]:
        """What ends an answer, how far it is drafted, and what marks it, as arguments of `Model.chat`."""
        given = {"max_tokens": self.max_tokens, "stop": tuple(self.stop or ()), "lookup": self.lookup}
        if self.watermark is None:
            return given
        from llama2.safety import keys

        return {**given, "watermark": keys.load(self.watermark)}

    def sampling(self) -> dict[str, Any]:
        """The settings of `Sampling` that are given, by name."""
        given = {field.name: getattr(self, field.name) for field in fields(Sampling)}
        given["logit_bias"] = dict(map(_bias, self.logit_bias)) if self.logit_bias else None
        return {name: value for name, value in given.items() if value is not None}


def _bias(entry: str) -> tuple[int, float]:
    token, _, bias = entry.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as error:
        raise RequestError(f"logit_bias {entry!r} must be a token id, `=`, and a number") from error


def expand(command: Callable[..., None]) -> Callable[..., None]:
    """`command` as typer needs it: fields of its dataclass parameters become options."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}

    @wraps(command)
    def expanded(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        name = parameter.name
        if name in groups:
            types = get_type_hints(groups[name], include_extras=True)
            parameters += [(field.name, types[field.name], field.default) for field in fields(groups[name])]
        else:
            parameters.append((name, hints[name], parameter.default))
    expanded.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, annotation=t, default=d) for n, t, d in parameters]
    )
    expanded.__annotations__ = {name: type_ for name, type_, _ in parameters}
    return expanded


#: Words of the prompt. A word `@FILE` stands for the file's text, `-` for standard input.
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="TEXT|@FILE|-",
        help="Words are joined by spaces; the text of @FILE, and of standard input for -, is set off by an empty line. "
        "@@ begins a word with @.",
        show_default="standard input",
    ),
]


def prompt(words: Sequence[str] | None) -> str:
    """The text that `words` stand for. One newline at the end of a file or of standard input is dropped, as shells do.

    Raises Llama2Error when a source cannot be read, is not UTF-8 or is too large.
    """
    paragraphs: list[str] = []
    for source, group in groupby(words or ["-"], key=_is_source):
        texts = [_text(word) for word in group]
        paragraphs += texts if source else [" ".join(texts)]
    return "\n\n".join(paragraphs)


def _is_source(word: str) -> bool:
    return word == "-" or (word.startswith("@") and not word.startswith("@@"))


def _text(word: str) -> str:
    if not _is_source(word):
        return word[1:] if word.startswith("@@") else word
    if word == "-":
        if sys.stdin.isatty():
            warn("type the text; Ctrl-D on an empty line ends it")
        name, advice, source = "standard input", "give the text as words, or as @FILE", sys.stdin.buffer
    else:
        name, advice, source = word, "@@ begins a word with @", None
    try:
        with nullcontext(source) if source else open(word[1:], "rb") as file:
            data = file.read(_LONGEST + 1)
    except OSError as error:
        reason = "it is closed" if error.errno == errno.EBADF else error.strerror
        raise Llama2Error(f"{name}: cannot be read ({reason}); {advice}") from error
    if len(data) > _LONGEST:
        raise Llama2Error(f"{name}: larger than {_LONGEST >> 20} MB, which no model's context holds; give a part of it")
    return _decoded(name, data).removesuffix("\n").removesuffix("\r")


def inputs(texts: Sequence[str] | None, file: Path | None) -> list[str]:
    """Texts from the command line, and a file's lines; else standard input's. Lines that are empty are left out.

    Raises what `prompt` and `read_text` do.
    """
    found = list(texts or ())
    lines = read_text(file) if file is not None else "" if found else prompt(["-"])
    return [*found, *(line for line in lines.splitlines() if line.strip())]


def read_text(path: Path) -> str:
    """A text file. Raises Llama2Error when it is not UTF-8, OSError when it cannot be read."""
    return _decoded(path, path.read_bytes())


def _decoded(name: object, data: bytes) -> str:
    """UTF-8 text, without the mark (U+FEFF) that some editors put before it."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise Llama2Error(f"{name}: not UTF-8 text at byte {error.start}; convert it first") from error
