"""The sample store: every answer that any round's model drew, and what each reward model says of it.

Rounds share a folder. The paper keeps the samples of all rounds, because the last one's alone lost skills (3.2.3).

prompts.jsonl          {"prompt", "messages"}
samples.jsonl          {"prompt", "policy", "round", "k", "answer", "tokens", "finish"}
rewards-MODEL.jsonl    {"dialog", "reward"}

`prompt` and `dialog` are digests of messages. `policy` names the model by its digest. Files only grow, by whole lines.
A process that is killed leaves at most a part of a last line, which the next one to write removes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic

from llama2 import files
from llama2.data.prompts import TaggedPrompt
from llama2.errors import DataError

_PROMPTS, _SAMPLES, _LOCK = "prompts.jsonl", "samples.jsonl", "lock"
_LONGEST = 1 << 24  # bytes of a line

_Count = Annotated[int, pydantic.Field(ge=0)]
_Positive = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
_Reward = Annotated[float, pydantic.Field(ge=0, le=1)]


@dataclass(frozen=True, slots=True)
class Policy:
    """What answers are drawn from: a model, by its digest, and how its tokens are sampled."""

    model: str
    temperature: _Positive
    top_p: _Positive
    max_tokens: _Count
    seed: _Count


@dataclass(frozen=True, slots=True)
class StoredSample:
    """Answer `k` of a policy to a prompt, by its digest; `finish` is "length" where the limit cut it, else "stop"."""

    prompt: str
    policy: Policy
    round: str
    k: _Count
    answer: str
    tokens: _Count
    finish: str


@dataclass(frozen=True, slots=True)
class _StoredPrompt:
    prompt: str
    messages: list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class _StoredReward:
    dialog: str
    reward: _Reward


_Stored = TypeVar("_Stored", StoredSample, _StoredPrompt, _StoredReward)


class SampleStore:
    """A store that is open to be written; `open` makes one.

    `samples` are in the order of the file; `drawn` finds them by prompt, policy and k.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.messages = {each.prompt: each.messages for each in _lines(folder / _PROMPTS, _StoredPrompt)}
        self.samples: list[StoredSample] = []
        self.drawn: dict[tuple[str, Policy, int], StoredSample] = {}
        self._rewards: dict[str, dict[str, float]] = {}
        for sample in _lines(folder / _SAMPLES, StoredSample):
            self._remember(sample)

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator[SampleStore]:
        """The store in a folder, which is made if it is not there. One process at a time has it.

        Raises DataError while another process has it, and for a line that is not what a store has.
        """
        from filelock import FileLock, Timeout

        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / _LOCK)
            lock.acquire(timeout=0)
        except Timeout:
            raise DataError(f"{folder}: another process draws samples into it; wait for its end") from None
        except OSError as error:
            raise DataError(f"{folder}: cannot be written ({error.strerror}); choose another store") from None
        try:
            for path in sorted(folder.glob("*.jsonl")):
                files.remove_half_line(path, error=DataError)
            yield cls(folder)
        finally:
            lock.release()

    def add_prompts(self, prompts: Iterable[TaggedPrompt]) -> None:
        """Write those prompts that are not there yet."""
        new = {prompt.id: list(prompt.messages) for prompt in prompts if prompt.id not in self.messages}
        self._append(_PROMPTS, ({"prompt": id, "messages": messages} for id, messages in new.items()))
        self.messages |= new

    def add_samples(self, samples: Sequence[StoredSample]) -> None:
        """Write samples, none of which is there yet."""
        self._append(_SAMPLES, map(asdict, samples))
        for sample in samples:
            self._remember(sample)

    def dialog(self, sample: StoredSample) -> list[dict[str, str]]:
        """A sample's prompt with its answer, without spaces around it: what is scored, and tuned on."""
        return [*self.messages[sample.prompt], {"role": "assistant", "content": sample.answer.strip()}]

    def rewards(self, model: str) -> Mapping[str, float]:
        """What a reward model, given by its digest, says of dialogs, by their digests (`identify`)."""
        if model not in self._rewards:
            lines = _lines(self._rewards_file(model), _StoredReward)
            self._rewards[model] = {each.dialog: each.reward for each in lines}
        return self._rewards[model]

    def add_rewards(self, model: str, rewards: Mapping[str, float]) -> None:
        """Write rewards of dialogs, by digest. Raises DataError for one that is not from 0 to 1."""
        self.rewards(model)
        for reward in rewards.values():
            if not 0 <= reward <= 1:
                raise DataError(f"reward model {model[:12]}: its reward {reward} is not from 0 to 1; use another")
        self._append(self._rewards_file(model).name, ({"dialog": d, "reward": r} for d, r in rewards.items()))
        self._rewards[model].update(rewards)

    def _rewards_file(self, model: str) -> Path:
        return self.folder / f"rewards-{model}.jsonl"

    def _remember(self, sample: StoredSample) -> None:
        self.samples.append(sample)
        self.drawn[sample.prompt, sample.policy, sample.k] = sample

    def _append(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        if text := "".join(json.dumps(record) + "\n" for record in records):
            files.append(self.folder / name, text, error=DataError)


def _lines(path: Path, kind: type[_Stored]) -> Iterator[_Stored]:
    """The lines of a file, which need not be there."""
    if not files.exists(path):
        return
    adapter = pydantic.TypeAdapter(kind)
    with files.open_file(path, error=DataError) as file:
        for number, line in enumerate(files.lines(file, _LONGEST), 1):
            try:
                yield adapter.validate_json(line or b"", strict=True)
            except pydantic.ValidationError as error:
                problem = error.errors(include_url=False)[0]
                name = ".".join(map(str, problem["loc"]))
                reason = f"{name}: {problem['msg']}" if name else problem["msg"]
                raise DataError(f"{path}:{number}: is not a line of a sample store ({reason}); remove it") from None
