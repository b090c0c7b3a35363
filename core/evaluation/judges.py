"""The judge that a command names: `api:MODEL@URL`, `local:MODEL`, `margin` or `human`.

`api` is an OpenAI-compatible endpoint (core/evaluation/judge_api.py), `local` a transformers model (judge_local.py),
`margin` the judge-free margin on matched pairs (margin.py), `human` a blind reading in the app.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from core.errors import JudgeError
from core.evaluation.judge_api import ApiJudge, ApiSettings, Scoring
from core.evaluation.readings import Judge

Kind = Literal["api", "local", "margin", "human"]
FORMS = "api:MODEL@URL, local:MODEL, margin or human"


@dataclass(frozen=True)
class JudgeSpec:
    """What `--judge` says."""

    kind: Kind
    model: str = ""
    url: str = ""


def parse_judge(text: str) -> JudgeSpec:
    """`api:gpt-4o@http://127.0.0.1:8000/v1` and so on. Raises `JudgeError` for anything else."""
    kind, _, rest = text.partition(":")
    if kind in ("margin", "human") and not rest:
        return JudgeSpec(kind)
    if kind == "local" and rest:
        return JudgeSpec("local", rest)
    if kind == "api":
        model, at, url = rest.rpartition("@")
        if model and at and url:
            return JudgeSpec("api", model, url)
        raise JudgeError(f"--judge {text!r} lacks the model or the address; write api:MODEL@http://HOST/v1.")
    raise JudgeError(f"There is no judge {text!r}; give {FORMS}.")


def make_judge(
    spec: JudgeSpec,
    *,
    scoring: str = "auto",
    concurrency: int = 8,
    key_env: str = "OPENAI_API_KEY",
    device: str | None = None,
    dtype: str | None = None,
) -> Judge:
    """The judge, ready to be asked; a local model is loaded. Raises `JudgeError` or `ModelError`."""
    if scoring not in get_args(Scoring):
        raise JudgeError(f"--scoring {scoring!r} is unknown; give {', '.join(get_args(Scoring))}.")
    if spec.kind == "api":
        return ApiJudge(ApiSettings(spec.model, spec.url, key_env=key_env, scoring=scoring, concurrency=concurrency))
    if spec.kind == "local":
        return _local(spec.model, device, dtype)
    raise JudgeError(f"The judge {spec.kind!r} scores no single response; see --help.")


def _local(name: str, device: str | None, dtype: str | None) -> Judge:
    from pathlib import Path

    from core.evaluation.judge_local import LocalJudge
    from core.experiment import load_experiment, preset_names
    from core.model.loading import load_model
    from core.specs import ModelSpec
    from core.store import prepare

    if name in preset_names():
        return LocalJudge(prepare.model_for(load_experiment(name), device=device, dtype=dtype))
    source = "local" if Path(name).expanduser().is_dir() else "hub"
    return LocalJudge(load_model(ModelSpec(name, source), device=device, dtype=dtype))
