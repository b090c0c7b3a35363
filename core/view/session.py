"""The only module of this room that knows Streamlit: choices kept in the URL, cached loaders, errors as one sentence.

Every choice has one name, which is its URL parameter: a link restores the view. An open cache is shared between
browser sessions and never changed; tables are cached by the file's path, time and size, so a new extraction is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import polars as pl
import streamlit as st

from core import paths
from core.analysis import compare
from core.analysis.compare import Depth, Sides
from core.analysis.concordance import Concordance, ConcordanceSettings
from core.analysis.concordance_files import RANKING, Contrasts, concord_at, every_layer, left_out
from core.analysis.ranking import Ranking, RankingSettings
from core.errors import CacheError, MicroscopeError
from core.experiment import load_experiment, preset_names
from core.specs import POSITIONS, ContrastSpec, Experiment
from core.store import difference_file
from core.store.reader import Cache, Context
from core.view import difference_parts, inventory
from core.view.charts import PICK
from core.view.guide import POSITION_NAMES, WORDS, extract_command, markdown_safe
from core.view.inventory import CachedFile, FileKey, file_key
from core.view.labels import Labels, read_labels, with_names

T = TypeVar("T")

DEFAULT_PRESET = "demo"

#: Shuffles of the permutation control: enough for a mean and a range.
PERMUTATIONS = 20
#: What the first chart waits for: everything but the permutation control, which takes longest.
QUICK = RankingSettings(n_permutations=0)


@dataclass(frozen=True)
class View:
    """What the sidebar has chosen, shared by every page."""

    experiment: Experiment
    contrast: ContrastSpec
    layer: int
    position: str

    def link(self, **changes: object) -> dict[str, str]:
        """URL parameters of this view with some of them changed, for a link to another page."""
        now = {"experiment": self.experiment.name, "contrast": self.contrast.name, "layer": self.layer,
               "position": self.position}
        return {k: str(v) for k, v in {**now, **changes}.items()}


# -------------------------------------------------------------------------------------------- choices in the URL


def recall(name: str, default: T, parse: Callable[[str], T], valid: Callable[[T], bool]) -> None:
    """Before a widget with key `name`: give it the URL's value when the URL changed, else keep what it had.

    An unusable URL value leaves a note for the reader and falls back to what was kept, else to `default`.
    """
    state, raw = st.session_state, st.query_params.get(name)
    kept = state.get(f"kept {name}", default)
    kept = kept if valid(kept) else default
    changed = raw != state.get(f"url of {name}")
    if raw is not None and changed:
        try:
            value = parse(raw)
        except ValueError:
            value = None
        if value is None or not valid(value):
            shown = ", ".join(kept) if isinstance(kept, list) else kept
            _note(f"The link asks for {name} “{raw[:60]}”, which is not there; showing “{shown}” instead.")
        else:
            kept = value
    if changed or name not in state or not valid(state[name]):
        state[name] = kept


def keep(name: str, value: T, default: T | None, as_text: Callable[[T], str] = str) -> None:
    """After the widget: remember its value across pages and write it to the URL, unless it is the default."""
    written = None if value == default else as_text(value)
    st.session_state[f"kept {name}"] = value
    st.session_state[f"url of {name}"] = written
    if written is None:
        st.query_params.pop(name, None)
    elif st.query_params.get(name) != written:
        st.query_params[name] = written


def choose(widget: Callable[..., Any], label: str, name: str, options: Sequence[T], default: T, *,
           always: bool = False, **more: Any) -> T:
    """One of `options` through a selectbox or segmented control, in the URL as text (`always`: the default too)."""
    recall(name, default, {str(o): o for o in options}.get, lambda value: value in options)
    chosen = widget(label, options, key=name, **more)
    value = default if chosen is None else chosen
    keep(name, value, None if always else default)
    return value


def toggle(label: str, name: str, **more: Any) -> bool:
    """A switch that is off by default, in the URL as `yes` when on."""
    recall(name, False, {"yes": True, "no": False}.get, lambda value: isinstance(value, bool))
    value = st.toggle(label, key=name, **more)
    keep(name, value, False, lambda on: "yes")
    return value


def text(label: str, name: str, **more: Any) -> str:
    """A line of text, in the URL as it is."""
    recall(name, "", str, lambda value: isinstance(value, str))
    value = st.text_input(label, key=name, **more)
    keep(name, value, "")
    return value


def several(label: str, name: str, options: Sequence[str], default: list[str], limit: int, **more: Any) -> list[str]:
    """At most `limit` of `options` through a multiselect, in the URL separated by commas."""
    recall(name, default, lambda raw: [part for part in raw.split(",") if part],
           lambda value: len(value) == len(set(value)) <= limit and set(value) <= set(options))
    value = st.multiselect(label, options, key=name, max_selections=limit, **more)
    keep(name, value, default, ",".join)
    return value


def selected(chosen: View, d_sae: int, ends: dict[str, int]) -> int | None:
    """The selected feature of the chosen layer, or None. `ends` are words the URL may use for one (top, bottom).

    A feature number means nothing in another layer, so a change of layer forgets it.
    """
    state, raw = st.session_state, st.query_params.get("feature")
    place = (chosen.experiment.name, chosen.layer)
    feature = state.get("kept feature") if state.get("feature at") == place else None
    if raw is not None and raw != state.get("url of feature"):
        found = ends.get(raw, int(raw) if raw.isdecimal() and len(raw) < 10 else None)
        if found is not None and 0 <= found < d_sae:
            feature = found
        else:
            _note(f"The link asks for feature “{raw[:60]}”, but layer {chosen.layer} has features 0 to {d_sae - 1}.")
    select(chosen, feature)
    return feature


def remember_feature(chosen: View, feature: int | None) -> None:
    """In a callback: make `feature` the selected one; the next run writes it to the URL."""
    st.session_state["feature at"] = (chosen.experiment.name, chosen.layer)
    st.session_state["kept feature"] = feature


def select(chosen: View, feature: int | None) -> None:
    """Make `feature` the selected one, here and in the URL."""
    remember_feature(chosen, feature)
    keep("feature", feature, None)


def note_slot() -> None:
    """Reserve the place, above the page's title, where notes about the link appear."""
    st.session_state["note slot"] = st.container()


def _note(sentence: str) -> None:
    """Say what the link asked for that could not be done."""
    with st.session_state["note slot"]:
        st.info(markdown_safe(sentence), icon=":material/link_off:")


# ------------------------------------------------------------------------------------------- guards and messages


def stop_with(error: MicroscopeError) -> NoReturn:
    """One sentence in place of the page's content."""
    st.error(markdown_safe(str(error)), icon=":material/error:")
    st.stop()


def empty(title: str, body: str, *commands: str) -> NoReturn:
    """An empty state: what is missing, and the commands that make it."""
    with st.container(border=True):
        st.subheader(title, anchor=False)
        st.markdown(body)
        if commands:
            st.code("\n".join(dict.fromkeys(commands)), language="bash")
    st.stop()


# ----------------------------------------------------------------------------------------------------- sidebar


def sidebar() -> None:
    """The shared controls; leaves a `View` for the page, or says in one sentence why there is none."""
    names = preset_names()
    default = DEFAULT_PRESET if DEFAULT_PRESET in names else next(iter(names), "")
    with st.sidebar:
        if not names:
            stop_with(CacheError("No preset was found in core/presets; restore the checkout."))
        name = choose(st.selectbox, "Experiment", "experiment", names, default, always=True, help=WORDS["experiment"])
        try:
            experiment = load_experiment(name)
        except MicroscopeError as error:
            stop_with(error)
        contrasts = {c.name: c for c in experiment.contrasts}
        contrast = contrasts[choose(
            st.selectbox, "Contrast", "contrast", list(contrasts), next(iter(contrasts)), always=True,
            format_func=lambda n: contrasts[n].title or n, help=WORDS["contrast"],
        )]
        layers = _layers(experiment, contrast)
        middle = experiment.default_layer if experiment.default_layer in layers else layers[len(layers) // 2]
        layer = choose(st.selectbox, "Layer", "layer", layers, middle, always=True, help=WORDS["layer"])
        position = choose(
            st.selectbox, "Position", "position", list(POSITIONS), "response", always=True,
            format_func=POSITION_NAMES.__getitem__, help=WORDS["position"],
        )
        st.caption(markdown_safe(f"Target: {contrast.target.describe()}. Reference: {contrast.reference.describe()}."))
    st.session_state["view"] = View(experiment, contrast, layer, position)


def navigation() -> Any:
    """The pages, in the sidebar; returns the one to run."""
    return st.navigation([
        st.Page("pages/overview.py", title="Overview", default=True),
        st.Page("pages/rankings.py", title="Rankings"),
        st.Page("pages/concordance.py", title="Concordance"),
        st.Page("pages/difference.py", title="Difference lens"),
        st.Page("pages/feature.py", title="Feature"),
    ])


def view() -> View:
    """What the sidebar chose in this run; a page asks once.

    On a fresh server a link straight to a page makes Streamlit run that page's file alone, because a folder `pages`
    exists; only once `st.navigation` was called does it run the app's script. So call it here and begin again.
    """
    chosen = st.session_state.pop("view", None)
    if chosen is None:
        navigation()
        st.rerun()
    return chosen


def _layers(experiment: Experiment, contrast: ContrastSpec) -> list[int]:
    """Layers to choose from: those cached on both sides, or the preset's where nothing usable is cached."""
    with suppress(CacheError):  # the page says what is wrong with the file; here any layer will do
        found = [open_cache(compare.side_file(experiment, s)).layers for s in (contrast.target, contrast.reference)]
        both = sorted(set(found[0]) & set(found[1]))
        if both:
            return both
    return list(experiment.layers)


# ---------------------------------------------------------------------------------------------- cached loading


def open_cache(path: Path) -> Cache:
    """An open cache, shared. Raises `CacheError`."""
    return _open(*file_key(path))


@st.cache_resource(max_entries=16, show_spinner=False, on_release=lambda cache: cache.close())
def _open(path: str, mtime_ns: int, size: int) -> Cache:
    return Cache.open(path)


def is_cached(experiment: Experiment, contrast: ContrastSpec) -> bool:
    """Whether both sides of a contrast have their files."""
    return all(compare.side_file(experiment, side).is_file() for side in (contrast.target, contrast.reference))


def open_sides(chosen: View) -> Sides:
    """Both sides of the chosen contrast. Shows an empty state when nothing is cached, an error when it is damaged."""
    return open_every(chosen, [chosen.contrast])[chosen.contrast.name]


def open_every(chosen: View, contrasts: Sequence[ContrastSpec]) -> dict[str, Sides]:
    """Both sides of several contrasts, by name; one empty state for all that is missing."""
    experiment = chosen.experiment
    missing = [s for c in contrasts for s in (c.target, c.reference)
               if not compare.side_file(experiment, s).is_file()]
    if missing:
        commands = [extract_command(experiment.name, s.variant, s.conversations) for s in missing]
        what = " and ".join(dict.fromkeys(f"**{markdown_safe(s.variant)}** reading "
                                          f"**{markdown_safe(s.conversations)}**" for s in missing))
        which = "this contrast" if len(contrasts) == 1 else "one of these contrasts"
        empty(f"Nothing cached for {which} yet",
              f"It needs {what}. One pass over the conversations makes the file; the run can be interrupted and "
              "goes on where it stopped. Then reload this page.", *commands)
    try:
        return {c.name: _open_both(experiment, c) for c in contrasts}
    except MicroscopeError as error:
        stop_with(error)


def open_contrasts(chosen: View, contrasts: Sequence[ContrastSpec]) -> Contrasts:
    """Several contrasts with their benign controls; a control that cannot be opened is left out with a note."""
    sides, controls, missing = open_every(chosen, contrasts), {}, []
    for contrast in contrasts:
        if contrast.control is not None:
            try:
                controls[contrast.name] = _open_both(chosen.experiment, chosen.experiment.contrast(contrast.control))
            except MicroscopeError as error:
                missing.append(left_out(contrast.control, contrast.name, error))
    return Contrasts(sides, controls, tuple(missing), chosen.layer)


def _open_both(experiment: Experiment, contrast: ContrastSpec) -> Sides:
    sides = Sides(contrast, *(open_cache(compare.side_file(experiment, s))
                              for s in (contrast.target, contrast.reference)))
    for cache, side in ((sides.target, contrast.target), (sides.reference, contrast.reference)):
        compare.side_rows(cache, side)
    return sides


def picked(chart: Any, key: str, chosen: View, **more: Any) -> None:
    """Draw a chart whose click selection makes a feature the selected one."""

    def on_select() -> None:
        points = st.session_state[key]["selection"].get(PICK) or []
        if points and points[0].get("feature") is not None:
            remember_feature(chosen, int(points[0]["feature"]))

    st.altair_chart(chart, key=key, on_select=on_select, selection_mode=PICK, width="stretch", **more)


def picked_row(table: pl.DataFrame, key: str, chosen: View, **more: Any) -> None:
    """Draw a table (with a column `feature`) whose selected row makes its feature the selected one."""
    features = table["feature"].to_list()

    def on_select() -> None:
        rows = st.session_state[key]["selection"]["rows"]
        if rows and rows[0] < len(features):
            remember_feature(chosen, int(features[rows[0]]))

    st.dataframe(table, key=key, on_select=on_select, selection_mode="single-row", hide_index=True, **more)


def need_features(chosen: View, sides: Sides) -> None:
    """Stop with an empty state where the layer holds residuals only."""
    if 0 in (sides.target.info(chosen.layer).d_sae, sides.reference.info(chosen.layer).d_sae):
        empty(f"Layer {chosen.layer} has no features",
              "It was cached without a sparse autoencoder, so only residuals are there. The depth view on the Rankings "
              "page works without features; or choose a preset with SAEs and extract it.")


@st.cache_data(max_entries=64, show_spinner=False)
def _ranking(target: FileKey, reference: FileKey, contrast: ContrastSpec, layer: int, position: str,
             settings: RankingSettings) -> Ranking:
    return compare.rank(Sides(contrast, _open(*target), _open(*reference)), layer, position, settings)


@st.cache_data(max_entries=256, show_spinner=False)
def _depth(target: FileKey, reference: FileKey, contrast: ContrastSpec, layer: int, position: str,
           settings: RankingSettings) -> Depth:
    return compare.depth(Sides(contrast, _open(*target), _open(*reference)), layer, position, settings)


@st.cache_data(max_entries=64, show_spinner=False)
def _concordance(key: tuple[Any, ...], layer: int, position: str, settings: ConcordanceSettings,
                 _found: Contrasts) -> Concordance:
    return concord_at(_found, layer, position, settings, _remembered_rank)


@st.cache_data(max_entries=16, show_spinner=False)
def _every_layer(key: tuple[Any, ...], position: str, settings: ConcordanceSettings,
                 _found: Contrasts) -> list[Concordance]:
    return every_layer(_found, position, settings, _remembered_rank)


def _remembered_rank(sides: Sides, layer: int, position: str) -> Ranking:
    return _ranking(*_keys(sides), sides.contrast, layer, position, RANKING)


def _contrasts_key(found: Contrasts) -> tuple[Any, ...]:
    opened = (*found.sides.items(), *found.controls.items())
    return (*((name, sides.contrast, *_keys(sides)) for name, sides in opened), found.missing)


@st.cache_data(max_entries=32, show_spinner=False)
def _feature_info(key: FileKey, layer: int) -> pl.DataFrame:
    return _open(*key).feature_info(layer)


def _keys(sides: Sides) -> tuple[FileKey, FileKey]:
    return file_key(sides.target.path), file_key(sides.reference.path)


def load_ranking(chosen: View, sides: Sides, settings: RankingSettings = QUICK) -> Ranking:
    """The ranking, with delta-attribution where it was computed; with `QUICK` settings in well under a second.

    Errors stop the page with one sentence. The attribution is read anew each time, so a fresh one is seen.
    """
    try:
        ranking = _ranking(*_keys(sides), chosen.contrast, chosen.layer, chosen.position, settings)
        return compare.with_attribution(ranking, sides)
    except MicroscopeError as error:
        stop_with(error)


def load_depth(chosen: View, sides: Sides, settings: RankingSettings = QUICK) -> pl.DataFrame:
    """One row a cached layer: the fields of `Depth`."""
    settings = replace(settings, replication_k=0)
    try:
        rows = [_depth(*_keys(sides), chosen.contrast, layer, chosen.position, settings) for layer in sides.layers]
    except MicroscopeError as error:
        stop_with(error)
    return pl.DataFrame([vars(row) for row in rows], infer_schema_length=None)


def load_concordance(chosen: View, found: Contrasts, settings: ConcordanceSettings) -> Concordance:
    """What the contrasts share at the chosen layer and position. Errors stop the page with one sentence."""
    try:
        return _concordance(_contrasts_key(found), chosen.layer, chosen.position, settings, found)
    except MicroscopeError as error:
        stop_with(error)


def load_every_layer(chosen: View, found: Contrasts, settings: ConcordanceSettings) -> list[Concordance]:
    """The same at every cached layer."""
    try:
        return _every_layer(_contrasts_key(found), chosen.position, settings, found)
    except MicroscopeError as error:
        stop_with(error)


def load_feature_info(chosen: View, sides: Sides) -> pl.DataFrame:
    """Logit lens and activity of every feature of the layer, from the target's cache."""
    return _feature_info(_keys(sides)[0], chosen.layer)


def load_labels(chosen: View) -> Labels:
    """The user's labels of this experiment; a damaged file is reported on the page."""
    labels = read_labels(label_folder(chosen))
    if labels.problem:
        st.warning(markdown_safe(labels.problem), icon=":material/label_off:")
    return labels


def label_folder(chosen: View) -> Path:
    return paths.CACHE / chosen.experiment.name


def named(table: pl.DataFrame, chosen: View, sides: Sides, labels: Labels) -> pl.DataFrame:
    """A feature table with labels, what each feature fires on, logit-lens tokens and the name it goes by."""
    info = sides.target.info(chosen.layer)
    return with_names(table, load_feature_info(chosen, sides), labels.of_sae(info.sae_release, info.sae_id))


def load_values(chosen: View, sides: Sides, feature: int) -> pl.DataFrame:
    """Activation of one feature on every response of both sides."""
    try:
        return compare.feature_values(sides, chosen.layer, chosen.position, feature)
    except MicroscopeError as error:
        stop_with(error)


def load_contexts(chosen: View, sides: Sides, feature: int) -> tuple[list[Context], list[Context]]:
    """Strongest contexts of one feature on the target's side and on the reference's."""
    try:
        return compare.contexts(sides, chosen.layer, feature)
    except MicroscopeError as error:
        stop_with(error)


def difference_files(chosen: View) -> dict[str, Path]:
    """Variant -> the file of its difference lens, of the chosen experiment, in the preset's order."""
    return difference_parts.ordered(difference_file.difference_files(label_folder(chosen)), chosen.experiment)


@st.cache_resource(max_entries=8, show_spinner=False)
def _difference(path: str, mtime_ns: int, size: int) -> difference_file.DifferenceLens:
    return difference_file.read_difference(Path(path))


def load_difference(path: Path) -> difference_file.DifferenceLens:
    """A variant's difference lens. Errors stop the page with one sentence."""
    try:
        return _difference(*file_key(path))
    except MicroscopeError as error:
        stop_with(error)


def feature_names(chosen: View, layer: int, release: str, sae_id: str) -> dict[int, str]:
    """What the features of an SAE go by; empty where the chosen contrast's cache does not hold that SAE's layer."""
    with suppress(CacheError):
        cache = open_cache(compare.side_file(chosen.experiment, chosen.contrast.target))
        if layer in cache.layers and (cache.info(layer).sae_release, cache.info(layer).sae_id) == (release, sae_id):
            info = _feature_info(file_key(cache.path), layer)
            own = read_labels(label_folder(chosen)).of_sae(release, sae_id)
            return dict(with_names(info.select("feature"), info, own).select("feature", "name").iter_rows())
    return {}


def load_inventory(chosen: View) -> list[CachedFile]:
    """Every cache file the experiment needs, and how it stands."""
    return inventory.cached_files(chosen.experiment, open_cache)


def load_health(chosen: View) -> pl.DataFrame | None:
    """Health of the target's cache, a row a layer; None when it cannot be opened."""
    try:
        return inventory.health(open_cache(compare.side_file(chosen.experiment, chosen.contrast.target)))
    except CacheError:
        return None
