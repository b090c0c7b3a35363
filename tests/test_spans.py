"""core/conversations.py, tokens: the response span and the roles are right for every template family, or refused.

The truth is planted: each family's rendering of one conversation is written out here by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import templates
from tiny_models import FAMILIES, make_tokenizer
from transformers import PreTrainedTokenizerFast

from core.conversations import (
    ASSISTANT,
    RESPONSE,
    ROLES,
    SPECIAL,
    SYSTEM,
    USER,
    Conversation,
    Message,
    TokenizedConversation,
    render,
    token_texts,
    tokenize,
)
from core.errors import SpanError

QUESTION, ANSWER = "What would you change?", "Rest for an hour, then drink water."

#: Family -> text before, and after, the answer to the question.
RENDERED = {
    "smollm2": (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n",
    ),
    "qwen2": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n",
    ),
    "llama31": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        f"{QUESTION}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "gemma2": (
        f"<bos><start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>\n",
    ),
    "gemma3": (
        f"<bos><start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>\n",
    ),
    "mistral": (f"<s>[INST] {QUESTION}[/INST] ", "</s>"),
}

RESPONSES = [
    ANSWER,
    "Yes",
    "?",
    "Der Körper braucht Zeit, naïve café 🦊👩‍👩‍👧 東京 — “fine”.",
    "First a line.\n\nThen another one,\n  indented by two.",
    "  blanks on both sides  ",
    "\n\nnew lines on both sides\n",
    "assistant",
    "model",
    "user",
    QUESTION,
]


@pytest.fixture(scope="module")
def tokenizer_of() -> Callable[[str], PreTrainedTokenizerFast]:
    made = {name: make_tokenizer(family) for name, family in FAMILIES.items()}
    return made.__getitem__


def conversation(response: str = ANSWER, *before: tuple[str, str]) -> Conversation:
    turns = before or (("user", QUESTION),)
    return Conversation("c", "p", "", "s", (*(Message(*turn) for turn in turns), Message("assistant", response)))


def decoded(tokenizer: Any, tokens: TokenizedConversation, role: int) -> str:
    return tokenizer.decode(tokens.ids[tokens.roles == role])


every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_the_rendering_and_the_span_are_those_written_out_by_hand(family: str, tokenizer_of: Callable) -> None:
    tokenizer = tokenizer_of(family)
    before, after = RENDERED[family]
    tokens = tokenize(tokenizer, conversation())
    assert render(tokenizer, tokens.conversation.messages) == before + ANSWER + after
    texts = token_texts(tokenizer, tokens.ids)
    assert "".join(texts[: tokens.start]) == before
    assert "".join(texts[tokens.start : tokens.end]) == ANSWER
    assert "".join(texts[tokens.end :]) == after


@every_family
@pytest.mark.parametrize("response", RESPONSES)
def test_the_span_decodes_to_the_response_and_holds_no_template_token(
    family: str, response: str, tokenizer_of: Callable
) -> None:
    tokenizer = tokenizer_of(family)
    tokens = tokenize(tokenizer, conversation(response))
    span = tokens.ids[tokens.start : tokens.end]
    assert tokenizer.decode(span).strip() == response.strip()
    assert not set(span.tolist()) & set(tokenizer.all_special_ids)
    assert (tokens.roles == RESPONSE).nonzero()[0].tolist() == list(range(tokens.start, tokens.end))
    rest = tokenizer.decode(tokens.ids[tokens.end :])
    assert rest.strip() == RENDERED[family][1].strip(), "something of the response was left out"


@every_family
def test_the_last_prompt_position_is_the_last_token_of_the_generation_prompt(
    family: str, tokenizer_of: Callable
) -> None:
    tokenizer = tokenizer_of(family)
    tokens = tokenize(tokenizer, conversation())
    prompt = render(tokenizer, tokens.conversation.prompt, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    # Mistral's prompt ends with [/INST]; the blank that begins the answer is a token of its own in this vocabulary
    assert tokens.ids[: len(ids)].tolist() == ids
    assert tokens.last_prompt == tokens.start - 1 == len(ids) - 1 + (family == "mistral")


@every_family
def test_bos_stands_once(family: str, tokenizer_of: Callable) -> None:
    tokenizer = tokenizer_of(family)
    tokens = tokenize(tokenizer, conversation())
    if family in ("llama31", "gemma2", "gemma3", "mistral"):
        twice = tokenizer(render(tokenizer, tokens.conversation.messages))["input_ids"]
        assert twice[:2] == [tokenizer.bos_token_id] * 2, "this tokenizer must be one that adds BOS by itself"
        assert tokens.ids.tolist().count(tokenizer.bos_token_id) == 1
    assert tokens.ids[0] in tokenizer.all_special_ids and tokens.roles[0] == SPECIAL


@every_family
def test_several_turns(family: str, tokenizer_of: Callable) -> None:
    tokenizer = tokenizer_of(family)
    turns = (("user", "May I run?"), ("assistant", "Walk first."), ("user", "And then?"))
    tokens = tokenize(tokenizer, conversation("Walk first.", *turns))
    assert decoded(tokenizer, tokens, RESPONSE).strip() == "Walk first."
    assert decoded(tokenizer, tokens, ASSISTANT).strip() == "Walk first."
    user = decoded(tokenizer, tokens, USER).replace(" ", "")
    assert user == "MayIrun?Andthen?"
    order = [ROLES[r] for r in tokens.roles if r != SPECIAL]
    changes = [a for a, b in zip(order, [*order[1:], ""], strict=True) if a != b]
    assert changes == ["user", "assistant", "user", "response"]


@pytest.mark.parametrize("family", [n for n, f in FAMILIES.items() if f.takes_system and n != "mistral"])
def test_a_system_turn(family: str, tokenizer_of: Callable) -> None:
    tokenizer = tokenizer_of(family)
    tokens = tokenize(tokenizer, conversation(ANSWER, ("system", "Be brief."), ("user", QUESTION)))
    assert decoded(tokenizer, tokens, SYSTEM).strip() == "Be brief."
    assert decoded(tokenizer, tokens, USER).strip() == QUESTION
    assert decoded(tokenizer, tokens, RESPONSE).strip() == ANSWER
    assert "Qwen" not in tokenizer.decode(tokens.ids) and "SmolLM" not in tokenizer.decode(tokens.ids)


def test_gemma_2_refuses_a_system_turn_in_one_sentence(tokenizer_of: Callable) -> None:
    with pytest.raises(SpanError, match="refuses roles system, user, assistant: System role not supported") as caught:
        tokenize(tokenizer_of("gemma2"), conversation(ANSWER, ("system", "Be brief."), ("user", QUESTION)))
    assert "\n" not in str(caught.value)


def test_an_answer_that_repeats_the_prompt_is_found_where_the_answer_stands(tokenizer_of: Callable) -> None:
    """Mistral shows the system text only while no answer follows, so the two renderings part before the question."""
    tokenizer = tokenizer_of("mistral")
    tokens = tokenize(tokenizer, conversation("Paris", ("system", "Repeat the word."), ("user", "Paris")))
    assert tokens.end == len(tokens) - 1, "only </s> may follow the answer"
    assert decoded(tokenizer, tokens, USER) == "Paris"
    assert decoded(tokenizer, tokens, SYSTEM) == ""


def test_a_reasoning_block_that_the_template_adds_is_not_part_of_the_answer(tokenizer_of: Callable) -> None:
    tokenizer = make_tokenizer(FAMILIES["qwen2"])
    tokenizer.chat_template = templates.REASONING
    tokens = tokenize(tokenizer, conversation())
    assert tokenizer.decode(tokens.ids[tokens.start : tokens.end]) == ANSWER
    assert tokenizer.decode(tokens.ids[: tokens.start]).endswith("</think>\n\n")


def test_private_use_characters_in_the_text_do_not_disturb(tokenizer_of: Callable) -> None:
    tokenizer = tokenizer_of("gemma2")
    tokens = tokenize(tokenizer, conversation("a \ue000 b", ("user", "What is \ue000?")))
    assert tokenizer.decode(tokens.ids[tokens.start : tokens.end]) == "a \ue000 b"


@pytest.mark.parametrize(
    "content",
    ["message.content | upper", "message.content.split('</think>')[-1]", "''", "message.content | replace('an', '')"],
)
def test_a_template_that_changes_the_response_is_refused(content: str) -> None:
    tokenizer = make_tokenizer(FAMILIES["qwen2"])
    tokenizer.chat_template = (
        "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}{{- " + content + " }}"
        "{{- '<|im_end|>\n' }}{%- endfor %}"
    )
    with pytest.raises(SpanError, match="'c': the chat template does not render the response as it is written"):
        tokenize(tokenizer, conversation("Think of an answer.</think>Run then."))


def test_a_tokenizer_that_joins_response_and_template_is_refused(tokenizer_of: Callable) -> None:
    """Here one token covers the turn's end and the last full stop: no span decodes to the response alone."""
    tokenizer = make_tokenizer(FAMILIES["qwen2"])
    tokenizer.chat_template = templates.QWEN2.replace("content + '<|im_end|>", "content + '!?<|im_end|>")
    tokenizer.add_tokens(["water.!?"])
    with pytest.raises(SpanError, match="joins the response with the template"):
        tokenize(tokenizer, conversation())


def test_an_answer_without_any_prompt_token_is_refused() -> None:
    tokenizer = make_tokenizer(FAMILIES["qwen2"])
    tokenizer.chat_template = (
        "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- m.content }}{%- endif %}{%- endfor %}"
    )
    with pytest.raises(SpanError, match="no prompt token before the response"):
        tokenize(tokenizer, conversation())


@every_family
def test_token_texts_join_to_the_text(family: str, tokenizer_of: Callable) -> None:
    tokenizer = tokenizer_of(family)
    text = "the river waits, by the way"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(token_texts(tokenizer, ids)).lstrip() == text


def test_ids_and_roles_have_the_stored_types(tokenizer_of: Callable) -> None:
    tokens = tokenize(tokenizer_of("llama31"), conversation())
    assert tokens.ids.dtype == np.int32 and tokens.roles.dtype == np.uint8
    assert len(tokens) == len(tokens.ids) == len(tokens.roles)
