"""Optimisation: Muon for matrices and convolutions and AdamW for the rest, or AdamW alone; rate and EMA."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


def orthogonalise(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrix to [m, n], by the quintic Newton-Schulz iteration of Muon."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. torch's own takes 2-D parameters only; here convolutions count as [out, rest].

    The step is scaled by 0.2 sqrt(max(m, n)), so that its size matches AdamW's at the same rate.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(buffer, group["momentum"])
                update = orthogonalise(direction.reshape(direction.shape[0], -1))
                scale = 0.2 * max(update.shape) ** 0.5
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)


def _by_factor(parameters: list[nn.Parameter], factors: dict[int, float]) -> list[dict]:
    """Groups of an optimiser: parameters of one `factor` (by id; 1 for those that have none) each."""
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(factors.get(id(parameter), 1.0), []).append(parameter)
    return [{"params": members, "factor": factor} for factor, members in groups.items()]


class Optimiser:
    """Both optimisers behind one step; `rate` maps the share of the run done to a factor on the learning rate.

    Parameters that want no gradient are left out. `muon` off: AdamW for all, with `betas`. `rates`: factors on the rate of
    parameters whose names begin so.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        warmup: float = 0.01,
        decay_from: float = 0.5,
        muon: bool = True,
        betas: tuple[float, float] = (0.9, 0.98),
        rates: dict[str, float] | None = None,
    ) -> None:
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        matrices = [p for n, p in trained if muon and p.ndim >= 2 and "modulation" not in n and "gamma" not in n]
        ids = {id(p) for p in matrices}
        rest = [p for _, p in trained if id(p) not in ids]
        factors = {id(p): f for n, p in trained for start, f in (rates or {}).items() if n.startswith(start)}
        self.parts: list[torch.optim.Optimizer] = [Muon(_by_factor(matrices, factors), lr)] if matrices else []
        if rest:
            groups = _by_factor(rest, factors)
            self.parts.append(torch.optim.AdamW(groups, lr, betas=betas, weight_decay=0.0, fused=True))
        self.parameters = matrices + rest
        self.lr, self.warmup, self.decay_from = lr, warmup, decay_from

    @staticmethod
    def of(model: nn.Module, config: dict, lr: float, decay_from: float) -> Optimiser:
        """As a run's file asks: `optimiser` ("muon", the default, or "adamw"), `betas`, `warmup`, `rates`."""
        kind = config.get("optimiser", "muon")
        if kind not in ("muon", "adamw"):
            raise ValueError(f"optimiser is {kind!r}; it must be muon or adamw")
        betas = tuple(config.get("betas", (0.9, 0.98)))
        return Optimiser(model, lr, config.get("warmup", 0.01), decay_from, kind == "muon", betas, config.get("rates"))

    def rate(self, done: float) -> float:
        """Linear warm-up, hold, linear decay to 2 %."""
        if done < self.warmup:
            return done / self.warmup + 0.02
        return 1.0 if done < self.decay_from else max(0.02, (1 - done) / (1 - self.decay_from))

    def step(self, done: float, clip: float = 1.0) -> float:
        """One update at `done` in 0..1 of the run; returns the gradient's norm before clipping."""
        norm = float(nn.utils.clip_grad_norm_(self.parameters, clip))
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * self.rate(done) * group.get("factor", 1.0)
            part.step()
            part.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


class Average:
    """Exponential moving average of a model's parameters, bias-corrected while it is young."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.shadow = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 9))
        values = dict(model.named_parameters())
        torch._foreach_lerp_(list(self.shadow.values()), [values[n] for n in self.shadow], 1 - decay)

    @contextmanager
    def used_by(self, model: nn.Module) -> Iterator[None]:
        """Within: `model` has the averaged weights."""
        trained = {n: p.detach().clone() for n, p in model.named_parameters() if n in self.shadow}
        model.load_state_dict(self.shadow, strict=False)
        try:
            yield
        finally:
            model.load_state_dict(trained, strict=False)

    def state_dict(self) -> dict:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        self.updates, self.shadow = state["updates"], dict(state["shadow"])
