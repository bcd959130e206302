"""Turns jobs into fits, in one process, for one module.

The parameters of the module are views into one flat buffer and so are the gradients. A step is the gradient (by
autograd, or recorded once and replayed, see `traced`) and a few in-place operations on flat buffers. Batches are
slices of a permuted resident tensor; the last batch of an epoch may be smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fedray.errors import ConfigError
from fedray.keys import Key
from fedray.models.normalisation import statistics
from fedray.models.task import (
    PLAIN,
    Regression,
    Task,
    buffers_of,
    constants,
    float_buffers,
    layouts,
    params_of,
    trainable,
)
from fedray.prune.structure import Slices, Structure
from fedray.round import Evidence, Fit, Job, Loss, Message, View
from fedray.train import evidence as looks
from fedray.train.buffers import Arrangement
from fedray.train.shrink import Submodel, hidden_tensors, larger_fit, part_job, smaller_job, smaller_task
from fedray.train.traced import NotTraceable, TracedStep, first_line
from fedray.tree import Mask, Tree, put, restrict, take

EngineKind = Literal["auto", "eager", "traced"]
MOST_RECORDED_LAYERS = 12
"""Above it "auto" does not record: it takes each process up to 20 s, and big operators leave little to save."""
MASKS_KEPT = 4  # a round shares one
SMALLER_KEPT = 16  # smaller models; each has weights and gradients of its own
PROBE_CHUNK = 1000  # samples; bounds the memory of a probe over all of a client's data


Skewed = Callable[[Tensor, Tensor], Tensor]
"""What a client's own circumstances make of its samples: (inputs, their positions among its samples) -> inputs."""
Augmented = Callable[[Tensor, torch.Generator], Tensor]
"""Random changes of training inputs: (inputs, generator) -> inputs."""


@dataclass(frozen=True)
class Samples:
    """Rows of a resident array, normalised when they are read.

    x: (n, *shape), uint8 or float32, of the whole data set; y: (n,) or (n, ...); index: the rows that are meant, (m,).
    The model's input is (x * scale - mean) / std, with mean and std per channel; tokens are taken as they are.
    skew:    applied whenever the samples are read. augment: applied to what is trained on, anew in each epoch.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    mean: Tensor
    std: Tensor
    scale: float
    tokens: bool = False
    skew: Skewed | None = None
    augment: Augmented | None = None

    def __len__(self) -> int:
        return self.index.shape[0]

    @cached_property
    def affine(self) -> tuple[float, float] | tuple[Tensor, Tensor]:
        """Gain and offset of x * gain - offset; floats where all channels agree, for then nothing is broadcast."""
        gain, offset = self.scale / self.std, self.mean / self.std
        if gain.numel() == 1 and offset.numel() == 1:
            return float(gain), float(offset)
        shape = (1, -1) + (1,) * (self.x.dim() - 2)
        return gain.view(shape), offset.view(shape)

    def take(self, positions: Tensor | slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """Input, float32 or int64 for tokens, and target of the samples at these positions of the index."""
        rows = self.index[positions]
        x = torch.index_select(self.x, 0, rows)
        if self.tokens:
            return x.to(device, torch.int64), self.y[rows].to(device)
        x = x.to(device, torch.float32)
        gain, offset = self.affine
        if isinstance(gain, Tensor) and isinstance(offset, Tensor):
            gain, offset = gain.to(device), offset.to(device)
        x.mul_(gain).sub_(offset)
        if self.skew is not None:
            at = torch.arange(len(self), device=device)[positions] if isinstance(positions, slice) else positions
            x = self.skew(x, at.to(device))
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, self.y[rows].to(device)


class Whole(NamedTuple):
    """A model in parts: what the server owns, and what clients keep to themselves (None where they keep nothing)."""

    params: Tree
    buffers: Tree
    local: Tree | None
    local_buffers: Tree | None


class Engine:
    """Trains and evaluates one module. Holds buffers for speed and no state: every call begins by loading.

    kind: "traced" replays a recorded step, "eager" uses autograd; "auto" takes traced where the model allows it.
    `self.kind` and `self.reason` tell what "auto" came to, a function of the model alone.
    """

    def __init__(
        self,
        task: Task,
        *,
        key: Key,
        sample_shape: tuple[int, ...],
        device: str,
        kind: EngineKind,
        vocabulary: int | None = None,
        kept: frozenset[str] = frozenset(),
        structure: Structure | None = None,
        recorded: TracedStep | None = None,
    ) -> None:
        """vocabulary: how many tokens there are, if samples are tokens. kept: names of the tensors that stay with
        clients: jobs and fits have them apart, as `local` and `local_buffers`.

        structure: the model's units, for jobs that train a smaller model. recorded: the step of a model that differs
        in sizes alone, which is taken where it gives this one's gradients.
        """
        self.task = task
        self.sample_shape = sample_shape
        self.vocabulary = vocabulary
        self.key = key
        self.kept = kept
        self.device = torch.device(device)
        self.module = task.module(key)
        self.origin_params, self.origin_buffers = params_of(self.module), buffers_of(self.module)
        self.module.to(self.device)
        for constant in constants(self.module).values():
            if constant.dim() == 4:
                constant.data = constant.data.contiguous(memory_format=torch.channels_last)
        self.params_layout, self.buffers_layout = layouts(self.module)
        self.arrangement = Arrangement(self.params_layout, self.device)
        self.weights = self.arrangement.empty()
        self.arrangement.load(self.weights, self.origin_params.flat)
        self.grads = self.arrangement.empty()
        self.weight_views = self.arrangement.views(self.weights)
        self.grad_views = self.arrangement.views(self.grads)
        moved = trainable(self.module).values()
        for parameter, view, grad in zip(moved, self.weight_views, self.grad_views, strict=True):
            parameter.data = view
            parameter.grad = grad
        self._buffers = float_buffers(self.module)
        self.has_buffers = bool(self._buffers)
        # Integer buffers (batches seen so far) do not travel: every call begins with those of the fresh module.
        others = (buffer for name, buffer in self.module.named_buffers() if name not in self._buffers)
        self._counters = [(buffer, buffer.clone()) for buffer in others]
        self._masks: dict[bytes, Tensor] = {}
        self._choices: dict[frozenset[str], Tensor] = {}
        self._whole_masks: dict[bytes, Mask] = {}
        self._step: TracedStep | None = None
        # A part that the module's constructor left in evaluation mode would not stay so from one call to the next.
        self.module.train()
        self.structure = None if structure is None else structure.over(self.params_layout)
        self._slices: dict[bytes, Slices | None] = {}
        self._smaller: dict[object, Engine] = {}
        self._submodels: dict[object, Submodel] = {}
        self._factors: dict[float, Tensor] = {}
        self._factor: Tensor | None = None
        self.kind, self.reason = self._resolve(kind, sample_shape, recorded)

    def origin(self) -> Whole:
        """The initial weights, as they came from the key."""
        return self.split(self.origin_params, self.origin_buffers)

    def split(self, params: Tree, buffers: Tree) -> Whole:
        """A whole model in its parts: what the server owns, and what clients keep."""
        if not self.kept:
            return Whole(params, buffers, None, None)
        return Whole(
            take(params, [name for name in params.layout.names if name not in self.kept]),
            take(buffers, [name for name in buffers.layout.names if name not in self.kept]),
            take(params, self.kept),
            take(buffers, self.kept),
        )

    def whole(self, shared: Tree, local: Tree | None, origin: Tree) -> Tree:
        """Both parts in one tree; `origin` where a part is not given."""
        if not self.kept:
            return shared
        return put(put(origin, shared), local) if local is not None else put(origin, shared)

    def whole_mask(self, mask: Mask | None) -> Mask | None:
        """A mask of what the server owns, extended to the whole model: nothing is cut from what clients keep."""
        if mask is None or mask.layout == self.params_layout:
            return mask
        if mask.digest not in self._whole_masks:
            if len(self._whole_masks) >= MASKS_KEPT:
                self._whole_masks.clear()
            self._whole_masks[mask.digest] = Mask.of(self.params_layout, dict(mask.items()))
        return self._whole_masks[mask.digest]

    # -- training ------------------------------------------------------------------------------------------------

    def fit(self, job: Job, received: Message, samples: Samples, key: Key) -> Fit:
        """Run a job on a client's samples. key: of this client in this round.

        Smaller models are built once for each set of shapes and kept; so are places of submodels.
        """
        if self.kept and job.local is None:
            job = replace(job, local=self.origin().local, local_buffers=self.origin().local_buffers)
        slices = self._slices_of(self.whole_mask(job.mask)) if job.shrink else None
        if slices is None:
            return self._fit(job, received, samples, key, self._parts(job, self, None))
        runner = self._engine_of(slices)
        parts = self._parts(job, runner, slices)
        return larger_fit(runner._fit(smaller_job(job, slices), received, samples, key, parts), job, slices)

    def _slices_of(self, mask: Mask | None) -> Slices | None:
        if self.structure is None:
            raise ConfigError(
                "a job is to train the physically smaller model, and no policy of this run cuts structures; the policy "
                "that sets Job.shrink says so by cuts = 'structures' or 'both'"
            )
        if mask is None:
            return None
        if mask.digest not in self._slices:
            _bounded(self._slices)[mask.digest] = self.structure.slices(mask)
        return self._slices[mask.digest]

    def _engine_of(self, slices: Slices) -> Engine:
        """The engine of a smaller model; one of other units of the same shapes serves as well."""
        name = (slices.layout(self.params_layout), slices.skipped)
        if name not in self._smaller:
            # From what the module is when it is fresh, so that nothing depends on the jobs before.
            self._load(self.origin_params, self.origin_buffers, None)
            _bounded(self._smaller)[name] = Engine(
                smaller_task(self.task, self.module, slices),
                key=self.key,
                sample_shape=self.sample_shape,
                device=str(self.device),
                kind="eager" if self._step is None else "auto",
                vocabulary=self.vocabulary,
                kept=self.kept,
                recorded=self._step,
            )
        return self._smaller[name]

    def _parts(self, job: Job, runner: Engine, held: Slices | None) -> list[_Part]:
        """The submodels of a job that `runner` trains, which has `held` of the whole model."""
        if not job.submodels:
            return []
        if job.sharpness or (job.distils and isinstance(self.task.objective, Regression)):
            raise ConfigError(
                "a job trains submodels, which goes neither with sharpness-aware steps nor with distillation in a "
                "regression; take correction=none, or another pruner"
            )
        found = []
        for part in job.submodels:
            mask = self.whole_mask(part if job.mask is None else part & job.mask)
            assert mask is not None
            name = (None if job.mask is None else job.mask.digest, mask.digest, job.shrink)
            slices = None if self.structure is None else self._slices_of(mask)
            if name not in self._submodels or self._submodels[name].outer is not runner:
                engine = self._engine_of(slices) if job.shrink and slices is not None else runner
                _bounded(self._submodels)[name] = Submodel.of(runner, held, engine, slices, mask, self.buffers_layout)
            submodel = self._submodels[name]
            submodel.engine._mode(training=True)
            submodel.engine._factor = submodel.engine._factor_of(job.scaler)
            whole = submodel.places is not None and submodel.inner is None  # what is alive of it has its own engine
            alone = partial(part_job, job, mask, slices) if whole and slices is not None else None
            found.append(_Part(submodel, alone))
        return found

    def _fit(self, job: Job, received: Message, samples: Samples, key: Key, parts: list[_Part]) -> Fit:
        self._load_job(job)
        self._mode(training=True)
        update = _Update(self, job, parts, key)
        loss_sum = torch.zeros((), device=self.device)
        seen = 0
        with self._seeded(key, "dropout", traced=update.traced):
            for x, y in _batches(samples, job.num_steps, job.batch_size, key, self.device):
                size = y.shape[0]
                loss_sum.add_(update.step(x, y), alpha=size)
                seen += size
        evidence: dict[Evidence, Tree] = {}
        if update.grad_sum is not None:
            update.gather()
            evidence["grad_sum"] = self._shared(self.arrangement.logical(update.grad_sum))
        after = self.split(Tree(self.params_layout, self.arrangement.logical(self.weights)), self._read_buffers())
        return Fit(
            received=received,
            params=restrict(after.params, job.mask),
            buffers=after.buffers,
            local=after.local,
            local_buffers=after.local_buffers,
            mask=job.mask,
            num_examples=len(samples),
            num_steps=job.num_steps,
            lr=job.lr,
            loss=float(loss_sum) / seen if seen else float("nan"),
            num_seen=seen * (2 if job.sharpness else 1) + update.num_taught,
            evidence=evidence,
        )

    def probe(
        self,
        view: View,
        samples: Samples,
        key: Key,
        *,
        wants: frozenset[Evidence],
        batch_size: int | None,
        per_class: int | None = None,
        loss: Loss | None = None,
    ) -> tuple[Mapping[str, float], Mapping[Evidence, Tree]]:
        """Mean loss and the wanted evidence at `view` restricted to its mask; see round.Probe."""
        minimised = PLAIN if loss is None else loss
        self._load_view(view)
        self._mode(training=True)
        targets = samples.y[samples.index] if per_class is not None else samples.index
        order = looks.chosen(targets, key.fold("probe"), batch_size=batch_size, per_class=per_class)
        count = len(order)
        total, mean = self.arrangement.empty(), 0.0
        gradient = self._autograd if "hvp" in wants else self.gradient  # both passes must drop the same units
        with self._seeded(key, "probe", "dropout", traced="hvp" not in wants):
            for start in range(0, count, PROBE_CHUNK):
                x, y = samples.take(order[start : start + PROBE_CHUNK], self.device)
                mean += float(gradient(x, y, minimised)) * len(y) / count
                total.add_(self.grads, alpha=len(y) / count)
        evidence: dict[Evidence, Tree] = {}
        if "grad" in wants:
            evidence["grad"] = self._shared(self.arrangement.logical(total))
        if "hvp" in wants:
            mask = self.whole_mask(view.mask)
            vector = self.arrangement.views(total if mask is None else total.mul_(self.mask(mask)))
            product = self.arrangement.empty()
            with self._seeded(key, "probe", "dropout", traced=False):
                for start in range(0, count, PROBE_CHUNK):
                    x, y = samples.take(order[start : start + PROBE_CHUNK], self.device)
                    self.grads.zero_()
                    looks.add_curvature(self.module, self.task.objective, x, y, minimised, vector)
                    product.add_(self.grads, alpha=len(y) / count)
            evidence["hvp"] = self._shared(self.arrangement.logical(product))
        return {"loss": mean}, evidence

    def flow(self, params: Tree, buffers: Tree, mask: Mask | None) -> Tree:
        """The flow through the model without data, of what the server owns, float32; see round.Flow.

        Raises ConfigError for a model of tokens, NumericError where the flow is beyond float64.
        """
        if self.vocabulary is not None:
            raise ConfigError(
                f"the model is {type(self.module).__name__}; it takes tokens, and a flow without data needs an input "
                "of ones: take a pruner that looks at data, such as pruner=snip"
            )
        self._load_view(View(params=params, buffers=buffers, mask=mask))
        self._mode(training=False)
        found = looks.flow(self.module, self.weight_views, self.sample_shape, self.device, self.params_layout)
        return self._shared(found.float().cpu())

    def gradient(self, x: Tensor, y: Tensor, loss: Loss = PLAIN) -> Tensor:
        """Fill `self.grads` with the batch gradient at `self.weights`; returns the mean loss."""
        if self._step is not None and loss == PLAIN:
            with torch.inference_mode(), self.rescaled():
                value, *grads = self._step.gradients(self.weight_views, x, y)
                torch._foreach_copy_(self.grad_views, grads)
            return value
        with self.rescaled():
            return self._autograd(x, y, loss)

    @contextmanager
    def rescaled(self) -> Iterator[None]:
        """A gradient that is taken inside is that of the model whose hidden outputs are divided by the job's scaler.

        (Wx + b) / s is (W/s)x + b/s, and the gradient of W is that of W/s, divided by s.
        """
        if self._factor is None:
            yield
            return
        here = self.weights.clone()
        with torch.no_grad():
            self.weights.mul_(self._factor)
        yield
        with torch.no_grad():
            self.weights.copy_(here)
            self.grads.mul_(self._factor)

    def _factor_of(self, scaler: float) -> Tensor | None:
        """What each weight is multiplied by in `rescaled`, in working order; None for no scaler."""
        if scaler == 1.0:
            return None
        if scaler not in self._factors:
            hidden = self.chosen(hidden_tensors(self.module))
            _bounded(self._factors)[scaler] = torch.where(hidden, 1.0 / scaler, 1.0).to(self.weights.dtype)
        return self._factors[scaler]

    def _autograd(self, x: Tensor, y: Tensor, loss: Loss = PLAIN) -> Tensor:
        self.grads.zero_()
        value = self.task.objective.loss(self.module(x), y, loss)
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    def buffers_flat(self) -> Tensor:
        """A copy of the running statistics as they are in the module."""
        return torch.cat([buffer.reshape(-1) for buffer in self._buffers.values()])

    def set_buffers(self, flat: Tensor) -> None:
        """Put back what `buffers_flat` gave."""
        at = 0
        for buffer in self._buffers.values():
            buffer.copy_(flat[at : at + buffer.numel()].view(buffer.shape))
            at += buffer.numel()

    # -- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self, view: View, samples: Samples, batch_size: int | None = None) -> dict[str, Tensor]:
        """Every metric of the task per sample, float32 (m,); in one forward pass, or in batches."""
        self._load_view(view)
        self._mode(training=False)
        size = batch_size or max(len(samples), 1)
        found: dict[str, list[Tensor]] = {name: [] for name in self.task.metrics}
        with torch.inference_mode():
            for start in range(0, len(samples), size):
                x, y = samples.take(slice(start, start + size), self.device)
                for name, value in self.task.objective.score(self.module(x), y).items():
                    found[name].append(value.cpu())
        return {name: torch.cat(values) for name, values in found.items()}

    def statistics(self, view: View, samples: Samples) -> tuple[Tree, int]:
        """What batch normalisation sees of all these samples in this model, see models.normalisation.statistics."""
        self._load_view(view)
        batches = (
            samples.take(slice(start, start + PROBE_CHUNK), self.device)[0]
            for start in range(0, len(samples), PROBE_CHUNK)
        )
        return statistics(self.module, batches)

    def _mode(self, *, training: bool) -> None:
        # Walking through the modules costs as much as a small layer: only where it changes something.
        if self.module.training != training:
            self.module.train(training)

    @contextmanager
    def _seeded(self, key: Key, *names: str, traced: bool = True) -> Iterator[None]:
        """Seed the generators that this engine's kernels draw from, and leave the process's own as it was.

        A recorded step that draws nothing needs no seed. `torch.manual_seed` would queue a call, and a stack trace,
        for every kind of accelerator that is not there.
        """
        if traced and self._step is not None and not self._step.draws:
            yield
            return
        seed, before = key.fold(*names).seed, torch.default_generator.get_state()
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            torch.default_generator.set_state(before)

    # -- loading -------------------------------------------------------------------------------------------------

    def _load_job(self, job: Job) -> None:
        self._factor = self._factor_of(job.scaler)
        self._load(
            self.whole(job.params, job.local, self.origin_params),
            self.whole(job.buffers, job.local_buffers, self.origin_buffers),
            self.whole_mask(job.mask),
        )

    def _load_view(self, view: View) -> None:
        self._factor = None
        self._load(
            self.whole(view.params, view.local, self.origin_params),
            self.whole(view.buffers, view.local_buffers, self.origin_buffers),
            self.whole_mask(view.mask),
        )

    def _load(self, params: Tree, buffers: Tree, mask: Mask | None) -> None:
        self.arrangement.load(self.weights, params.flat)
        if mask is not None:
            self.weights.mul_(self.mask(mask))
        for name, buffer in self._buffers.items():
            buffer.copy_(buffers[name])
        for counter, origin in self._counters:
            counter.copy_(origin)

    def _shared(self, flat: Tensor) -> Tree:
        """Of a whole flat tensor what the server owns."""
        whole = Tree(self.params_layout, flat)
        return take(whole, [name for name in self.params_layout.names if name not in self.kept]) if self.kept else whole

    def chosen(self, names: frozenset[str]) -> Tensor:
        """Which coordinates belong to these tensors, in working order, bool."""
        if names not in self._choices:
            layout = self.params_layout
            flags = {name: torch.full(layout.shape(name), name in names) for name in layout.names}
            self._choices[names] = self.arrangement.arranged(Mask.of(layout, flags).flat)
        return self._choices[names]

    def mask(self, mask: Mask) -> Tensor:
        """The mask as 0.0 and 1.0 in working order; kept for the last few masks, since a round shares one."""
        found = self._masks.get(mask.digest)
        if found is None:
            if len(self._masks) >= MASKS_KEPT:
                self._masks.clear()
            found = self._masks[mask.digest] = self.arrangement.arranged(mask.flat.float())
        return found

    def _read_buffers(self) -> Tree:
        if not self._buffers:
            return self.origin_buffers
        return Tree(self.buffers_layout, self.buffers_flat().cpu().clone())

    def _resolve(self, kind: EngineKind, sample_shape: tuple[int, ...], recorded: TracedStep | None) -> tuple[str, str]:
        if kind == "eager":
            return "eager", "asked for"
        layers = [child for child in self.module.modules() if any(True for _ in child.parameters(recurse=False))]
        if kind == "auto" and any(isinstance(layer, torch.nn.RNNBase) for layer in layers):
            return "eager", "recording a recurrent layer takes longer than it saves"
        if kind == "auto" and len(layers) > MOST_RECORDED_LAYERS:
            return "eager", f"recording {len(layers)} layers takes longer than it saves"
        x = try_inputs(4, sample_shape, self.vocabulary).to(self.device)
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        try:
            with torch.inference_mode(False):
                y = self.task.objective.targets(4, self._num_outputs(x), sample_shape).to(self.device)
                if recorded is not None and self._serves(recorded, x, y):
                    self._step = recorded
                    return "traced", "the recording of the whole model serves"
                step = TracedStep(self.module, self.task.loss, x, y)
            self._refuse_unfaithful(step, x, y)
        except NotTraceable as why:
            if kind == "traced":
                raise ConfigError(
                    f"trainer.engine is 'traced'; this model's step cannot be recorded ({why}). Use trainer.engine=auto"
                ) from why
            return "eager", str(why)
        self._step = step
        return "traced", "the model's step could be recorded"

    def _serves(self, recorded: TracedStep, x: Tensor, y: Tensor) -> bool:
        """Whether the recording of a larger model gives the gradients of this one."""
        if recorded.num_params != len(self.weight_views):
            return False
        try:
            self._refuse_unfaithful(recorded, x, y)
        except NotTraceable:
            return False
        return True

    def _num_outputs(self, x: Tensor) -> int:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            training = self.module.training
            outputs = self.module.eval()(x)
            self.module.train(training)
        return int(outputs.shape[-1])

    def _refuse_unfaithful(self, step: TracedStep, x: Tensor, y: Tensor) -> None:
        """Compare the recording with autograd at several batch sizes; a recording may have frozen a decision."""
        self.module.train()
        for size in (4, 3, 1):
            key = Key.of(size)
            with self._seeded(key):
                self._autograd(x[:size], y[:size])
            try:
                with self._seeded(key), torch.inference_mode():
                    _, *grads = step.gradients(self.weight_views, x[:size], y[:size])
            except RuntimeError as error:  # a size of the first batch has become part of an operator's arguments
                raise NotTraceable(f"the recorded step fails at batch size {size}: {first_line(error)}") from error
            for name, ours, theirs in zip(self.params_layout.names, grads, self.grad_views, strict=True):
                scale = float(theirs.abs().max()) if theirs.numel() else 0.0
                if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * scale + 1e-8):
                    raise NotTraceable(f"the recorded gradient of {name} differs from autograd's at batch size {size}")


def _bounded(cache: dict[Any, Any]) -> dict[Any, Any]:
    """The cache with room for one more, without what was put in first."""
    while len(cache) >= SMALLER_KEPT:
        del cache[next(iter(cache))]
    return cache


def try_inputs(count: int, sample_shape: tuple[int, ...], vocabulary: int | None) -> Tensor:
    """Inputs as a model gets them, to try it with."""
    if vocabulary is not None:
        return (torch.arange(count * math.prod(sample_shape)) * 7 % vocabulary).view(count, *sample_shape)
    return torch.randn(count, *sample_shape, generator=Key.of(0).torch())


class _Part(NamedTuple):
    """A submodel of a job. alone: makes the job of a step on it alone, where an engine has nothing else."""

    submodel: Submodel
    alone: Callable[[], Job] | None


class _Update:
    """The optimiser's side of a job: what happens to a gradient until it moves the weights."""

    def __init__(self, engine: Engine, job: Job, parts: list[_Part], key: Key) -> None:
        self.engine = engine
        self.job = job
        self.parts = parts
        self.key = key
        self.alone: dict[int, _Update] = {}  # of submodels that are stepped on alone
        self.within: Tensor | None = None  # of the submodel that the step at hand trains
        self.drawn = 0
        self.num_taught = 0
        mask = engine.whole_mask(job.mask)
        self.mask = None if mask is None else engine.mask(mask)
        self.drift = None if job.drift is None else engine.arrangement.arranged(self._extended(job.drift))
        self.anchor = self.pull = None
        if job.prox:
            self.anchor = engine.weights.clone()
            if job.anchor is not None:
                engine.arrangement.load(self.anchor, engine.whole(job.anchor, None, engine.origin_params).flat)
            self.pull = torch.empty_like(engine.weights)
        # What clients keep is pulled nowhere.
        self.shared = None
        if engine.kept:
            self.shared = engine.chosen(frozenset(engine.params_layout.names) - engine.kept)
        self.moves = None if job.trains is None else engine.chosen(job.trains)
        self.traced = engine._step is not None and job.loss == PLAIN and not parts
        self.grad_sum = torch.zeros_like(engine.grads) if "grad_sum" in job.wants else None
        adam = job.optim.name in ("adam", "adamw")
        self.first = torch.zeros_like(engine.grads) if adam or job.optim.momentum else None
        self.second = torch.zeros_like(engine.grads) if adam else None
        self.step_count = 0
        optim = job.optim
        # Plain SGD can fold the gradient's product into the update; then the mask is applied to the weights after.
        self.plain = (
            self.traced
            and not (
                adam or optim.momentum or optim.weight_decay or optim.clip_norm or job.prox or self.drift is not None
            )
            and self.grad_sum is None
            and job.lr != 0
            and not job.sharpness
            and job.scaler == 1.0
            and self.moves is None
        )

    def _extended(self, tree: Tree) -> Tensor:
        """A tree of what the server owns, with zeros for what clients keep."""
        layout = self.engine.params_layout
        return tree.flat if tree.layout == layout else put(Tree.zeros(layout), tree).flat

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One optimiser step on a batch; returns its mean loss before the step."""
        engine, job = self.engine, self.job
        if self.parts:
            return self._part_step(x, y)
        if self.plain and engine._step is not None:
            with torch.inference_mode():
                loss = engine._step.update(engine.weight_views, x, y, job.lr)
                if self.mask is not None:
                    engine.weights.mul_(self.mask)
            return loss
        loss = engine.gradient(x, y, job.loss)
        with torch.no_grad():
            if job.sharpness:
                self._climb(x, y)
            self._move()
        return loss

    def _move(self) -> None:
        """Apply the gradient to what the step may move."""
        weights = self.engine.weights
        before = None if self.moves is None else weights.clone()
        self._apply(weights, self.engine.grads)
        if before is not None and self.moves is not None:
            weights.copy_(torch.where(self.moves, weights, before))

    def _part_step(self, x: Tensor, y: Tensor) -> Tensor:
        """A step on the submodel that is drawn for it; with distillation on the last one as well, which teaches it."""
        at, last = int(self.key.fold("submodel", self.drawn).numpy().integers(len(self.parts))), len(self.parts) - 1
        part = self.parts[at].submodel
        self.drawn += 1
        if self.job.distils and at < last:
            teacher = self.parts[last].submodel
            loss, outputs = teacher.teach(x, y, self.job.loss)
            loss = loss + part.learn(x, outputs)
            self.num_taught += len(y)
            self._move_within(teacher.within)
        elif self.parts[at].alone is not None:
            loss = self._step_alone(at, x, y)
        else:
            loss = part.gradient(x, y, self.job.loss)
            self._move_within(part.within)
        return loss

    def _move_within(self, within: Tensor | None) -> None:
        """Apply the gradient to a part; what does not belong to it has no momentum and no decay in this step either."""
        self.within = within
        with torch.no_grad():
            if within is None:
                self._move()
                return
            moving = [tensor for tensor in (self.engine.weights, self.first, self.second) if tensor is not None]
            before = [tensor.clone() for tensor in moving]
            self._move()
            for tensor, held in zip(moving, before, strict=True):
                tensor.copy_(torch.where(within.bool(), tensor, held))

    def _step_alone(self, at: int, x: Tensor, y: Tensor) -> Tensor:
        """A step on the smaller model of a part, whose weights and moments come from here and go back."""
        part, alone = self.parts[at]
        if at not in self.alone:
            assert alone is not None
            self.alone[at] = _Update(part.engine, alone(), [], self.key)
        own, places = self.alone[at], part.places
        assert places is not None
        pairs = [(self.first, own.first), (self.second, own.second)]
        with part.lent():
            with torch.no_grad():
                for mine, its in pairs:
                    if mine is not None and its is not None:
                        torch.index_select(mine, 0, places, out=its)
            own.step_count = self.step_count
            loss = own.step(x, y)
            self.step_count = own.step_count
            with torch.no_grad():
                for mine, its in ((self.engine.weights, part.engine.weights), *pairs):
                    if mine is not None and its is not None:
                        mine.index_copy_(0, places, its)
        return loss

    def gather(self) -> None:
        """Add what steps on parts have summed up to `grad_sum`."""
        for at, own in self.alone.items():
            places = self.parts[at].submodel.places
            if self.grad_sum is not None and own.grad_sum is not None and places is not None:
                self.grad_sum.index_add_(0, places, own.grad_sum)

    def _climb(self, x: Tensor, y: Tensor) -> None:
        """Replace the gradient by that at w + rho * g / |g| (Foret et al. 2021, equation 2); statistics of batches
        are taken at w alone."""
        engine = self.engine
        direction = engine.grads.clone()
        if self.mask is not None:
            direction.mul_(self.mask)
        if self.moves is not None:
            direction.mul_(self.moves)
        here, statistics = engine.weights.clone(), engine.buffers_flat() if engine.has_buffers else None
        length = torch.linalg.vector_norm(direction)
        engine.weights.add_(direction.mul_(self.job.sharpness / (length + 1e-12)))
        with torch.enable_grad():
            engine.gradient(x, y, self.job.loss)
        engine.weights.copy_(here)
        if statistics is not None:
            engine.set_buffers(statistics)

    def _apply(self, weights: Tensor, grad: Tensor) -> None:
        job, optim = self.job, self.job.optim
        if self.grad_sum is not None:
            self.grad_sum.add_(grad)
        if job.lr == 0:
            return
        if self.anchor is not None:
            # The difference first: it is exactly zero where nothing moved, and Adam would enlarge any rounding error.
            pull = torch.sub(weights, self.anchor, out=self.pull)
            grad.add_(pull if self.shared is None else pull.mul_(self.shared), alpha=job.prox)
        if self.drift is not None:
            grad.add_(self.drift)
        if self.mask is not None:
            # Before the moments, so that they too stay zero outside the mask.
            grad.mul_(self.mask)
        if self.within is not None:
            grad.mul_(self.within)
        if self.moves is not None:
            grad.mul_(self.moves)  # what stays still has no part in the norm
        if optim.clip_norm is not None:
            length = torch.linalg.vector_norm(grad)
            grad.mul_(torch.clamp(optim.clip_norm / (length + 1e-6), max=1.0))
        if optim.name == "adamw":
            weights.mul_(1 - job.lr * optim.weight_decay)
        elif optim.weight_decay:
            grad.add_(weights, alpha=optim.weight_decay)
        if self.second is not None and self.first is not None:
            self._adam(weights, grad, self.first, self.second)
            return
        if self.first is not None:
            # The first gradient starts the momentum buffer, as in torch.optim.SGD.
            self.first.mul_(optim.momentum).add_(grad)
            grad = grad.add_(self.first, alpha=optim.momentum) if optim.nesterov else self.first
        weights.add_(grad, alpha=-job.lr)

    def _adam(self, weights: Tensor, grad: Tensor, first: Tensor, second: Tensor) -> None:
        """Kingma & Ba 2015, algorithm 1, in the form of torch.optim.Adam."""
        beta1, beta2 = self.job.optim.betas
        self.step_count += 1
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = second.sqrt().div_((1 - beta2**self.step_count) ** 0.5).add_(self.job.optim.eps)
        weights.addcdiv_(first, denominator, value=-self.job.lr / (1 - beta1**self.step_count))


def _batches(samples: Samples, num_steps: int, batch_size: int, key: Key, device: torch.device):  # type: ignore[no-untyped-def]
    """num_steps batches; each epoch goes once through a permutation of its own."""
    done, epoch = 0, 0
    while done < num_steps:
        order = key.fold("batches", epoch).permutation(len(samples))
        needed = min(len(samples), (num_steps - done) * batch_size)
        x, y = samples.take(order[:needed], device)
        if samples.augment is not None:
            x = samples.augment(x, key.fold("augment", epoch).torch(str(device)))
        for start in range(0, needed, batch_size):
            yield x[start : start + batch_size], y[start : start + batch_size]
            done += 1
        epoch += 1
