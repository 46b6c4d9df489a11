"""The shared trainer: transformers' loop with our forward pass, data, optimizer, meters and progress bar."""

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate.utils import broadcast
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler

import flora
from flora.errors import TrainingDiverged
from flora.launch import processes
from flora.models.deberta import positions_kept
from flora.tasks.base import Forward, Split, cross_entropy
from flora.training import compiling, frozen_norms, internals, layout, parts, sharding
from flora.training.callbacks import ClosingLoss, StepMeter, StopOnDivergence, TellEpoch
from flora.training.capture import CapturedAdamW, CapturedStep, say_once, wanted
from flora.training.ema import Ema
from flora.training.groups import layer_scales, parameter_groups
from flora.training.order import ModalityOrder, padded_to
from flora.training.progress import Fit
from flora.training.resume import KeepBest, load_optimizer, load_weights, set_rng_state
from flora.training.settings import TrainerSettings

CACHED_SHARE = 0.1  # of the free GPU memory, that a dataset may take by itself
PREFETCHED = 4  # batches that each worker process has ahead: decoding takes its time unevenly
Loss = Callable[[Any, torch.Tensor, float], torch.Tensor]
Condense = Callable[[Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Trainer(internals.Loop):
    """Fine-tunes any module whose forward pass is given as a function.

    Args:
        model: a module whose trainable parameters are already chosen.
        settings: optimisation settings.
        forward: ``(model, batch, training) -> (outputs, targets)``; the batch is on the device.
        head: names of the classifier modules, which train with ``settings.head_lr``.
        metric: object with ``compute(predictions=..., references=...) -> {name: value}``; the selection metric is
            ``metric_name``.
        folder: the run's; nothing is written there.
        select: ``best`` restores the epoch with the best metric on ``validation`` after training.
        seed: seeds data order and dropout.
        progress: shows the steps of this fit; None: nothing does.
        extra_callbacks: what the fine-tuning method does while it trains.
        penalty: ``model -> scalar`` that the fine-tuning method adds to the training loss.
        loss: ``(outputs, targets, label_smoothing) -> scalar``.
        lr_scales: factors of the learning rate by parameter's name, from the fine-tuning method.
        condense: what an evaluation keeps of a batch (``flora.tasks.base.Task.condensed``); None: all.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: TrainerSettings,
        forward: Forward,
        head: Sequence[str],
        metric: Any,
        metric_name: str,
        folder: Path,
        train: Split | None = None,
        validation: Split | None = None,
        select: str = "last",
        seed: int = 0,
        progress: TrainerCallback | None = None,
        extra_callbacks: Sequence[TrainerCallback] = (),
        penalty: Callable[[nn.Module], torch.Tensor] | None = None,
        loss: Loss = cross_entropy,
        lr_scales: dict[str, float] | None = None,
        condense: Condense | None = None,
    ) -> None:
        self.lr_scales = lr_scales or {}
        self.settings = settings
        self.penalty = penalty
        self.forward = forward
        # Layers that are computed again in the backward pass build their own weights.
        self._together = contextlib.nullcontext() if settings.gradient_checkpointing else flora.batched(model)
        self.loss = loss
        self.condense = condense
        self.metric = metric
        self.head = list(head)
        self.captured: CapturedStep | None = None
        self._in_training_mode = False
        self._placed: dict[Any, Any] = {}  # datasets on the device, by the ones they copy
        self.on_gpu = settings.on_gpu
        if settings.pad_to_multiple_of is not None and train is not None:
            train = padded_to(train, settings.pad_to_multiple_of)
        if self.on_gpu and processes.count() > 1:
            model = parts.synchronised(model)
        norms = [module for module in model.modules() if isinstance(module, internals.BatchNorm)]
        # Where their parameters are frozen, their statistics stay frozen too: otherwise an adapter's base model would
        # drift, and the saved adapter could not reproduce the run.
        self._frozen_norms = frozen_norms.of(model)
        self._statistics_move = len(norms) > len(self._frozen_norms)
        validates = validation is not None and train is not None
        # Every trained parameter is used in every step, but for a projector where a batch shows no image.
        skips = hasattr(getattr(model, "config", None), "vision_config")
        arguments = settings.arguments(folder, seed, metric_name, validates, skips)
        internals.use_one_gpu(arguments)
        if processes.count() == 1 and self.on_gpu and (gpus := torch.cuda.device_count()) > 1:
            say_once(f"one of {gpus} GPUs is used: torchrun --nproc-per-node {gpus} train.py ... uses all")
        if settings.frozen_dtype == "bf16":
            as_statistics = {id(p) for norm in norms for p in norm.parameters()}  # torch takes both of one precision
            for parameter in model.parameters():
                if not parameter.requires_grad and parameter.is_floating_point() and id(parameter) not in as_statistics:
                    parameter.data = parameter.data.bfloat16()
        if settings.channels_last:
            layout.channels_last(model)
        if settings.distributed == "fsdp":
            sharding.shard(model, arguments.device)
        self.meter = StepMeter(self.on_gpu)
        self.ema = Ema(model, settings.ema_decay) if settings.ema_decay else None
        self._order: torch.Generator | None = None
        self._saved: dict[str, Any] | None = None
        self._ran: dict[str, Any] | None = None  # how the steps were run, where that was in another process
        self.resumed_at: list[int] = []
        self.start: dict[str, Any] = {}  # what a start from gradients took
        super().__init__(
            model=model,
            args=arguments,
            data_collator=_as_is,
            train_dataset=cast(Any, train),
            eval_dataset=cast(Any, validation),
            compute_metrics=lambda p: metric.compute(predictions=p.predictions, references=p.label_ids),
            callbacks=[
                self.meter,
                StopOnDivergence(),
                ClosingLoss(self),
                TellEpoch(),
                *([progress] if progress else []),
                *([self.ema] if self.ema else []),
                *([KeepBest(model, metric_name)] if validates and select == "best" else []),
                *extra_callbacks,
            ],
        )
        if settings.distributed == "fsdp":  # accelerate need not wrap it
            self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
            internals.mark_prepared(model)
        self.model_accepts_loss_kwargs = False  # the loss is ours: a mean over each of the accumulated batches
        self.remove_callback(PrinterCallback)

    @property
    def _module(self) -> nn.Module:
        return cast(nn.Module, self.model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The task's loss and the method's penalty; of several processes, their mean is that of the whole batch."""
        training = self._module.training
        share = parts.share(inputs) if training and processes.count() > 1 else None
        # What is written is not computed by the network's forward pass alone, around which the autocast is.
        cast_too = self.settings.frozen_dtype is not None and not training
        with self._together, self.accelerator.autocast() if cast_too else contextlib.nullcontext():
            outputs, targets = self.forward(model, inputs, training)
        loss = self.loss(outputs, targets, self.settings.label_smoothing if training else 0.0)
        if share is not None:
            loss = loss * share.to(loss.dtype)
        if self.penalty is not None and training:
            loss = loss + self.penalty(self.accelerator.unwrap_model(self._module))
        return (loss, {"logits": outputs}) if return_outputs else loss

    def prediction_step(self, model, inputs, *args, **kwargs):
        """Loss, outputs and labels of a batch; of several processes, those of all of theirs."""
        counts = inputs.pop(parts.COUNTS, None)
        prediction: Any = super().prediction_step(model, inputs, *args, **kwargs)
        loss, outputs, labels = prediction
        if self.condense is not None and outputs is not None:
            outputs, labels = self.condense(outputs, labels)
        if counts is None:
            return loss, outputs, labels
        return parts.joined(counts, [loss.repeat(len(labels)), outputs, labels])

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward of a micro-batch, replayed as a CUDA graph where that is wanted and possible."""
        if not (self._in_training_mode and self._module.training):
            model.train()
            for module in self._frozen_norms:
                module.eval()
            self._in_training_mode = True
        step = self.captured or self._forward_backward
        return step(self.on_device(inputs), self.current_gradient_accumulation_steps)

    def _forward_backward(self, batch: dict[str, torch.Tensor], parts: int) -> torch.Tensor:
        """The loss of one of ``parts`` micro-batches over their number; adds its gradients."""
        with self._scaling:  # around both: checkpoints compute the forward pass again
            loss = self.compute_loss(self._running, batch)
            loss = loss / parts
            self.accelerator.backward(loss)
        return loss.detach()

    def prepared(self, model):
        """Compile or capture the step as the settings ask, seed what differs between processes."""
        self._in_training_mode = False
        self._running = compiling.run(model, self._together, self.settings.dtype) if self.settings.compile else model
        as_they_are = self.settings.compile or self.settings.distributed == "fsdp"  # whose parameters lie in shards
        self._scaling = frozen_norms.Scaling([] if as_they_are else self._frozen_norms)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not processes.first():  # what is drawn for other examples is drawn otherwise
            transformers.set_seed(self.args.seed + processes.index())
        # Module.zero_grad walks all modules, and transformers calls it at every step.
        model.zero_grad = partial(_zero_grad, self.trained)
        self.captured = None
        if wanted(self.settings, steps := self.state.max_steps - self.state.global_step):
            insists, calls = self.settings.cuda_graph is True, steps * self.args.gradient_accumulation_steps
            self.captured = CapturedStep(self._forward_backward, self.trained, insists, calls)
            self._adamw.follow(self.captured)

    @contextlib.contextmanager
    def fitting(self):
        """Time a fit, and leave the model as it was."""
        self._began = time.perf_counter()
        try:
            with contextlib.nullcontext() if self.settings.compile else positions_kept(self._module):
                yield
        finally:
            self.model_wrapped.__dict__.pop("zero_grad", None)
            if self.captured is not None:
                self.captured.release()
            self.meter.close()

    def go_on(self, checkpoint: Path, saved: dict[str, Any]) -> None:
        """Train from a checkpoint; ``saved`` is what ``flora.training.resume.Keeper`` put into it."""
        self._saved = saved
        self.train(resume_from_checkpoint=str(checkpoint))

    def restore_weights(self):
        """Put back the weights of a checkpoint."""
        assert self._saved is not None
        load_weights(self._module, self._saved["weights"])

    def restore_optimizer(self):
        """Put back the optimizer, the schedule and the order of texts."""
        if self._saved is not None:
            load_optimizer(self._adamw, self._saved["optimizer"])
            cast(Any, self.lr_scheduler).load_state_dict(self._saved["scheduler"])
            if self._order is not None:
                self._order.set_state(self._saved["order"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(self._saved["scaler"])

    def restore_random_state(self):
        """Put back the random numbers; what comes next is as it would have been."""
        if self._saved is not None:
            for saved in self._saved["rng"][processes.index() :][:1]:  # there may have been fewer processes before
                set_rng_state(saved, self.on_gpu)
            self._saved = None

    @property
    def order_state(self) -> torch.Tensor | None:
        """The state of the generator that orders texts."""
        return None if self._order is None else self._order.get_state()

    @property
    def scaler_state(self) -> dict[str, Any]:
        """How the loss is scaled, where it is."""
        return {} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()

    @property
    def seconds(self) -> float:
        """Wall time of the fit, with that before it was resumed."""
        return self.seconds_before + time.perf_counter() - self._began

    def get_total_train_batch_size(self, args):
        """Examples of an optimiser step."""
        return self.settings.batch_size

    def clipped(self, limit: float) -> torch.Tensor:
        """Clip the gradients to a norm; gives their norm before, 0 where they overflow and the step is left out."""
        if (scaler := self.accelerator.scaler) is not None:
            self.accelerator.unscale_gradients()
            norm = nn.utils.clip_grad_norm_(self.trained, limit)
            if bool(norm.isfinite()):
                return norm
            if scaler.get_scale() < 1:
                raise TrainingDiverged(
                    f"the gradients were not finite in fp16 at step {self.state.global_step}, however the loss was "
                    "scaled: lower trainer.lr, or set trainer.dtype=bf16"
                )
            return torch.zeros_like(norm)
        clip = partial(nn.utils.clip_grad_norm_, self.trained, limit)
        return sharding.whole(clip()) if self.captured is None else self.captured.after("clip", clip)

    @property
    def execution(self) -> dict[str, Any]:
        """How the steps were run, for the record: captured, compiled, data on the GPU, where resumed, by how many."""
        several = processes.count() > 1
        return self._ran or {
            "cuda_graph": self.captured is not None and self.captured.replayed,
            "compile": self.settings.compile,
            "cached_on_device": any(placed is not dataset for dataset, placed in self._placed.items()),
            **({"start": self.start} if self.start else {}),
            **({"resumed_at_steps": self.resumed_at} if self.resumed_at else {}),
            **({"processes": processes.count(), "distributed": self.settings.distributed or "ddp"} if several else {}),
        }

    def stand_for(self, fit: Fit) -> None:
        """Take the weights and figures of a fit that another process did."""
        assert fit.weights is not None
        load_weights(self._module, fit.weights())
        self.state = TrainerState(**fit.state)
        self.meter.load_state_dict(fit.meters)
        self._ran = fit.meters["execution"]

    def floating_point_ops(self, inputs):
        """Not counted: transformers would walk the model at every step."""
        return 0

    def loader(self, make, dataset, batch_size, is_training):
        """Batches from the GPU where the data lies there; of several processes each has its part of them."""
        placed = self._place(dataset)
        self.args.dataloader_pin_memory = self.on_gpu and placed is dataset
        self.args.dataloader_num_workers = workers = self.settings.num_workers if placed is dataset else 0
        self.args.dataloader_prefetch_factor = PREFETCHED if workers else None
        # Those of an evaluation end with it: transformers would keep its batches for the next, of whatever data.
        self.args.dataloader_persistent_workers = is_training and workers > 0
        if processes.count() == 1:
            return make(dataset=placed, batch_size=batch_size)
        if is_training:
            part = parts.Part(placed)
        else:
            part, batch_size = parts.Part(placed, each=batch_size), batch_size * processes.count()
        return parts.undivided(make(dataset=part, batch_size=batch_size))

    def _place(self, dataset: Any) -> Any:
        """The dataset on the GPU if the settings want it there and it can move, else the dataset."""
        if not self.on_gpu or self.settings.cache_on_device is False or not hasattr(dataset, "to"):
            return dataset
        if dataset not in self._placed:
            free, _ = torch.cuda.mem_get_info(self.args.device)
            fits = self.settings.cache_on_device is True or dataset.nbytes <= CACHED_SHARE * free
            self._placed[dataset] = dataset.to(self.args.device) if fits else dataset
        return self._placed[dataset]

    def create_optimizer(self, model=None):
        """AdamW over the groups of ``flora.training.groups``."""
        if self.optimizer is None:
            trained: Any = model or self.model
            scales = layer_scales(self._module, self.settings.layer_decay, self.settings.layer_decay_type)
            scales |= self.lr_scales
            groups = parameter_groups(trained.named_parameters(), self.head, scales, self.settings)
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args)
            may_capture = self.on_gpu and processes.count() == 1
            self.optimizer = (CapturedAdamW if may_capture else optimizer_class)(groups, **kwargs)
            self._adamw = self.optimizer  # accelerate wraps it
        return self.optimizer

    def train_order(self, dataset):
        """Batches of similar length where the examples have ``lengths``, in an order that every process shares."""
        if (lengths := getattr(dataset, "lengths", None)) is None:
            return None
        if self._order is None:
            self._order = torch.Generator().manual_seed(self.args.seed)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        if self.settings.group_by_modality and (shows := getattr(dataset, "shows", None)) is not None:
            return ModalityOrder(lengths, shows, batch, self._order)
        return LengthGroupedSampler(batch, lengths=list(lengths), generator=self._order)

    def evaluation_order(self, dataset):
        """Longest first where the examples have ``lengths``: little padding, and memory runs out at once or never."""
        if (lengths := getattr(dataset, "lengths", None)) is None:
            return None
        return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Drop accelerate's wrapper where all it does is look for a package on the disk at every step."""
        if self.accelerator.scaler is None:
            self.optimizer = self._adamw
        return super().create_scheduler(num_training_steps, optimizer)

    def evaluate(self, *args, **kwargs):
        """Evaluate, with the time kept out of the training throughput."""
        with self.meter.pause(), self._averaged():
            self._in_training_mode = False
            if processes.count() > 1 and self._statistics_move:
                for buffer in self._module.buffers():
                    broadcast(buffer)
            if processes.count() > 1:
                # `prediction_step` has gathered them. transformers puts its own back after each evaluation.
                self.gather_function = _as_is
            try:
                return super().evaluate(*args, **kwargs)
            finally:
                sharding.reshard(self._module)  # what was gathered may be averages, which are now put away

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return self.ema.applied() if self.ema is not None and self.ema.averages else contextlib.nullcontext()


def _zero_grad(parameters: list[nn.Parameter], set_to_none: bool = True) -> None:
    for parameter in parameters:
        parameter.grad = None


def _as_is(batch: Any) -> Any:
    # Datasets gather whole batches in __getitems__, so there is nothing left to collate.
    return batch
