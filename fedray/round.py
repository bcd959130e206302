"""The nouns of a federated round and the protocol that methods implement. No paper's name occurs here.

A method is a list of policies, inner to outer: `[*personal, pruner, strategy, *corrections]`.

                   server                            |wire|                   client
    personal · pruner · strategy · correction         ==>     correction · strategy · pruner · personal · TRAINER
    send   ------- inner to outer ------->                    begin  -------- outer to inner -------->
    settle <------ outer to inner --------                    end    <------- inner to outer ---------

Every hook defaults to the identity and threads its own memory: nothing is stored on `self`, inputs are never
written to, and a hook called twice with the same arguments gives the same answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import torch

from fedray.errors import ConfigError
from fedray.keys import Key
from fedray.prune.structure import Structure
from fedray.sums import Sums
from fedray.tree import Layout, Mask, Tree, restrict

ClientId = int
Evidence = Literal["grad", "grad_sum", "hvp"]
"""What a job or a probe can report beside the fit, dense (no mask applied), shape of the parameters:
`grad` the gradient of one batch, `grad_sum` the sum of the batch gradients over the steps of a job, `hvp` the product
of the Hessian with the gradient, both of the same examples and of the coordinates that the mask keeps."""

M = TypeVar("M")
C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One quantity in a message.

    value:   float32, zero outside `support`.
    weight:  this client's vote in the sum: its number of examples, or 1.0. Greater than 0.
    support: the coordinates that are sent and vouched for; None means all. May differ from what is alive.
    """

    value: Tree
    weight: float = 1.0
    support: Mask | None = None


@dataclass(frozen=True, kw_only=True)
class PartSpec:
    """What a codec and a guard need to know of a part.

    direction: which way it travels.
    lossy:     whether it may be written with loss; if not it travels as float32, whatever the wire is.
    absolute:  whether it is a state rather than a difference: leaving a coordinate out would set it to zero.
    """

    layout: Layout
    direction: Literal["down", "up", "both"]
    lossy: bool = True
    absolute: bool = False


@dataclass(frozen=True, kw_only=True)
class Message:
    """What crosses the wire, in either direction.

    parts: by name, in wire order.
    mask:  what the sender says is alive; None means everything.
    """

    parts: Mapping[str, Part] = field(default_factory=dict)
    mask: Mask | None = None

    def put(self, name: str, part: Part) -> Message:
        """This message with one part more (or another one under that name)."""
        return replace(self, parts={**self.parts, name: part})

    def __getitem__(self, name: str) -> Tree:
        return self.parts[name].value

    def __contains__(self, name: str) -> bool:
        return name in self.parts


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The local optimiser. Weight decay is added to the gradient for sgd and adam, decoupled for adamw.

    clip_norm: upper bound of the Euclidean norm of a batch gradient; None for no clipping.
    """

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float | None = None

    def effective_steps(self, num_steps: int, *, lr: float, prox: float = 0.0) -> float:
        """How far SGD goes in steps on a gradient of one, in units of -lr.

        num_steps for plain SGD; more with momentum, less with a pull of `prox` to the start.
        """
        velocity, way = 0.0, 0.0
        for _ in range(num_steps):
            gradient = 1.0 - lr * prox * way
            velocity = self.momentum * velocity + gradient
            way += gradient + self.momentum * velocity if self.nesterov else velocity
        return way


ABSENT_SHIFT = 100.0


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The task's loss, or a variant of its cross-entropy.

    smoothing:   label smoothing in [0, 1): the target is (1 - s) * one-hot + s / num_classes.
    logit_shift: subtracted from the logits before the softmax, one per class; None for zeros. A class with
                 ABSENT_SHIFT or more takes no part: e^-100 is nothing beside any class that is there, and smoothing
                 leaves it out.
    zeroed:      classes whose logits are replaced by 0 before the softmax.
    temperature: the logits are divided by it, above 0.
    """

    smoothing: float = 0.0
    logit_shift: tuple[float, ...] | None = None
    zeroed: tuple[int, ...] = ()
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """Local training as data, so that it can run eagerly, traced or on another machine.

    params, buffers: where to start; what the server owns.
    local, local_buffers: where to start with the tensors that clients keep to themselves; None without any.
    mask:      parameters and moments stay zero outside it, after every step; None means dense.
    num_steps: optimiser steps; the batches go through a fresh permutation of the data each epoch.
    drift:     added to every gradient; a policy adds to what is there.
    prox:      coefficient of the pull `prox * (w - anchor)` in the gradient; a policy adds to what is there.
    anchor:    where the pull leads; None for the job's own start.
    trains:    names of the tensors that steps may move; None for all, local ones included.
    loss:      what is minimised.
    sharpness: radius rho of sharpness-aware minimisation: the gradient is taken at w + rho * g / |g|; 0 for none.
    shrink:    train the physically smaller model, without the units that `mask` cuts whole: the same fit, but for
               rounding, in less time.
    submodels: masks within `mask`, one of which is drawn for each step, that trains nothing else; empty for none.
    distils:   whether a step on a submodel smaller than the last one also teaches it the outputs of the last one.
    scaler:    outputs of hidden layers with a weight matrix are divided by it in training; 1 for none.
    wants:     evidence to gather on the way; only "grad_sum" is gathered by a job.
    """

    params: Tree
    buffers: Tree
    mask: Mask | None
    num_steps: int
    batch_size: int
    lr: float
    optim: Optim
    local: Tree | None = None
    local_buffers: Tree | None = None
    drift: Tree | None = None
    prox: float = 0.0
    anchor: Tree | None = None
    trains: frozenset[str] | None = None
    loss: Loss = Loss()
    sharpness: float = 0.0
    shrink: bool = False
    submodels: tuple[Mask, ...] = ()
    distils: bool = False
    scaler: float = 1.0
    wants: frozenset[Evidence] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What came of a job.

    received: the message as this client decoded it: the reference for differences.
    local, local_buffers: the tensors that clients keep to themselves, after training; None without any.
    num_seen: examples that a gradient was taken of, each as often as it was.
    loss:     mean training loss over them; NaN after zero steps.
    """

    received: Message
    params: Tree
    buffers: Tree
    mask: Mask | None
    num_examples: int
    num_steps: int
    lr: float
    loss: float
    num_seen: int = 0
    local: Tree | None = None
    local_buffers: Tree | None = None
    evidence: Mapping[Evidence, Tree] = field(default_factory=dict)

    def cut(self, mask: Mask) -> Fit:
        """This fit under another mask, with zeros outside it."""
        return replace(self, params=restrict(self.params, mask), mask=mask)

    def without_restarts(self, tree: Tree) -> Tree:
        """`tree` with zeros where a weight was cut and grew back after training: its way to zero was no step.

        Training leaves no kept weight at exactly zero.
        """
        if self.mask is None:
            return tree
        restarted = (self.params.flat == 0) & (self.received["params"].flat != 0)
        return restrict(Tree(tree.layout, torch.where(restarted, 0.0, tree.flat)), self.mask)


@dataclass(frozen=True, kw_only=True)
class Server:
    """What strategy and pruner own between rounds. Law: `params` are zero outside `mask`."""

    params: Tree
    buffers: Tree
    mask: Mask | None = None

    def cut(self, mask: Mask) -> Server:
        """This server under another mask, with zeros outside it."""
        return replace(self, params=restrict(self.params, mask), mask=mask)


@dataclass(frozen=True, kw_only=True)
class ClientInfo:
    """Facts about one client. label_counts: examples by class, shape (num_classes,)."""

    id: ClientId
    num_examples: int
    label_counts: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class View:
    """The model that a client runs, as parts of a whole: what the server owns, and what the client keeps."""

    params: Tree
    buffers: Tree
    mask: Mask | None
    local: Tree | None = None
    local_buffers: Tree | None = None


class Trainer(Protocol):
    """Run one more local job on the client's training data; pure. Its fit is sent nowhere."""

    def __call__(self, job: Job, name: str) -> Fit:
        """name: tells this job's batches from those of other jobs of the round."""
        ...


class Validate(Protocol):
    """Score a model on the part of the client's training data that was set apart (`validation`); pure."""

    def __call__(self, view: View) -> Mapping[str, float]:
        """The task's metrics, as {"accuracy": ..., "loss": ...}. Raises ConfigError where nothing was set apart."""
        ...


class Probe(Protocol):
    """Look at the client's training data without training; pure, at any point, in `begin` and in `end`."""

    def __call__(
        self,
        params: Tree,
        buffers: Tree,
        mask: Mask | None,
        *,
        wants: frozenset[Evidence],
        batch_size: int | None,
        per_class: int | None = None,
        loss: Loss | None = None,
    ) -> tuple[Mapping[str, float], Mapping[Evidence, Tree]]:
        """{"loss": mean loss} and the wanted evidence; the gradient is that of the effective weight.

        mask:       the point is `params` restricted to it; the gradient is not.
        batch_size: one keyed batch of that many examples; None for all of the client's training data.
        per_class:  a batch of that many examples of each class instead (of a class that has fewer, all).
        loss:       what the evidence is the derivative of; None for the plain one.
        """
        ...


class Score(Protocol):
    """Score a model on the client's training data, in evaluation mode; pure."""

    def __call__(self, view: View) -> Mapping[str, float]:
        """The task's metrics, means over the examples."""
        ...


class Moments(Protocol):
    """What batch normalisation sees of the client's training data in a model; pure."""

    def __call__(self, view: View) -> tuple[Tree, int]:
        """Means and mean squares in the place of the running means and variances (layout of the buffers; other
        buffers as they are in `view`), which may be averaged over clients, and the number of examples. `normalised`
        of the average gives the buffers."""
        ...

    def normalised(self, moments: Tree) -> Tree:
        """Buffers with means and variances, from means and mean squares."""
        ...


class Flow(Protocol):
    """The flow through a model without data; pure."""

    def __call__(self, params: Tree, buffers: Tree, mask: Mask | None) -> Tree:
        """|w * dR/d|w|| of every parameter at `params` restricted to the mask, divided by its largest value: R is
        the sum of the outputs for an input of ones in evaluation mode with absolute weights. float64 inside."""
        ...


@dataclass(frozen=True, kw_only=True)
class Context:
    """Read-only facts of the moment.

    round:    1 for the first; 0 while the run is set up.
    key:      randomness of this round, and on a client of this client in this round.
    cohort:   the clients of this round, sorted; empty while the run is set up.
    origin:   the initial parameters that the server owns; both sides derive them from the seed.
    prunable: names of the tensors that a pruner may cut, in layout order.
    lr:       the clients' learning rate in this round.
    server_lr: factor of this round on a strategy's own rate (`server.lr_schedule`).
    run_key:  randomness that is the same in every round, on the server and on every client.
    flow:     the model's flow without data.
    structure: the model's units that can be cut whole; None where no policy of the run cuts structures.
    flops:    dense FLOPs of one sample by the name of the weight that causes them; empty on clients.
    client:   whose turn it is; None on the server, as are those below.
    known:    the mask last exchanged with this client.
    job:      this client's training as it is configured, from the initial weights: what `begin` starts from.
    probe:    look at the client's training data; on the server at the public data, None where there are none.
    train, validate, score, moments: train on, and score with, the client's training data.
    """

    round: int
    key: Key
    num_clients: int
    cohort: tuple[ClientId, ...]
    origin: Tree
    prunable: tuple[str, ...]
    lr: float
    run_key: Key
    server_lr: float = 1.0
    flow: Flow | None = None
    structure: Structure | None = None
    flops: Mapping[str, int] = field(default_factory=dict)
    client: ClientInfo | None = None
    known: Mask | None = None
    job: Job | None = None
    probe: Probe | None = None
    train: Trainer | None = None
    validate: Validate | None = None
    score: Score | None = None
    moments: Moments | None = None


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A question to clients before a round's training. It is a policy's own: no other policy sees it.

    name:    what the ledger calls it; the name of `Policy.exchange_parts`.
    clients: who is asked: "cohort" (of the round that begins), "all", or ids. Availability decides about cohorts alone:
             who is asked by id, or with all others, is waited for.
    """

    name: str
    clients: Literal["cohort", "all"] | tuple[ClientId, ...] = "cohort"


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What `check` may look at. It is called before data load, when data and model are known, and at last with what
    needs both: units, and who has what.

    kinds:     of every trainable tensor by name: weight, bias, norm or other; None before the model is known.
    objective: classification, regression or next_token; None before the data are known.
    validation: share of each client's training data that is set apart.
    public:    number of training examples that the server has to itself, before any are dealt to clients.
    has_statistics: whether the model has batch normalisation with running statistics; None before it is known.
    tokens:    whether samples are tokens; None before the data are known.
    layout:    of the parameters that the server owns; prunable: names of those that a pruner may cut. None and empty
               before the last call, as are those below.
    initial_mask: of the model that the run starts from, over `layout`; None where nothing of it is cut.
    structure: the units that can be cut whole, where a policy cuts any.
    unjudged:  clients of whose training data nothing could be set apart, though `validation` asks for it.
    """

    rounds: int
    num_clients: int
    cohort: int
    optim: Optim
    epochs: float | None
    steps: int | None
    policies: tuple[tuple[str, Policy[Any, Any]], ...]
    validation: float = 0.0
    public: int = 0
    kinds: Mapping[str, str] | None = None
    objective: str | None = None
    has_statistics: bool | None = None
    tokens: bool | None = None
    layout: Layout | None = None
    prunable: tuple[str, ...] = ()
    initial_mask: Mask | None = None
    structure: Structure | None = None
    unjudged: tuple[ClientId, ...] = ()


class Policy(Generic[M, C]):
    """One concern of a federated round. M is its memory on the server, C its memory at each client.

    Concrete policies are frozen, final, keyword-only dataclasses whose fields are hyper-parameters; they refuse
    bad values in `__post_init__` with `refuse`. A memory is None, a number, a Tree, a Mask, or a tuple or dict of
    such; C must be picklable, and equal memories mean that nothing changed.

    cuts: what kind of mask it makes; "weights" cuts single weights out of matrices, "structures" whole units with
          everything that belongs to them (biases and norms too), "both" first units and then weights, "none" nothing.
    exempt: laws of the conformance suite that do not apply, and why: see docs/conformance.md.
    regrown: where a coordinate starts that comes back: at zero, or at the value that the server held for it.
    sends_each: whether `send` gives each client a message of its own; then downloads cannot follow each other.
    depends_on_time: whether the course of a run depends on how long things take; then it has only one price.
    recomputes_statistics: whether what it keeps are statistics that the cohort is asked for before each evaluation.
    looks_ahead: whether its jobs take gradients elsewhere than at the weights (`Job.sharpness`).
    """

    cuts: ClassVar[Literal["none", "weights", "structures", "both"]] = "none"
    sends_each: ClassVar[bool] = False
    depends_on_time: ClassVar[bool] = False
    recomputes_statistics: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False
    exempt: ClassVar[Mapping[str, str]] = MappingProxyType({})
    regrown: ClassVar[Literal["zero", "held"]] = "zero"

    def sparsity_after(self, round: int) -> float | None:
        """The fraction removed that this policy promises after a round, 0 for the start; None where the size is an
        outcome, or where clients have masks of their own. Of its budget: see `prune.allocate`."""
        return None

    def changes_masks(self, round: int) -> bool | None:
        """Whether masks, the server's or clients', change in a round; None where that depends on more."""
        return None

    def check(self, run: RunFacts) -> None:
        """Refuse bad company, by ConfigError, before data loads."""

    def warns(self, run: RunFacts) -> tuple[str, ...]:
        """Sentences about what this run does that its user may not expect; printed and kept in the manifest."""
        return ()

    def keeps(self, kinds: Mapping[str, str], buffers: Layout) -> frozenset[str]:
        """Names of the parameters and buffers that never leave a client; the server then has no whole model.

        kinds: of every trainable parameter, in layout order: "weight", "bias", "norm" or "other".
        """
        return frozenset()

    def parts(self, params: Layout, buffers: Layout) -> Mapping[str, PartSpec]:
        """The parts that this policy puts into messages."""
        return {}

    def init_server(self, server: Server, ctx: Context) -> tuple[Server, M]:
        """Set up the server's state and memory before the first round, inner to outer."""
        return server, None  # type: ignore[return-value]

    def init_client(self, ctx: Context) -> C:
        """A client's memory before its first round."""
        return None  # type: ignore[return-value]

    def send(self, server: Server, message: Message, memory: M, ctx: Context) -> Message:
        """Fill the message for a client, inner to outer. Runs where the client lives."""
        return message

    def begin(self, message: Message, job: Job, memory: C, ctx: Context) -> tuple[Message, Job, C]:
        """Shape the client's job from the decoded message, outer to inner."""
        return message, job, memory

    def end(self, fit: Fit, message: Message, memory: C, ctx: Context) -> tuple[Fit, Message, C]:
        """Fill the client's answer from its fit, inner to outer."""
        return fit, message, memory

    def settle(self, server: Server, sums: Sums, memory: M, ctx: Context) -> tuple[Server, Sums, M]:
        """Take what the cohort sent into the server's state, outer to inner."""
        return server, sums, memory

    def exchange_parts(self, params: Layout, buffers: Layout) -> Mapping[str, Mapping[str, PartSpec]]:
        """By the name of each exchange that this policy may ask for, the parts of its messages."""
        return {}

    def exchanges(self, memory: M, ctx: Context) -> tuple[Exchange, ...]:
        """What to ask clients before the training of this round, one after the other; usually nothing."""
        return ()

    def ask(self, exchange: Exchange, server: Server, memory: M, ctx: Context) -> Message:
        """What the server sends each client that is asked; `send` has no part in it."""
        return Message()

    def answer(self, exchange: Exchange, message: Message, memory: C, ctx: Context) -> Message:
        """What a client answers to the decoded message. Nothing is remembered."""
        return Message()

    def learn(self, exchange: Exchange, server: Server, sums: Sums, memory: M, ctx: Context) -> tuple[Server, M]:
        """Take the answers into the server's state; sums may be empty where nobody could be asked."""
        return server, memory

    def view(self, view: View, memory: C, ctx: Context) -> View:
        """The model that this client would run on its own data, from the server's; outer to inner. Pure, and it
        costs no bytes. Overriding it means that clients are evaluated one by one."""
        return view


class FieldError(ConfigError):
    """A field has a value that it must not have. `under` puts the name of the group before the field's."""

    def __init__(self, field_name: str, value: object, rule: str) -> None:
        super().__init__(f"{field_name} is {value!r}; {rule}")
        self.parts = (field_name, value, rule)

    def under(self, group: str) -> ConfigError:
        name, value, rule = self.parts
        return ConfigError(f"{group}.{name} is {value!r}; {rule}")


def refuse(bad: bool, field_name: str, value: object, rule: str) -> None:
    """Raise FieldError("<field> is <value>; <rule>") if `bad`. The rule says what holds and how to get it."""
    if bad:
        raise FieldError(field_name, value, rule)
