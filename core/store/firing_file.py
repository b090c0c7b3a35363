"""Opens a finished firing file: what each component's scalar was, by response and by token. Never imports torch."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import polars as pl

from core.conversations import RESPONSE
from core.model.gains import BlockGains
from core.store import firing_layout
from core.store.stored_file import Kind, StoredFile


class Firing(StoredFile):
    """One adapter reading one conversation set. Open it with `Firing.open`; close when done."""

    KIND = Kind(firing_layout.FORMAT, firing_layout.FORMAT_VERSION, "a firing file", "firing", "lora")

    # ------------------------------------------------------------------------------------- what it is about

    @property
    def model_id(self) -> str:
        return self.spec["model"]

    @property
    def adapter(self) -> str:
        return self.spec["variant"]

    @property
    def conversations_name(self) -> str:
        return self.spec["conversations"]

    @cached_property
    def groups(self) -> tuple[tuple[str, str], ...]:
        """(conversation set, condition), in the order of the first axis of every sum."""
        group = self._file["groups"]
        return tuple(zip(group["set"].asstr()[...].tolist(), group["condition"].asstr()[...].tolist(), strict=True))

    @cached_property
    def components(self) -> pl.DataFrame:
        """A row a component, in order: layer, module, kind, index, singular_value, on_text (mean over counted tokens
        of its squared update), text_share (its share of the sum of on_text over the adapter), kept (token by token)."""
        group = self._file["components"]
        modules = group["module"].asstr()[...].tolist()
        values = group["singular_value"][...]
        layer = group["layer"][...]
        counted = self._tokens_counted()
        on_text = values**2 * group["square"][...].sum(0) / np.maximum(1, counted[np.searchsorted(self.layers, layer)])
        total = on_text.sum()
        return pl.DataFrame({
            "layer": layer.astype(np.int64),
            "module": modules,
            "kind": [name.rsplit(".", 1)[-1] for name in modules],
            "index": group["index"][...].astype(np.int64),
            "singular_value": values,
            "on_text": on_text,
            "text_share": on_text / total if total > 0 else np.zeros(len(on_text)),
            "kept": np.isin(np.arange(len(layer)), self._kept),
        })  # fmt: skip

    @cached_property
    def modules(self) -> pl.DataFrame:
        """A row a module: layer, module, kind, text_share, relative (root mean square of the update over that of the
        module's whole output, adapter included)."""
        group = self._file["modules"]
        names = group["module"].asstr()[...].tolist()
        layer = group["layer"][...].astype(np.int64)
        counted = np.maximum(1, self._tokens_counted()[np.searchsorted(self.layers, layer)])
        output = group["output_square"][...].sum(0) / counted
        sums = self.components.group_by("layer", "module").agg(pl.sum("on_text"), pl.sum("text_share"))
        table = pl.DataFrame({"layer": layer, "module": names, "output": output})
        table = table.join(sums, on=["layer", "module"], how="left", maintain_order="left")
        return table.select(
            "layer", "module", pl.col("module").str.split(".").list.last().alias("kind"), "text_share",
            pl.when(pl.col("output") > 0).then((pl.col("on_text") / pl.col("output")).sqrt()).alias("relative"),
        )  # fmt: skip

    @cached_property
    def layers(self) -> np.ndarray:
        """int [n]: the layers that the adapter changes."""
        return self._file["layers/layer"][...].astype(np.int64)

    def _tokens_counted(self) -> np.ndarray:
        return self._file["layers/n_tokens"][...].sum(0)

    @property
    def masked_share(self) -> float:
        """Share of response tokens, layers together, left out as attention sinks."""
        masked, counted = int(self._file["layers/n_masked"][...].sum()), int(self._tokens_counted().sum())
        return masked / max(1, masked + counted)

    def mean_resid_norm(self, layer: int) -> float | None:
        """Mean norm of resid_post over the counted response tokens; None at a layer that the adapter leaves alone."""
        at = np.flatnonzero(self.layers == layer)
        if not len(at) or not self._tokens_counted()[at[0]]:
            return None
        return float(self._file["layers/sum_norm"][...].sum(0)[at[0]] / self._tokens_counted()[at[0]])

    @cached_property
    def gains(self) -> dict[int, BlockGains]:
        """What the norms of each of the adapter's layers multiply by."""
        found = {}
        for layer in self.layers.tolist():
            group = self._file[f"gains/{layer}"]
            found[layer] = BlockGains(*(
                group[name][...].astype(np.float32) if name in group else None for name in firing_layout.GAINS
            ))  # fmt: skip
        return found

    def lens(self, component: int) -> tuple[list[str], list[str]]:
        """Tokens that the component's write direction promotes and suppresses, strongest first; empty lists for one
        that does not write into the residual stream."""
        group = self._file["components"]
        at = np.flatnonzero(group["writing"][...] == component)
        if not len(at):
            return [], []
        text = self._token_text
        top, bottom = ([text[i] for i in group[name][at[0]].tolist()] for name in ("top_ids", "bottom_ids"))
        return top, bottom

    # ------------------------------------------------------------------------------------------------ numbers

    def mean(self, component: int | None = None) -> np.ndarray:
        """Mean scalar over each response's counted tokens: float32 [n] of one component, or [n, c] of all; NaN where
        a response has none."""
        data = self._file["components/mean"]
        return (data[...] if component is None else data[component]).astype(np.float32).T

    @cached_property
    def writing(self) -> np.ndarray:
        """int [w]: which components write into the residual stream."""
        return self._file["components/writing"][...].astype(np.int64)

    def written(self) -> np.ndarray:
        """float32 [n, w]: mean over each response of what multiplies singular value x write direction. The scalar
        itself, or where a norm follows the module (Gemma), the scalar over the root mean square of its output."""
        group = self._file["components"]
        return (group["written"][...] if "written" in group else group["mean"][...][self.writing]).astype(np.float32).T

    @cached_property
    def _kept(self) -> np.ndarray:
        return self._file["scalars/component"][...].astype(np.int64)

    @cached_property
    def _response_offsets(self) -> np.ndarray:
        return np.r_[0, np.cumsum(self.conversations["n_response_tokens"].to_numpy())]

    def scalars(self, component: int) -> np.ndarray | None:
        """float32 [all response tokens], conversation after conversation; NaN at attention sinks. None for a component
        whose single tokens are not kept."""
        at = np.flatnonzero(self._kept == component)
        return self._file["scalars/value"][at[0]].astype(np.float32) if len(at) else None

    def on_tokens(self, row: int, component: int) -> np.ndarray | None:
        """float32 [tokens of the conversation]: the scalar on the response, NaN elsewhere and at sinks; None as
        `scalars`."""
        at = np.flatnonzero(self._kept == component)
        if not len(at):
            return None
        begin, end = (int(i) for i in self._response_offsets[row : row + 2])
        _, roles = self.tokens(row)
        found = np.full(len(roles), np.nan, dtype=np.float32)
        found[roles == RESPONSE] = self._file["scalars/value"][at[0], begin:end]
        return found

    def texts(self, row: int) -> list[str]:
        """What each token of a conversation reads as."""
        return [self._token_text[i] for i in self.tokens(row)[0].tolist()]
