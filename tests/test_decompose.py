"""Five ways to write a direction as features: planted atoms are found, sums close, scikit-learn and scipy agree."""

from __future__ import annotations

import numpy as np
import pytest

from core.analysis.decompose import METHODS, Decomposition, decompose, explained, method_overlap, parts
from core.dictionary import Dictionary
from core.directions import Direction
from core.errors import DirectionError

D_MODEL, D_SAE = 256, 700
PLANTED = {17: 3.0, 88: -2.0, 140: 1.5, 301: -1.2, 399: 1.3}


def dictionary(seed: int = 0, *, unit: bool = False) -> Dictionary:
    rng = np.random.default_rng(seed)
    W_dec = rng.standard_normal((D_SAE, D_MODEL)).astype(np.float32)
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    if not unit:
        W_dec *= rng.uniform(0.3, 3.0, (D_SAE, 1)).astype(np.float32)
    W_dec[5] = 0  # a feature that writes nothing
    return Dictionary(2, "local", "sae", W_dec, rng.standard_normal((D_MODEL, D_SAE)).astype(np.float32))


def direction(vector: np.ndarray, layer: int = 2) -> Direction:
    return Direction("planted", "tiny", layer, vector, 10.0)


def planted(book: Dictionary, noise: float = 0.02) -> Direction:
    """Five atoms with known weights in units of their own norm, and noise."""
    rng = np.random.default_rng(1)
    weights = np.zeros(D_SAE)
    for feature, weight in PLANTED.items():
        weights[feature] = weight / book.norms[feature]
    return direction(book.decode(weights) + noise * rng.standard_normal(D_MODEL))


def signed(found: Decomposition, n: int) -> dict[int, float]:
    top = found.table.head(n)
    return {f: np.sign(c) for f, c in zip(top["feature"], top["coefficient"], strict=True)}


def test_matching_pursuit_finds_exactly_the_planted_atoms_with_their_signs() -> None:
    book = dictionary()
    found = decompose(planted(book), book, "omp", k=12)
    assert signed(found, 5) == {f: np.sign(w) for f, w in PLANTED.items()}
    five = decompose(planted(book), book, "omp", k=5)
    sizes = dict(zip(five.table["feature"], five.table["coefficient"], strict=True))
    for feature, weight in PLANTED.items():
        assert sizes[feature] * book.norms[feature] == pytest.approx(weight, abs=0.1)
    assert five.error_share < 0.01 < 0.9 < five.curve["share"][4]


def test_non_negative_least_squares_finds_the_planted_atoms_that_are_positive() -> None:
    book = dictionary()
    found = decompose(planted(book), book, "nnls")
    assert found.table["coefficient"].min() > 0
    positive = [f for f, w in PLANTED.items() if w > 0]
    assert set(found.table["feature"].head(3)) == set(positive)


def test_without_noise_what_is_left_is_nothing() -> None:
    book = dictionary()
    found = decompose(planted(book, noise=0), book, "omp")
    assert found.table.height == 5 and found.error_norm_share < 1e-6


def test_exact_closes_and_its_contributions_and_the_error_sum_to_one() -> None:
    book, rng = dictionary(), np.random.default_rng(2)
    differences = rng.standard_normal(D_SAE) * (rng.random(D_SAE) < 0.3)
    error = rng.standard_normal(D_MODEL)
    vector = book.decode(differences) + error
    found = decompose(direction(vector), book, "exact", differences=differences)
    assert np.allclose(found.remainder, error, atol=1e-5)
    assert found.table["contribution"].sum() + found.error_share == pytest.approx(1, abs=1e-6)
    rebuilt = book.decode(differences) + found.remainder
    assert np.allclose(rebuilt, vector, atol=1e-5)
    kept = dict(zip(found.table["feature"], found.table["coefficient"], strict=True))
    assert all(kept.get(f, 0.0) == c for f, c in enumerate(differences) if book.norms[f])


def test_encoder_difference_is_what_the_pre_activations_change_by() -> None:
    book, rng = dictionary(), np.random.default_rng(3)
    x, v, bias = rng.standard_normal(D_MODEL), rng.standard_normal(D_MODEL), rng.standard_normal(D_SAE)
    before, after = ((y - 0.3) @ book.W_enc + bias for y in (x, x + v))
    found = decompose(direction(v), book, "encoder").table.sort("feature")
    assert np.allclose(found["coefficient"], (after - before)[found["feature"].to_numpy()], atol=1e-3)


def test_cosines_rank_by_angle_and_double_count() -> None:
    book = dictionary()
    book.W_dec[10] = 2 * book.W_dec[11]
    v = book.W_dec[11] + 0.01
    top = decompose(direction(v), book, "cosine").table.head(2)
    assert set(top["feature"]) == {10, 11} and np.allclose(top["cosine"], top["cosine"][0])
    chosen = decompose(direction(v), book, "omp").table["feature"]
    assert len({10, 11} & set(chosen)) == 1


def test_scikit_learn_chooses_the_same() -> None:
    from sklearn.linear_model import OrthogonalMatchingPursuit

    book, v = dictionary(unit=True), np.random.default_rng(4).standard_normal(D_MODEL)
    other = OrthogonalMatchingPursuit(n_nonzero_coefs=20, fit_intercept=False).fit(book.W_dec.T.astype(float), v)
    found = decompose(direction(v), book, "omp", k=20)
    own = np.zeros(D_SAE)
    own[found.table["feature"].to_numpy()] = found.table["coefficient"].to_numpy()
    assert np.allclose(own, other.coef_, atol=1e-4)


def test_scipy_fits_the_same_when_all_may_be_chosen() -> None:
    from scipy.optimize import nnls

    rng = np.random.default_rng(5)
    W = rng.standard_normal((60, 40)).astype(np.float32)
    book, v = Dictionary(2, "local", "s", W, W.T), rng.standard_normal(40)
    atoms = W.T.astype(float)
    own = np.zeros(60)
    found = decompose(direction(v), book, "nnls").table
    own[found["feature"].to_numpy()] = found["coefficient"].to_numpy()
    # the optimum is unique, and it gives no weight to atoms that point away at first unless others call for them
    best = np.linalg.norm(atoms @ nnls(atoms, v)[0] - v)
    near = W @ v > 0
    allowed = np.linalg.norm(atoms[:, near] @ nnls(atoms[:, near], v)[0] - v)
    assert np.linalg.norm(atoms @ own - v) == pytest.approx(allowed, abs=1e-4) and allowed >= best - 1e-9


def test_curve_is_a_projection_and_random_sets_explain_k_over_d_model() -> None:
    book, v = dictionary(), np.random.default_rng(6).standard_normal(D_MODEL)
    found = decompose(direction(v), book, "omp", k=30)
    shares = found.curve["share"].to_numpy()
    assert (np.diff(shares) > 0).all() and shares[-1] <= 1
    atoms = book.atoms(found.table["feature"].head(7).to_numpy())
    fit = atoms @ np.linalg.lstsq(atoms, v, rcond=None)[0]
    assert shares[6] == pytest.approx(fit @ fit / (v @ v), abs=1e-6)
    assert found.curve["random_share"][29] == pytest.approx(30 / D_MODEL, rel=0.2)
    assert shares[29] > found.curve["random_high"][29] > found.curve["random_low"][29]


def test_a_dependent_atom_explains_nothing_more() -> None:
    rng = np.random.default_rng(7)
    atoms, v = rng.standard_normal((10, 3)), rng.standard_normal(10)
    shares = explained(np.column_stack([atoms, atoms @ [1, 2, 3], atoms[:, 0], np.zeros(10)]), v)
    assert np.allclose(shares[2:], shares[2])


@pytest.mark.parametrize("method", METHODS)
def test_parts_sum_to_the_direction(method: str) -> None:
    book = dictionary()
    whole = planted(book, noise=0.3)
    differences = np.random.default_rng(8).standard_normal(D_SAE)
    found = decompose(whole, book, method, differences=differences)
    for k in (0, 3, 20):
        made = parts(found, book, k)
        total = sum((c.vector for c in made.components), made.remainder.vector)
        assert np.allclose(total, whole.vector, atol=1e-5)
        assert len(made.components) == min(k, found.table.height)
    if method == "omp":  # its first k are what it would have chosen of k, and refitted they rebuild as much
        five = decompose(whole, book, "omp", k=5)
        assert np.allclose(parts(found, book, 5).remainder.vector, five.remainder, atol=1e-5)


def test_methods_overlap_counts_and_signs() -> None:
    book = dictionary()
    found = [decompose(planted(book), book, m) for m in ("omp", "nnls", "cosine")]
    table = method_overlap(found, 5)
    same = table.filter((table["method_a"] == "omp") & (table["method_b"] == "omp")).row(0, named=True)
    assert same["shared"] == same["same_sign"] == 5
    other = table.filter((table["method_a"] == "omp") & (table["method_b"] == "nnls")).row(0, named=True)
    assert other["shared"] == len(set(found[0].table["feature"].head(5)) & set(found[1].table["feature"].head(5)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "lasso"}, "use one of exact"),
        ({"direction": direction(np.ones(D_MODEL), layer=3)}, "layer 3, the SAE at layer 2"),
        ({"direction": direction(np.ones(4))}, "d_model 4"),
        ({"direction": direction(np.zeros(D_MODEL))}, "points nowhere"),
        ({"method": "exact"}, "needs the caches"),
        ({"method": "exact", "differences": np.ones(3)}, "hold 3 features"),
    ],
)
def test_what_cannot_be_decomposed_is_refused_in_a_sentence(change: dict, says: str) -> None:
    book = dictionary()
    arguments = {"direction": direction(np.ones(D_MODEL)), "method": "omp"} | change
    with pytest.raises(DirectionError, match=says):
        decompose(arguments.pop("direction"), book, arguments.pop("method"), **arguments)


def test_an_sae_that_scales_its_input_has_no_exact_sum() -> None:
    book = dictionary()
    scaled = Dictionary(2, "local", "sae", book.W_dec, book.W_enc, "layer_norm")
    with pytest.raises(DirectionError, match="scales its input"):
        decompose(planted(book), scaled, "encoder")
    assert decompose(planted(book), scaled, "omp").table.height
