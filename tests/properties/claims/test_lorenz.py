"""Networks on the Lorenz system: the data, the networks against loops, the verdict's arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from attnproof.properties.claims import lorenz
from attnproof.properties.claims.lorenz import Recipe

SMALL = Recipe(seeds=2, steps=3, batch=4, length=5, width=4, heads=2, hidden=3)


def test_the_trajectory_against_runge_kutta() -> None:
    found = lorenz.trajectory((1.0, 1.0, 20.0), 50)
    state = found[0].double().numpy() * 20.0 + np.array([0.0, 0.0, 25.0])

    def flow(y):
        return np.array([10 * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]])

    for _ in range(200):
        a = flow(state)
        b = flow(state + 0.0005 * a)
        c = flow(state + 0.0005 * b)
        d = flow(state + 0.001 * c)
        state = state + 0.001 / 6 * (a + 2 * b + 2 * c + d)
    reached = found[10].double().numpy() * 20.0 + np.array([0.0, 0.0, 25.0])
    np.testing.assert_allclose(state, reached, atol=2e-4)


def test_forecasts_are_ahead_of_their_windows() -> None:
    states = torch.arange(40.0)[:, None].expand(-1, 3)
    windows, targets = lorenz.forecast_pairs(states, SMALL)
    assert windows.shape[1:] == (5, 3)
    assert len(windows) == len(targets)
    assert torch.equal(windows[:, -1] + SMALL.ahead, targets)
    assert torch.equal(windows[0, :, 0], torch.arange(5.0))


@pytest.mark.parametrize("kind", ["easy", "softmax"])
def test_the_network_against_loops(kind: str) -> None:
    p = lorenz.initial(kind, SMALL, torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 5, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = lorenz.forward(p, x, SMALL.heads)
        for seed in range(2):
            one = {name: y[seed].squeeze(0) if name == "position" else y[seed] for name, y in p.items()}
            for b in range(3):
                torch.testing.assert_close(found[seed, b], by_loops(one, x[seed, b]), rtol=1e-4, atol=1e-5)


def by_loops(p, x):
    z = x @ p["embed"] + p["position"]
    v, mixed = z @ p["values"], torch.zeros(4)
    for head in range(2):
        part = slice(2 * head, 2 * head + 2)
        if "alpha" in p:
            weights = p["alpha"][head, -1]
        else:
            q, k = (z @ p["queries"])[-1, part], (z @ p["keys"])[:, part]
            weights = torch.softmax(k @ q / math.sqrt(2), 0)
        for j in range(5):
            mixed[part] += weights[j] * v[j, part]
    last = z[-1] + mixed @ p["output"]
    last = last + torch.relu(last @ p["up"]) @ p["down"]
    return x[-1] + last @ p["read"]


def test_errors_are_relative_by_component() -> None:
    truth = torch.tensor([[3.0, 1.0, 2.0], [4.0, 0.0, 0.0]])
    forecast = truth.clone()[None]
    forecast[0, 0, 0] += 5.0
    assert lorenz.errors(forecast, truth).tolist() == pytest.approx([100.0 / 3])


def test_seeds_learn_apart() -> None:
    """Other seeds beside a seed do not change what it learns."""
    torch.manual_seed(0)
    states = lorenz.trajectory((1.0, 1.0, 20.0))
    windows, targets = lorenz.forecast_pairs(states, SMALL)
    p = lorenz.initial("easy", SMALL, torch.Generator().manual_seed(0))
    x = windows[:8].expand(2, -1, -1, -1)
    loss = (lorenz.forward(p, x, 2) - targets[:8]).square().mean(dim=(1, 2)).sum()
    together = torch.autograd.grad(loss, p["alpha"])[0][0]
    alone = {name: y[:1].detach().requires_grad_() for name, y in p.items()}
    loss = (lorenz.forward(alone, x[:1], 2) - targets[:8]).square().mean()
    torch.testing.assert_close(torch.autograd.grad(loss, alone["alpha"])[0][0], together)


def test_products_by_hand() -> None:
    s, d, f = 5, 4, 3
    # Embedding, values, mixing, output of one token, its network, its forecast.
    easy = s * 3 * d + s * d * d + s * s * d + d * d + 2 * d * f + 3 * d
    assert lorenz.products("easy", SMALL) == easy
    assert lorenz.products("softmax", SMALL) == easy + 2 * s * d * d + s * s * d


def test_the_interval_is_students() -> None:
    low, high = lorenz.interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182446305284263 * math.sqrt(5 / 3) / 2
    assert (low, high) == pytest.approx((2.5 - half, 2.5 + half))


@pytest.mark.parametrize(
    ("easy", "longer", "softmax", "status"),
    [
        (5.0, 4.0, 6.0, "SUPPORTED"),
        (7.0, 7.0, 6.0, "REFUTED"),
        (7.0, 5.0, 6.0, "CONDITIONAL"),
        (6.0, 5.0, 6.0, "OPEN"),
        (70.0, 50.1, 60.0, "OPEN"),
    ],
)
def test_verdicts(monkeypatch, easy: float, longer: float, softmax: float, status: str) -> None:
    spread = [-0.1, 0.0, 0.2, -0.1]

    def trained(kind, recipe):
        middle = softmax if kind == "softmax" else easy if recipe.steps == 3 else longer
        noise = spread if kind == "softmax" else spread[::-1]
        return [middle + x for x in noise], 1

    monkeypatch.setattr(lorenz, "trained", trained)
    finding = lorenz.against(replace(SMALL, seeds=4))
    assert finding.status == status
    assert bool(finding.counterexample) == (status in ("REFUTED", "CONDITIONAL"))


def test_training_learns_and_repeats() -> None:
    recipe = replace(SMALL, steps=40, width=8, batch=16, rate=2e-2)
    assert max(lorenz.trained("easy", recipe)[0]) < 90.0
    assert min(lorenz.trained("easy", replace(recipe, shuffled=True))[0]) > 90.0
    short = replace(recipe, steps=2)
    assert lorenz.trained("softmax", short) == lorenz.trained("softmax", short)
