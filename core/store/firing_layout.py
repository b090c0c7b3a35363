"""The firing file's format: when each component of a LoRA fires on the response tokens of conversations.

`cache/README.md` is its prose. Knows names and types; firing_writer.py writes, firing_file.py reads.
"""

from __future__ import annotations

from pathlib import Path

FORMAT = "em-microscope-firing"
FORMAT_VERSION = 1

#: Folder, within an experiment's, where firing files lie.
FOLDER = "lora"

#: Components whose scalar on every single token is kept: those that carry most of the update on this text.
KEPT, COMPACT_KEPT = 64, 12
#: Significant bits of a compact file's token scalars.
COMPACT_BITS = 7
#: A compact file's means are rounded to steps of this share of their standard deviation over responses, or half of it.
COMPACT_STEP = 1 / 8
#: Logit-lens tokens kept per writing component and sign.
LENS_KEPT = 10

#: The norms of a block whose gains are kept, where there are such; fields of core.model.gains.BlockGains.
GAINS = ("attention", "mlp", "after_attention", "after_mlp")


def firing_file(folder: Path, adapter: str, conversations: str) -> Path:
    """Where the firing of an adapter on a conversation set lies; `folder` is the experiment's."""
    return Path(folder) / FOLDER / f"{adapter}__{conversations}.h5"


def firing_files(folder: Path, adapter: str) -> dict[str, Path]:
    """Name of the conversation set -> file, of every finished firing file of an adapter, in name order."""
    start = f"{adapter}__"
    found = sorted((Path(folder) / FOLDER).glob("*.h5"))
    return {path.stem.removeprefix(start): path for path in found if path.stem.startswith(start)}
