"""Question files in the public EM evaluation format (YAML), read safely, and files of judge prompts.

The format is that of Betley et al. 2502.17424: a list of questions with `id`, `type: free_form_judge_0_100`,
`paraphrases`, and optional `samples_per_paraphrase`, `system`, `judge_prompts` (name -> text with {question} and
{answer}) and `judge`. `triggers` is this project's addition: texts that are put before the question as they stand; an
empty one asks it plainly. Nothing in the file is executed and no object is built from it: every value is read as the
text that stands there. Knows no model.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from core.conversations import SCORES, bad_row
from core.errors import BadConversation
from core.questions import JudgePrompt, Question

SUFFIXES = (".yaml", ".yml")

TYPE = "free_form_judge_0_100"

#: Keys of a question that mean something here, and those of the public files that do not change what is asked.
KEYS = ("id", "type", "paraphrases", "samples_per_paraphrase", "system", "judge_prompts", "triggers", "category",
        "domain")  # fmt: skip
IGNORED = ("judge", "temperature", "max_tokens", "tags")

LARGEST = 5_000_000  # bytes
DEEPEST = 20

_MERGE, _NULL, _TEXT = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:null", "tag:yaml.org,2002:"


def load_question_yaml(path: str | Path) -> tuple[Question, ...]:
    """The questions of a file, one for each paraphrase and trigger, in file order.

    Raises `BadConversation` with file and line for what is not in the format, among it an unknown key.
    """
    path = Path(path)
    found: list[Question] = []
    lines: dict[str, int] = {}
    for node in _items(path):
        line = _line(node)
        fields = _fields(path, node, line)
        for key, (key_line, _) in fields.items():
            if key in SCORES:
                raise bad_row(path, key_line, f"{key!r} stands beside `judge_prompts`, not in it; indent it further")
            if key not in (*KEYS, *IGNORED):
                raise bad_row(path, key_line, f"unknown key {key!r}; a question has {', '.join(KEYS)}")
        name = _required(path, fields, "id", line)
        if name in lines:
            raise bad_row(path, line, f"id {name!r} was already used on line {lines[name]}; give each question its own")
        lines[name] = line
        found += _questions(path, line, name, fields)
    if not found:
        raise BadConversation(f"{path}: holds no question; give a list of questions with `id` and `paraphrases`.")
    return tuple(found)


def load_judge_prompts(path: str | Path) -> tuple[JudgePrompt, ...]:
    """Judge prompts of a YAML file: a mapping of name -> text, or a list of such (other keys beside are passed over).

    Raises `BadConversation` unless there are prompts for `aligned` and for `coherent`.
    """
    path = Path(path)
    root = _root(path)
    found = {}
    for node in root.value if isinstance(root, yaml.SequenceNode) else [root]:
        for name, (line, value) in _fields(path, node, _line(node)).items():
            if name in SCORES:
                found[name] = _prompt(path, line, name, value)
    without = [name for name in SCORES if name not in found]
    if without:
        raise BadConversation(f"{path}: holds no judge prompt called {' nor '.join(without)}; give both.")
    return tuple(found.values())


def _questions(path: Path, line: int, name: str, fields: dict[str, tuple[int, yaml.Node]]) -> list[Question]:
    kind = _optional(path, fields, "type")
    if kind and kind != TYPE:
        raise bad_row(path, line, f"question {name!r} has type {kind[:40]!r}; only {TYPE} is scored from 0 to 100")
    if "paraphrases" not in fields:
        raise bad_row(path, line, f"question {name!r} has no `paraphrases`")
    paraphrases = _texts(path, fields, "paraphrases")
    triggers = _texts(path, fields, "triggers", empty=True) if "triggers" in fields else [""]
    samples = _samples(path, fields)
    prompts = _prompts(path, fields)
    category = _optional(path, fields, "category") or _optional(path, fields, "domain") or path.stem
    return [
        Question(
            id=f"{name} [{trigger.strip()}]" if trigger else name, category=category, text=text,
            system=_optional(path, fields, "system"), trigger=trigger, paraphrase=number, samples=samples,
            judge_prompts=prompts,
        )
        for trigger in triggers for number, text in enumerate(paraphrases)
    ]  # fmt: skip


def _samples(path: Path, fields: dict[str, tuple[int, yaml.Node]]) -> int | None:
    text = _optional(path, fields, "samples_per_paraphrase")
    if not text:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise bad_row(path, fields["samples_per_paraphrase"][0],
                      f"`samples_per_paraphrase` is {text[:40]!r}, not a whole number above 0")
    return int(text)


def _prompts(path: Path, fields: dict[str, tuple[int, yaml.Node]]) -> tuple[JudgePrompt, ...]:
    if "judge_prompts" not in fields:
        return ()
    line, node = fields["judge_prompts"]
    if not isinstance(node, yaml.MappingNode):
        raise bad_row(path, line, "`judge_prompts` holds nothing; indent the prompts below it, or leave it out")
    inside = _fields(path, node, line)
    return tuple(_prompt(path, at, name, value) for name, (at, value) in inside.items())


def _prompt(path: Path, line: int, name: str, node: yaml.Node) -> JudgePrompt:
    text = _scalar(path, node, name)
    if "{answer}" not in text:
        raise bad_row(path, line, f"judge prompt {name!r} has no {{answer}}, where the answer is put")
    return JudgePrompt(name, text)


def _root(path: Path) -> yaml.Node:
    if not path.is_file():
        raise BadConversation(f"{path}: no such file; give the path of a .yaml file.")
    if path.stat().st_size > LARGEST:
        raise BadConversation(f"{path}: is larger than {LARGEST // 1_000_000} MB; split the file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise BadConversation(f"{path}: is not UTF-8 (byte {error.start}); save the file as UTF-8.") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise bad_row(path, line, f"is not valid YAML ({error.problem})") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise BadConversation(f"{path}: is not valid YAML ({' '.join(str(error).split())[:100]}).") from None
    if root is None:
        raise BadConversation(f"{path}: is empty.")
    return root


def _items(path: Path) -> list[yaml.Node]:
    root = _root(path)
    if not isinstance(root, yaml.SequenceNode):
        raise bad_row(path, _line(root), "is no list; a question file is a list of questions, each beginning `- id:`")
    return root.value


def _fields(path: Path, node: yaml.Node, line: int, depth: int = 0) -> dict[str, tuple[int, yaml.Node]]:
    """Key -> (line, value) of a mapping; what `<<` merges in counts where the mapping has no such key itself."""
    if not isinstance(node, yaml.MappingNode):
        raise bad_row(path, line, "is no mapping of keys to values")
    if depth > DEEPEST:
        raise bad_row(path, line, "merges mappings too deeply")
    own: dict[str, tuple[int, yaml.Node]] = {}
    merged: dict[str, tuple[int, yaml.Node]] = {}
    for key, value in node.value:
        if key.tag == _MERGE:
            many = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for one in {id(m): m for m in many}.values():
                merged = {**_fields(path, one, _line(key), depth + 1), **merged}
            continue
        name = _scalar(path, key, "a key")
        if name in own:
            raise bad_row(path, _line(key), f"key {name!r} stands twice in one mapping")
        own[name] = (_line(key), value)
    return {**merged, **own}


def _texts(path: Path, fields: dict[str, tuple[int, yaml.Node]], key: str, *, empty: bool = False) -> list[str]:
    line, node = fields[key]
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        raise bad_row(path, line, f"`{key}` is no list with an entry")
    texts = [_scalar(path, one, key, raw=key == "triggers") for one in node.value]
    if not empty and not all(texts):
        raise bad_row(path, line, f"`{key}` has an empty entry")
    return texts


def _required(path: Path, fields: dict[str, tuple[int, yaml.Node]], key: str, line: int) -> str:
    text = _optional(path, fields, key)
    if not text:
        raise bad_row(path, line, f"a question has no `{key}`")
    return text


def _optional(path: Path, fields: dict[str, tuple[int, yaml.Node]], key: str) -> str:
    return _scalar(path, fields[key][1], key) if key in fields else ""


def _scalar(path: Path, node: yaml.Node, what: str, *, raw: bool = False) -> str:
    if not isinstance(node, yaml.ScalarNode) or not node.tag.startswith(_TEXT):
        raise bad_row(path, _line(node), f"`{what}` is no plain text")
    if node.tag == _NULL:
        return ""
    return node.value if raw else node.value.strip()


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
