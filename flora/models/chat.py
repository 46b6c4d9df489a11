"""How conversations are written for a language model: the words around questions and answers, and where answers lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple


class Place(NamedTuple):
    """Where a turn lies in a text, in characters.

    Attributes:
        header: end of the question, where the words that open its answer begin.
        answer: where the answer begins.
        end: after the answer and the token that ends it.
    """

    header: int
    answer: int
    end: int


@dataclass(frozen=True)
class Chat:
    """The words around the turns of a conversation; what a tokenizer puts before every text (``<s>``) is not of them.

    Attributes:
        opening: what comes first, ``{system}`` in it stands for the system message.
        system: that message.
        question: what comes before a question.
        answer: what comes between a question and its answer.
        space: what separates the answer from that, and belongs to the answer.
        end: the token that ends an answer, as text.
        after: what comes between an answer and the next question.
        asks: whether the words of a question are written; else its images alone are.
    """

    opening: str
    system: str
    question: str
    answer: str
    space: str
    end: str
    after: str
    asks: bool = True

    def saying(self, system: str | None) -> Chat:
        """The same with another system message; None or empty: unchanged."""
        return replace(self, system=system) if system else self

    def end_token(self, tokenizer: Any) -> int:
        """The token of ``end``, which a tokenizer may know under another name, as of a byte; ValueError for none."""
        if self.end in tokenizer.get_vocab():
            return tokenizer.convert_tokens_to_ids(self.end)
        if self.end.isspace():
            alone, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", f"a{self.end}"))
            if after[:-1] == alone and after[-1] != tokenizer.unk_token_id:
                return after[-1]
        raise ValueError(f"it has no token {self.end!r}")

    def write(self, turns: Sequence[tuple[str, str | None]]) -> tuple[str, list[Place]]:
        """A conversation as text, and where each turn lies in it; an answer of None is left to be written."""
        text, places = self.opening.replace("{system}", self.system), []
        for number, (question, answer) in enumerate(turns):
            text += (self.after if number else "") + self.question + question
            header = len(text)
            text += self.answer
            begin = len(text)
            if answer is not None:
                text += self.space + answer + self.end
            places.append(Place(header, begin, len(text)))
        return text, places


CHATS = {
    # The template that SmolLM2-Instruct carries in its tokenizer, with an empty system message instead of its name.
    "chatml": Chat(
        opening="<|im_start|>system\n{system}<|im_end|>\n",
        system="",
        question="<|im_start|>user\n",
        answer="<|im_end|>\n<|im_start|>assistant\n",
        space="",
        end="<|im_end|>",
        after="\n",
    ),
    # conv_vicuna_v1 of LLaVA's llava/conversation.py, in which LLaVA-1.5 was trained.
    "vicuna": Chat(
        opening="{system} ",
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        question="USER: ",
        answer=" ASSISTANT:",
        space=" ",
        end="</s>",
        after="",
    ),
    # conv_llava_plain and preprocess_plain there: the image and its caption, in which LLaVA's stage 1 trains.
    "plain": Chat(opening="", system="", question="", answer="", space="", end="\n", after="", asks=False),
}
