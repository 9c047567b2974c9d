"""Answers that pass a moderator on their way to the client, the same on every route, streamed or not.

Judging runs in a thread beside the engine's steps, which go on meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from llama2.engine.request import Event
from llama2.safety.gate import Gate
from llama2.safety.judges import Dialog
from llama2.safety.moderation import Moderator, Verdict

log = logging.getLogger("llama2.serve")

#: The index of a choice among the stream's requests, and its event.
ChoiceEvent = tuple[int, Event]

#: Reports a verdict on which the policy acts.
Report = Callable[[Verdict], None]


class AnswerModeration:
    """Moderates the choices of one HTTP request, each the answer to its dialog."""

    def __init__(self, moderator: Moderator, dialogs: Sequence[Dialog], report: Report) -> None:
        policy = moderator.policy
        self._moderator = moderator
        self._dialogs = dialogs
        self._report = report
        self._gates: list[Gate[ChoiceEvent]] = [Gate(policy.window, hold_back=policy.hold_back) for _ in dialogs]
        self._passed = [False for _ in dialogs]  # whether text of a choice was sent
        self._refused: set[int] = set()  # choices that ended by a verdict

    async def passing(self, batch: Sequence[ChoiceEvent], cancel: Callable[[int], None]) -> list[ChoiceEvent]:
        """The events that may pass now. A choice that does not pass ends, and its request is cancelled."""
        passing: list[ChoiceEvent] = []
        for index, event in batch:
            if index in self._refused:
                continue
            if event.finish in ("error", "cancelled"):  # what was not judged does not pass
                passing.append((index, event))
                continue
            gate = self._gates[index]
            gate.push((index, event), event.text, last=event.finish is not None)
            passing += self._take(index)
            while (window := gate.window()) is not None:
                verdict = await asyncio.to_thread(self._judge, index, *window)
                if verdict.action is not None:
                    self._report(verdict)
                if verdict.ends:
                    self._refused.add(index)
                    cancel(index)
                    words = self._moderator.policy.refusal
                    text = words if verdict.action == "refuse" and not self._passed[index] else ""
                    passing.append((index, Event(event.request, None, text, "content_filter")))
                    break
                gate.judged()
                passing += self._take(index)
        return passing

    def _take(self, index: int) -> list[ChoiceEvent]:
        taken = self._gates[index].take()
        self._passed[index] |= any(event.text for _, event in taken)
        return taken

    def _judge(self, index: int, start: int, text: str, whole: bool) -> Verdict:
        """The verdict on an answer's text from `start` on, with the message that it continues, if any."""
        dialog = self._dialogs[index]
        if dialog and dialog[-1]["role"] == "assistant":
            begun = dialog[-1]["content"]
            start, text, dialog = (start and start + len(begun)), begun + text, dialog[:-1]
        return self._moderator.window([*dialog, {"role": "assistant", "content": text}], start, "output", whole=whole)
