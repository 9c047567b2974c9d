"""The page on which a person rates: a small application on loopback, which knows one rater."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict
from starlette.middleware.trustedhost import TrustedHostMiddleware

from llama2.data.comparisons import order
from llama2.rate import ratings
from llama2.rate.questions import Kind, Question
from llama2.rate.ratings import Rating

PAGE = Path(__file__).parent / "page"
_FILES = {"/": "index.html", "/rate.js": "rate.js", "/rate.css": "rate.css"}
#: Nothing but the page's own files and requests; no other page may frame it.
_POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


class RatingBody(BaseModel):
    """What the page sends: the value of a question, by the order in which its answers are shown."""

    model_config = ConfigDict(extra="forbid", strict=True)

    question: str
    value: int
    safety: str | None = None
    seconds: float = 0.0


@dataclass
class Session:
    """One rater's work: the questions in this rater's own order, and the file that ratings go to."""

    questions: dict[str, Question]
    kind: Kind
    rater: str
    path: Path
    seed: int = 0
    order: list[str] = field(init=False)
    rated: dict[str, Rating] = field(init=False)

    def __post_init__(self) -> None:
        self.order = sorted(self.questions, key=lambda id: order(self.seed, f"{self.rater} {id}"))
        found = ratings.read(self.path, self.questions, self.kind)
        self.rated = {rating.question: rating for rating in found if rating.rater == self.rater}

    def question(self, number: int) -> dict[str, Any]:
        """What the page shows of question `number`, from 0: texts alone, without the models' names."""
        id = self.order[number]
        question, given = self.questions[id], self.rated.get(id)
        return {
            "number": number,
            "question": id,
            "kind": self.kind,
            "prompt": list(question.prompt),
            "answers": [question.answers[model] for model in question.shown(self.rater, self.seed)],
            "rating": None if given is None else {"value": given.value, "safety": given.safety},
            "total": len(self.order),
            "done": len(self.rated),
        }

    def next(self) -> int | None:
        """The first question that has no rating; None when all have one."""
        return next((i for i, id in enumerate(self.order) if id not in self.rated), None)

    def rate(self, body: RatingBody) -> None:
        """Write a rating; a later one of the same question counts in its place. Raises ValueError, and DataError."""
        if body.question not in self.questions:
            raise ValueError("there is no such question")
        shown = tuple(self.questions[body.question].shown(self.rater, self.seed))
        if self.kind == "preference" and body.safety is None:
            raise ValueError("a preference needs a label for safety")
        rating = Rating(body.question, self.kind, self.rater, shown, body.value, body.safety, round(body.seconds, 1))
        ratings.append(self.path, rating)
        self.rated[body.question] = rating


def application(session: Session) -> FastAPI:
    """The page and what it asks for. Requests for another host name than the machine's own are refused."""
    app = FastAPI(openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]"])

    @app.get("/api/state")
    def state() -> dict[str, Any]:
        number = session.next()
        return {"next": number, "total": len(session.order), "done": len(session.rated), "kind": session.kind}

    @app.get("/api/questions/{number}")
    def question(number: int) -> dict[str, Any]:
        if not 0 <= number < len(session.order):
            raise HTTPException(404, f"there are {len(session.order)} questions")
        return session.question(number)

    @app.post("/api/ratings")
    def rate(body: RatingBody) -> dict[str, Any]:
        try:
            session.rate(body)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        return state()

    for route, name in _FILES.items():
        app.add_api_route(route, _file(PAGE / name), include_in_schema=False)
    return app


def _file(path: Path) -> Any:
    def answer() -> FileResponse:
        return FileResponse(path, headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-store"})

    return answer


def serve(session: Session, port: int, started: Callable[[str], None]) -> None:
    """Run the page on loopback until it is stopped; `started` gets its address. Port 0 takes a free one."""
    import socket

    import uvicorn

    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        config = uvicorn.Config(application(session), log_config=None, access_log=False, lifespan="off")
        started(f"http://127.0.0.1:{listening.getsockname()[1]}/")
        uvicorn.Server(config).run(sockets=[listening])
