"""Turns jobs into fits, in one process, for one module.

The parameters of the module are views into one flat buffer and so are the gradients. A step is the gradient (by
autograd, or recorded once and replayed, see `traced`) and a few in-place operations on flat buffers. Batches are
slices of a permuted resident tensor; the last batch of an epoch may be smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedray.errors import ConfigError
from fedray.keys import Key
from fedray.models.normalisation import statistics
from fedray.models.task import PLAIN, Task, buffers_of, constants, float_buffers, layouts, params_of, trainable
from fedray.round import Evidence, Fit, Job, Loss, Message, View
from fedray.train.buffers import Arrangement
from fedray.train.traced import NotTraceable, TracedStep, first_line
from fedray.tree import Mask, Tree, put, restrict, take

EngineKind = Literal["auto", "eager", "traced"]
MOST_RECORDED_LAYERS = 12
"""Above it "auto" does not record: it takes each process up to 20 s, and big operators leave little to save."""
MASKS_KEPT = 4  # a round shares one
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
    ) -> None:
        """vocabulary: how many tokens there are, if samples are tokens. kept: names of the tensors that stay with
        clients: jobs and fits have them apart, as `local` and `local_buffers`."""
        self.task = task
        self.vocabulary = vocabulary
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
        self.kind, self.reason = self._resolve(kind, sample_shape)

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
        """Run a job on a client's samples. key: of this client in this round."""
        self._load_job(job)
        self._mode(training=True)
        update = _Update(self, job)
        loss_sum = torch.zeros((), device=self.device)
        seen = 0
        with self._seeded(key, "dropout", traced=update.traced):
            for x, y in _batches(samples, job.num_steps, job.batch_size, key, self.device):
                size = y.shape[0]
                loss_sum.add_(update.step(x, y), alpha=size)
                seen += size
        evidence: dict[Evidence, Tree] = {}
        if update.grad_sum is not None:
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
            num_seen=seen * (2 if job.sharpness else 1),
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
    ) -> tuple[Mapping[str, float], Mapping[Evidence, Tree]]:
        """Mean loss and, where wanted, the dense gradient at `view` restricted to its mask; see round.Probe."""
        self._load_view(view)
        self._mode(training=True)
        count = len(samples) if batch_size is None else min(batch_size, len(samples))
        order = key.fold("probe").permutation(len(samples))[:count]
        total, loss = self.arrangement.empty(), 0.0
        with self._seeded(key, "probe", "dropout"):
            for start in range(0, count, PROBE_CHUNK):
                x, y = samples.take(order[start : start + PROBE_CHUNK], self.device)
                loss += float(self.gradient(x, y)) * len(y) / count
                total.add_(self.grads, alpha=len(y) / count)
        evidence: dict[Evidence, Tree] = {}
        if "grad" in wants:
            evidence["grad"] = self._shared(self.arrangement.logical(total))
        return {"loss": loss}, evidence

    def gradient(self, x: Tensor, y: Tensor, loss: Loss = PLAIN) -> Tensor:
        """Fill `self.grads` with the batch gradient at `self.weights`; returns the mean loss."""
        if self._step is not None and loss == PLAIN:
            with torch.inference_mode():
                value, *grads = self._step.gradients(self.weight_views, x, y)
                torch._foreach_copy_(self.grad_views, grads)
            return value
        return self._autograd(x, y, loss)

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
        self._load(
            self.whole(job.params, job.local, self.origin_params),
            self.whole(job.buffers, job.local_buffers, self.origin_buffers),
            self.whole_mask(job.mask),
        )

    def _load_view(self, view: View) -> None:
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

    def _resolve(self, kind: EngineKind, sample_shape: tuple[int, ...]) -> tuple[str, str]:
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


def try_inputs(count: int, sample_shape: tuple[int, ...], vocabulary: int | None) -> Tensor:
    """Inputs as a model gets them, to try it with."""
    if vocabulary is not None:
        return (torch.arange(count * math.prod(sample_shape)) * 7 % vocabulary).view(count, *sample_shape)
    return torch.randn(count, *sample_shape, generator=Key.of(0).torch())


class _Update:
    """The optimiser's side of a job: what happens to a gradient until it moves the weights."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self.engine = engine
        self.job = job
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
        self.traced = engine._step is not None and job.loss == PLAIN
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
            and self.moves is None
        )

    def _extended(self, tree: Tree) -> Tensor:
        """A tree of what the server owns, with zeros for what clients keep."""
        layout = self.engine.params_layout
        return tree.flat if tree.layout == layout else put(Tree.zeros(layout), tree).flat

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One optimiser step on a batch; returns its mean loss before the step."""
        engine, job = self.engine, self.job
        if self.plain and engine._step is not None:
            with torch.inference_mode():
                loss = engine._step.update(engine.weight_views, x, y, job.lr)
                if self.mask is not None:
                    engine.weights.mul_(self.mask)
            return loss
        loss = engine.gradient(x, y, job.loss)
        with torch.no_grad():
            before = None if self.moves is None else engine.weights.clone()
            if job.sharpness:
                self._climb(x, y)
            self._apply(engine.weights, engine.grads)
            if before is not None and self.moves is not None:
                engine.weights.copy_(torch.where(self.moves, engine.weights, before))
        return loss

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
