"""Packages that only some need, by the extra that brings them, and the line that says which one is missing."""

from flora.files import ROOT

DISTRIBUTION = "flora-peft"  # `flora` on the package index is another project
MODULES = {  # what can be imported with each extra
    "suite": (
        *("torchvision", "timm", "datasets", "evaluate", "hydra", "omegaconf", "wandb", "sklearn", "pyarrow", "PIL"),
        *("sentencepiece", "google.protobuf", "matplotlib", "hotcoco", "scipy", "psutil", "filelock", "pynvml"),
        *("rich", "jinja2"),
    ),
    "lycoris": ("lycoris",),
    "embedded": ("gguf",),
    "tensorboard": ("tensorboard",),
    "search": ("optuna",),
    "slurm": ("submitit",),
}


def needs(what: str, module: str) -> str:
    """The line for what cannot be done without a module: which command installs it."""
    extra = next(extra for extra, modules in MODULES.items() if module in modules)
    clone = (ROOT / "pyproject.toml").is_file()
    command = f'pip install -e ".[{extra}]"' if clone else f'pip install "{DISTRIBUTION}[{extra}]"'
    return f"{what} needs {module}, which is not installed: {command}"


def explained(what: str, error: ImportError) -> str | None:
    """The line for a module that was not found; None where no extra has it."""
    parts = (error.name or "").split(".")
    names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    known = {module for modules in MODULES.values() for module in modules}
    return next((needs(what, name) for name in names if name in known), None)
