"""A direction as a sum of SAE features, in five ways. Pure arrays in, a feature table out; no torch.

A direction is never sent through the SAE's encoder: it is no residual, and its negative parts would be lost (Mayne et
al. 2411.08790). The ways (METHODS of the field in brackets):

- `exact`: mean feature activations of the target minus the reference's. With the difference of mean SAE errors as one
  more component they sum to the direction, because decoding is linear and the biases cancel.
- `encoder`: W_enc^T v, the change of every feature's pre-activation along the direction; the biases cancel.
- `cosine`: cosine with each decoder direction (Chen et al. 2507.21509, appendix M). No joint fit: features that point
  the same way are all counted.
- `omp`: orthogonal matching pursuit, signed (Pati et al. 1993): take the feature that fits the remainder best, refit
  all, repeat.
- `nnls`: non-negative least squares (Lawson and Hanson 1974) on the features with the largest cosines.

How much a set of features explains is the share of the direction's squared norm within their span, by orthogonalizing
them one after another; it is not comparable between methods that order features differently unless k is the same, and
a random set of k explains about k / d_model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import polars as pl

from core.dictionary import Dictionary
from core.directions import Direction
from core.errors import DirectionError

Method = Literal["exact", "encoder", "cosine", "omp", "nnls"]
METHODS: tuple[Method, ...] = get_args(Method)

#: Features in a fit, and the longest curve.
K = 64
#: Features that non-negative least squares may choose from.
PRESELECTED = 256
#: Random sets behind the floor of the curve.
N_RANDOM = 20
#: A further decoder direction whose part outside the span of the others is smaller than this share adds nothing.
DEPENDENT = 1e-6


@dataclass(frozen=True, eq=False)
class Decomposition:
    """One direction by one method."""

    method: Method
    direction: Direction
    table: pl.DataFrame = field(repr=False)
    """Rows: features with a coefficient, best first. layer, feature, coefficient (units of feature activation; for
    `encoder` of pre-activation, for `cosine` v . unit decoder direction), cosine (with the decoder direction),
    contribution (coefficient x decoder direction . v / |v|^2; with `exact` and the error term these sum to 1), rank."""
    curve: pl.DataFrame = field(repr=False)
    """k (1 to at most K), share (of |v|^2 within the span of the k best), random_share (mean over random sets of k),
    random_low, random_high (2.5% and 97.5% of those)."""
    remainder: np.ndarray = field(repr=False)
    """float64 [d_model]: the direction minus what the method's own coefficients decode to. For `exact` it is the
    difference of mean SAE errors; for `encoder` and `cosine`, which fit nothing, what is outside the span of the k
    best."""
    k: int

    @property
    def error_share(self) -> float:
        """remainder . v / |v|^2: the part of the squared norm that features do not account for."""
        vector = self.direction.vector.astype(np.float64)
        return float(self.remainder @ vector / (vector @ vector))

    @property
    def error_norm_share(self) -> float:
        """|remainder| / |v|; above 1 where the features' sum and the remainder point against each other."""
        return float(np.linalg.norm(self.remainder) / self.direction.norm)


@dataclass(frozen=True, eq=False)
class Parts:
    """A direction as `components` + `remainder`, exactly."""

    components: tuple[Direction, ...]
    remainder: Direction


def decompose(
    direction: Direction,
    dictionary: Dictionary,
    method: Method,
    *,
    differences: np.ndarray | None = None,
    k: int = K,
    seed: int = 0,
) -> Decomposition:
    """Decompose `direction` over `dictionary`.

    differences: float [d_sae], mean feature activation of the target minus the reference's, for `exact` alone.
    Raises `DirectionError` when the direction is zero, belongs to another layer or width, or the method lacks what it
    needs.
    """
    vector = _checked(direction, dictionary, method, differences)
    cosines = cosines_with(vector, dictionary)
    k = min(k, dictionary.d_sae, dictionary.d_model)
    if method == "exact":
        coefficients = np.asarray(differences, dtype=np.float64)
        order = _by_size(coefficients * dictionary.norms * cosines)
    elif method == "encoder":
        coefficients = (vector.astype(np.float32) @ dictionary.W_enc).astype(np.float64)
        order = _by_size(coefficients)
    elif method == "cosine":
        coefficients = cosines * np.linalg.norm(vector)
        order = _by_size(cosines)
    else:
        chosen, values = (_omp if method == "omp" else _nnls)(vector, dictionary, cosines, k)
        coefficients = np.zeros(dictionary.d_sae)
        coefficients[chosen] = values
        order = chosen
    remainder = vector - dictionary.decode(coefficients)
    if method in ("encoder", "cosine"):
        remainder = vector - _span_part(dictionary.atoms(order[:k]), vector)
    return Decomposition(
        method, direction, _table(direction, dictionary, order, coefficients, cosines),
        _curve(vector, dictionary, order[:k], seed), remainder, k,
    )  # fmt: skip


def parts(found: Decomposition, dictionary: Dictionary, k: int) -> Parts:
    """The k best features as directions of their own, and what they leave: together exactly the direction.

    `exact` features keep their own coefficients; the others are fitted together by least squares (non-negative for
    `nnls`), so that k components rebuild as much as k can.
    """
    from scipy.optimize import nnls

    features = found.table["feature"].head(k).to_numpy()
    vector = found.direction.vector.astype(np.float64)
    atoms = dictionary.atoms(features)
    if found.method == "exact":
        values = found.table["coefficient"].head(k).to_numpy()
    elif found.method == "nnls":
        values = nnls(atoms, vector)[0] if len(features) else np.zeros(0)
    else:
        values = np.linalg.lstsq(atoms, vector, rcond=None)[0]
    origin = {"kind": "component", "of": found.direction.name, "method": found.method}
    made = tuple(
        Direction(
            f"feature {feature}", found.direction.model, found.direction.layer, value * atoms[:, n],
            found.direction.resid_norm, {**origin, "feature": str(feature), "coefficient": f"{value:.6g}"},
        )
        for n, (feature, value) in enumerate(zip(features.tolist(), values.tolist(), strict=True))
    )  # fmt: skip
    rest = vector - sum((c.vector.astype(np.float64) for c in made), np.zeros_like(vector))
    left = Direction("remainder", found.direction.model, found.direction.layer, rest, found.direction.resid_norm,
                     {**origin, "kind": "remainder", "k": str(len(made))})
    return Parts(made, left)


def method_overlap(found: list[Decomposition], k: int) -> pl.DataFrame:
    """Features that two methods have among their k best, for every pair.

    Columns: method_a, method_b, shared, same_sign (of those shared), k, n_a and n_b (below k where a fit is shorter).
    """
    tops = {d.method: set(d.table["feature"].head(k).to_list()) for d in found}
    rows = [
        {"method_a": a, "method_b": b, "shared": len(tops[a] & tops[b]), "k": k, "n_a": len(tops[a]),
         "n_b": len(tops[b]), "same_sign": _same_sign(found, a, b, tops[a] & tops[b])}
        for a in tops for b in tops
    ]  # fmt: skip
    return pl.DataFrame(rows)


def cosines_with(vector: np.ndarray, dictionary: Dictionary) -> np.ndarray:
    """float64 [d_sae]: cosine of `vector` with every decoder direction; 0 for features that write nothing."""
    dots = dictionary.W_dec @ vector.astype(np.float32)
    size = dictionary.norms.astype(np.float64) * np.linalg.norm(vector)
    return np.divide(dots, size, out=np.zeros(dictionary.d_sae), where=size > 0)


def explained(atoms: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """float64 [n]: share of |vector|^2 within the span of the first 1, 2, ... n columns of atoms [d_model, n]."""
    basis = np.zeros_like(atoms, dtype=np.float64)
    for n in range(atoms.shape[1]):
        basis[:, n] = _new_part(basis[:, :n], atoms[:, n])
    return np.cumsum((basis.T @ vector) ** 2) / (vector @ vector)


def _checked(
    direction: Direction, dictionary: Dictionary, method: str, differences: np.ndarray | None
) -> np.ndarray:
    if method not in METHODS:
        raise DirectionError(f"Unknown method {method!r}; use one of {', '.join(METHODS)}.")
    if direction.layer != dictionary.layer:
        raise DirectionError(
            f"Direction {direction.name!r} lives at layer {direction.layer}, the SAE at layer {dictionary.layer}."
        )
    if direction.d_model != dictionary.d_model:
        raise DirectionError(
            f"Direction {direction.name!r} has d_model {direction.d_model}, the SAE {dictionary.d_model}."
        )
    if method in ("exact", "encoder") and dictionary.normalize_activations != "none":
        raise DirectionError(
            f"The SAE {dictionary.sae_id} scales its input ({dictionary.normalize_activations}), so {method!r} does "
            "not read a difference of residuals; use cosine, omp or nnls."
        )
    if method == "exact" and differences is None:
        raise DirectionError(
            f"The exact decomposition of {direction.name!r} needs the caches it was made from; a vector made elsewhere "
            "has none: use encoder, cosine, omp or nnls."
        )
    if differences is not None and np.shape(differences) != (dictionary.d_sae,):
        raise DirectionError(
            f"The caches hold {len(differences)} features at layer {direction.layer}, the SAE has {dictionary.d_sae}."
        )
    direction.unit  # noqa: B018 - refuses a vector of zeros
    return direction.vector.astype(np.float64)


def _by_size(values: np.ndarray) -> np.ndarray:
    """Indices of the values that are not 0, the largest magnitude first."""
    order = np.argsort(-np.abs(values), kind="stable")
    return order[values[order] != 0]


def _new_part(basis: np.ndarray, atom: np.ndarray) -> np.ndarray:
    """The unit vector of `atom`'s part outside the orthonormal `basis` [d, n]; zeros when nothing is left."""
    size = np.linalg.norm(atom)
    if size == 0:
        return np.zeros_like(atom)
    left = atom / size
    for _ in range(2):  # twice is enough (Giraud et al. 2005)
        left = left - basis @ (basis.T @ left)
    rest = np.linalg.norm(left)
    return left / rest if rest > DEPENDENT else np.zeros_like(atom)


def _span_part(atoms: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """The part of `vector` within the span of the columns."""
    return atoms @ np.linalg.lstsq(atoms, vector, rcond=None)[0] if atoms.shape[1] else np.zeros_like(vector)


def _omp(vector: np.ndarray, dictionary: Dictionary, cosines: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(features in the order they were chosen, their coefficients in the last joint fit)."""
    norms = dictionary.norms
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    basis, chosen, rest = np.zeros((len(vector), k)), [], vector
    fits = np.abs(cosines)
    for n in range(k):
        if n:
            fits = np.abs(dictionary.W_dec @ rest.astype(np.float32)) * inverse
        fits[chosen] = 0
        best = int(fits.argmax())
        new = _new_part(basis[:, :n], dictionary.atoms([best])[:, 0])
        if fits[best] == 0 or not new.any():
            break
        basis[:, n] = new
        chosen.append(best)
        rest = vector - basis[:, : n + 1] @ (basis[:, : n + 1].T @ vector)
        if np.linalg.norm(rest) <= 1e-6 * np.linalg.norm(vector):
            break
    features = np.array(chosen, dtype=np.int64)
    return features, np.linalg.lstsq(dictionary.atoms(features), vector, rcond=None)[0]


def _nnls(vector: np.ndarray, dictionary: Dictionary, cosines: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(features with a positive weight, largest component first, their coefficients); k is not used: all are kept."""
    from scipy.optimize import nnls

    near = np.argsort(-cosines, kind="stable")[:PRESELECTED]
    near = near[cosines[near] > 0]
    norms = dictionary.norms[near].astype(np.float64)
    weights = nnls(dictionary.atoms(near) / norms, vector)[0] if len(near) else np.zeros(0)
    order = np.argsort(-weights, kind="stable")
    order = order[weights[order] > 0]
    return near[order], weights[order] / norms[order]


def _table(
    direction: Direction, dictionary: Dictionary, order: np.ndarray, coefficients: np.ndarray, cosines: np.ndarray
) -> pl.DataFrame:
    values = coefficients[order]
    contribution = values * dictionary.norms[order] * cosines[order] / direction.norm
    return pl.DataFrame({
        "layer": np.full(len(order), direction.layer, dtype=np.int64),
        "feature": order.astype(np.int64),
        "coefficient": values,
        "cosine": cosines[order],
        "contribution": contribution,
        "rank": np.arange(1, len(order) + 1, dtype=np.int64),
    })


def _curve(vector: np.ndarray, dictionary: Dictionary, order: np.ndarray, seed: int) -> pl.DataFrame:
    shares = explained(dictionary.atoms(order), vector)
    alive = np.flatnonzero(dictionary.norms > 0)
    rng = np.random.default_rng(seed)
    n = min(len(order), len(alive))
    drawn = np.array([
        explained(dictionary.atoms(rng.choice(alive, n, replace=False)), vector) for _ in range(N_RANDOM)
    ]).reshape(N_RANDOM, n)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0) if n else (np.zeros(0), np.zeros(0))
    return pl.DataFrame({
        "k": np.arange(1, n + 1, dtype=np.int64), "share": shares[:n], "random_share": drawn.mean(axis=0),
        "random_low": low, "random_high": high,
    })


def _same_sign(found: list[Decomposition], a: str, b: str, shared: set[int]) -> int:
    signs = {d.method: dict(zip(d.table["feature"], np.sign(d.table["coefficient"]), strict=True)) for d in found}
    return sum(signs[a][f] == signs[b][f] for f in shared)
