"""How a question is answered: by the likelihood of each listed answer, or by what the network writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flora.tasks.base import Batch
from flora.tasks.text.causal import answer_logits, sequence_losses, write_out
from flora.tasks.text.tokenise import pad_or_end

_IMPOSSIBLE = -1e9


def likelihoods(module: nn.Module, batch: Batch) -> Tensor:
    """Log-probability of every listed answer given its prompt, ``[B, most]``."""
    logits, targets = answer_logits(module, batch, batch["targets"])
    scores = torch.full((len(batch["labels"]), int(batch["most"])), _IMPOSSIBLE, device=logits.device)
    scores.view(-1)[batch["places"]] = -sequence_losses(logits, targets)[:, 0]
    return scores


def usual(batch: Batch) -> Tensor:
    """One-hot choice of the answer that is most often right in training, whatever is asked: ``[B, most]``."""
    return F.one_hot(batch["usual"], int(batch["most"])).float()


def generated(module: nn.Module, batch: Batch, tokenizer: Any, longest: int, beams: int) -> Tensor:
    """One-hot choice of the listed answer that is named first in what is written, ``[B, most + 1]``; the last: none.

    Args:
        module: the network.
        batch: of ``Choices``.
        tokenizer: of transformers.
        longest: the most tokens to write.
        beams: of the search for the likeliest text.
    """
    most, targets = int(batch["most"]), batch["targets"]
    asked = batch["places"] % most == 0  # the first sequence of each question
    is_prompt = batch["attention_mask"].bool() & (targets == -100)
    prompts = [ids[inside] for ids, inside in zip(batch["input_ids"][asked], is_prompt[asked], strict=True)]
    pad = pad_or_end(tokenizer)
    padded = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left", padding_value=pad)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left")
    written = write_out(module, padded, mask, longest, pad, tokenizer.eos_token_id, beams)
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    listed: list[list[str]] = [[] for _ in texts]
    for place, row in zip(batch["places"].tolist(), targets, strict=True):
        listed[place // most].append(tokenizer.decode(row[row != -100], skip_special_tokens=True).split()[-1])
    picked = [named(text, answers) for text, answers in zip(texts, listed, strict=True)]
    return F.one_hot(torch.tensor([most if i is None else i for i in picked], device=mask.device), most + 1).float()


def named(text: str, answers: Sequence[str]) -> int | None:
    """Which of the answers a text names first; None if none."""
    places = [(text.lower().find(answer), i) for i, answer in enumerate(answers)]
    return min(((place, i) for place, i in places if place >= 0), default=(0, None))[1]
