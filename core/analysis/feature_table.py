"""The feature table: one row per (layer, feature), the currency that ranking, labels, charts and steering share.

Holds the schema with a sentence and unit per column, the checks, the two tails, the format rule and the joins.
It does not know how any number in it was computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from core.errors import MicroscopeError

#: What names a row.
KEY: tuple[str, str] = ("layer", "feature")

#: A feature with less than this share of its activation mass on tokens with letters is a format feature
#: (punctuation, whitespace, digits).
FORMAT_BELOW = 0.5


class FeatureTableError(MicroscopeError):
    """A table is not a feature table, or cannot be joined to one."""


@dataclass(frozen=True)
class Column:
    """One column: its name, type, unit and meaning."""

    name: str
    dtype: pl.DataType
    unit: str
    meaning: str


_INT, _FLOAT = pl.Int64(), pl.Float64()
_ACTS = "feature activation"

#: Positive always means higher in the target. A null says that the number does not exist, never that it is zero.
COLUMNS: tuple[Column, ...] = (
    Column("layer", _INT, "index", "0-based decoder block."),
    Column("feature", _INT, "index", "Feature of this layer's SAE, 0 to d_sae - 1."),
    Column("mean_target", _FLOAT, _ACTS, "Mean over the target's prompts, responses averaged within a prompt."),
    Column("mean_reference", _FLOAT, _ACTS, "Mean over the reference's prompts, responses averaged within a prompt."),
    Column("mean_diff", _FLOAT, _ACTS, "mean_target minus mean_reference."),
    Column("frac_active_target", _FLOAT, "share of responses", "Share of target responses with activation > 0."),
    Column("frac_active_reference", _FLOAT, "share of responses", "Share of reference responses with activation > 0."),
    Column("log2_ratio", _FLOAT, "log2", "log2 of mean_target over mean_reference, the pseudocount added to both."),
    Column("effect_size", _FLOAT, "standard deviations", "Paired d_z, or Hedges' g; over prompts; null if undefined."),
    Column("auroc", _FLOAT, "probability", "Chance that a target response exceeds a reference one, pairs ignored."),
    Column("p_value", _FLOAT, "probability", "Two-sided signed-rank test, or rank-sum when unpaired, over prompts."),
    Column("q_value", _FLOAT, "probability", "Benjamini-Hochberg over the tested features of this layer."),
    Column("n_target", _INT, "responses", "Target responses compared."),
    Column("n_reference", _INT, "responses", "Reference responses compared."),
    Column("content_share", _FLOAT, "share of mass", "Share of the activation mass on tokens with letters."),
    Column("rank", _INT, "position", "1 is the most raised by effect_size; the last is the most suppressed."),
)

#: Columns a table may carry as well, all of them null where unknown; they follow those of the schema.
OPTIONAL: tuple[Column, ...] = (
    Column("delta_attribution", _FLOAT, "nats", "Target minus reference: how much the feature's direction at one token "
           "makes the rest of the response likelier, to first order; mean over prompts."),
    Column("delta_attribution_se", _FLOAT, "nats", "Standard error of delta_attribution, over prompts."),
)

SCHEMA = pl.Schema({c.name: c.dtype for c in COLUMNS})
NULLABLE: frozenset[str] = frozenset({"effect_size", "p_value", "q_value", "content_share", "rank"})
_SHARES = ("frac_active_target", "frac_active_reference", "auroc", "p_value", "q_value", "content_share")


def describe() -> dict[str, str]:
    """Column name -> its meaning and unit in one line, for tooltips and exports; the optional ones included."""
    return {c.name: f"{c.meaning} [{c.unit}]" for c in (*COLUMNS, *OPTIONAL)}


def columns(table: pl.DataFrame) -> list[str]:
    """Names of the schema's columns, then of those optional ones that `table` carries."""
    return [*SCHEMA, *(c.name for c in OPTIONAL if c.name in table.columns)]


def validate(table: pl.DataFrame, *, extra: bool = True) -> pl.DataFrame:
    """Return `table` if it is a feature table (with `extra`, one that may carry further columns).

    Raises `FeatureTableError` naming the first column at fault.
    """
    missing = [name for name in SCHEMA if name not in table.columns]
    if missing:
        raise FeatureTableError(f"This is not a feature table: it lacks {', '.join(missing)}; make it with `rank`.")
    carried = columns(table)
    foreign = [name for name in table.columns if name not in carried]
    if foreign and not extra:
        raise FeatureTableError(f"The feature table has columns it should not have: {', '.join(foreign)}.")
    for name, dtype in {**SCHEMA, **{c.name: c.dtype for c in OPTIONAL if c.name in carried}}.items():
        column = table[name]
        if column.dtype != dtype:
            raise FeatureTableError(f"Column {name} of the feature table is {column.dtype}, not {dtype}.")
        if name in SCHEMA and name not in NULLABLE and column.null_count():
            raise FeatureTableError(f"Column {name} of the feature table holds {column.null_count()} nulls.")
        if dtype.is_float() and not column.drop_nulls().is_finite().all():
            raise FeatureTableError(f"Column {name} of the feature table holds a NaN or an infinity; use null.")
        if name in _SHARES and not column.drop_nulls().is_between(0, 1).all():
            raise FeatureTableError(f"Column {name} of the feature table leaves the range 0 to 1.")
    _check_key(table)
    ranked = table.filter(pl.col("rank").is_not_null()).select("layer", "rank")
    per_layer = ranked.group_by("layer").agg(n=pl.len(), kinds=pl.col("rank").n_unique(), low=pl.col("rank").min(),
                                             high=pl.col("rank").max())
    if not per_layer.filter((pl.col("low") != 1) | (pl.col("high") != pl.col("n")) | (pl.col("kinds") != pl.col("n"))
                            ).is_empty():
        raise FeatureTableError("Column rank of the feature table does not run from 1 to the number ranked.")
    return table


def _check_key(table: pl.DataFrame) -> None:
    missing = [name for name in KEY if name not in table.columns]
    if missing:
        raise FeatureTableError(f"A table keyed by layer and feature is needed; {', '.join(missing)} is missing.")
    repeated = table.filter(table.select(KEY).is_duplicated())
    if not repeated.is_empty():
        layer, feature = repeated.select(KEY).row(0)
        raise FeatureTableError(f"Layer {layer}, feature {feature} stands more than once in the table.")


def top(table: pl.DataFrame, k: int) -> pl.DataFrame:
    """At most k raised features (effect_size > 0), the most raised first; over all layers of the table."""
    return _tail(table, k, raised=True)


def bottom(table: pl.DataFrame, k: int) -> pl.DataFrame:
    """At most k suppressed features (effect_size < 0), the most suppressed first; over all layers of the table."""
    return _tail(table, k, raised=False)


def _tail(table: pl.DataFrame, k: int, *, raised: bool) -> pl.DataFrame:
    effect = pl.col("effect_size")
    ranked = table.filter(pl.col("rank").is_not_null() & (effect > 0 if raised else effect < 0))
    if raised:
        return ranked.sort("effect_size", "rank", descending=[True, False]).head(k)
    return ranked.sort("effect_size", "rank", descending=[False, True]).head(k)


def is_format(table: pl.DataFrame, below: float = FORMAT_BELOW) -> pl.Series:
    """Boolean [n_rows]: mostly on tokens without letters. An unknown content_share does not count as format."""
    return (table["content_share"] < below).fill_null(False).alias("is_format")


def hide_format(table: pl.DataFrame, below: float = FORMAT_BELOW) -> pl.DataFrame:
    """The rows that are not format features; the number hidden is the difference in height."""
    return table.filter(~is_format(table, below))


def attach(table: pl.DataFrame, other: pl.DataFrame, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Left join: every row of `table`, in order, with `columns` (default: all new ones) of `other`, null where absent.

    Raises `FeatureTableError` when a key repeats in `other` or a column would be overwritten.
    """
    _check_key(table)
    _check_key(other)
    chosen = list(columns) if columns is not None else [c for c in other.columns if c not in table.columns]
    clash = [c for c in chosen if c in table.columns]
    absent = [c for c in chosen if c not in other.columns]
    if clash or absent:
        what = f"{', '.join(clash)} already there" if clash else f"{', '.join(absent)} not in the other table"
        raise FeatureTableError(f"Columns cannot be attached to the feature table: {what}.")
    keyed = other.select(*KEY, *chosen).with_columns(pl.col(name).cast(pl.Int64) for name in KEY)
    return table.join(keyed, on=list(KEY), how="left", maintain_order="left")


def side_by_side(tables: Mapping[str, pl.DataFrame], column: str) -> pl.DataFrame:
    """Inner join of several contrasts: layer, feature and one column per contrast, named by the contrast.

    Only keys that every table has stay. Raises `FeatureTableError` when a key repeats or the column is missing.
    """
    joined: pl.DataFrame | None = None
    for name, table in tables.items():
        _check_key(table)
        if column not in table.columns:
            raise FeatureTableError(f"The table of {name!r} has no column {column}.")
        one = table.select(*KEY, pl.col(column).alias(name))
        joined = one if joined is None else joined.join(one, on=list(KEY), how="inner", maintain_order="left")
    if joined is None:
        raise FeatureTableError("No feature table was given to put side by side.")
    return joined
