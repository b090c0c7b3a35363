"""Labels: written whole, read back, joined; a damaged file is reported, set aside and never lost."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import polars as pl
import pytest

from core.view import labels
from core.view.labels import FILE, MAX_LENGTH, LabelError, key, read_labels, with_names, write_label


def test_written_read_changed_and_removed(tmp_path: Path) -> None:
    write_label(tmp_path, "local", "saes/layer_15", 7, "  sees a\n doctor ")
    assert read_labels(tmp_path).get("local", "saes/layer_15", 7) == "sees a doctor"
    write_label(tmp_path, "local", "saes/layer_15", 7, "names a doctor")
    write_label(tmp_path, "local", "saes/layer_3", 7, "another layer")
    found = read_labels(tmp_path)
    assert found.of_sae("local", "saes/layer_15") == {7: "names a doctor"}
    assert write_label(tmp_path, "local", "saes/layer_15", 7, " ").texts == {"local|saes/layer_3|7": "another layer"}
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


def test_no_file_is_no_problem(tmp_path: Path) -> None:
    found = read_labels(tmp_path / "not yet")
    assert found.texts == {} and found.problem is None


def test_markup_is_kept_as_it_is_written(tmp_path: Path) -> None:
    text = '<script>alert("x")</script> & *stars* \u00e9\U0001f4a1'
    assert write_label(tmp_path, "r", "s", 1, text).get("r", "s", 1) == text


def test_keys_of_odd_names_stay_apart(tmp_path: Path) -> None:
    assert key("a|b", "c", 1) != key("a", "b|c", 1)
    write_label(tmp_path, "a|b", "c%7C", 1, "one")
    assert read_labels(tmp_path).of_sae("a|b", "c%7C") == {1: "one"}
    assert read_labels(tmp_path).of_sae("a", "b|c%7C") == {}


@pytest.mark.parametrize("damage", [
    b"", b"{", b'{"labels": ', b"[]", b'"text"', b"\xff\xfe\x00", b'{"format": "other", "version": 1, "labels": {}}',
    b'{"format": "em-microscope-labels", "version": 99, "labels": {}}',
    b'{"format": "em-microscope-labels", "version": 1, "labels": []}',
])
def test_a_damaged_file_is_reported_and_set_aside_not_lost(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / FILE).write_bytes(damage)
    found = read_labels(tmp_path)
    assert found.texts == {} and FILE in found.problem and found.problem.count("\n") == 0
    assert (tmp_path / FILE).read_bytes() == damage  # reading changes nothing
    now = write_label(tmp_path, "r", "s", 1, "new")
    assert now.problem is None and now.texts == {"r|s|1": "new"}
    (aside,) = tmp_path.glob("labels.damaged-*.json")
    assert aside.read_bytes() == damage


def test_a_partly_damaged_file_keeps_its_sound_labels(tmp_path: Path) -> None:
    write_label(tmp_path, "r", "s", 1, "sound")
    value = json.loads((tmp_path / FILE).read_text())
    value["labels"] |= {"r|s|2": {"text": 5}, "r|s|x": {"text": "no number"}, "bare": "text"}
    (tmp_path / FILE).write_text(json.dumps(value))
    found = read_labels(tmp_path)
    assert found.texts == {"r|s|1": "sound"} and "3 of 4" in found.problem
    assert write_label(tmp_path, "r", "s", 3, "new").texts == {"r|s|1": "sound", "r|s|3": "new"}
    assert len(list(tmp_path.glob("labels.damaged-*.json"))) == 1


def test_two_damaged_files_in_one_second_are_both_kept(tmp_path: Path) -> None:
    for damage in ("first", "second"):
        (tmp_path / FILE).write_text(damage)
        write_label(tmp_path, "r", "s", 1, "new")
    assert sorted(p.read_text() for p in tmp_path.glob("labels.damaged-*.json")) == ["first", "second"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_label(tmp_path, "r", "s", 1, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(labels, "write_json", full)
    with pytest.raises(LabelError, match="No space left"):
        write_label(tmp_path, "r", "s", 1, "new")
    assert read_labels(tmp_path).texts == {"r|s|1": "old"}


def test_too_long_a_label_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=str(MAX_LENGTH)):
        write_label(tmp_path, "r", "s", 1, "x" * (MAX_LENGTH + 1))
    assert not (tmp_path / FILE).exists()


def test_writers_of_one_process_do_not_lose_each_others_labels(tmp_path: Path) -> None:
    threads = [threading.Thread(target=write_label, args=(tmp_path, "r", "s", i, f"label {i}")) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_labels(tmp_path).of_sae("r", "s") == {i: f"label {i}" for i in range(16)}
    assert os.listdir(tmp_path) == [FILE]


def test_names_prefer_the_label_and_keep_rows_and_order() -> None:
    table = pl.DataFrame({"feature": [2, 0, 1, 3]}, schema={"feature": pl.Int64})
    lens = [[" doctor", "\n", " see", " your", " fifth"], [], [" a"]]
    fires = pl.Series([[], ["your\ndoctor", " a b"], []], dtype=pl.List(pl.String))
    info = pl.DataFrame({"feature": [0, 1, 2], "top_tokens": lens, "fires_on": fires})
    named = with_names(table, info, {2: "my label", 99: "elsewhere"})
    assert named["feature"].to_list() == [2, 0, 1, 3]
    assert named["label"].to_list() == ["my label", "", "", ""]
    assert named["name"].to_list()[:2] == ["my label", "doctor \u00b7 \u21b5 \u00b7 see \u00b7 your"]
    assert named["name"].to_list()[2:] == ["your\u21b5doctor \u00b7 a b", "no tokens recorded"]
    assert with_names(table, info, {})["label"].to_list() == [""] * 4
