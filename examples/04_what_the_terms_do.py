# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What the terms do
#
# CLIMB adds `beta * (rate + alpha * entropy)` to a loss. This notebook takes these terms to
# Gaussians, where the true information and entropy are known in closed form. You will learn
#
# 1. how far the rate lies above the information I(z; v) that it bounds, and why,
# 2. why `alpha=1` alone drives the standard deviation to 0, and what it charges for instead of
#    information,
# 3. why a normalised mean needs a learned standard deviation,
# 4. which nats the `standard`, `learned`, `view` and `backward` priors charge for,
# 5. what the same terms read when a small network is trained on images.
#
# Only the last part needs images: scikit-learn's digits, or CIFAR-10 by the variable `DATA`.
# 1 nat is 1.443 bits.

# %%
import math

import matplotlib.pyplot as plt
import torch
from digits import load, train
from torch import nn
from torch.nn import functional as F

from climb_plugin import ClimbLoss, GaussianHead
from climb_plugin.gaussian import (
    conditional_entropy,
    entropy_bound,
    kl_between,
    kl_to_standard_normal,
    reparameterize,
    symmetric_kl,
)
from climb_plugin.monitor import nats_to_bits

DATA = "digits"  # or "cifar10", which torchvision downloads

torch.set_num_threads(1)  # these tensors are small
torch.manual_seed(0)
plt.rcParams.update(
    {"figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3, "figure.dpi": 80}
)

# %% [markdown]
# ## 1. The rate bounds the information
#
# A view $v \sim N(0, I)$ in 8 dimensions goes through a linear encoder, $z = A v + s \cdot$ noise.
# All variables are Gaussian, so the truth is known, with $C = A A^T + s^2 I$:
#
# - the information $I(z; v) = \frac12 \log\det(C / s^2)$,
# - the entropy $H(z) = \frac12 \log\det(2 \pi e\, C)$,
# - and what the rate charges in excess, $R - I(z; v) = KL(N(0, C) \,\|\, N(0, I))$: the divergence
#   from the marginal of z, its distribution over all views, to the prior.
#
# The rate itself is computed the way training does it: the mean of `kl_to_standard_normal` over
# views. `best diagonal` is the rate to the diagonal Gaussian with the mean and variance of z,
# which is where a learned prior ends up. First a check of the closed forms against sampling.

# %%
DIM = 8
views = torch.randn(20_000, DIM, dtype=torch.float64)
encoder = torch.randn(DIM, DIM, dtype=torch.float64) / math.sqrt(DIM)


def posterior(std):
    """Mean and log-variance of z for every view."""
    mean = views @ encoder.T
    return mean, torch.full_like(mean, 2 * math.log(std))


mean, logvar = posterior(0.5)
sample = reparameterize(mean, logvar, noise=torch.randn_like(mean))
log_p = torch.distributions.Normal(mean, 0.5).log_prob(sample).sum(1)
log_r = torch.distributions.Normal(0, 1).log_prob(sample).sum(1)
print("at std 0.5                 closed form    by sampling (± standard error), nats")
for name, exact, sampled in (
    ("rate R", kl_to_standard_normal(mean, logvar), log_p - log_r),
    ("entropy H(z|v)", conditional_entropy(mean, logvar), -log_p),
    ("bound on H(z), R + H(z|v)", entropy_bound(mean, logvar), -log_r),
):
    error = (sampled - exact).std() / math.sqrt(len(views))
    print(f"{name:26}{exact.mean():12.3f} {sampled.mean():14.3f} ± {error:.3f}")

# %%
stds = torch.logspace(-1.3, 0.7, 25).tolist()
rows = []
for std in stds:
    mean, logvar = posterior(std)
    covariance = encoder @ encoder.T + std**2 * torch.eye(DIM)
    information = torch.logdet(covariance / std**2) / 2
    entropy = torch.logdet(2 * math.pi * math.e * covariance) / 2
    gap = (covariance.trace() - DIM - torch.logdet(covariance)) / 2
    rate = kl_to_standard_normal(mean, logvar).mean()
    variance = mean.var(0) + std**2
    prior = (mean.mean(0).expand_as(mean), variance.log().expand_as(mean))
    best = kl_between(mean, logvar, *prior).mean()
    conditional = conditional_entropy(mean, logvar).mean()
    rows.append([information, rate, best, gap, entropy, conditional, rate + conditional])
information, rate, best, gap, entropy, conditional, bound = torch.tensor(rows).T

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4))
left.plot(stds, information, "k", label="I(z; v), exact")
left.plot(stds, rate, "o", ms=4, color="tab:orange", label="rate, standard prior")
left.plot(stds, best, "x", color="tab:green", label="rate, best diagonal prior")
left.set(title="Information and its bounds", ylabel="nats", ylim=(-1, 30))
middle.plot(stds, gap, "k", label="KL(marginal to prior), exact")
middle.plot(stds, rate - information, "o", ms=4, color="tab:orange", label="rate - I, standard")
middle.plot(stds, best - information, "x", color="tab:green", label="rate - I, best diagonal")
middle.set(title="What is charged in excess", ylabel="nats", yscale="log", ylim=(1e-3, None))
right.plot(stds, entropy, "k", label="H(z), exact")
right.plot(stds, bound, "o", ms=4, color="tab:orange", label="R + H(z|v), standard prior")
right.plot(stds, conditional, ":", color="tab:blue", label="H(z|v)")
right.set(title="Entropy and its bound", ylabel="nats (may be below 0)", ylim=(-15, 60))
for axes in (left, middle, right):
    axes.set(xscale="log", xlabel="noise std s (units of z)")
    axes.legend()
plt.show()

# %%
closest = int(gap.argmin())
print(f"tightest at std {stds[closest]:.2f}:")
for name, value in (("I(z; v)", information), ("rate, standard", rate), ("best diagonal", best)):
    nats = float(value[closest])
    print(f"  {name:16}{nats:6.2f} nats = {nats_to_bits(nats):5.2f} bits")
print(f"smallest rate - I, standard prior, over all stds: {(rate - information).min():.3f} nats")

# %% [markdown]
# The rate never falls below the information. What it charges in excess is the mismatch between
# the marginal of z and the prior: with the standard prior that is small only where the variance
# of z is near 1 in every dimension. A diagonal prior that follows the embedding takes away the
# mismatch in scale; the rest is correlation between dimensions, which no diagonal prior can
# describe. So a rate in nats is a bound on the information, not a measurement of it.

# %% [markdown]
# ## 2. Why `alpha=1` alone drives the standard deviation to 0
#
# Per dimension, up to a constant,
#
# $$R + \alpha H(z|v) = \tfrac12 \left(\mu^2 + \sigma^2 - (1 - \alpha) \log \sigma^2\right).$$
#
# The logarithm is all that keeps the variance up, and alpha takes it away. With a base loss that
# noise harms, here $\frac\lambda2 E \|z - \mu\|^2$, the stationary point is
#
# $$\sigma^2 = \frac{(1 - \alpha)\, \beta}{\beta + \lambda},$$
#
# which is 0 at alpha = 1. Below, a `GaussianHead` and `ClimbLoss` as in training, on fixed means;
# only the std can move.


# %%
def std_trace(alpha, harm, steps=800):
    """The std at each step; ``harm`` is lambda of the base loss, beta is 1."""
    torch.manual_seed(0)
    embedding = torch.randn(64, 8)
    head = GaussianHead(8, init_std=0.3)
    head.logvar.weight.requires_grad_(False)  # one std per dimension, the same for all views

    def base(z):
        return harm / 2 * (z - embedding).square().sum(1).mean()

    loss = ClimbLoss(base, heads=head, beta=1.0, alpha=alpha)
    optimizer = torch.optim.Adam([head.logvar.bias], lr=0.1)
    trace = []
    for _ in range(steps):
        value = loss(head(embedding))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        trace.append(head.posterior(embedding).logvar.mean().div(2).exp().item())
    return trace


figure, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
for axes, harm in zip(panels, (0.0, 3.0), strict=True):
    for alpha, colour in ((0.0, "tab:blue"), (0.5, "tab:orange"), (1.0, "tab:red")):
        trace = std_trace(alpha, harm)
        exact = math.sqrt((1 - alpha) / (1 + harm))
        axes.plot(trace, color=colour, label=f"alpha {alpha:g}")
        if exact:
            axes.axhline(exact, ls="--", lw=1, color=colour)
        print(
            f"lambda {harm:g}, alpha {alpha:g}: std {trace[-1]:.2g} at the end, {exact:.2g} exact"
        )
    axes.axhline(math.exp(-10), ls=":", color="k", label="least std of a GaussianHead")
    minds = "minds" if harm else "ignores"
    axes.set(xlabel="optimiser step", yscale="log", title=f"a base loss that {minds} noise")
panels[0].set_ylabel("std of z given v (units of z)")
panels[1].legend()
plt.show()

# %% [markdown]
# Dashed lines are the closed form. With alpha 0 and 0.5 the std settles there. With alpha 1 it
# falls and falls, more slowly as it gets small because its gradient is the variance itself; only
# the head would stop it, whose log-variance stays between -20 and 10. A base loss that minds noise
# does not help: it pushes the std in the same direction.
#
# Nor is information what is paid for. At alpha = 1 the penalty is $\frac12 E \|z\|^2$ plus a
# constant: an L2 penalty on the sample. Multiply mean and std by a common scale c: no information
# is lost, but the penalty falls.

# %%
scales = torch.logspace(-1.5, 0.7, 40).tolist()
mean, logvar = posterior(0.5)
rates, bounds = [], []
for scale in scales:
    scaled = (mean * scale, logvar + 2 * math.log(scale))
    rates.append(kl_to_standard_normal(*scaled).mean().item())
    bounds.append(entropy_bound(*scaled).mean().item())
covariance = encoder @ encoder.T + 0.25 * torch.eye(DIM)
figure, axes = plt.subplots(figsize=(6, 4))
axes.axhline(torch.logdet(covariance / 0.25).item() / 2, color="k", label="I(z; v), exact")
axes.plot(scales, rates, color="tab:blue", label="alpha 0: R")
axes.plot(scales, bounds, color="tab:red", label="alpha 1: R + H(z|v)")
axes.set(xlabel="common scale c of mean and std", ylabel="nats", xscale="log", ylim=(0, 40))
axes.legend()
plt.show()

# %% [markdown]
# The rate is least at a scale near 1, and lies above the information everywhere. The entropy bound
# falls towards $\frac D2 \log 2\pi$ (here 7.35) as the embedding shrinks, while the information
# stays what it is: a differential entropy depends on the unit of z, and can be lowered without
# forgetting anything. A base loss that normalises z (NT-Xent, DINO, BYOL) does not notice the
# scale at all.

# %% [markdown]
# ## 3. A normalised mean needs a learned std
#
# On a mean of length 1, half the sum of its squares is 1/2 for every view. With a fixed std the
# rate to N(0, I) is then one constant, and has no gradient. What is left to train is the std, if it
# is learned.


# %%
def gradients(normalise, prior):
    """Norms of the gradients of the rate: by the embedding, by the log-variance."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(2, 64, 32, generator=generator, dtype=torch.float64).requires_grad_()
    logvar = torch.full_like(embedding, 2 * math.log(0.1)).requires_grad_()
    mean = F.normalize(embedding, dim=-1) if normalise else embedding
    if prior == "standard":
        rate = kl_to_standard_normal(mean, logvar)
    else:
        rate = symmetric_kl(mean[0], logvar[0], mean[1], logvar[1])
    by_embedding, by_logvar = torch.autograd.grad(rate.mean(), (embedding, logvar))
    return rate.detach(), by_embedding.norm().item(), by_logvar.norm().item()


print("mean         prior       rate, nats: mean (std over views)    |gradient| by")
print("                                                           embedding   log var")
for normalise in (False, True):
    for prior in ("standard", "view"):
        rate, by_embedding, by_logvar = gradients(normalise, prior)
        spread = f"{rate.mean():.2f} ({rate.std():.1g})"
        name = "normalised" if normalise else "free"
        print(f"{name:12} {prior:10} {spread:>24} {by_embedding:20.1e} {by_logvar:9.1e}")

# %% [markdown]
# The third row is the one to avoid with a fixed std: the gradient by the embedding is rounding
# noise. That is why `wrap` puts the Gaussian before the normalisation and learns the std. A batch
# norm without affine parameters at the end of a head does the same to the size of the mean. The
# view prior compares two means, so it has a gradient on normalised ones as well.

# %% [markdown]
# ## 4. Which nats does each prior charge for?
#
# Two views of an image, with three coordinates of variance 1 each. The first is the same in both
# views, the second nearly (correlation 0.9), the third is drawn anew for each view. Each is sent
# with gain g = 1 and noise std s = 0.5. Of a coordinate with correlation $\rho$ we know
#
# - the information about its view, $I(z; v_1) = \frac12 \log(1 + g^2 / s^2)$,
# - of it, what the other view lacks: $I(z; v_1 | v_2) = \frac12 \log(1 + (1 - \rho^2) g^2 / s^2)$,
# - the rate of the view prior, $(1 - \rho) g^2 / s^2$, an upper bound of the latter,
# - the rate of the backward prior, which is the latter itself once gain and variance are learned.
#
# The learned and the backward prior are the plugin's, trained by their own parameters.

# %%
CORRELATIONS = {"shared": 1.0, "mostly shared": 0.9, "private": 0.0}
PRIORS = ("standard", "learned", "view", "backward")
COLOURS = dict(zip(PRIORS, ("tab:orange", "tab:green", "tab:purple", "tab:blue"), strict=True))


def draw_views(count, correlations):
    """Two views, each of shape (count, number of correlations)."""
    shared = torch.tensor(correlations)
    one, noise = torch.randn(2, count, len(correlations))
    return one, shared * one + (1 - shared.square()).sqrt() * noise


def charge(prior, correlation):
    """The rate of one coordinate in nats."""
    torch.manual_seed(0)
    head = GaussianHead(1, init_std=0.5)
    loss = ClimbLoss(lambda one, two: 0 * (one + two).sum(), heads=head, beta=1.0, prior=prior)
    if prior in ("learned", "backward"):
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
        for _ in range(300):
            optimizer.zero_grad()
            loss(*(head(view) for view in draw_views(4_000, [correlation]))).backward()
            optimizer.step()
            decay.step()
    loss(*(head(view) for view in draw_views(100_000, [correlation])))
    return loss.terms.rate.item()


figure, axes = plt.subplots(figsize=(9, 4.2))
lines = ["coordinate       I(z;v1)  I(z;v1|v2)" + "".join(f"{p:>10}" for p in PRIORS) + "   (nats)"]
for place, (name, correlation) in enumerate(CORRELATIONS.items()):
    whole = math.log1p(1 / 0.25) / 2
    superfluous = math.log1p((1 - correlation**2) / 0.25) / 2
    charges = [charge(prior, correlation) for prior in PRIORS]
    for index, prior in enumerate(PRIORS):
        x = place + 0.2 * (index - 1.5)
        axes.bar(x, charges[index], 0.18, color=COLOURS[prior], label=None if place else prior)
        axes.text(x, charges[index] + 0.05, f"{charges[index]:.2f}", ha="center")
    for value, style, label in ((whole, "k-", "I(z; v1)"), (superfluous, "k:", "I(z; v1 | v2)")):
        axes.plot([place - 0.4, place + 0.4], [value] * 2, style, label=None if place else label)
    cells = "".join(f"{value:10.3f}" for value in charges)
    lines.append(f"{name:14}{whole:10.3f}{superfluous:12.3f}{cells}")
axes.set(xticks=range(3), xticklabels=CORRELATIONS, ylabel="nats", title="Charged for, and true")
axes.legend(title="bars: rate with prior")
plt.show()
print("\n".join(lines))

# %% [markdown]
# The standard and the learned prior charge every coordinate alike: they bound I(z; v), and do not
# know what the other view has. (The learned one is a little cheaper: it follows the scale.) The
# view prior charges nothing for the shared coordinate. What is private costs it far more nats
# than there are, since two means that differ by many standard deviations are far apart as
# Gaussians: a loose bound, and one reason why a beta for one prior is no beta for another. The
# backward prior charges what the other view lacks, and no more: its Gaussian around the other
# mean is as wide as the difference is large.
#
# What does that do to a code that is trained? Below, gain and std of each coordinate are learned,
# with a base loss that wants the whole view back, $\frac12 E \|v - w z\|^2$ with a gain w that is
# learned too. The least loss is at
#
# - standard, learned: $I(z; v_1) = \frac12 \log(1 / \beta)$ for every coordinate,
# - view: $I(z; v_1) = \frac14 \log(1 / (2 \beta (1 - \rho)))$, without limit for $\rho = 1$,
# - backward: the ratio $x = g^2 / s^2$ that solves $1 + a x = \beta a (1 + x)^2$ with
#   $a = 1 - \rho^2$, without limit for $\rho = 1$, and as the standard prior for $\rho = 0$,
#
# and at 0 where that is negative.


# %%
class Code(nn.Module):
    """For each coordinate a gain, CLIMB's Gaussian behind it, and a gain to decode with."""

    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.head = GaussianHead(width, init_std=0.2)
        self.head.logvar.weight.requires_grad_(False)  # one std for each coordinate
        self.decode = nn.Parameter(torch.ones(width))

    def error(self, *views):
        """Half the squared error of the decoded sample, the mean over views."""
        errors = [view - self.decode * self.head(self.gain * view) for view in views]
        return torch.stack([error.square().sum(1).mean() / 2 for error in errors]).mean()

    @torch.no_grad()
    def information(self):
        """I(z; v1) of each coordinate in nats, exactly."""
        logvar = self.head.posterior(torch.zeros(1, len(self.gain))).logvar[0]
        return (torch.log1p(self.gain.square() / logvar.exp()) / 2).tolist()


def trained_code(prior, beta, steps=400):
    """The information that is left in each coordinate."""
    torch.manual_seed(0)
    code = Code(len(CORRELATIONS))
    loss = ClimbLoss(code.error, heads=code.head, beta=beta, prior=prior)
    modules = nn.ModuleList([code, loss])
    optimizer = torch.optim.Adam(modules.parameters(), lr=0.03)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(*draw_views(512, list(CORRELATIONS.values()))).backward()
        optimizer.step()
        decay.step()
    return code.information()


def exact(prior, beta, correlation):
    """The information at the least loss."""
    if prior in ("standard", "learned"):
        return max(0.0, math.log(1 / beta) / 2)
    if correlation == 1:
        return math.inf
    if prior == "backward":
        a = 1 - correlation**2
        b = a * (1 - 2 * beta)
        ratio = (b + math.sqrt(b**2 + 4 * beta * a * (1 - beta * a))) / (2 * beta * a)
        return max(0.0, math.log1p(ratio) / 2)
    return max(0.0, math.log(1 / (2 * beta * (1 - correlation))) / 4)


betas = [0.01, 0.03, 0.1, 0.3, 0.8]
figure, panels = plt.subplots(1, 4, figsize=(17, 4), sharey=True)
for axes, prior in zip(panels, PRIORS, strict=True):
    left = torch.tensor([trained_code(prior, beta) for beta in betas])
    for (name, correlation), values, style in zip(
        CORRELATIONS.items(), left.T, ("o", "x", "^"), strict=True
    ):
        (points,) = axes.plot(betas, values, style, label=name, markerfacecolor="none")
        truth = [exact(prior, beta, correlation) for beta in betas]
        axes.plot(betas, truth, "--", lw=1, color=points.get_color())
    axes.set(title=f"prior = {prior}", xscale="log", xlabel="beta (loss per nat)")
panels[0].set_ylabel("I(z; v1) that is left (nats)")
panels[0].legend(title="coordinate")
plt.show()

# %% [markdown]
# Dashed: the closed forms. The standard and the learned prior take from all three coordinates
# alike. The view prior empties the private coordinate first and leaves the shared one alone: its
# points show how far the training got, since nothing limits them. The backward prior takes from
# the private coordinate no more than the standard prior does. Nothing limits its shared coordinate
# either, but gain and variance of the prior have to follow the code, so the same 400 steps get less
# far. The base loss here asks for everything, shared or not. A contrastive loss asks only for what
# the views share, so it may drop the private part by itself, and then these two priors have little
# left to do.

# %% [markdown]
# ## 5. The terms in a training
#
# A small SimCLR on images, with every prior and alpha: what the terms read over the last 20 of
# 200 steps. One seed: this shows what the numbers look like, not which setting is better. The
# embedding has 32 dimensions, and $\frac D2 \log 2 \pi$ = 29.4 nats is the least that R + H can be
# with the standard prior. With the view and the backward prior the rate is measured against the
# other view, so that R + H bounds no entropy.

# %%
images = load(DATA, limit=4_000).train.images
print("prior     alpha   NT-Xent     rate R          H(z|v)   R + H   rms of    std   ratio")
print("                  (nats)   (nats)   (bits)   (nats)   (nats)   mean")
for prior, alpha in (*((prior, 0.0) for prior in PRIORS), ("standard", 1.0)):
    run = train(images, prior=prior, alpha=alpha, beta=0.1, steps=200)
    base, rate, entropy = (sum(trace[-20:]) / 20 for trace in (run.base, run.rate, run.entropy))
    bound = "-" if prior in ("view", "backward") else f"{rate + entropy:.1f}"
    size = run.embedding(images).square().mean().sqrt().item()
    std = math.exp(entropy / 32 - (1 + math.log(2 * math.pi)) / 2)
    print(
        f"{prior:9} {alpha:5g} {base:9.2f} {rate:8.1f} {nats_to_bits(rate):8.1f}"
        f" {entropy:8.1f} {bound:>8} {size:8.2f} {std:7.3f} {size / std:6.1f}"
    )
print(f"at step 0, standard prior: rate {run.rate[0]:.1f} nats, std 0.1")
run = train(images, steps=200)
size = run.embedding(images).square().mean().sqrt().item()
print(f"plain, without CLIMB: NT-Xent {sum(run.base[-20:]) / 20:.2f}, rms of embedding {size:.2f}")

# %% [markdown]
# `rms` is the root of the mean square over images and dimensions, `std` the geometric mean over
# dimensions and views. On the digits, `alpha=1` has the lowest bound on the entropy and an NT-Xent
# near that of the plain run, but its rate has hardly moved since step 0 and is many times that of
# alpha = 0: mean and std have become smaller together, and their ratio, which carries the
# information, stays high. That is section 2 at work. With alpha = 0 the std rises towards 1, the
# rate falls, and NT-Xent pays for it. The learned prior finds a lower rate at about the same
# NT-Xent. The rate of the view prior is in another currency (section 4) and cannot be compared
# with the others.
