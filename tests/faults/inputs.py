"""Faults of what a run is given or reaches for: settings, data, weights, other machines."""

import shutil

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features
from datasets import Image as ImageFeature

from tests.faults.frame import FOLDER, fault
from tests.tasks.imagefolder.folders import photographs


@fault("secret typed for a sweep")
def secret_typed(place):
    return place.run("+api_key=abc", "hydra.mode=MULTIRUN"), None


@fault("W&B unreachable", slow=True)
def no_wandb(place):
    for name, value in {"MODE": "online", "API_KEY": "0" * 40, "BASE_URL": "http://127.0.0.1:9"}.items():
        place.patch.setenv(f"WANDB_{name}", value)
    place.patch.setattr("flora.training.loggers.SECONDS", 1.0)
    return place.run("logger=wandb"), None


@fault("settings that ask for more memory than there is")
def too_large(place):
    return place.run("model.image_size=100000"), None


@fault("batch norm over one value")
def one_value(place):
    return place.run("adapter=full", "trainer.batch_size=1"), None


@fault("EPS or another format named .jpg")
def postscript(place):
    photographs(place.folder / "data")
    for image in (place.folder / "data" / "train").rglob("*.png"):
        image.rename(image.with_suffix(".jpg")).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    return place.run(*FOLDER, f"paths.data={place.folder}/data"), None


@fault("class name that no font can write")
def undrawable(place):
    photographs(place.folder / "data")
    for split in ("train", "val"):
        (place.folder / "data" / split / "bee").rename(place.folder / "data" / split / "b\udcffe")
    return place.run(*FOLDER, f"paths.data={place.folder}/data"), None


@fault("hub unreachable")
def no_hub(place):
    place.patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    place.patch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    place.patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place.folder / "cache"))
    return place.run("model.timm_name=convnextv2_femto.fcmae_ft_in1k", "model.pretrained=true"), None


def image_removed(place, workers):
    photographs(place.folder / "data")
    lost = sorted((place.folder / "data" / "train").rglob("*.png"))
    options = (*FOLDER, f"paths.data={place.folder}/data", f"trainer.num_workers={workers}", "trainer.max_steps=30")

    def remove():
        for path in lost:
            path.rename(path.with_suffix(".gone"))

    ended = place.run(*options, at=3, do=remove)

    def mend():
        for path in lost:
            path.with_suffix(".gone").rename(path)
        return options

    return ended, mend


@fault("image file removed while the run reads it")
def image_lost(place):
    return image_removed(place, 0)


@fault("image file removed, read by another process", slow=True)
def image_lost_in_worker(place):
    return image_removed(place, 2)


@fault("parquet file removed while the run goes on")
def parquet_lost(place):
    photographs(place.folder / "images")
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["ant", "bee"])})
    for split in ("train", "val"):
        files = sorted((place.folder / "images" / split).rglob("*.png"))
        rows = [
            {"image": {"bytes": p.read_bytes(), "path": p.name}, "label": int(p.parent.name == "bee")} for p in files
        ]
        (place.folder / "data").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, features.arrow_schema), place.folder / "data" / f"{split}.parquet")
    options = (*FOLDER, f"paths.data={place.folder}/data")
    return place.run(*options, at=3, do=lambda: shutil.rmtree(place.folder / "data")), None


@fault("loss not finite")
def diverged(place):
    return place.run("adapter=full", "trainer.lr=1e30", "trainer.max_grad_norm=1e30", "trainer.log_every=1"), None


@fault("weights not finite when training ends")
def broken_at_the_end(place):
    def spoil(callback, args, state, control, model=None, **kwargs):
        next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    with place.patch.context() as patch:
        patch.setattr("flora.training.callbacks.StepMeter.on_train_end", spoil)
        return place.run("protocol.select=last"), None
