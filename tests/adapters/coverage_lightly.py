"""Every public loss and head of lightly, trained with CLIMB: writes examples/LIGHTLY.md.

    python tests/adapters/coverage_lightly.py > examples/LIGHTLY.md

The names are read from lightly. What they are called with is in ``LOSSES`` and ``HEADS``: each
entry is the code of the call, which is both run and printed. A name without an entry is a row
that says so, and a failing test.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from types import ModuleType
from typing import Any, NamedTuple

import lightly.loss
import lightly.models.modules
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from climb_plugin import ClimbLoss, GaussianHead
from climb_plugin._run.place import find_place
from climb_plugin.adapters.lightly import wrap
from climb_plugin.settings import PLACES

IMAGES, TOKENS, MASKED, FEATURES, WIDTH, PROTOTYPES = 20, 4, 3, 12, 10, 24
STEPS = 3

LOSS_COLUMNS = ("loss", "called as", "the Gaussian acts on", "outcome", '`prior="view"`', "note")
HEAD_COLUMNS = ("head", '`at="projection"`', '`at="features"`', "outcome", "note")

TRAINS = "trains"
NOT_BUILT = "lightly itself does not build it here"
NOTHING = "nothing to act on"
NO_CASE = "NO CASE: add one to tests/adapters/coverage_lightly.py"

TWO_VIEWS = "criterion(head(x0), head(x1))"
VIEW_LIST = "criterion([head(x0), head(x1)])"
MULTI_CROP = (
    "criterion(local_proj=torch.stack([head(x2)]), global_proj=torch.stack([head(x0), head(x1)]))"
)
ANCHORS = "criterion(head(x0), teacher(x1), prototypes)"


class LossCase(NamedTuple):
    """How a loss is used.

    Attributes:
        call: One training step's call of the wrapped loss.
        head: Class of the projection head; GaussianHead: one put in by hand.
        base: What is wrapped; empty: the loss with its defaults.
        views: As in ``wrap``, where the head is called on several views in one batch.
        frozen: Whether ``teacher`` is a momentum teacher, which ``wrap`` is given.
        note: For the reader.
    """

    call: str = TWO_VIEWS
    head: str = "SimCLRProjectionHead"
    base: str = ""
    views: int = 1
    frozen: bool = True
    note: str = ""


class HeadCase(NamedTuple):
    """How a head is built, and where a Gaussian makes sense.

    Attributes:
        build: The head; empty: its class with small widths.
        places: Those of ``at`` that are trained.
        note: For the reader, and the reason for each place that is missing.
        copied: Whether the teacher is a copy of the wrapped head, made again in each step.
    """

    build: str = ""
    places: tuple[str, ...] = PLACES
    note: str = ""
    copied: bool = False


class Row(NamedTuple):
    """A line of the table, and whether it is as it should be."""

    cells: list[str]
    outcome: str

    @property
    def covered(self) -> bool:
        """Whether there is a case, and nothing went wrong in it that is ours."""
        return self.outcome in (TRAINS, NOTHING) or self.outcome.startswith(NOT_BUILT)


Shapes = list[tuple[int, ...]]


REGULARISER = "a regulariser: wrapped together with the loss that it is added to, so the rate \
counts once"

LOSSES: dict[str, LossCase | str] = {
    "BarlowTwinsLoss": LossCase(head="BarlowTwinsProjectionHead"),
    "CAPILoss": LossCase(
        "criterion(teacher(tokens0), head(tokens0[:, 1:]), index[:, 1:])",
        "CAPIProjectionHead",
        frozen=False,
        note="the teacher's head is trained by a clustering loss of its own: keep that one a plain "
        "`CAPILoss()`, it sees no sample",
    ),
    "CO2Regularizer": LossCase(
        base="lambda z0, z1: NTXentLoss()(z0, z1) + CO2Regularizer()(z0, z1)",
        note=REGULARISER + ". By itself it is refused: lightly detaches its value",
    ),
    "DCLLoss": LossCase(),
    "DCLWLoss": LossCase(),
    "DINOLoss": LossCase(
        "criterion([teacher(x0), teacher(x1)], [head(x0), head(x1), head(x2)], epoch=0)",
        "DINOProjectionHead",
        "DINOLoss(output_dim=24)",
    ),
    "DSERegularizer": LossCase(
        "criterion(head(tokens0), teacher(tokens0))",
        "DenseCLProjectionHead",
        "lambda s, t: PatchKernelAlignmentLoss()(s, t) + DSERegularizer()(s)",
        note=REGULARISER,
    ),
    "DetConBLoss": LossCase(
        "criterion(rows(predict, tokens0), rows(predict, tokens1), "
        "rows(teacher, tokens0), rows(teacher, tokens1), index, index)",
        "BYOLProjectionHead",
        note="one row per region",
    ),
    "DetConSLoss": LossCase(
        "criterion(rows(head, tokens0), rows(head, tokens1), index, index)",
        note="one row per region",
    ),
    "DirectCLRLoss": LossCase(
        "criterion(*head(torch.cat([x0, x1])).chunk(2))",
        "GaussianHead",
        "DirectCLRLoss(loss_dim=6)",
        views=2,
        note="no projection head: `head = GaussianHead(width)` goes behind the backbone",
    ),
    "EMPSSLLoss": LossCase("criterion([head(x0), head(x1), head(x2)])"),
    "FroSSLLoss": LossCase(VIEW_LIST),
    "HypersphereLoss": LossCase(),
    "IBOTPatchLoss": LossCase(
        "criterion(teacher(tokens0[mask]), head(tokens0[mask]), mask=mask.view(-1, 2, 2))",
        "DINOv2ProjectionHead",
        "IBOTPatchLoss(output_dim=24)",
        note="one row per masked token",
    ),
    "IBOTPlusPlusPatchLoss": LossCase(
        "criterion(teacher(tokens0), head(tokens0), mask=mask)",
        "DINOv2ProjectionHead",
        "IBOTPlusPlusPatchLoss(output_dim=24)",
    ),
    "KoLeoLoss": LossCase(
        base="lambda z0, z1: NTXentLoss()(z0, z1) + 0.1 * KoLeoLoss()(z0)",
        note=REGULARISER + ". DINOv2 adds it on the backbone's class token: keep it plain there, "
        "it sees no sample",
    ),
    "LeJEPALoss": LossCase(MULTI_CROP, "LeJEPAProjectionHead", "LeJEPALoss(sigreg_num_vectors=16)"),
    "LeWMLoss": LossCase(
        "criterion(embeddings=(z := rows(head, tokens0)), "
        "predicted=rows(predictor, z[:, :-1]), target=z[:, 1:])",
        "LeWMProjectionHead",
        "LeWMLoss(sigreg_num_vectors=16)",
        note="tokens are the frames of a clip",
    ),
    "MACLLoss": LossCase(),
    "MMCRLoss": LossCase(
        "criterion(torch.stack([head(x0), head(x1)], dim=1), "
        "torch.stack([teacher(x0), teacher(x1)], dim=1))",
        "MMCRProjectionHead",
    ),
    "MSNLoss": LossCase(ANCHORS, "MSNProjectionHead"),
    "NTXentLoss": LossCase(
        "criterion(head(x0), teacher(x1))",
        "MoCoProjectionHead",
        "NTXentLoss(memory_bank_size=(32, 10))",
    ),
    "NegativeCosineSimilarity": LossCase(
        "0.5 * (criterion(predict(x0), teacher(x1)) + criterion(predict(x1), teacher(x0)))",
        "BYOLProjectionHead",
        note="each call counts its own view, and the mean of both the rate once",
    ),
    "PMSNCustomLoss": LossCase(
        ANCHORS, "MSNProjectionHead", "PMSNCustomLoss(lambda p: torch.full_like(p, 1 / len(p)))"
    ),
    "PMSNLoss": LossCase(ANCHORS, "MSNProjectionHead"),
    "PatchKernelAlignmentLoss": LossCase(
        "criterion(head(tokens0), teacher(tokens0))", "DenseCLProjectionHead"
    ),
    "SIGReg": LossCase(
        base="lambda z0, z1: (z0 - z1).square().mean() + 0.05 * SIGReg(num_vectors=16)(z0)",
        note=REGULARISER,
    ),
    "SwaVLoss": LossCase("criterion([scores(x0), scores(x1)], [scores(x2)])", "SwaVProjectionHead"),
    "SymNegCosineSimilarityLoss": LossCase(
        "criterion(((z0 := head(x0)), predictor(z0)), ((z1 := head(x1)), predictor(z1)))",
        "SimSiamProjectionHead",
    ),
    "TiCoLoss": LossCase("criterion(head(x0), teacher(x1))", "TiCoProjectionHead"),
    "VICRegLLoss": LossCase(
        "criterion([(head(x0), local(grid0)), (head(x1), local(grid1))], [where0, where1])",
        "BarlowTwinsProjectionHead",
        "VICRegLLoss(num_matches=(2, 2))",
        note="`local` is the plain local head. Both heads: `ClimbLoss(VICRegLLoss(), "
        "heads=[attach(head), attach(local)], beta=...)`, `attach` from `climb_plugin.attach`",
    ),
    "VICRegLoss": LossCase(head="VICRegProjectionHead"),
    "VISRegLoss": LossCase(MULTI_CROP, "LeJEPAProjectionHead", "VISRegLoss(num_slices=16)"),
    "VISRegLossComponents": "not a loss: the values that `VISRegLoss.forward_components` returns",
    "WMSELoss": LossCase(
        "criterion(torch.cat([head(x0), head(x1)]))",
        base="WMSELoss(embedding_dim=10, w_size=20)",
    ),
    "Whitening2d": "not a loss: the layer with which `WMSELoss` whitens",
    "roi_resample_to_grid": "not a loss: cuts the region that two crops share out of a feature map",
}

PREDICTION = "a predictor: the Gaussian is usually wanted in the projection head before it"

HEADS: dict[str, HeadCase | str] = {
    "AIMPredictionHead": HeadCase(
        "AIMPredictionHead(12, 10, hidden_dim=16, num_blocks=1)",
        ("features",),
        "its output are pixels, not an embedding; `features` are the tokens of the backbone",
    ),
    "AIMPredictionHeadBlock": "not a head: a part of `AIMPredictionHead`",
    "BYOLPredictionHead": HeadCase(note=PREDICTION),
    "BYOLProjectionHead": HeadCase(),
    "BarlowTwinsProjectionHead": HeadCase(),
    "CAPIProjectionHead": HeadCase(
        note="normalises its input and has no MLP: both places are the same"
    ),
    "DINOProjectionHead": HeadCase(),
    "DINOv2ProjectionHead": HeadCase(),
    "DenseCLProjectionHead": HeadCase(),
    "LeJEPAProjectionHead": HeadCase(),
    "LeWMProjectionHead": HeadCase(),
    "MMCRProjectionHead": HeadCase(),
    "MSNProjectionHead": HeadCase(),
    "MoCoProjectionHead": HeadCase(),
    "NNCLRPredictionHead": HeadCase(note=PREDICTION),
    "NNCLRProjectionHead": HeadCase(),
    "ProjectionHead": HeadCase(
        "ProjectionHead([(12, 16, nn.BatchNorm1d(16), nn.ReLU()), (16, 10, None, None)])",
        note="the base class, for heads of your own",
    ),
    "SMoGPredictionHead": HeadCase(note=PREDICTION),
    "SMoGProjectionHead": HeadCase(
        copied=True,
        note="trained with a `copy.deepcopy` of the wrapped head as the teacher, which SMoG copies "
        "again and again: frozen, it passes on its mean",
    ),
    "SMoGPrototypes": "not a head: scores of groups; the Gaussian is in `SMoGProjectionHead`",
    "SimCLRProjectionHead": HeadCase(),
    "SimSiamPredictionHead": HeadCase(note=PREDICTION),
    "SimSiamProjectionHead": HeadCase(),
    "SwaVProjectionHead": HeadCase(),
    "SwaVPrototypes": "not a head: scores of an embedding that was normalised before; the Gaussian "
    "is in `SwaVProjectionHead`",
    "TiCoProjectionHead": HeadCase(),
    "VICRegProjectionHead": HeadCase(),
    "VicRegLLocalProjectionHead": HeadCase(),
}

GUIDE = """\
## Wrapping a loss

`from climb_plugin.adapters.lightly import wrap` is `climb_plugin.wrap`, with an error that names
the missing package if lightly is not installed. `wrap` hangs a Gaussian on the projection head,
and a frozen twin on the teacher's. Heads with an L2 normalisation or prototypes inside get the
Gaussian before these.

- Wrap before the optimiser is built, because the Gaussian has parameters: a step that moves the
  projection head raises if no optimiser holds them. Wrap before other copies are made, too: an
  `AveragedModel` that is older pairs its parameters with the wrong ones. The momentum copy that
  lightly's scripts make with the model is passed as `teacher=`, and gets its twin by that.
- No layer is added. `len(head)`, `head[-1]` and the keys that were there mean what they meant,
  and the new parameters are called `<layer>.gaussian.logvar.weight` and `.bias`.
- `criterion.climb` holds everything that is CLIMB's, with short names (`criterion.terms`,
  `.beta`, `.step`); a name that the loss has as well raises. All other attributes are the loss's
  own: read, set and deleted through the criterion.
- A criterion that is called once per view (BYOL, SimSiam, NNCLR) counts each view once.
- `climb_plugin.unwrap(criterion)` takes all of CLIMB out again and returns the loss.

All options, and how to choose beta: [README.md](README.md#options) beside this page.

## In a LightningModule

For `lightning` or `pytorch_lightning` 2.x, make the criterion an attribute of the module, and add
`ClimbCallback()` from `climb_plugin.adapters.lightning` to the Trainer's callbacks. The callback
logs `climb_rate`, `climb_entropy` (nats), `climb_beta` and `climb_base_loss` every epoch,
averaged over steps and ranks, and shows `climb_rate_step` in the progress bar. The plain twin is
`wrap(..., beta=0)`: the callback raises if a module has no ClimbLoss.

```python
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from pytorch_lightning import LightningModule

from climb_plugin.adapters.lightly import wrap
from climb_plugin.adapters.lightning import ClimbCallback


class SimCLR(LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Linear(32, 16)
        self.projection_head = SimCLRProjectionHead(16, 16, 8)
        self.criterion = wrap(NTXentLoss(), student=self.projection_head, beta=1e-3)

    def training_step(self, views, batch_index):
        return self.criterion(*(self.projection_head(self.backbone(view)) for view in views))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.06)  # the Gaussian's, too


callbacks = [ClimbCallback()]  # Trainer(callbacks=callbacks, ...).fit(SimCLR(), ...)
```

A warm-up that is a fraction, as in `Linear(1e-3, warmup=0.1)`, then needs no `total_steps`: the
callback lays the fraction over the fit, whatever a learning-rate or batch-size finder did before.
The callback puts the losses back after such a search, those in lists and dicts too. (Give
`total_steps` if a `GradientAccumulationScheduler` changes the length, or if you step by hand less
than once a batch.)

A run that was killed goes on to the same numbers from the last whole checkpoint, under three
conditions. `on_train_epoch_start` calls `torch.manual_seed(self.current_epoch)`: augmentations,
dropout and CLIMB's noise follow that seed. The order comes from a sampler with `set_epoch(epoch)`
that seeds its own permutation: `shuffle=True` does not repeat the order. The DataLoader has a
`generator` of its own, so that the loader takes no seeded random numbers. Lightning 2.1 writes
checkpoints in place, so a kill may cut `last.ckpt` short, and torch refuses the file (`OSError:
Invalid argument` or `PytorchStreamReader failed`): keep older ones (`save_top_k=-1`).
"""


def discovered_losses() -> dict[str, Any]:
    """Public losses: modules of any file of lightly.loss, and whatever a package there exports."""
    found: dict[str, Any] = {}
    for module in _modules(lightly.loss):
        exported = hasattr(module, "__path__")
        for name, item in _public(module):
            ours = getattr(item, "__module__", "").startswith(lightly.loss.__name__)
            if ours and (exported or _is_module(item)):
                found[name] = item
    return found


def discovered_heads() -> dict[str, Any]:
    """Public modules of lightly.models.modules in a file of heads, or called a head."""
    return {
        name: item
        for module in _modules(lightly.models.modules)
        for name, item in _public(module)
        if _is_module(item)
        and item.__module__.startswith(lightly.models.modules.__name__)
        and (item.__module__.rpartition(".")[2].startswith("heads") or "Head" in name)
    }


def not_importable() -> list[str]:
    """Files whose names could not be read, because something they need is not installed."""
    return [
        name
        for package in (lightly.loss, lightly.models.modules)
        for name in _names(package)
        if _import(name) is None
    ]


def _names(package: ModuleType) -> Iterator[str]:
    yield package.__name__
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        yield info.name


def _modules(package: ModuleType) -> Iterator[ModuleType]:
    yield from (module for module in map(_import, _names(package)) if module is not None)


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    for name, item in vars(module).items():
        if not name.startswith("_") and (inspect.isclass(item) or inspect.isfunction(item)):
            yield name, item


def _is_module(item: object) -> bool:
    return inspect.isclass(item) and issubclass(item, nn.Module)


class Model(nn.Module):
    """A projection head and what stands around it in lightly's scripts."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.head, self.teacher = build(), build()
        for parameter in (*self.head.parameters(), *self.teacher.parameters()):
            if parameter.ndim > 1:  # lightly starts some so near 0 that nothing would move
                nn.init.normal_(parameter, std=0.4)
        for part in self.modules():
            if isinstance(part, GaussianHead):
                part.reset_parameters()
        heads = lightly.models.modules.heads
        self.predictor = heads.BYOLPredictionHead(WIDTH, 16, WIDTH)
        self.local = heads.VicRegLLocalProjectionHead(FEATURES, 16, WIDTH)
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, WIDTH))
        self.teacher.requires_grad_(False)

    def names(self) -> dict[str, Any]:
        """What a call may use: these modules, and a new batch of features."""
        images = torch.randn(IMAGES, 1 + TOKENS, FEATURES)
        x0, x1, x2 = (images[:, 0] + 0.3 * torch.randn(IMAGES, FEATURES) for _ in range(3))
        tokens0, tokens1 = (images[:, 1:] + 0.3 * torch.randn(images[:, 1:].shape) for _ in "01")
        mask = torch.zeros(IMAGES, TOKENS, dtype=torch.bool)
        mask[:, -MASKED:] = True
        return {
            "torch": torch,
            "head": self.head,
            "teacher": self.teacher,
            "predictor": self.predictor,
            "predict": lambda x: self.predictor(self.head(x)),
            "local": self.local,
            "prototypes": self.prototypes.data,
            "scores": lambda x: F.normalize(self.head(x), dim=1) @ self.prototypes.T,
            "rows": lambda module, t: module(t.flatten(0, 1)).unflatten(0, t.shape[:2]),
            "x0": x0,
            "x1": x1,
            "x2": x2,
            "tokens0": tokens0,
            "tokens1": tokens1,
            "grid0": tokens0.unflatten(1, (2, 2)),
            "grid1": tokens1.unflatten(1, (2, 2)),
            "where0": torch.rand(IMAGES, 2, 2, 2),
            "where1": torch.rand(IMAGES, 2, 2, 2),
            "mask": mask,
            "index": torch.arange(TOKENS).expand(IMAGES, TOKENS),
        }


def small_head(name: str, build: str = "") -> nn.Module:
    """A head of lightly with small widths, or a GaussianHead."""
    classes = {"GaussianHead": GaussianHead, **discovered_heads()}
    if build:
        return eval(build, {"nn": nn, **classes})
    widths = {
        "in_features": FEATURES,
        "input_dim": FEATURES,
        "hidden_dim": 16,
        "bottleneck_dim": WIDTH,
        "output_dim": PROTOTYPES if "bottleneck_dim" in _parameters(classes[name]) else WIDTH,
        "num_clusters": PROTOTYPES,
    }
    known = _parameters(classes[name])
    return classes[name](**{key: width for key, width in widths.items() if key in known})


def _parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def put_in(base: Any, model: Model, *, teacher: bool, **options: Any) -> ClimbLoss:
    """What a user does: wrap, or a GaussianHead that is there already."""
    if isinstance(model.head, GaussianHead):
        options.pop("at", None)
        return ClimbLoss(base, heads=model.head, beta=1e-3, **options)
    pair = {"teacher": model.teacher} if teacher else {}
    return wrap(base, student=model.head, **pair, beta=1e-3, **options)


def train(model: Model, criterion: ClimbLoss, step: Callable[[dict[str, Any]], Tensor]) -> Shapes:
    """Three steps.

    Returns:
        The shapes of what the Gaussian was given in each.

    Raises:
        ValueError: If something is not finite, has no gradient or stays where it was.
    """
    (gaussian,) = criterion.heads
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    shapes: Shapes = []
    gaussian.register_forward_hook(lambda _, args, out: shapes.append(tuple(args[0].shape)))
    for _ in range(STEPS):
        before = {name: p.detach().clone() for name, p in gaussian.named_parameters()}
        loss = step(model.names())
        loss.sum().backward()
        _check("the loss is finite", torch.isfinite(loss).all())
        _check("the rate is above 0", criterion.terms.rate > 0)
        for name, parameter in model.head.named_parameters():
            if parameter.requires_grad:
                _check(f"{name} has a gradient", parameter.grad is not None)
                _check(f"that of {name} is finite", torch.isfinite(parameter.grad).all())
        for name, parameter in gaussian.named_parameters():
            _check(f"the gradient of {name} is not 0", parameter.grad.any())
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in gaussian.named_parameters():
            _check(f"{name} moves", not torch.equal(parameter, before[name]))
    return shapes[: len(shapes) // STEPS]


def _check(what: str, holds: object) -> None:
    if not holds:
        raise ValueError(f"it does not hold that {what}.")


def loss_row(name: str, case: LossCase | str | None) -> Row:
    """Trains with one loss at both places, and once more with the prior that compares views."""
    if not isinstance(case, LossCase):
        return _untrained(name, case, columns=len(LOSS_COLUMNS))

    def attempt(**options: Any) -> Shapes:
        model = Model(lambda: small_head(case.head))
        loss = _built(case.base or f"{name}()")
        teacher = case.frozen and "teacher" in case.call
        criterion = put_in(loss, model, teacher=teacher, **options)
        return train(
            model, criterion, lambda names: eval(case.call, {**names, "criterion": criterion})
        )

    outcome, trainings = _outcome(attempt, [{"at": at} for at in PLACES])
    views, _ = _outcome(attempt, [{"prior": "view", "views": case.views}])
    function = ClimbLoss.__name__ if case.head == GaussianHead.__name__ else wrap.__name__
    wrapped = f"`{function}({case.base}, ...)` " if case.base else ""
    cells = [
        f"`{name}`",
        f"{wrapped}`{case.call}`",
        _letters(trainings[0]) if trainings else "",
        outcome,
        "no" if views != TRAINS else "yes" if case.views == 1 else f"`views={case.views}`",
        case.note,
    ]
    return Row(cells, outcome)


def head_row(name: str, case: HeadCase | str | None) -> Row:
    """Trains one head at both places, with a contrastive loss."""
    if not isinstance(case, HeadCase):
        return _untrained(name, case, columns=len(HEAD_COLUMNS))

    def attempt(at: str) -> Shapes:
        model = Model(lambda: small_head(name, case.build))
        criterion = put_in(lightly.loss.NTXentLoss(), model, teacher=not case.copied, at=at)

        def step(names: dict[str, Any]) -> Tensor:
            other = copy.deepcopy(model.head).requires_grad_(False) if case.copied else model.head
            loss: Tensor = criterion(model.head(names["x0"]), other(names["x1"]))
            return loss

        return train(model, criterion, step)

    outcome, _ = _outcome(attempt, [{"at": at} for at in case.places])
    places = [_place(name, case, at) if at in case.places else "no" for at in PLACES]
    return Row([f"`{name}`", *places, outcome, case.note], outcome)


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """The same random numbers each time, those of the caller left alone, and quiet hosts."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Their own: torch.tensor() of a tensor, deprecations.
        for module in ("lightly", "torch"):
            warnings.filterwarnings("ignore", module=module)
        torch.manual_seed(0)
        yield


class NotBuiltError(Exception):
    """lightly raised in the constructor of its own loss."""


def _built(base: str) -> Any:
    try:
        return eval(base, {"torch": torch, **discovered_losses()})
    except Exception as error:
        raise NotBuiltError(error) from error


def _place(name: str, case: HeadCase, at: str) -> str:
    with _seeded():
        place = find_place(small_head(name, case.build), at=at)
    end = f"`{place.path}`" if place.path else "the head"
    return f"{'before' if place.before else 'behind'} {end}, D = {place.width}"


def _outcome(
    attempt: Callable[..., Shapes], options: list[dict[str, Any]]
) -> tuple[str, list[Shapes]]:
    """Tries each, from the same seed; what goes wrong belongs into the table."""
    trainings = []
    for chosen in options:
        with _seeded():
            try:
                trainings.append(attempt(**chosen))
            except NotBuiltError as error:
                return f"{NOT_BUILT}: {error}", trainings
            except Exception as error:
                return f"FAILS with {chosen}: {type(error).__name__}: {error}", trainings
    return TRAINS, trainings


def _untrained(name: str, reason: str | None, *, columns: int) -> Row:
    cells = [f"`{name}`", *[""] * (columns - 2), reason or ""]
    outcome = NO_CASE if reason is None else NOTHING
    cells[LOSS_COLUMNS.index("outcome")] = outcome
    return Row(cells, outcome)


def _letters(shapes: Shapes) -> str:
    """Shapes with letters: B images, T tokens of each, M of them masked."""
    letters = {
        IMAGES: "B",
        TOKENS: "T",
        MASKED: "M",
        2 * IMAGES: "2B",
        IMAGES * TOKENS: "BT",
        IMAGES * MASKED: "BM",
    }
    texts = ["(" + ", ".join([*(letters[n] for n in shape[:-1]), "D"]) + ")" for shape in shapes]
    return ", ".join(f"{texts.count(text)} x {text}" for text in dict.fromkeys(texts))


def loss_rows() -> list[Row]:
    """A row for each public loss."""
    return [loss_row(name, LOSSES.get(name)) for name in sorted(discovered_losses())]


def head_rows() -> list[Row]:
    """A row for each public head."""
    return [head_row(name, HEADS.get(name)) for name in sorted(discovered_heads())]


def totals(losses: list[Row], heads: list[Row]) -> str:
    """N of N."""
    return ", ".join(
        f"{sum(row.outcome == TRAINS for row in rows)} of "
        f"{sum(row.outcome != NOTHING for row in rows)} {kind}"
        for kind, rows in (("losses", losses), ("heads", heads))
    )


def markdown(losses: list[Row], heads: list[Row]) -> str:
    """The page, in lines that a shell's redirection writes as they are."""
    release = ".".join(version("lightly").split(".")[:2])
    other = sorted((LOSSES.keys() - discovered_losses()) | (HEADS.keys() - discovered_heads()))
    lines = [
        "# Losses and heads of lightly with CLIMB",
        "",
        "<!-- Written by tests/adapters/coverage_lightly.py: change that, and run it again. -->",
        "",
        f"lightly {release}: **{totals(losses, heads)}** train with `wrap`. Every row was run: "
        f"{STEPS} steps at each place (`at`), in which all is finite, the rate is above 0, and "
        "each parameter of the Gaussian gets a gradient and moves. Where one place alone makes "
        "sense, or there is no head to wrap, the note says so. The other public names, "
        f"which are no loss or no head, are listed as '{NOTHING}'.",
        "",
        *GUIDE.splitlines(),
        "",
        "## Losses",
        "",
        "What the calls are made of: `x0`, `x1`, `x2` are features of views (B, F), `tokens0` and "
        "`tokens1` of patches, regions or frames (B, T, F); `head` is the wrapped projection head, "
        "`teacher` its momentum copy, `predictor` an MLP behind it, `predict(x)` is "
        "`predictor(head(x))`, `scores(x)` are those of prototypes for the normalised `head(x)`, "
        "`rows(module, tokens)` calls `module` on (BT, F). The Gaussian acts on what stands in the "
        "third column, each time that the criterion's arguments are computed (at the projection). "
        'The fifth says whether `prior="view"` and `prior="backward"` have what they need: all '
        "views, of one size, in one call of the criterion.",
        "",
        *_table(LOSS_COLUMNS, losses),
        "",
        "## Heads",
        "",
        "Where the Gaussian is put, and its width D; the heads here take "
        f"{FEATURES} features and have an embedding of width {WIDTH}. Each was trained with "
        "`criterion(head(x0), head(x1))` and `NTXentLoss`, with a teacher of the same layout.",
        "",
        *_table(HEAD_COLUMNS, heads),
    ]
    if other:
        names = ", ".join(f"`{name}`" for name in other)
        lines += ["", f"With other versions of lightly the same is run for {names}."]
    if missing := not_importable():
        lines += ["", f"Not importable here, so not covered: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _table(columns: tuple[str, ...], rows: list[Row]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{' --- |' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row.cells)} |"


def main() -> None:
    """Prints the page; fails if a row is not as it should be."""
    losses, heads = loss_rows(), head_rows()
    sys.stdout.write(markdown(losses, heads))
    if bad := [row.cells[0] for row in (*losses, *heads) if not row.covered]:
        sys.exit(f"not covered: {', '.join(bad)}")


if __name__ == "__main__":
    main()
