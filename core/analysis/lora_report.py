"""The `lora` command's result: modules, components with their firing and features, probes, prediction; plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import polars as pl

from core.analysis.lora import WRITERS, module_table
from core.analysis.lora_features import nearest_layer, read_features, write_features
from core.analysis.lora_files import ContrastPrediction, Dictionaries, OpenLora, direction_for
from core.analysis.lora_firing import firing_table, probe_table, questions
from core.analysis.lora_space import cosines_over_layers, write_direction
from core.directions import Direction
from core.errors import NotEnoughData

#: Features listed for a component, and logit-lens tokens.
FEATURES, TOKENS = 5, 8


def lora_summary(
    lora: OpenLora,
    dictionaries: Dictionaries,
    sae_layers: list[int],
    directions: Mapping[int, Direction],
    predicted: tuple[ContrastPrediction, ...],
    *,
    top: int,
    probes: bool = True,
    notes: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The `top` components that carry most of the update on this text, and everything about the whole adapter."""
    firing = lora.firing
    table = firing.components.with_row_index("component").sort("on_text", descending=True)
    tests = {}
    for question in questions(firing):
        try:
            tests[question.name] = firing_table(firing, question)
        except NotEnoughData as error:
            notes = (*notes, str(error))
    contrast = next(iter(directions.values())).name if directions else None
    chosen = [row["component"] for row in table.head(top).iter_rows(named=True)]
    own = next((p for p in predicted if p.of == p.by), None)
    return {
        "adapter": firing.adapter,
        "file": str(firing.path),
        "sets": list(firing.spec["sets"]),
        "n_conversations": firing.conversations.height,
        "n_response_tokens": int(firing.conversations["n_response_tokens"].sum()),
        "masked_share": firing.masked_share,
        "n_components": len(lora.parts),
        "direction": contrast,
        "modules": _modules(lora),
        "components": [_component(lora, i, dictionaries, sae_layers, directions, tests) for i in chosen],
        "write_cosines": [
            {"kind": kind, "index": 0, **row}
            for kind in WRITERS for row in _plain_rows(cosines_over_layers(lora.writes.space, kind))
            if int(row["a"]) < int(row["b"])
        ],
        "firing": [
            {"question": name, "n_components": found.height, "n_passing": found.filter(pl.col("q_value") < 0.05).height,
             "n_prompts": found["n_prompts"][0]} for name, found in tests.items()
        ],
        "probes": _plain_rows(probe_table(firing, [None])) if probes else [],
        "prediction_of_model_contrast": _prediction(own) if own else {},
        "predictions_of_other_variants": [_prediction(p) for p in predicted if p is not own],
        "notes": list(notes),
    }  # fmt: skip


def _modules(lora: OpenLora) -> list[dict[str, Any]]:
    table = module_table(lora.parts).join(lora.firing.modules.drop("kind"), on=["layer", "module"], how="left",
                                          maintain_order="left")  # fmt: skip
    return _plain_rows(table)


def _component(
    lora: OpenLora, at: int, dictionaries: Dictionaries, sae_layers: list[int], directions: Mapping[int, Direction],
    tests: Mapping[str, pl.DataFrame],
) -> dict[str, Any]:  # fmt: skip
    part, firing = lora.parts[at], lora.firing
    gains, row = firing.gains[part.key.layer], firing.components.row(at, named=True)
    direction = direction_for(part, directions)
    vector = write_direction(part, gains)
    top, bottom = firing.lens(at)
    layer = nearest_layer(part, sae_layers)
    book = dictionaries(layer) if layer is not None else None
    written: list[dict[str, Any]] = []
    read: list[dict[str, Any]] = []
    if book is not None and part.writes_residual:
        found = write_features(part, gains, book, firing.model_id, "omp", FEATURES)
        written = _plain_rows(found.table.select("layer", "feature", "coefficient", "cosine"))
    elif book is not None and part.reads_residual:
        read = _plain_rows(read_features(part, gains, book).table.head(FEATURES))
    return {
        "layer": part.key.layer, "module": part.key.module, "index": part.key.index,
        "singular_value": part.singular_value, "share": part.share, "text_share": row["text_share"],
        "cosine_with_direction": _number(direction.cosine(vector)) if direction and vector is not None else None,
        "direction_layer": direction.layer if direction and vector is not None else None,
        "firing": {
            name: {k: _number(t[k][at]) for k in ("mean_target", "mean_reference", "effect_size", "auroc", "q_value")}
            for name, t in tests.items()
        },
        "write_features": written, "read_features": read,
        "promoted": top[:TOKENS], "suppressed": bottom[:TOKENS],
    }  # fmt: skip


def _prediction(found: ContrastPrediction) -> dict[str, Any]:
    layers = []
    for p in found.layers:
        figures = {name: getattr(p, name) for name in ("cosine", "preactivation", "activation")}
        layers.append({
            "layer": p.layer, "n_prompts": p.n_prompts, "n_features": p.n_features,
            "norm_ratio": _number(p.norm_ratio), "explained": _number(p.explained),
            **{name: None if f is None else _number(f.value) for name, f in figures.items()},
            **{f"{name}_ci95": None if f is None else [_number(x) for x in f.ci95] for name, f in figures.items()},
        })  # fmt: skip
    return {"contrast": found.contrast, "variant": found.of, "predicted_by": found.by, "layers": layers}


def _plain_rows(table: pl.DataFrame) -> list[dict[str, Any]]:
    return [{k: _number(v) for k, v in row.items()} for row in table.to_dicts()]


def _number(value: Any) -> Any:
    """NaN and infinities become null, as JSON has none."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
