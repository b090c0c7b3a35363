"""Plain-language explanations of the words on the pages, and the commands the empty states name.

Text only. The words are those of the project's glossary; each explanation is for a reader who has not met them.
"""

from __future__ import annotations

from urllib.parse import quote

WORDS: dict[str, str] = {
    "experiment": "One model with its feature dictionaries, conversations and comparisons, described by a preset file.",
    "layer": "Which block of the network is looked at, counted from 0. Early layers see words and spelling; "
             "middle and late layers carry more of the meaning.",
    "contrast": "What is compared with what: the target minus the reference. Positive always means higher in the "
                "target.",
    "position": "Where activations are read: averaged over the tokens of the response, or at the last prompt token, "
                "just before the model speaks.",
    "feature": "One direction the sparse autoencoder found in this layer's activations. It is active on few tokens, "
               "often on one theme. Numbers are local to a layer.",
    "sae": "Sparse autoencoder: a dictionary that rewrites a layer's activation as a sum of few features.",
    "activation": "How strongly a feature is present on a token: 0 when it is silent, larger when it is stronger. "
                  "On a response it is the mean over the response's tokens.",
    "effect_size": "How far apart the two sides are, in standard deviations. Paired contrasts use d_z (mean difference "
                   "of matched answers over its spread), unpaired ones Hedges g. Above 0: raised in the target.",
    "q_value": "The p-value corrected for testing many features at once (Benjamini-Hochberg): among features with "
               "q below 0.05, about 5% are expected to be false alarms.",
    "auroc": "The chance that a random response of the target has a higher activation than one of the reference: "
             "0.5 says nothing, 1 separates perfectly, 0 separates the other way round.",
    "prevalence": "Share of all responses, both sides together, on which the feature is active at least once.",
    "frac_active": "Share of the side's responses on which the feature is active at least once.",
    "raised": "Higher in the target than in the reference, with q below the threshold.",
    "suppressed": "Lower in the target than in the reference, with q below the threshold. As telling as raised ones.",
    "format": "Features active mostly on punctuation and white space. They follow the length and layout of answers "
              "rather than their content, so they are hidden unless asked for.",
    "content_share": "Share of the feature's activation that falls on tokens with letters in them. Low: a format "
                     "feature.",
    "replication": "The prompts are split in two. The strongest features are picked on one half and tested on the "
                   "other, which had no part in picking them.",
    "permutation": "The same procedure with the labels of the two sides shuffled: what would be found by luck alone.",
    "logit_lens": "The tokens this feature pushes the model towards (promoted) or away from (suppressed) when its "
                  "direction is read straight through the output layer. A hint, not a proof of meaning.",
    "fires_on": "What stands at the peaks of the feature's strongest contexts, with the token before; or your label. A "
                "short name, not a proof of meaning: read the contexts.",
    "contexts": "The stretches of text on which the feature is most active, each token shaded by its activation.",
    "fvu": "Fraction of variance unexplained: what the dictionary fails to reproduce of the layer's activations. "
           "0 is perfect.",
    "l0": "Mean number of features active on a token.",
    "dead_share": "Share of features that were never active on these conversations.",
    "masked_share": "Share of tokens left out because their activation is an outlier (more than 10 times the median "
                    "norm of the layer).",
    "n_tokens": "Number of tokens the figures of this layer are computed on.",
    "mean_resid_norm": "Mean length of the residual stream vector on the tokens counted; steering strengths are "
                       "multiples of it.",
    "residual": "The residual stream: the vector each layer reads and adds to, before any dictionary.",
    "separation": "How well the mean difference of the two sides, taken on half of the prompts, tells apart responses "
                  "to the other half. Uses the residual stream, not features. 0.5 is a coin, 1 is perfect.",
    "variant": "Which weights read the text: the base model, or the base with a fine-tuned adapter.",
    "conversations": "A set of prompts with responses. Each carries a condition, such as misaligned or aligned.",
    "rank": "1 is the most raised feature of those tested; the largest number is the most suppressed.",
    "label": "Your own words for the feature. Kept beside the cache and written into every export.",
    "neuronpedia": "A public site with more examples for features of published dictionaries.",
}

#: Headings of the columns of a ranking, and the word that explains each.
COLUMNS: dict[str, tuple[str, str]] = {
    "rank": ("Rank", "rank"),
    "feature": ("Feature", "feature"),
    "name": ("Fires on", "fires_on"),
    "effect_size": ("Effect size", "effect_size"),
    "q_value": ("q", "q_value"),
    "auroc": ("AUROC", "auroc"),
    "mean_target": ("Mean, target", "activation"),
    "mean_reference": ("Mean, reference", "activation"),
    "frac_active_target": ("Active, target", "frac_active"),
    "frac_active_reference": ("Active, reference", "frac_active"),
    "content_share": ("Content share", "content_share"),
}

POSITION_NAMES = {"response": "Response (mean)", "last_prompt": "Last prompt token"}


def extract_command(preset: str, variant: str = "base", conversations: str | None = None) -> str:
    """The command that makes one cache file."""
    parts = ["python -m core extract", preset]
    if variant != "base":
        parts += ["--variant", variant]
    if conversations:
        parts += ["--conversations", conversations]
    return " ".join(parts)


def markdown_safe(text: str) -> str:
    """`text` with every sign that Markdown could act on escaped, so that it is shown as it is."""
    return "".join("\\" + c if c in "\\`*_{}[]()#+-.!$:<>~|&@" else c for c in " ".join(text.split()))


def neuronpedia_url(neuronpedia_id: str, feature: int) -> str:
    """The public page of a feature; `neuronpedia_id` is `model/dictionary`."""
    return f"https://www.neuronpedia.org/{quote(neuronpedia_id, safe='/')}/{feature}"
