"""GGUF files as the folder that transformers would have saved: converted once, kept in FLORA_CACHE."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from flora import extras
from flora.errors import WeightsError, first_line
from flora.models.quiet import quietly
from flora.models.weights import cache_dir, sha256_of


def converted(path: Path) -> Path:
    """The folder with ``model.safetensors`` in float32 and the tokenizer of a GGUF file.

    Args:
        path: of a causal language model that transformers can read.

    Raises:
        WeightsError: the package gguf is missing, or the file cannot be read.
    """
    target = cache_dir() / "gguf" / sha256_of(path)[:16]
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise WeightsError(extras.needs(path.name, "gguf"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".convert-") as folder, quietly():
            whole = Path(folder) / "whole"
            place: dict[str, Any] = {
                "pretrained_model_name_or_path": str(path.parent),
                "gguf_file": path.name,
                "trust_remote_code": False,
            }
            transformers.AutoTokenizer.from_pretrained(**place).save_pretrained(whole)
            model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
            # transformers refuses to save what came from GGUF; parameters that are tied are listed once.
            weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
            save_file(weights, whole / "model.safetensors", metadata={"format": "pt"})
            try:
                os.replace(whole, target)
            except OSError:
                if not target.is_dir():  # another process was first
                    raise
    except Exception as error:  # transformers raises almost any type on files that are not what it expects
        shutil.rmtree(target, ignore_errors=True)
        raise WeightsError(f"{path} cannot be converted ({first_line(error)}): fetch it again") from error
    return target
