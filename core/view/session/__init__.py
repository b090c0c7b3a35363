"""The only room under core that knows Streamlit: what pages call, one idea a file."""
# ruff: noqa: F401

from core.view.session.caches import is_cached, need_features, open_contrasts, open_sides
from core.view.session.choices import choose, forget, keep, number, put, several, slide, text, toggle, within
from core.view.session.contrasts import (
    PERMUTATIONS,
    QUICK,
    example_rows,
    load_concordance,
    load_contexts,
    load_depth,
    load_every_layer,
    load_ranking,
    load_rankings,
    load_values,
)
from core.view.session.directions import (
    carried,
    carry,
    just_carried,
    load_across,
    load_decomposition,
    load_decompositions,
    load_dictionary,
    load_measured,
    load_readers,
    pools,
    steering_page,
)
from core.view.session.files import (
    coherent_range,
    difference_files,
    load_difference,
    load_health,
    load_inventory,
    load_margins,
    load_sweep,
)
from core.view.session.frame import navigation, sidebar, view
from core.view.session.generations import Turn, busy, forget_turns, queue, records, start, turns
from core.view.session.loras import (
    adapters_here,
    load_angles,
    load_contrast_directions,
    load_effects,
    load_firing_table,
    load_lora,
    load_movers,
    load_predictions,
    load_probes,
    load_written,
    lora_files_of,
    names_at,
    sae_layers,
)
from core.view.session.messages import empty, note_slot, warn_about_sae
from core.view.session.models import read_text
from core.view.session.names import feature_names, label_folder, load_feature_info, load_labels, named
from core.view.session.rating import rating_tab
from core.view.session.responses import (
    UPLOAD_MB,
    choose_response,
    load_judged,
    load_sources,
    opened_response,
    picked_response,
    picked_response_row,
    read_by,
    remember_opened,
    take_upload,
    uploads,
)
from core.view.session.selection import picked, picked_row, remember_feature, select, selected
