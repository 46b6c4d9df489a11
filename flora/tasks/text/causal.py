"""What tasks of language models share: the logits of the tokens to be learnt, their loss, and greedy decoding."""

from __future__ import annotations

from torch import Tensor, nn

from flora.tasks.base import Batch, cross_entropy


def answer_logits(module: nn.Module, batch: Batch, targets: Tensor, **images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``[B, K, V]`` for the last K tokens, which hold every target, and those targets ``[B, K]``.

    Sequences end where the answers end (they are padded on the left), so that the rest needs no logits. ``targets``
    ``[B, L]`` are -100 except on answers; ``images`` is what the network takes beside the text.
    """
    kept = targets.shape[1] - int((targets != -100).any(0).nonzero()[0])
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


def write_greedily(
    module: nn.Module, ids: Tensor, mask: Tensor, longest: int, pad: int, end: int, **images: Tensor
) -> Tensor:
    """The likeliest tokens after each prompt, one after the other up to ``end``, then ``pad``: ``[B, T]``.

    Args:
        module: the network, perhaps in a wrapper for several processes.
        ids, mask: prompts ``[B, L]``, padded on the left.
        longest: T is at most that.
        pad, end: tokens.
        images: what the network takes beside the text.
    """
    written = getattr(module, "module", module).generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        **images,
        max_new_tokens=longest,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=end,
    )
    return written[:, ids.shape[1] :]
