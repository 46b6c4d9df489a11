"""What tasks of language models share: the logits of the tokens to be learnt, their loss, and decoding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flora.tasks.base import Batch, cross_entropy


def answer_logits(module: nn.Module, batch: Batch, targets: Tensor, **images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``[B, K, V]`` for the last K tokens, which hold every target, and those targets ``[B, K]``.

    Sequences end where the answers end (they are padded on the left), so that the rest needs no logits. ``targets``
    ``[B, L]`` are -100 except on what is to be learnt, which the first token never is; ``images`` is what the network
    takes beside the text.
    """
    kept = min(targets.shape[1] - int((targets != -100).any(0).nonzero()[0]), targets.shape[1] - 1)
    mask = batch["attention_mask"]
    logits = module(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        logits_to_keep=kept + 1,
        use_cache=False,
        **images,
    ).logits
    return logits[:, :-1], targets[:, -kept:]


def answer_loss(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of logits ``[B, K, V]``, a mean over the targets ``[B, K]`` that are not -100."""
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing)


def sequence_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Of logits ``[B, K, V]`` for targets ``[B, K]``: cross-entropy summed over those not -100, and their number."""
    lost = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return torch.stack([lost.view(targets.shape).sum(1), (targets != -100).sum(1).float()], 1)


def write_out(
    module: nn.Module, ids: Tensor, mask: Tensor, longest: int, pad: int, end: int, beams: int, **images: Tensor
) -> Tensor:
    """What a network writes after each prompt up to ``end``, then ``pad``: ``[B, T]``; nothing is drawn.

    Args:
        module: the network, perhaps in a wrapper for several processes.
        ids, mask: prompts ``[B, L]``, padded on the left.
        longest: T is at most that.
        pad, end: tokens.
        beams: of the search for the likeliest text; 1: the likeliest token, one after the other.
        images: what the network takes beside the text.
    """
    written = getattr(module, "module", module).generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        **images,
        max_new_tokens=longest,
        do_sample=False,
        num_beams=beams,
        pad_token_id=pad,
        eos_token_id=end,
    )
    return written[:, ids.shape[1] :]
