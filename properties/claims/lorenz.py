"""Easy against softmax attention on the Lorenz system: small networks, trained here, many seeds at once.

Both networks are the same but for their attention: embedding and learned positions, one layer of attention
with a residual connection, a feed-forward network with a residual connection, a linear forecast from the last
token. All seeds train together, as the leading dimension of every parameter; Adam acts on each number by
itself, so the seeds know nothing of one another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.stats import t as student

from attnproof.properties.claims.base import Claim, ClaimFinding, Plot

__all__ = [
    "CLAIMS",
    "Recipe",
    "against",
    "errors",
    "forecast_pairs",
    "forward",
    "initial",
    "interval",
    "products",
    "trained",
    "trajectory",
]

Parameters = dict[str, torch.Tensor]

_SEED = 4
_STEP = 0.02
# The mean state's error is about 100%: a network above half of that has not learned the system.
_LEARNED = 50.0


def _flow(_: float, x: Any) -> tuple[float, float, float]:
    """The Lorenz system with σ = 10, ρ = 28, β = 8/3."""
    return 10.0 * (x[1] - x[0]), x[0] * (28.0 - x[2]) - x[1], x[0] * x[1] - 8.0 / 3.0 * x[2]


@lru_cache(maxsize=4)
def trajectory(start: tuple[float, float, float], samples: int = 2000) -> torch.Tensor:
    """States at steps of 0.02 after a transient of 10 units of time, divided by 20 (samples, 3), float32."""
    times = 10.0 + _STEP * np.arange(samples)
    solution = solve_ivp(_flow, (0.0, times[-1]), start, t_eval=times, rtol=1e-8, atol=1e-8)
    centred = solution.y.T - np.array([0.0, 0.0, 25.0])
    return torch.tensor(centred / 20.0, dtype=torch.float32)


@dataclass(frozen=True)
class Recipe:
    """How networks are trained and judged.

    Attributes:
        seeds: how many; steps: of Adam; batch: windows a step; rate: of learning, falling to 0 as a cosine.
        length: S, positions of a window; width: d; heads: H; hidden: of the feed-forward network.
        ahead: steps of 0.02 from the window's end to the forecast state.
        shuffled: give windows the targets of others, so that there is nothing to learn.
    """

    seeds: int = 8
    steps: int = 200
    batch: int = 32
    rate: float = 1.6e-2
    length: int = 12
    width: int = 16
    heads: int = 4
    hidden: int = 32
    ahead: int = 10
    shuffled: bool = False


def forecast_pairs(states: torch.Tensor, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows (n, S, 3) and the states ``ahead`` steps after their last ones (n, 3)."""
    windows = states.unfold(0, recipe.length, 1).mT[: -recipe.ahead]
    return windows, states[recipe.length - 1 + recipe.ahead :]


def initial(kind: str, recipe: Recipe, generator: torch.Generator) -> Parameters:
    """Parameters of all seeds, (R, …), Gaussian with variance 1/fan-in; easy scores start near 1/S."""
    r, s, d, h = recipe.seeds, recipe.length, recipe.width, recipe.heads

    def drawn(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(r, *shape, generator=generator) * scale

    found = {
        "embed": drawn(3, d, scale=3**-0.5),
        "position": drawn(1, s, d, scale=0.1),
        "values": drawn(d, d, scale=d**-0.5),
        "output": drawn(d, d, scale=d**-0.5),
        "up": drawn(d, recipe.hidden, scale=d**-0.5),
        "down": drawn(recipe.hidden, d, scale=recipe.hidden**-0.5),
        "read": drawn(d, 3, scale=0.1 * d**-0.5),
    }
    if kind == "easy":
        found["alpha"] = 1.0 / s + drawn(h, s, s, scale=0.5 / s)
    else:
        found["queries"] = drawn(d, d, scale=d**-0.5)
        found["keys"] = drawn(d, d, scale=d**-0.5)
    return {name: x.requires_grad_() for name, x in found.items()}


def forward(p: Parameters, x: torch.Tensor, heads: int) -> torch.Tensor:
    """Forecasts (R, B, 3) of windows x (R, B, S, 3): a change from the last state."""
    z = torch.einsum("rbsc,rcd->rbsd", x, p["embed"]) + p["position"]

    def split(name: str) -> torch.Tensor:
        y = torch.einsum("rbsc,rcd->rbsd", z, p[name])
        return y.reshape(*y.shape[:3], heads, -1).transpose(2, 3)

    v = split("values")
    if "alpha" in p:
        mixed = p["alpha"].unsqueeze(1) @ v
    else:
        q, k = split("queries"), split("keys")
        mixed = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v
    last = z[:, :, -1] + mixed.transpose(2, 3).flatten(3)[:, :, -1] @ p["output"]
    last = last + torch.relu(last @ p["up"]) @ p["down"]
    forecast: torch.Tensor = x[:, :, -1] + last @ p["read"]
    return forecast


def errors(forecast: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Mean over components of ‖forecast − truth‖₂/‖truth‖₂ in percent, one a seed; (R, n, 3) and (n, 3)."""
    off, size = (torch.linalg.vector_norm(x, dim=-2) for x in (forecast - truth, truth))
    percent: torch.Tensor = 100.0 * (off / size).mean(dim=-1)
    return percent


def trained(kind: str, recipe: Recipe) -> tuple[list[float], int]:
    """Errors on a trajectory never seen, one a seed, and the parameters of one network."""
    generator = torch.Generator().manual_seed(_SEED)
    p = initial(kind, recipe, generator)
    windows, targets = forecast_pairs(trajectory((1.0, 1.0, 20.0)), recipe)
    # The same batches for both kinds: another generator than the parameters'.
    batches = torch.Generator().manual_seed(_SEED + 1)
    if recipe.shuffled:
        targets = targets[torch.randperm(len(targets), generator=batches)]
    adam = torch.optim.Adam(p.values(), lr=recipe.rate)
    for step in range(recipe.steps):
        for group in adam.param_groups:
            group["lr"] = recipe.rate * 0.5 * (1.0 + math.cos(math.pi * step / recipe.steps))
        chosen = torch.randint(len(windows), (recipe.seeds, recipe.batch), generator=batches)
        loss = (forward(p, windows[chosen], recipe.heads) - targets[chosen]).square().mean(dim=(1, 2)).sum()
        adam.zero_grad()
        torch.autograd.backward(loss)
        adam.step()
    unseen, truth = forecast_pairs(trajectory((-3.0, 2.0, 15.0), 1000), recipe)
    with torch.no_grad():
        found = errors(forward(p, unseen.expand(recipe.seeds, -1, -1, -1), recipe.heads), truth)
    return found.tolist(), sum(x[0].numel() for x in p.values())


def products(kind: str, recipe: Recipe) -> int:
    """Multiplications of numbers by numbers for one forecast of one window."""
    s, d = recipe.length, recipe.width
    shared = 3 * s * d + s * d * d + s * s * d + d * d + 2 * d * recipe.hidden + 3 * d
    # Queries and keys, and their products.
    return shared if kind == "easy" else shared + 2 * s * d * d + s * s * d


def interval(differences: list[float]) -> tuple[float, float]:
    """Student's interval of 95% for the mean difference over seeds."""
    x = np.array(differences)
    half = float(student.ppf(0.975, len(x) - 1)) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return float(x.mean()) - half, float(x.mean()) + half


def against(recipe: Recipe, work: Callable[[str, Recipe], int] = products) -> ClaimFinding:
    """Easy against softmax attention after equal steps, and after steps that cost equal work.

    SUPPORTED or REFUTED where easy attention's error is lower or higher in both comparisons, its interval of
    95% away from 0; CONDITIONAL where it is lower in one and higher in the other; OPEN else, and where a
    network has learned too little to be compared: an error above 50%, where the mean state has about 100%.

    Args:
        recipe: of training.
        work: of one forecast of "easy" and of "softmax".
    """
    longer = replace(recipe, steps=round(recipe.steps * work("softmax", recipe) / work("easy", recipe)))
    runs = {
        "easy": trained("easy", recipe),
        "easy, equal work": trained("easy", longer),
        "softmax": trained("softmax", recipe),
    }
    softmax = runs["softmax"][0]
    spans = {
        name: interval([a - b for a, b in zip(runs[name][0], softmax, strict=True)])
        for name in ("easy", "easy, equal work")
    }
    told = "; ".join(
        f"{name}: {np.mean(found):.2f} ± {np.std(found, ddof=1):.2f} %, {size} parameters"
        for name, (found, size) in runs.items()
    )
    verdict = _verdict([x for found, _ in runs.values() for x in found], list(spans.values()))
    return ClaimFinding(
        status=verdict,
        evidence=f"forecast {recipe.ahead} steps of {_STEP} ahead on a trajectory never seen, error mean_c "
        "‖g_c − "
        f"p_c‖₂/‖g_c‖₂, mean and deviation over {recipe.seeds} seeds: {told}. Easy less softmax attention, "
        "95%: "
        f"{_span(spans['easy'])} after {recipe.steps} steps each; {_span(spans['easy, equal work'])} after "
        f"{longer.steps} steps of easy attention, which cost as many multiplications",
        table={
            "network": [name for name, (found, _) in runs.items() for _ in found],
            "seed": [i for found, _ in runs.values() for i in range(len(found))],
            "error in percent": [x for found, _ in runs.values() for x in found],
        },
        plots=(_plot({name: found for name, (found, _) in runs.items()}),),
        counterexample=_by_seed(recipe, {name: found for name, (found, _) in runs.items()})
        if verdict in ("REFUTED", "CONDITIONAL")
        else "",
        seed=_SEED,
    )


def _verdict(found: list[float], spans: list[tuple[float, float]]) -> str:
    lower, higher = [high < 0 for _, high in spans], [low > 0 for low, _ in spans]
    if max(found) > _LEARNED or not all(a or b for a, b in zip(lower, higher, strict=True)):
        return "OPEN"
    if all(lower):
        return "SUPPORTED"
    return "REFUTED" if all(higher) else "CONDITIONAL"


def _by_seed(recipe: Recipe, found: dict[str, list[float]]) -> str:
    heading = (
        f"S = {recipe.length}, d = {recipe.width}, H = {recipe.heads}, {recipe.steps} steps of Adam, rate "
        f"{recipe.rate:g}, batches of {recipe.batch}; errors in percent by seed:"
    )
    return "\n".join(
        [heading, *(f"{name}: {', '.join(f'{x:.2f}' for x in values[:8])}" for name, values in found.items())]
    )


def _span(span: tuple[float, float]) -> str:
    return f"({span[0]:+.2f}, {span[1]:+.2f})"


def _plot(found: dict[str, list[float]]) -> Plot:
    rows = [(name, i, x) for name, values in found.items() for i, x in enumerate(values)]
    names = ("network", "seed", "error in percent")
    columns: dict[str, list[Any]] = {title: [row[i] for row in rows] for i, title in enumerate(names)}
    return Plot(
        "Errors on the Lorenz system", "scatter", columns, x="seed", y="error in percent", color="network"
    )


CLAIMS: Final = (
    Claim(
        id="EASY-4b",
        subject="easy attention",
        title="the Lorenz system",
        statement="On the Lorenz system a network with easy attention forecasts with smaller errors than one "
        "with "
        "softmax attention.",
        source="Sanchis-Agudo et al., arXiv 2308.12874, abstract; small networks of our own",
        kind="measurement",
        check=lambda lab: against(lab.choose(Recipe(), Recipe(seeds=16), Recipe(seeds=40))),
        control=lambda _: against(Recipe(steps=60, shuffled=True)),
        covers=("SEED2-7",),
    ),
)
