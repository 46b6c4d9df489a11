"""A saved run as a program that runs without Python code, checked against its network before it is left behind."""

import os
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from flora.errors import ConfigError, first_line
from flora.models import programs
from flora.predict.predictor import Predictor, load

CLOSE = 1e-3  # largest difference of the logits, as a share of the largest


def write(run: str | os.PathLike[str], place: Path, live: bool = False) -> float:
    """Write the network of a saved run as a program, for batches of any size: ``.onnx``, or ``.pt2`` of torch.export.

    It takes what ``Predictor.preprocess`` gives: floats ``images`` [N, 3, H, W] of the run's size, or the integers
    [N, T] of a tokenizer by name, T at most what the model reads. It gives ``logits`` [N, C].

    Args:
        run: its folder.
        place: the file.
        live: leave the adapter beside the weights that it adapts, instead of merging it into them.

    Returns:
        How far the program's logits are from the network's on a batch of another size, as a share of the largest.

    Raises:
        ConfigError: a run that gives no classes or numbers for images or texts, a place that cannot be written, a
            package that is missing, or a program that does not run or gives other logits. Nothing is left behind then.
    """
    if (kind := programs.ENDS.get(place.suffix)) is None:
        raise ConfigError(f"{place}: a program ends in {' or '.join(programs.ENDS)}")
    if place.exists():
        raise ConfigError(f"{place} is there already; name another file")
    if not place.absolute().parent.is_dir():
        raise ConfigError(f"{place}: there is no folder {place.absolute().parent}")
    if missing := programs.lacking(kind):
        raise ConfigError(f"{place}: ONNX needs {', '.join(missing)}; pip install -e '.[onnx]'")
    predictor = load(run, device="cpu")
    if predictor.spec.kind not in ("image", "sequence_classification"):
        raise ConfigError(f"{run}: a run of a {predictor.spec.kind} network; only classifiers become programs here")
    model: Any = predictor.model
    if not live and isinstance(model, peft.PeftModel):
        model = model.merge_and_unload()
    texts = predictor.spec.kind != "image"
    try:
        example = _inputs(predictor, 2)
        made = programs.program(model, example, predictor.spec.max_length if texts else None)
        programs.save(made, place, list(example))
        given = _inputs(predictor, 3)
        with torch.no_grad():
            expected = model(**given).logits if texts else model(given["images"])
        try:
            found = programs.run(place, given)
        except Exception as error:  # torch 2.9 cannot load its own programs for texts of any length
            said = f"{place}: what torch {torch.__version__} wrote does not run: {first_line(error)}; not kept"
            raise ConfigError(said) from error
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= CLOSE:
            raise ConfigError(f"{place}: the program's logits differ from the network's by {difference:.1e}; not kept")
    except BaseException:
        for written in (place, place.with_name(f"{place.name}.data")):  # ONNX's weights, where they are large
            written.unlink(missing_ok=True)
        raise
    return difference


def _inputs(predictor: Predictor, count: int) -> dict[str, Tensor]:
    """Noise, or texts of some words, as the network takes them."""
    if predictor.spec.kind == "image":
        size = predictor.spec.image_size
        return {"images": torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))}
    columns = len(getattr(predictor.task, "text_columns", ())) or 1
    texts = [" ".join(["a text"] * (count + number)) for number in range(count)]
    return dict(predictor.preprocess(texts if columns == 1 else [(text,) * columns for text in texts]))
