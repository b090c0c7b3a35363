"""What the LoRA page says: sentences with their figures, rows for the charts, text around a component's peaks.

Pure, like describe.py: returns Markdown in which foreign text is escaped, and tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from core.analysis.lora import Component, ComponentKey, module_table
from core.analysis.lora_files import ContrastPrediction, OpenLora
from core.analysis.lora_firing import OPPOSED, Auroc, Question
from core.store.firing_file import Firing
from core.view.guide import markdown_safe

#: Modules from the residual stream inwards and back, as the map shows them.
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: What the map can be coloured by: column, name, sentence.
COLOURS = {
    "text_share": "On this text",
    "share": "In the weights",
    "relative": "Beside the module's output",
}
#: Tokens before and after a peak.
BEFORE, AFTER = 14, 8


def lora_command(preset: str, adapter: str) -> str:
    """The command that makes an adapter's firing file."""
    return f"python -m core lora {preset} {adapter}"


def not_kept(preset: str, lora: OpenLora) -> str:
    """Why there is nothing token by token, and how to have it."""
    n = int(lora.firing.components["kept"].sum())
    command = lora_command(preset, lora.firing.adapter)
    return (f"This file keeps single tokens of the {n} strongest components alone. To keep them of all, remove "
            f"`{lora.firing.path.name}` and run `{command} --keep 0`.")


def map_rows(lora: OpenLora) -> pl.DataFrame:
    """A row a module: layer, kind, n_components, norm, effective_rank, share, text_share, relative."""
    table = module_table(lora.parts)
    more = lora.firing.modules.select("layer", "module", "text_share", "relative")
    return table.join(more, on=["layer", "module"], how="left", maintain_order="left").drop("module")


def headline(lora: OpenLora) -> str:
    """Where the update sits."""
    rows = map_rows(lora)
    kinds = rows.group_by("kind").agg(pl.sum("share"), pl.sum("text_share")).sort("text_share", descending=True)
    layers = rows.group_by("layer").agg(pl.sum("text_share")).sort("text_share", descending=True)
    n, total = len(lora.parts), layers["text_share"].to_list()
    first = kinds.row(0, named=True)
    half = int(np.searchsorted(np.cumsum(total), 0.5)) + 1
    where = ", ".join(map(str, sorted(layers["layer"].head(half).to_list())))
    table = lora.firing.conversations
    said = (f"**{markdown_safe(lora.firing.adapter)}** has {n:,} components in {rows.height} modules. It has read "
            f"{table.height:,} conversations ({int(table['n_response_tokens'].sum()):,} response tokens). ")
    layer_word = f"layer {where} carries" if half == 1 else f"layers {where} carry"
    said += (f"There, {layer_word} {sum(total[:half]):.0%} of the update's squared size")
    if kinds.height > 1:
        said += (f", and {first['kind']} alone {first['text_share']:.0%} "
                 f"(of the weights' squared norm it has {first['share']:.0%})")
    return said.replace("_", "\\_") + "."


def component_label(key: ComponentKey, text_share: float) -> str:
    return f"layer {key.layer} · {key.kind} · {key.index} ({text_share:.1%} of the update here)"


def what_it_touches(part: Component) -> str:
    """Which spaces the component writes into and reads from."""
    writes = ("It writes into the residual stream" if part.writes_residual else
              "It writes into the attention heads, not into the residual stream" if part.key.kind in
              ("q_proj", "k_proj", "v_proj") else "It writes into the MLP's hidden space, not into the residual stream")
    reads = ("reads the residual stream through the norm, whose gain is folded in" if part.reads_residual else
             "reads the MLP's hidden space, which no dictionary describes: its firing on text is shown instead"
             if part.key.kind == "down_proj" else
             "reads what the attention heads put out, which no dictionary describes: its firing is shown instead")
    return f"{writes}, and {reads}."


def nearest_sentence(part: Component, layer: int) -> str:
    """How far the dictionary is from what the component writes or reads."""
    if part.writes_residual:
        if layer == part.key.layer:
            return f"Features are those of layer {layer}, where it writes."
        above = "above: what the layers between make of it is left out" if layer > part.key.layer else (
            "below it, as there is no dictionary above: take them as a hint")
        return f"Features are those of layer {layer}, {abs(layer - part.key.layer)} {above}."
    return f"Features are those of layer {layer}; it reads at the beginning of layer {part.key.layer}."


def group_rows(firing: Firing, component: int) -> pl.DataFrame:
    """A row a response: group (`set, condition`), condition, mean (its mean scalar), id; NaN left out."""
    table = firing.conversations
    group = [f"{s}, {c}" if c else s for s, c in zip(table["set"], table["condition"], strict=True)]
    rows = pl.DataFrame({"group": group, "condition": table["condition"], "mean": firing.mean(component).astype(float),
                         "id": table["id"]})
    return rows.filter(pl.col("mean").is_finite())


def firing_sentence(question: Question, row: Mapping[str, float], found: Auroc) -> str:
    """One component, one question: how far apart, how surely."""
    low, high = found.ci95
    effect = "" if row["effect_size"] is None else f", effect size {row['effect_size']:+.2f}"
    passes = "passes" if row["q_value"] < 0.05 else "does not pass"
    return (f"- **{markdown_safe(question.name)}**: AUROC {found.value:.2f} [{low:.2f}, {high:.2f}]{effect}; "
            f"q = {row['q_value']:.2g}, which {passes} ({found.n_prompts} prompts, "
            f"{found.n_target} against {found.n_reference} responses)")


@dataclass(frozen=True)
class Window:
    """A stretch of text around one token on which a component fires strongly."""

    row: int
    group: str
    id: str
    value: float
    tokens: tuple[str, ...]
    values: np.ndarray
    """float32 [len(tokens)]; NaN outside the response."""


def windows(firing: Firing, component: int, *, positive: bool, n: int = 5) -> list[Window]:
    """The strongest windows of one sign, at most one a response; empty when single tokens are not kept."""
    scalars = firing.scalars(component)
    if scalars is None:
        return []
    table = firing.conversations
    offsets = np.r_[0, np.cumsum(table["n_response_tokens"].to_numpy())]
    signed = np.where(np.isfinite(scalars), scalars if positive else -scalars, -np.inf)
    peaks = np.array([signed[a:b].max(initial=-np.inf) for a, b in zip(offsets[:-1], offsets[1:], strict=True)])
    found = []
    for row in np.argsort(-peaks, kind="stable")[:n].tolist():
        if not peaks[row] > 0:
            break
        values, texts = firing.on_tokens(row, component), firing.texts(row)
        peak = int(np.nanargmax(values if positive else -values))
        part = slice(max(0, peak - BEFORE), peak + AFTER + 1)
        group = f"{table['set'][row]}, {table['condition'][row]}" if table["condition"][row] else table["set"][row]
        found.append(Window(row, group, table["id"][row], float(values[peak]), tuple(texts[part]), values[part]))
    return found


def matched_prompts(firing: Firing) -> dict[str, tuple[int, int]]:
    """`set: prompt` -> rows of its target and its reference response, for every prompt that has both."""
    rows: dict[tuple[str, str], dict[str, int]] = {}
    table = firing.conversations
    for i, (s, p, c) in enumerate(zip(table["set"], table["prompt_id"], table["condition"], strict=True)):
        rows.setdefault((s, p), {}).setdefault(c, i)
    found = {}
    for (s, p), by in rows.items():
        for target, reference in OPPOSED:
            if target in by and reference in by:
                found[f"{s}: {p}"] = (by[target], by[reference])
                break
    return found


def scale_of(firing: Firing, component: int) -> float:
    """The scalar that is shown at full shade: the 99th percentile of its magnitude."""
    scalars = np.abs(firing.scalars(component))
    return float(np.nanquantile(scalars, 0.99)) if np.isfinite(scalars).any() else 1.0


def prediction_rows(found: Sequence[ContrastPrediction]) -> pl.DataFrame:
    """A row a contrast and layer, for the table: contrast, of, own, layer, cosine, cosine_range, norm_ratio, explained,
    preactivation, activation, n_features, n_prompts."""
    rows = []
    for p in found:
        for layer in p.layers:
            figures = {n: getattr(layer, n) for n in ("cosine", "preactivation", "activation")}
            rows.append({
                "of": p.of, "contrast": p.contrast, "own": p.of == p.by, "layer": layer.layer,
                **{n: None if f is None else f.value for n, f in figures.items()},
                "cosine_range": f"{layer.cosine.ci95[0]:.2f} to {layer.cosine.ci95[1]:.2f}",
                "norm_ratio": layer.norm_ratio, "explained": layer.explained,
                "n_features": layer.n_features, "n_prompts": layer.n_prompts,
            })  # fmt: skip
    schema = {"of": pl.String, "contrast": pl.String, "own": pl.Boolean, "layer": pl.Int64, "cosine": pl.Float64,
              "preactivation": pl.Float64, "activation": pl.Float64, "cosine_range": pl.String,
              "norm_ratio": pl.Float64, "explained": pl.Float64, "n_features": pl.Int64, "n_prompts": pl.Int64}
    return pl.DataFrame(rows, schema=schema).fill_nan(None)


def prediction_sentence(own: ContrastPrediction, layer: int) -> str:
    """How much of the measured change at a layer the linear reading tells."""
    p = next((x for x in own.layers if x.layer == layer), own.layers[-1])
    name = markdown_safe(own.of)
    if not np.isfinite(p.cosine.value):
        return f"At layer {p.layer} **{name}** has written nothing yet, or changes nothing that was measured."
    said = (f"At layer {p.layer}, what **{name}** writes up to there points where its measured change points with "
            f"cosine **{p.cosine.value:.2f}** and is **{p.norm_ratio:.0%}** as long; it accounts for "
            f"**{max(p.explained, 0.0):.0%}** of the change's squared length ({p.n_prompts} prompts).")
    if p.activation is not None:
        said += (f" Over {p.n_features:,} features the predicted effect and the measured change of activation "
                 f"correlate at **{p.activation.value:.2f}** (Spearman).")
    return said + " The rest is what other layers and the reading modules make of it."


def other_sentence(own: ContrastPrediction, others: Sequence[ContrastPrediction], layer: int) -> str:
    """How well the same writing predicts other variants' changes: what is not special to this one; empty for none."""
    told = [f"{markdown_safe(p.of)} {x.cosine.value:.2f}" for p in others for x in p.layers if x.layer == layer]
    if not told:
        return ""
    return ("The same writing against what other fine-tunes change there, as a control: cosine "
            f"{', '.join(told)}. What these share is not special to {markdown_safe(own.of)}.")


def mean_written(firing: Firing, component: int) -> float:
    """Mean over responses of what multiplies singular value x write direction; 1 where that is nothing."""
    at = int(np.flatnonzero(firing.writing == component)[0])
    found = float(np.nanmean(firing.written()[:, at]))
    return found if np.isfinite(found) and found else 1.0
