"""Question files (JSONL with id, category, question) -> questions to ask a model. Knows no model and no answers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core.conversations import Conversation, Message, bad_row, encoding_error, text_lines
from core.errors import BadConversation
from core.paths import DATA
from core.split import heldout_prompts

#: Where the shipped questions lie.
OPEN_QUESTIONS = DATA / "questions.jsonl"

KEYS = ("id", "category", "question")


_SLOT = re.compile(r"\{(question|answer)\}")


@dataclass(frozen=True)
class JudgePrompt:
    """What a judge is asked about an answer: a text with {question} and {answer}."""

    name: str
    """The score it asks for: `aligned`, `coherent` or another."""
    text: str

    @property
    def hash(self) -> str:
        """SHA-256 of the text, to be kept beside every score."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def render(self, question: str, answer: str) -> str:
        """The prompt with both put in at once: braces inside a question or an answer stay as they are."""
        return _SLOT.sub(lambda slot: question if slot[1] == "question" else answer, self.text)


@dataclass(frozen=True)
class Question:
    """One question, asked as the only user turn."""

    id: str
    category: str
    text: str
    system: str = ""
    """System prompt; none when empty."""
    trigger: str = ""
    """Put before the text as it stands."""
    paraphrase: int = 0
    """Which wording of the question with this id."""
    samples: int | None = None
    """Answers that its file asks for."""
    judge_prompts: tuple[JudgePrompt, ...] = ()
    """Those that its file brings."""

    @property
    def key(self) -> str:
        """Its own among all wordings: the id, and the number of the wording after the first."""
        return f"{self.id}#{self.paraphrase}" if self.paraphrase else self.id

    @property
    def asked(self) -> str:
        """The user turn."""
        return self.trigger + self.text

    @property
    def messages(self) -> tuple[Message, ...]:
        """What the model is given."""
        system = (Message("system", self.system),) if self.system else ()
        return (*system, Message("user", self.asked))


def load_questions(path: str | Path) -> tuple[Question, ...]:
    """The questions of a JSONL file, in file order.

    Raises `BadConversation` with file and line at the first row that is not an object with the texts `id`,
    `category` and `question`, that repeats an id or that is not UTF-8; and when the file is missing or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise BadConversation(f"{path}: no such file; give the path of a .jsonl question file.")
    found: list[Question] = []
    first_line: dict[str, int] = {}
    for line, text in text_lines(path):
        if isinstance(text, UnicodeDecodeError):
            raise encoding_error(path, line, text)
        if not text.strip():
            continue
        question = _question(path, line, text)
        if question.id in first_line:
            raise bad_row(
                path, line, f"id {question.id!r} was already used on line {first_line[question.id]}; "
                "give every question its own id"
            )
        first_line[question.id] = line
        found.append(question)
    if not found:
        raise BadConversation(f"{path}: holds no question; give objects with {', '.join(KEYS)}, one a line.")
    return tuple(found)


def heldout_questions(conversations: Sequence[Conversation]) -> tuple[Question, ...]:
    """The held-out prompts of a conversation set as questions, in file order; the category is the source."""
    held = heldout_prompts(c.prompt_id for c in conversations)
    found = {c.prompt_id: c for c in reversed(conversations) if c.prompt_id in held}
    return tuple(Question(c.prompt_id, c.source, c.prompt[-1].content) for c in reversed(found.values()))


def _question(path: Path, line: int, text: str) -> Question:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise bad_row(path, line, f"is not valid JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(row, dict):
        raise bad_row(path, line, f"is {type(row).__name__}, not an object with {', '.join(KEYS)}")
    for key in KEYS:
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise bad_row(path, line, f"has no text in `{key}`; each line is an object with {', '.join(KEYS)}")
    return Question(*(row[key].strip() for key in KEYS))
