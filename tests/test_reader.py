"""Opening cache files: what is wrong with a file is said in one sentence, and damage is found."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from make_cache import make_cache

from core.errors import CacheError, CacheMismatch
from core.store import layout
from core.store.check import check_file
from core.store.reader import Cache


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("cache") / "base__health_advice.h5")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(whole, tmp_path / "copy.h5"))


def one_sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")
    return text


def test_missing_foreign_truncated_incomplete_and_newer_files(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no such cache file") as error:
        Cache.open(tmp_path / "nothing.h5")
    one_sentence(error)
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(CacheError, match="not a readable HDF5"):
        Cache.open(tmp_path / "text.h5")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["x"] = [1]
    with pytest.raises(CacheError, match="not a cache of EM Microscope"):
        Cache.open(tmp_path / "foreign.h5")
    size = copy.stat().st_size
    with open(copy, "r+b") as file:
        file.truncate(size // 2)
    with pytest.raises(CacheError, match="truncated|not a readable") as error:
        Cache.open(copy)
    one_sentence(error)


@pytest.mark.parametrize(
    ("attribute", "value", "says"),
    [("complete", False, "never finished"), ("format_version", 99, "version 99"), ("fingerprint", None, "fingerprint")],
)
def test_headers_are_checked(copy: Path, attribute: str, value: object, says: str) -> None:
    with h5py.File(copy, "r+") as file:
        del file.attrs[attribute]
        if value is not None:
            file.attrs[attribute] = value
    with pytest.raises(CacheError, match=says) as error:
        Cache.open(copy)
    one_sentence(error)


def test_a_refused_file_is_closed_again(copy: Path) -> None:
    with h5py.File(copy, "r+") as file:
        file.attrs["complete"] = False
    with pytest.raises(CacheError):
        Cache.open(copy)
    with h5py.File(copy, "r+") as file:  # would fail if the reader still held it
        file.attrs["complete"] = True
    Cache.open(copy).close()


def test_expectations_name_the_field(whole: Path) -> None:
    with Cache.open(whole) as cache:
        spec = cache.spec
    Cache.open(whole, expect={**spec, "batch_tokens": 7, "device": "cuda"}).close()  # these change no number
    with pytest.raises(CacheMismatch, match="template") as error:
        Cache.open(whole, expect={**spec, "template": "new"})
    assert error.value.expected == "new"


def test_damage_is_found(copy: Path) -> None:
    with Cache.open(copy) as cache:
        assert cache.verify() == []
    with h5py.File(copy, "r+") as file:
        file["layers/1/resid_response"][0, 0] += 1
    with Cache.open(copy) as cache:
        assert "content hash" in cache.verify()[0]
    result = check_file(copy)
    assert not result["ok"] and str(copy) in result["problems"][0]


def test_a_flipped_byte_is_found(copy: Path) -> None:
    with h5py.File(copy) as file:
        chunk = file["layers/2/resid_response"].id.get_chunk_info(0)
    data = bytearray(copy.read_bytes())
    data[chunk.byte_offset + chunk.size // 2] ^= 0xFF
    copy.write_bytes(data)
    with Cache.open(copy) as cache:
        assert len(cache.verify()) == 1


def test_check_reports_health_and_fingerprint(whole: Path, tmp_path: Path) -> None:
    result = check_file(whole)
    assert result["ok"] and result["problems"] == [] and len(result["fingerprint"]) == 64
    assert result["layers"]["1"]["fvu"] == pytest.approx(0.1)
    missing = check_file(tmp_path / "no.h5")
    assert not missing["ok"] and missing["fingerprint"] is None


def test_unknown_layers_statistics_positions_and_features(whole: Path) -> None:
    with Cache.open(whole) as cache:
        for call, says in (
            (lambda: cache.response(5), "holds layers 1, 2"),
            (lambda: cache.response(1, "median"), "median"),
            (lambda: cache.resid(1, "middle"), "middle"),
            (lambda: cache.contexts(1, 64), "features 0 to 63"),
            (lambda: cache.contexts(1, -1), "features 0 to 63"),
        ):
            with pytest.raises(CacheError, match=says) as error:
                call()
            one_sentence(error)


def test_fingerprint_ignores_only_what_changes_no_number() -> None:
    spec = {"model": "a", "device": "cpu", "batch_tokens": 1}
    assert layout.fingerprint(spec) == layout.fingerprint({**spec, "device": "cuda", "batch_tokens": 2})
    assert layout.fingerprint(spec) != layout.fingerprint({**spec, "model": "b"})


def test_float16_keeps_what_it_cannot_hold_finite() -> None:
    stored = layout.to_float16(np.array([1e6, -1e6, 1.5]))
    assert np.isfinite(stored).all() and stored[2] == 1.5 and stored[0] == layout.FLOAT16_MAX


def test_index_type_fits() -> None:
    assert layout.index_dtype(65_536) == np.uint16 and layout.index_dtype(65_537) == np.uint32
