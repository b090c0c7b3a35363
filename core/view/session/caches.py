"""Open cache files and the sides of contrasts, or in their place what is missing and how to make it.

An open cache is shared between browser sessions and never changed; its key is the file's path, time and size, so a
new extraction is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import streamlit as st

from core.analysis import find
from core.analysis.compare import Sides
from core.analysis.concordance_files import Contrasts, left_out
from core.errors import MicroscopeError
from core.specs import ContrastSpec, Experiment
from core.store.places import side_file
from core.store.reader import Cache
from core.view.guide import extract_command, markdown_safe
from core.view.inventory import FileKey, file_key
from core.view.session.chosen import View
from core.view.session.messages import empty, stop_with


def open_cache(path: Path) -> Cache:
    """An open cache, shared. Raises `CacheError`."""
    return open_key(*file_key(path))


#: Files held open: more than any experiment has, as one that is let go is closed under whoever still reads it.
MOST_OPEN = 128


@st.cache_resource(max_entries=MOST_OPEN, show_spinner=False, on_release=lambda cache: cache.close())
def open_key(path: str, mtime_ns: int, size: int) -> Cache:
    """The same by its key, as `file_key` gives it."""
    return Cache.open(path)


def is_cached(experiment: Experiment, contrast: ContrastSpec) -> bool:
    """Whether both sides of a contrast have their files."""
    return all(side_file(experiment, side).is_file() for side in (contrast.target, contrast.reference))


def open_sides(chosen: View) -> Sides:
    """Both sides of the chosen contrast. Shows an empty state when nothing is cached, an error when it is damaged."""
    return open_every(chosen, [chosen.contrast])[chosen.contrast.name]


def open_every(chosen: View, contrasts: Sequence[ContrastSpec]) -> dict[str, Sides]:
    """Both sides of several contrasts, by name; one empty state for all that is missing."""
    experiment = chosen.experiment
    missing = [s for c in contrasts for s in (c.target, c.reference)
               if not side_file(experiment, s).is_file()]
    if missing:
        commands = [extract_command(experiment.name, s.variant, s.conversations) for s in missing]
        what = " and ".join(dict.fromkeys(f"**{markdown_safe(s.variant)}** reading "
                                          f"**{markdown_safe(s.conversations)}**" for s in missing))
        which = "this contrast" if len(contrasts) == 1 else "one of these contrasts"
        empty(f"Nothing cached for {which} yet",
              f"It needs {what}. One pass over the conversations makes the file; the run can be interrupted and "
              "goes on where it stopped. Then reload this page.", *commands)
    try:
        return {c.name: find.open_sides(experiment, c, None, open_cache) for c in contrasts}
    except MicroscopeError as error:
        stop_with(error)


def open_contrasts(chosen: View, contrasts: Sequence[ContrastSpec]) -> Contrasts:
    """Several contrasts with their benign controls; a control that cannot be opened is left out with a note."""
    sides, controls, missing = open_every(chosen, contrasts), {}, []
    for contrast in contrasts:
        if contrast.control is not None and contrast.control not in sides:
            try:
                controls[contrast.name] = find.open_sides(
                    chosen.experiment, chosen.experiment.contrast(contrast.control), None, open_cache
                )
            except MicroscopeError as error:
                missing.append(left_out(contrast.control, contrast.name, error))
    return Contrasts(sides, controls, tuple(missing), chosen.layer)


def side_keys(sides: Sides) -> tuple[FileKey, FileKey]:
    """What tables of these sides are kept under: the target's file and the reference's."""
    return file_key(sides.target.path), file_key(sides.reference.path)


def need_features(chosen: View, sides: Sides) -> None:
    """Stop with an empty state where the layer holds residuals only."""
    if 0 in (sides.target.info(chosen.layer).d_sae, sides.reference.info(chosen.layer).d_sae):
        empty(f"Layer {chosen.layer} has no features",
              "It was cached without a sparse autoencoder, so only residuals are there. The depth view on the Rankings "
              "page works without features; or choose a preset with SAEs and extract it.")
