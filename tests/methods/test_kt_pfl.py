from __future__ import annotations

from pathlib import Path

import torch
from linear_by_hand import close, descended, naive_kl, public, scores, start, trained_alone
from test_public_images import failing, opened, recorded
from toys import IMAGES, deployed, sites, toy_study, trained

from polyclinic.methods.kt_pfl import learnt_coefficients

RHO, SHARPNESS, TEMPERATURE = 0.7, 5.0, 10.0


def row_loss(row: torch.Tensor, answers: torch.Tensor, own: int, rho: float) -> torch.Tensor:
    """Mean squared errors: of the mixture to the site's own answers, and of the row to 1/K."""
    return (row @ answers - answers[own]).square().mean() + rho * (row - 1 / len(row)).square().mean()


def better_by_hand(matrix: torch.Tensor, answers: torch.Tensor, rho: float, sharpness: float) -> torch.Tensor:
    """Along the gradient by autograd to the vertex of the parabola through three points, then a softmax."""
    rows = []
    for own in range(len(matrix)):
        row = matrix[own].clone().requires_grad_()
        (slope,) = torch.autograd.grad(row_loss(row, answers, own, rho), row)
        at = [float(row_loss(matrix[own] - step * slope, answers, own, rho)) for step in (-1.0, 0.0, 1.0)]
        bend = at[0] - 2 * at[1] + at[2]
        step = 0.0 if bend <= 0 else (at[0] - at[2]) / (2 * bend)
        rows.append((sharpness * (matrix[own] - step * slope)).softmax(0))
    return torch.stack(rows)


def made_up(sites: int = 4, images: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.rand(sites, sites, generator=draw, dtype=torch.float64).softmax(1)
    answers = (3 * torch.randn(sites, images, 3, generator=draw, dtype=torch.float64)).softmax(2).flatten(1)
    return matrix, answers


def test_a_step_of_the_coefficients_by_hand() -> None:
    for seed in range(3):
        matrix, answers = made_up(seed=seed)
        for rho in (0.0, RHO):
            found = learnt_coefficients(matrix, answers, rho, SHARPNESS)
            torch.testing.assert_close(found, better_by_hand(matrix, answers, rho, SHARPNESS), rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(found.sum(1), torch.ones(4, dtype=torch.float64))


def test_sites_that_say_the_same_stay_alike() -> None:
    _, answers = made_up()
    uniform = torch.full((4, 4), 0.25, dtype=torch.float64)
    same = answers[:1].expand(4, -1)
    torch.testing.assert_close(learnt_coefficients(uniform, same, RHO, SHARPNESS), uniform)


def test_a_site_listens_to_itself_and_to_its_like_more_than_to_others() -> None:
    _, answers = made_up(3)
    answers = torch.stack([answers[0], answers[0] + 1e-4, answers[2]])
    found = learnt_coefficients(torch.full((3, 3), 1 / 3, dtype=torch.float64), answers, 0.0, SHARPNESS)
    assert found[0, 1] > found[0, 2] + 0.05
    assert found[2, 2] > found[2, 0] + 0.05


def test_three_rounds_by_hand(tmp_path: Path) -> None:
    data = sites()
    study = toy_study({"name": "kt-pfl", "digest": {"batch_size": 100}})
    run = trained(study, data, tmp_path)
    shown, own = public(study), {site: start(run) for site in sorted(data)}
    matrix = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    goals: dict[str, torch.Tensor] = {}
    for _ in range(3):
        for site, weights in own.items():
            if site in goals:
                goal = goals[site]

                def digest(w: list[torch.Tensor], goal: torch.Tensor = goal) -> torch.Tensor:
                    return TEMPERATURE**2 * naive_kl(goal, (scores(w, shown) / TEMPERATURE).softmax(1))

                weights = descended(weights, digest)
            own[site] = trained_alone(weights, data[site])
        said = torch.stack([(scores(w, shown) / TEMPERATURE).softmax(1) for w in own.values()]).double()
        matrix = better_by_hand(matrix, said.flatten(1), RHO, SHARPNESS)
        goals = {site: torch.einsum("m,mnc->nc", matrix[k], said).float() for k, site in enumerate(own)}
    for site, weights in own.items():
        close(deployed(run, site), weights)
    torch.testing.assert_close(run.state.groups["coefficients"]["matrix"], matrix, rtol=1e-4, atol=1e-6)


def test_every_site_hears_its_own_mixture(tmp_path: Path) -> None:
    run = opened(toy_study({"name": "kt-pfl", "rounds": 2, "temperature": 1.0, "proxies": 10}), tmp_path)
    calls = recorded(run)
    run.train()
    said = {site: left.arrays["answers/probabilities"] for n, op, site, _, left in calls if (n, op) == (1, "train")}
    told = {site: came.arrays["target/probabilities"] for n, op, site, came, _ in calls if (n, op) == (2, "train")}
    stacked = torch.stack([said[site] for site in sorted(said)]).double()
    matrix = better_by_hand(torch.full((3, 3), 1 / 3, dtype=torch.float64), stacked.flatten(1), RHO, SHARPNESS)
    for k, site in enumerate(sorted(said)):
        wanted = sum(matrix[k, m] * stacked[m] for m in range(3))
        torch.testing.assert_close(told[site].double(), wanted, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(told["north"], told["west"], atol=1e-5)


def test_an_absent_site_keeps_its_row_and_hears_those_who_answered(tmp_path: Path) -> None:
    study = toy_study({"name": "kt-pfl", "rounds": 2, "proxies": 10}, federation={"on_absent": "continue"})
    run = opened(study, tmp_path)
    failing(run, "south", "train", 1)
    calls = recorded(run)
    run.train()
    first = {site: left.arrays["answers/probabilities"] for n, op, site, _, left in calls if (n, op) == (1, "train")}
    assert sorted(first) == ["north", "west"]
    told = next(came for n, op, site, came, _ in calls if (n, op, site) == (2, "train", "south"))
    wanted = (first["north"] + first["west"]) / 2  # its row is still uniform
    torch.testing.assert_close(told.arrays["target/probabilities"], wanted, rtol=1e-5, atol=1e-6)
    matrix = run.state.groups["coefficients"]["matrix"]
    torch.testing.assert_close(matrix.sum(1), torch.ones(3, dtype=torch.float64))


def test_an_absent_site_changes_nothing_of_what_others_give_it(tmp_path: Path) -> None:
    study = toy_study({"name": "kt-pfl", "rounds": 1, "temperature": 1.0}, federation={"on_absent": "continue"})
    run = opened(study, tmp_path)
    failing(run, "south", "train", 1)
    run.train()
    matrix, third = run.state.groups["coefficients"]["matrix"], torch.tensor(1 / 3, dtype=torch.float64)
    order = sorted(IMAGES)
    south = order.index("south")
    torch.testing.assert_close(matrix[south], third.expand(3))
    torch.testing.assert_close(matrix.sum(1), torch.ones(3, dtype=torch.float64))
    for site in ("north", "west"):
        torch.testing.assert_close(matrix[order.index(site), south], third)
        assert not torch.isclose(matrix[order.index(site), order.index(site)], third, atol=1e-9)
