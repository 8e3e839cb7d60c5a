"""Turns embeddings into samples of a Gaussian whose variance is learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from climb_plugin._graph import noise
from climb_plugin._graph.sample import draw, next_number
from climb_plugin._torch import in_function_forward, is_batched, is_replica, transforms_active
from climb_plugin.affine import LOGVARS, Mean, SharedLogvar, checked_std
from climb_plugin.checks import checked_choice, checked_width, warn
from climb_plugin.gaussian import Posterior, bound_logvar, widened

P = ParamSpec("P")
R = TypeVar("R")


class GaussianHead(nn.Module):
    """Turns an embedding into a sample of a Gaussian whose variance is learned.

    A head samples if a gradient flows through it: in training mode, with gradients enabled, if the
    embedding or a parameter of the head requires one. Otherwise, in ``eval()``, under
    ``torch.no_grad()`` or frozen, the head passes on the mean; so a frozen copy is a teacher by
    itself. Statistics are computed in float32 outside autocast (float64 stays float64); the output
    has the dtype of the embedding. :class:`~climb_plugin.loss.ClimbLoss` finds the posteriors of
    the samples that its base loss depends on; nothing has to be passed along.

    ``GaussianHead(dim)`` takes the embedding as the mean, so the wrapped model computes the same as
    before, up to noise of ``init_std``. ``GaussianHead(in_features, out_features)`` learns a linear
    mean. Both learn the log-variance.

    The noise follows ``torch.manual_seed`` and leaves torch's own random numbers untouched. No two
    calls share noise, of one head or several. Building a head restarts the noise, so that a run
    repeated in one process is the same: build all heads of a model before you call one. A seed that
    is set again and again (in each epoch) repeats the noise, as it repeats dropout's masks, if
    torch has drawn random numbers in between: set seed + epoch.

    Args:
        in_features: Width of the embedding.
        out_features: Width of the sample. None: the embedding itself is the mean.
        init_std: Standard deviation at the start, in units of the embedding.
        logvar: ``"linear"``: the log-variance is a linear function of the embedding, with
            in_features x out_features parameters. ``"shared"``: one learned number for each
            dimension, the same for every image.

    Raises:
        ValueError: If a width is not positive, ``init_std`` is out of range or ``logvar`` is
            unknown.

    Shape:
        Input (..., B, in_features), output (..., B, out_features).

    Source: Alemi et al., Deep Variational Information Bottleneck, 2017. The place of the Gaussian
    and the bounds of the variance are choices of this package, not of the CLIMB paper.

    Examples:
        >>> head = GaussianHead(256)
        >>> embedding = torch.randn(8, 256)
        >>> head(embedding).shape, torch.equal(head.eval()(embedding), embedding)
        (torch.Size([8, 256]), True)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        init_std: float = 0.1,
        logvar: str = "linear",
    ) -> None:
        super().__init__()
        self.in_features = checked_width("in_features", in_features)
        width = in_features if out_features is None else out_features
        self.out_features = checked_width("out_features", width)
        self.init_std = checked_std(init_std)
        self.mean = None if out_features is None else Mean(self.in_features, self.out_features)
        form = LOGVARS[checked_choice("logvar", logvar, LOGVARS)]
        self.logvar = form(self.in_features, self.out_features, init_std=self.init_std)
        # The number of the last call with each outcome, for messages; "trained": of the last draw
        # through which a gradient came.
        self.last_calls: dict[str, int] = {}
        self._is_started = False  # Whether the head has sampled, or has loaded weights.
        self.register_load_state_dict_pre_hook(_check_form)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_start)  # type: ignore[no-untyped-call]
        noise.begin()

    def forward(self, embedding: Tensor) -> Tensor:
        """A sample of the posterior if a gradient flows, else the mean."""
        if self.training and torch.is_grad_enabled():
            return outside_compiled_code(self._sample, embedding)
        if not torch.compiler.is_compiling():
            self._note_mean()
        return self.embed(embedding)

    def embed(self, embedding: Tensor) -> Tensor:
        """The mean of the posterior, in the dtype of ``embedding``."""
        if self.mean is None:
            return embedding
        self._check(embedding)
        with no_autocast(embedding):
            return cast("Tensor", self.mean(widened(embedding))).to(embedding.dtype)

    def posterior(self, embedding: Tensor) -> Posterior:
        """Mean and log-variance of (..., B, in_features), in float32 or float64; draws nothing.

        Raises:
            TypeError: If ``embedding`` is not a floating-point tensor.
            ValueError: If the shape does not fit.
        """
        self._check(embedding)
        with no_autocast(embedding):
            wide = widened(embedding)
            mean = wide if self.mean is None else self.mean(wide)
            logvar = self.logvar(wide)
            # FSDP's mixed precision, if applied to a layer, casts that layer's output: cast back.
            return Posterior(mean.to(wide.dtype), bound_logvar(logvar.to(wide.dtype)))

    def reset_parameters(self) -> None:
        """Initialises all parameters: the std is ``init_std`` again."""
        if self.mean is not None:
            self.mean.reset_parameters()
        self.logvar.reset_parameters()

    def _sample(self, embedding: Tensor) -> Tensor:
        if isinstance(embedding, torch.fx.Proxy):  # symbolic tracing follows no sample
            return self.embed(embedding)
        if is_replica(self):
            raise RuntimeError(
                "GaussianHead cannot train in nn.DataParallel, which runs copies of the model that "
                "last for one forward: the loss would not find their posteriors. Train on one GPU, "
                "or use DistributedDataParallel. In eval() nn.DataParallel works."
            )
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise RuntimeError(
                "a GaussianHead in training cannot be traced: trace the eval() model."
            )
        posterior = self.posterior(embedding)
        if is_batched(posterior.mean) or is_batched(posterior.logvar):
            raise RuntimeError(
                "a GaussianHead in training cannot run under torch.vmap: CLIMB could not tell the "
                "posteriors of the samples apart. Loop over the models or samples, or use eval()."
            )
        # Not asked of the parameters, which FSDP flattens and functional_call replaces.
        if not (posterior.mean.requires_grad or posterior.logvar.requires_grad):
            self._note("frozen")
            return self.embed(embedding)
        self._check_start()
        self._note("sampled")
        with no_autocast(embedding):
            return draw(self, embedding, posterior).to(embedding.dtype)

    def _check_start(self) -> None:
        if self._is_started or transforms_active():
            return
        self._is_started = True
        if not self.logvar.is_at_start():
            warn(
                "the log-variance of a GaussianHead does not start at init_std="
                f"{self.init_std}: its parameters were set before its first sample. If trained "
                "ones were copied into it, all is well. If an initialiser has gone through "
                "model.parameters(), call head.reset_parameters() after that, or wrap after it."
            )

    def _note_mean(self) -> None:
        if torch.is_grad_enabled():
            self._note("eval")
        elif not in_function_forward():
            self._note("no_grad")
        elif self.training and self.logvar.bias.requires_grad:
            self._note("function")

    def _note(self, outcome: str) -> None:
        self.last_calls[outcome] = next_number()

    def _check(self, embedding: Tensor) -> None:
        if not isinstance(embedding, Tensor) or not embedding.is_floating_point():
            received = getattr(embedding, "dtype", type(embedding).__name__)
            raise TypeError(f"GaussianHead takes floating-point embeddings, got {received}.")
        # In tracing a size is a tensor, and asking for the value warns.
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return
        if embedding.ndim < 2 or embedding.shape[-1] != self.in_features:
            raise ValueError(
                f"GaussianHead({self.in_features}) takes embeddings of shape "
                f"(..., B, {self.in_features}), got {tuple(embedding.shape)}. If a layer before it "
                "was replaced since the head was built, build the head anew (unwrap, then wrap)."
            )

    def extra_repr(self) -> str:
        """The widths, ``init_std``, and the form of the log-variance if that is shared."""
        shown = f"{self.in_features}, {self.out_features}, init_std={self.init_std}"
        return f"{shown}, logvar='shared'" if isinstance(self.logvar, SharedLogvar) else shown

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            "torch.jit.script cannot compile a GaussianHead: take CLIMB out first with "
            "climb_plugin.unwrap(criterion), or use torch.jit.trace or torch.export on the model "
            "in eval()."
        )


def _check_form(head: GaussianHead, state: Mapping[str, object], prefix: str, *lists: Any) -> None:
    """Says more of a state with the other form of log-variance than that keys are missing."""
    parts = [key for key in state if key.startswith(f"{prefix}logvar.")]
    # Not by the name of the weight, which pruning and parametrizations change.
    saved = "linear" if len(parts) > 1 else "shared"
    built = "shared" if isinstance(head.logvar, SharedLogvar) else "linear"
    if f"{prefix}logvar.bias" in parts and saved != built:
        errors: list[str] = lists[-1]
        errors.append(
            f"the state of the GaussianHead {prefix.rstrip('.')!r} was saved with "
            f"logvar={saved!r}, and the model has logvar={built!r}: build the model with "
            f"logvar={saved!r}."
        )


def _start(head: GaussianHead, *_: object) -> None:
    head._is_started = True


def outside_compiled_code(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Calls ``function``; torch.compile steps around the call, with one graph break.

    ``torch.compiler.disable`` as a decorator would import the compiler with this package: a second.
    """
    if torch.compiler.is_compiling():
        function = torch.compiler.disable(function)
    return function(*args, **kwargs)


def no_autocast(tensor: Tensor) -> torch.autocast:
    """Switches autocast off within, for the device of a tensor."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def is_look(value: Tensor, heads: Sequence[GaussianHead]) -> bool:
    """Whether a loss's value is one of an evaluation: the heads ran under no_grad() last.

    The value trains nothing then, even if the loss itself was called with gradients enabled.
    """
    if value.requires_grad or transforms_active():
        return False
    calls = [head.last_calls for head in heads]
    return all(one and max(one, key=one.__getitem__) == "no_grad" for one in calls)
