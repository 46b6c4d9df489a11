"""What training takes from its libraries beyond their public interface: all of it is here, with the reason.

Training itself overrides and calls only the public methods of ``Loop``. tests/training/test_internals.py compares the
tables with the installed versions, and says what to do where one of them differs.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Sampler

# The versions of transformers that the test has passed on. The range in pyproject.toml is from the first to the last.
TESTED = ("5.19.0", "5.20.2", "5.21.1", "5.22.2", "5.23.0", "5.24.0")

# Methods of transformers.Trainer that Loop overrides or calls: their parameters, and why.
PRIVATE_METHODS = {
    "_inner_training_loop": (
        "self, batch_size=None, args=None, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None",
        "what a fit begins and ends with, whatever ends it",
    ),
    "_prepare_for_training": (
        "self, max_steps, train_dataloader, resume_from_checkpoint",
        "model and optimizer are wrapped, and no step has run",
    ),
    "_finalize_training": (
        "self, trial, num_train_samples, start_time",
        "the mean loss is that of all processes, the speed that of all processes before this one",
    ),
    "_load_from_checkpoint": (
        "self, resume_from_checkpoint, model=None",
        "our checkpoints are other files",
    ),
    "_load_optimizer_and_scheduler": ("self, checkpoint", "our checkpoints are other files"),
    "_load_rng_state": ("self, checkpoint", "our checkpoints are other files"),
    "_clip_grad_norm": ("self, model", "replayed in a graph; whole where parameters are in shards"),
    "_get_grad_norm": ("self, model, grad_norm=None", "the same where nothing is clipped"),
    "_get_dataloader": (
        "self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None",
        "data on the GPU, and of several processes a part for each",
    ),
    "_get_train_sampler": ("self, train_dataset=None", "texts of similar length share a batch"),
    "_get_eval_sampler": ("self, eval_dataset", "the longest texts come first"),
    "_prepare_inputs": ("self, inputs", "called: a batch goes to the device"),
}

# Public methods of transformers.Trainer that flora.training.Trainer overrides: their parameters.
PUBLIC_METHODS = {
    "compute_loss": "self, model, inputs, return_outputs=False, num_items_in_batch=None",
    "prediction_step": "self, model, inputs, prediction_loss_only, ignore_keys=None",
    "training_step": "self, model, inputs, num_items_in_batch=None",
    "evaluate": "self, eval_dataset=None, ignore_keys=None, metric_key_prefix='eval'",
    "create_optimizer": "self, model=None",
    "create_scheduler": "self, num_training_steps, optimizer=None",
    "get_total_train_batch_size": "self, args",
    "floating_point_ops": "self, inputs",
}

# Attributes that transformers.Trainer has when a fit begins, and why they are read or written.
FIELDS = {
    "_tr_loss": "the loss since the last log; a checkpoint holds it",
    "_total_loss_scalar": "the loss before that; a checkpoint holds it",
    "_globalstep_last_logged": "the step of the last log; a checkpoint holds it",
    "_initial_global_step": "from which step the mean loss counts; of a resumed run from the first",
}

# Other private names, as module:name, and why. Those of flora.launch are used there, as it does not import training.
NAMES = {
    "torch.nn.modules.batchnorm:_BatchNorm": "all kinds of batch norm: frozen ones keep their statistics",
    "torch.nn:BatchNorm2d._check_input_dim": "what torch refuses, a frozen norm refuses too",
    "torch.nn:Module._parameters": "what saves an adapter finds whole parameters in the place of shards",
    "torch:_C._are_functorch_transforms_active": "they do not take a function with a backward pass of our own",
    "torch.autograd.forward_ad:_current_level": "nor does forward-mode AD",
    "torch:_foreach_lerp_": "all moving averages in one launch",
    "torch:_foreach_copy_": "all gradients in one launch",
    "torch.cuda.memory:_cuda_endAllocateToPool": "a capture that failed leaves the allocator to its graph",
    "torch.cuda.memory:_cuda_releasePool": "the same",
    "torch:_C._error_if_any_worker_fails": "says that a data-loading process was killed",
    "torch.utils.data:DataLoader._iterator": "worker processes that stay draw as those that are begun at each epoch",
    "torch.utils.data.dataloader:_MultiProcessingDataLoaderIter._shutdown_workers": "they end with their fit",
    "torch.distributed.distributed_c10d:_get_default_store": "flora.launch.processes: which process tells of an error",
    "hydra.core.utils:JobReturn._return_value": "flora.launch.sweep: the error of a job, without the words around it",
    "transformers:TrainingArguments._n_gpu": "one process uses one GPU",
}

# Marks that a library looks for on a model: the module that looks, and why we set it.
MARKS = {
    "_is_accelerate_prepared": ("accelerate.accelerator", "a model in shards need not be wrapped"),
    "_is_fsdp_managed_module": (
        "transformers.distributed.fsdp",
        "in shards: processes whose texts are written go on until the others' are",
    ),
}

BatchNorm = _BatchNorm


class Loop(transformers.Trainer):
    """transformers' loop, with public methods where flora.training.Trainer does something else than it.

    Attributes:
        seconds_before: time that earlier processes took for this fit.
        loss_before_closing, closing_loss: of ``flora.training.callbacks.ClosingLoss``.
    """

    seconds_before = 0.0
    loss_before_closing = 0.0
    closing_loss: float | None = None

    # ------------------------------------------------------------------ for a subclass to fill in

    def fitting(self) -> contextlib.AbstractContextManager[Any]:
        """Is around a fit, however it ends."""
        return contextlib.nullcontext()

    def prepared(self, model: nn.Module) -> None:
        """Comes before the first step; ``model`` is wrapped as accelerate wraps it."""

    def restore_weights(self) -> None:
        """Put back the weights of a checkpoint."""

    def restore_optimizer(self) -> None:
        """Put back the optimizer and the schedule of a checkpoint."""

    def restore_random_state(self) -> None:
        """Put back the random numbers of a checkpoint."""

    def clipped(self, limit: float) -> Tensor:
        """Clip the gradients to a norm; gives their norm before."""
        raise NotImplementedError

    def loader(self, make: Callable[..., DataLoader], dataset: Any, batch_size: int, is_training: bool) -> DataLoader:
        """A data loader; ``make(dataset=..., batch_size=...)`` is transformers' way."""
        return make(dataset=dataset, batch_size=batch_size)

    def train_order(self, dataset: Any) -> Sampler | None:
        """What draws training examples; None: transformers' way."""
        return None

    def evaluation_order(self, dataset: Any) -> Any:
        """The order of an evaluation; None: transformers' way."""
        return None

    # ------------------------------------------------------------------ for a subclass and callbacks to use

    def on_device(self, batch: Any) -> Any:
        """A batch on the device."""
        return self._prepare_inputs(batch)

    @property
    def running_loss(self) -> Tensor:
        """The sum of the losses since the last log."""
        return self._tr_loss

    def total_loss(self) -> float:
        """The sum of the losses of all steps; all processes must ask."""
        return self._total_loss_scalar + self.accelerator.reduce(self._tr_loss, "mean").item()

    def loss_sums(self) -> dict[str, Any]:
        """What the loop has added up so far, for a checkpoint; all processes must ask."""
        return {
            "since_log": self.accelerator.reduce(self._tr_loss, "mean").item(),
            "before": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "before_closing": self.loss_before_closing,
        }

    def restore_loss_sums(self, saved: dict[str, Any]) -> None:
        """Put back what ``loss_sums`` gave, when a fit begins."""
        self._tr_loss.fill_(saved["since_log"])
        self._total_loss_scalar, self._globalstep_last_logged = saved["before"], saved["last_logged"]
        self.loss_before_closing = saved.get("before_closing", 0.0)  # older checkpoints have none
        self._initial_global_step = 0

    # ------------------------------------------------------------------ transformers' side

    def _inner_training_loop(self, *args, **kwargs):
        try:
            with self.fitting():
                return super()._inner_training_loop(*args, **kwargs)
        finally:
            end_workers(self.callback_handler.train_dataloader)

    def _prepare_for_training(self, *args, **kwargs):
        model, loader = super()._prepare_for_training(*args, **kwargs)
        self.prepared(model)
        return model, loader

    def _finalize_training(self, trial, num_train_samples, start_time):
        self._tr_loss = self.accelerator.reduce(self._tr_loss, "mean")
        return super()._finalize_training(trial, num_train_samples, start_time - self.seconds_before)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.restore_weights()

    def _load_optimizer_and_scheduler(self, checkpoint):
        self.restore_optimizer()

    def _load_rng_state(self, checkpoint):
        self.restore_random_state()

    def _clip_grad_norm(self, model):
        return self.clipped(self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        return self.clipped(float("inf")) if grad_norm is None else grad_norm

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        options = {"sampler_fn": sampler_fn, "is_training": is_training, "dataloader_key": dataloader_key}
        make = partial(super()._get_dataloader, description=description, **options)
        return self.loader(make, dataset, batch_size, is_training)

    def _get_train_sampler(self, train_dataset=None):
        order = self.train_order(self.train_dataset if train_dataset is None else train_dataset)
        return super()._get_train_sampler(train_dataset) if order is None else order

    def _get_eval_sampler(self, eval_dataset):
        order = self.evaluation_order(eval_dataset)
        return super()._get_eval_sampler(eval_dataset) if order is None else order


def use_one_gpu(arguments: transformers.TrainingArguments) -> None:
    """Let this process use one GPU at most; several would mean nn.DataParallel."""
    arguments._n_gpu = min(arguments.n_gpu, 1)


def mark_prepared(model: nn.Module) -> None:
    """Tell accelerate that a model need not be wrapped."""
    cast(Any, model)._is_accelerate_prepared = True


def mark_sharded(network: nn.Module) -> None:
    """Tell transformers that a network is in shards, so that processes write texts until the last one is done."""
    cast(Any, network)._is_fsdp_managed_module = True


def own_parameters(module: nn.Module) -> dict[str, Any]:
    """A module's own parameters by name, in the mapping that holds them."""
    return module._parameters


def approach(averages: list[Tensor], weights: list[Tensor], share: float) -> None:
    """Move each average this share of the way to its weight, in place."""
    torch._foreach_lerp_(averages, weights, share)


def fill(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Copy each value into its tensor."""
    torch._foreach_copy_(tensors, values)


def abandon(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """Let the allocator go on after a failed capture into a pool, as torch does after one that ends well."""
    try:
        torch.cuda.memory._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
    except RuntimeError:
        return  # it failed later, where torch had done so
    _ABANDONED.append(graph)
    torch.cuda.memory._cuda_releasePool(torch.cuda.current_device(), pool)


_ABANDONED: list[torch.cuda.CUDAGraph] = []  # torch keeps their addresses, so that they must not be freed


def draw_as_anew(loader: Any) -> None:
    """Draw what a data loader draws from torch's generator for new worker processes, where its own go on.

    So the random numbers of a run do not depend on how many there are, nor on where it was resumed.
    """
    loader = getattr(loader, "base_dataloader", loader)  # accelerate's is around torch's
    if loader.persistent_workers and getattr(loader, "_iterator", None) is not None:
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator)


def end_workers(loader: Any) -> None:
    """End the processes of a data loader that keeps them: found by the garbage collector, each takes five seconds."""
    loader = getattr(loader, "base_dataloader", loader)
    if (batches := getattr(loader, "_iterator", None)) is not None:
        batches._shutdown_workers()
        loader._iterator = None


def check_dimensions(norm: Any, input: torch.Tensor) -> None:
    """ValueError where a batch norm takes another number of dimensions."""
    norm._check_input_dim(input)


def transformed() -> bool:
    """Whether transforms of torch.func or forward-mode AD look at what is computed."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def raise_for_killed_workers() -> None:
    """RuntimeError where a data-loading process of this one was killed."""
    torch._C._error_if_any_worker_fails()
