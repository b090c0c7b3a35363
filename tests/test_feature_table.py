"""The feature table's schema, tails, format rule and joins."""

from __future__ import annotations

import polars as pl
import pytest

from core.analysis import feature_table
from core.analysis.feature_table import FeatureTableError


def table(layer: int = 3) -> pl.DataFrame:
    effect = [0.5, -2.0, 3.0, None, -0.1, 0.2]
    n = len(effect)
    columns = {
        "layer": [layer] * n, "feature": list(range(n)), "mean_target": [1.0] * n, "mean_reference": [1.0] * n,
        "mean_diff": [0.0] * n, "frac_active_target": [0.5] * n, "frac_active_reference": [0.5] * n,
        "log2_ratio": [0.0] * n, "effect_size": effect, "auroc": [0.5] * n,
        "p_value": [0.1, 0.1, 0.1, None, 0.1, None], "q_value": [None] * n, "n_target": [9] * n,
        "n_reference": [9] * n, "content_share": [0.1, 0.9, 0.5, 0.2, None, 0.9],
        "rank": [2, 4, 1, None, 3, None],
    }  # fmt: skip
    return pl.DataFrame(columns, schema=feature_table.SCHEMA)


def test_every_column_of_the_method_is_there_and_explained() -> None:
    assert list(feature_table.SCHEMA) == [
        "layer", "feature", "mean_target", "mean_reference", "mean_diff", "frac_active_target",
        "frac_active_reference", "log2_ratio", "effect_size", "auroc", "p_value", "q_value", "n_target",
        "n_reference", "content_share", "rank",
    ]  # fmt: skip
    assert all("[" in text and text[0].isalnum() for text in feature_table.describe().values())
    assert feature_table.validate(table(), extra=False).equals(table())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop("auroc"), "lacks auroc"),
        (lambda t: t.with_columns(note=pl.lit("x")), "should not have: note"),
        (lambda t: t.with_columns(pl.col("rank").cast(pl.Float64)), "rank .* is Float64"),
        (lambda t: t.with_columns(auroc=pl.lit(None, pl.Float64)), "auroc .* 6 nulls"),
        (lambda t: t.with_columns(effect_size=pl.lit(float("inf"))), "effect_size .* infinity"),
        (lambda t: t.with_columns(p_value=pl.lit(float("nan"))), "p_value .* NaN"),
        (lambda t: t.with_columns(q_value=pl.lit(1.5)), "q_value .* range"),
        (lambda t: t.with_columns(feature=pl.lit(7, pl.Int64)), "Layer 3, feature 7 stands more than once"),
        (lambda t: t.with_columns(pl.col("rank") + 1), "rank"),
    ],
)
def test_a_wrong_table_is_named(change, message: str) -> None:
    with pytest.raises(FeatureTableError, match=message):
        feature_table.validate(change(table()), extra=False)


def test_ranks_run_within_each_layer() -> None:
    feature_table.validate(pl.concat([table(3), table(4)]))


def test_tails_hold_only_their_own_sign_strongest_first() -> None:
    assert feature_table.top(table(), 5)["feature"].to_list() == [2, 0]
    assert feature_table.bottom(table(), 5)["feature"].to_list() == [1, 4]
    assert feature_table.top(table(), 1)["feature"].to_list() == [2]
    both = pl.concat([table(3), table(4).with_columns(pl.col("effect_size") * 2)])
    assert feature_table.top(both, 3).select("layer", "feature").rows() == [(4, 2), (3, 2), (4, 0)]


def test_format_features_are_those_below_the_threshold_and_not_the_unknown() -> None:
    assert feature_table.is_format(table()).to_list() == [True, False, False, True, False, False]
    assert feature_table.hide_format(table()).height == 4
    assert feature_table.is_format(table(), below=0.6).sum() == 3


def test_attach_keeps_every_row_and_its_order() -> None:
    labels = pl.DataFrame({"layer": [3, 3, 9], "feature": [4, 1, 1], "label": ["four", "one", "elsewhere"]})
    shuffled = table().sort("effect_size")
    joined = feature_table.attach(shuffled, labels.cast({"layer": pl.Int32, "feature": pl.UInt32}))
    assert joined.drop("label").equals(shuffled)
    assert dict(joined.select("feature", "label").rows()) == {0: None, 1: "one", 2: None, 3: None, 4: "four", 5: None}
    feature_table.validate(joined)
    for wrong in (pl.concat([labels, labels]), labels.drop("layer")):
        with pytest.raises(FeatureTableError):
            feature_table.attach(table(), wrong)
    with pytest.raises(FeatureTableError, match="already there"):
        feature_table.attach(joined, labels, ["label"])


def test_side_by_side_keeps_shared_keys_only() -> None:
    wide = feature_table.side_by_side({"data": table(), "model": table().head(3)}, "effect_size")
    assert wide.columns == ["layer", "feature", "data", "model"] and wide.height == 3
    with pytest.raises(FeatureTableError, match="no column"):
        feature_table.side_by_side({"data": table()}, "score")
