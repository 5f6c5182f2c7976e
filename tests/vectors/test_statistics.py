"""A site's statistics against sums written out in NumPy."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import SIZE, site_data

from polyclinic.data.dataset import SiteData
from polyclinic.data.manifest import Case
from polyclinic.errors import ContributionError
from polyclinic.tasks.classification import MultiClass, MultiLabel
from polyclinic.tasks.segmentation import Segmentation
from polyclinic.vectors.statistics import (
    fisher_diagonal,
    head_sums,
    input_grams,
    running_statistics_of,
    site_statistics,
)

TWO = MultiClass(("a", "b"))
PIXELS = SIZE * SIZE


class Small(nn.Sequential):
    """A convolution with batch normalisation and dropout, three features, a head."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(3, classes),
        )
        self.feature_tap = "5"


def linear(classes: int = 2) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, classes))


def findings(images: int, patients: int) -> SiteData:
    """Three findings: most images have the first, few the others; ``patients`` share the images."""
    draw = torch.Generator().manual_seed(1)
    targets = (torch.rand(images, 3, generator=draw) < torch.tensor([0.7, 0.4, 0.1])).float()
    cases = [Case(f"{i}.png", f"p{i % patients}", "s", split="train") for i in range(images)]
    none = torch.arange(0)
    splits = {"train": torch.arange(images), "val": none, "test": none}
    return SiteData("s", cases, torch.rand(images, 1, SIZE, SIZE, generator=draw), targets, splits)


def inputs(data: SiteData) -> np.ndarray:
    return data.inputs(data.splits["train"]).double().flatten(1).numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


class TestFisher:
    def test_softmax_regression_by_hand(self) -> None:
        """The gradient for the drawn label y is (p - onehot(y)) x^T; averaged over y that is known in closed form."""
        data, model = site_data("s", 30), linear()
        weight, bias = (p.detach().double().numpy() for p in model[1].parameters())
        x = inputs(data)
        p = softmax(x @ weight.T + bias)
        # With two classes both squared errors of class k are the same for one y: E = sum_y p_y (p_k - [y = k])^2.
        expected = np.stack([(p[:, k] * (1 - p[:, k]) ** 2 + (1 - p[:, k]) * p[:, k] ** 2) for k in range(2)], 1)
        drawn = [fisher_diagonal(model, data, TWO, seed=seed) for seed in range(60)]
        mean = torch.stack([f["1.bias"] for f in drawn]).mean(0).numpy()
        np.testing.assert_allclose(mean, expected.mean(0), rtol=0.05)
        mean = torch.stack([f["1.weight"] for f in drawn]).mean(0).numpy()
        np.testing.assert_allclose(mean, expected.T @ x**2 / len(x), rtol=0.15, atol=2e-3)

    def test_one_image_is_exact_for_one_of_its_labels(self) -> None:
        data, model = site_data("s", 20), linear(3)
        data.splits["train"] = torch.tensor([4])
        weight, bias = (p.detach().double().numpy() for p in model[1].parameters())
        x = inputs(data)
        p = softmax(x @ weight.T + bias)[0]
        found = fisher_diagonal(model, data, MultiClass(("a", "b", "c")), seed=1)
        candidates = [np.outer((p - np.eye(3)[y]) ** 2, x[0] ** 2) for y in range(3)]
        assert min(np.abs(found["1.weight"].numpy() - c).max() for c in candidates) < 1e-6

    def test_gradients_are_squared_image_by_image(self) -> None:
        """Two images whose gradients cancel in a batch: the squared batch gradient would be zero."""
        data, model = site_data("s", 20), linear()
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        found = fisher_diagonal(model, data, TWO)
        torch.testing.assert_close(found["1.bias"], torch.full((2,), 0.25))  # (0.5 - [y = k])^2 whatever the label

    def test_labels_come_from_the_network_not_from_the_data(self) -> None:
        data, model = site_data("s", 40), linear()
        with torch.no_grad():
            model[1].weight.zero_()
            model[1].bias.copy_(torch.tensor([20.0, -20.0]))
        assert fisher_diagonal(model, data, TWO)["1.bias"].max() < 1e-12  # sure of class 0, so it is never surprised

    def test_findings_and_pixels(self) -> None:
        model = linear(3)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        found = fisher_diagonal(model, findings(40, 40), MultiLabel(("a", "b", "c")))
        torch.testing.assert_close(found["1.bias"], torch.full((3,), 0.25))
        masks = site_data("s", 6)
        masks.targets = torch.zeros(len(masks), SIZE, SIZE, dtype=torch.uint8)
        network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1))
        found = fisher_diagonal(network, masks, Segmentation(("no", "yes")))
        assert {n: tuple(f.shape) for n, f in found.items()} == {"0.weight": (2, 1, 3, 3), "0.bias": (2,)}
        assert all(bool((f >= 0).all()) for f in found.values())

    def test_the_same_seed_gives_the_same_and_nothing_of_the_network_changes(self) -> None:
        data, model = site_data("s", 40), Small()
        before = copy.deepcopy(model.state_dict())
        one, two, other = (fisher_diagonal(model, data, TWO, images=20, seed=s) for s in (5, 5, 6))
        assert all(torch.equal(one[n], two[n]) for n in one)
        assert any(not torch.equal(one[n], other[n]) for n in one)
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        assert set(one) == {n for n, _ in model.named_parameters()}
        assert {f.dtype for f in one.values()} == {torch.float32}


def patches(x: np.ndarray, layer: Any) -> np.ndarray:
    """im2col, one patch a row, by plain loops."""
    axes = layer.kernel_size
    pad = [(0, 0), (0, 0)] + [(p, p) for p in layer.padding]
    x = np.pad(x, pad)
    reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, axes, strict=True)]
    places = [range(0, n - r + 1, s) for n, r, s in zip(x.shape[2:], reach, layer.stride, strict=True)]
    rows = []
    for image in x:
        for at in np.array(np.meshgrid(*places, indexing="ij")).reshape(len(axes), -1).T:
            cut = tuple(slice(a, a + r, d) for a, r, d in zip(at, reach, layer.dilation, strict=True))
            rows.append(image[(slice(None), *cut)].reshape(-1))
    return np.array(rows)


class TestGrams:
    @pytest.mark.parametrize(
        "layer",
        [
            nn.Conv2d(2, 3, 3, padding=1),
            nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(0, 1)),
            nn.Conv2d(2, 3, 2, dilation=2),
            nn.Conv2d(2, 3, 1),
        ],
    )
    def test_patches_of_a_convolution(self, layer: nn.Conv2d, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("polyclinic.vectors.statistics._PATCH_VALUES", 300)  # several parts an image
        first = nn.Conv2d(1, 2, 1)
        data = site_data("s", 7)
        found = input_grams(nn.Sequential(first, layer), data)
        with torch.no_grad():
            x = first(data.inputs(data.splits["train"])).double().numpy()
        rows = patches(x, layer)
        np.testing.assert_allclose(found["1.weight"].numpy(), rows.T @ rows / len(rows), atol=1e-5)
        # The order of a patch is that of the kernel: the layer is this matrix product.
        with torch.no_grad():
            out = layer(torch.from_numpy(x).float()).permute(0, 2, 3, 1).reshape(len(rows), -1)
            made = torch.from_numpy(rows).float() @ layer.weight.reshape(3, -1).T + layer.bias
        torch.testing.assert_close(made, out, atol=1e-5, rtol=1e-5)

    def test_volumes(self) -> None:
        layer = nn.Conv3d(1, 2, 2, stride=2, padding=1)
        data = site_data("s", 5)
        volumes = torch.rand(len(data), 1, 4, 4, 4)
        data = SiteData("s", data.cases, volumes, data.targets, data.splits)
        rows = patches(data.inputs(data.splits["train"]).double().numpy(), layer)
        found = input_grams(nn.Sequential(layer), data)["0.weight"].numpy()
        np.testing.assert_allclose(found, rows.T @ rows / len(rows), atol=1e-5)

    def test_linear_layers_and_what_is_left_out(self) -> None:
        data = site_data("s", 9)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 2)
        )
        found = input_grams(model, data)
        assert set(found) == {"0.weight", "3.weight", "5.weight"}
        assert set(input_grams(model, data, largest=15)) == {"0.weight", "5.weight"}
        with torch.no_grad():
            x = model[:5](data.inputs(data.splits["train"])).double().numpy()
        np.testing.assert_allclose(found["5.weight"].numpy(), x.T @ x / len(x), atol=1e-5)
        assert not model[0]._forward_pre_hooks

    def test_batch_normalisation_and_dropout_are_as_in_use(self) -> None:
        data, model = site_data("s", 20), Small().train()
        before = copy.deepcopy(model.state_dict())
        one, two = input_grams(model, data, seed=1), input_grams(model, data, seed=1)
        assert all(torch.equal(one[n], two[n]) for n in one)
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


class TestHeadSums:
    def test_sums_over_the_features(self) -> None:
        data, model = site_data("s", 30), Small()
        found = head_sums(model, data, TWO)
        with torch.no_grad():
            x = nn.Sequential(*list(model)[:6])(data.inputs(data.splits["train"])).double().numpy()
        x = np.hstack([x, np.ones((30, 1))])
        labels = data.labels("train").numpy()
        for c in range(2):
            own = x[labels == c]
            assert found["count"][c] == len(own)
            np.testing.assert_allclose(found["first"][c].numpy(), own.sum(0), atol=1e-5)
            np.testing.assert_allclose(found["second"][c].numpy(), own.T @ own, atol=1e-5)
        assert {t.dtype for t in found.values()} == {torch.float64}

    def test_classes_in_the_order_of_the_base(self) -> None:
        data, model = site_data("s", 30), Small()
        plain, mapped = head_sums(model, data, TWO), head_sums(model, data, TWO, classes=("b", "c", "a"))
        for name in plain:
            assert torch.equal(mapped[name][[2, 0]], plain[name])
            assert mapped[name][1].abs().max() == 0
        with pytest.raises(ContributionError, match="class 'b' is not a class of the base"):
            head_sums(model, data, TWO, classes=("a", "c"))

    def test_a_class_of_few_patients_leaves_with_its_images(self) -> None:
        data = site_data("s", 30)
        for i in range(1, 30, 2):  # class b: fifteen images of four patients
            data.cases[i] = Case(f"{i}.png", f"few{i % 4}", "s", label="b", split="train")
        assert head_sums(Small(), data, TWO)["count"].tolist() == [15, 0]
        assert head_sums(Small(), data, TWO, fewest=2)["count"].tolist() == [15, 15]
        with pytest.raises(ContributionError, match="no class has 40 patients"):
            head_sums(Small(), data, TWO, fewest=40)

    def test_findings_have_one_row_more_for_all_images(self) -> None:
        data, task = findings(60, 60), MultiLabel(("a", "b", "c"))
        found = head_sums(Small(3), data, task, fewest=1)
        assert found["count"].tolist() == [*data.targets.sum(0).tolist(), 60]
        torch.testing.assert_close(found["first"][-1, -1], torch.tensor(60.0, dtype=torch.float64))
        few = head_sums(Small(3), data, task, fewest=int(data.targets[:, 2].sum()) + 1)
        rest = data.targets[data.targets[:, 2] == 0]
        assert few["count"].tolist() == [*rest.sum(0).tolist(), len(rest)]

    def test_what_is_left_out_can_make_another_finding_rare(self) -> None:
        """Five images have b, three of them c as well: c is rare at four patients, and then so is b."""
        data = findings(20, 20)
        data.targets = torch.zeros(20, 3)
        data.targets[:, 0] = 1
        data.targets[:5, 1] = 1
        data.targets[:3, 2] = 1
        found = head_sums(Small(3), data, MultiLabel(("a", "b", "c")), fewest=4)
        assert found["count"].tolist() == [15, 0, 0, 15]

    def test_segmentation_has_no_head_sums(self) -> None:
        with pytest.raises(ContributionError, match="classification"):
            head_sums(Small(), site_data("s", 6), Segmentation(("no", "yes")))


def test_running_statistics_are_copies_with_variances_above_zero() -> None:
    model = Small()
    model[1].running_var[0] = 0
    found = running_statistics_of(model)
    assert set(found) == {"1.running_mean", "1.running_var"}
    assert (found["1.running_var"] > 0).all()
    assert (F.batch_norm(torch.ones(1, 3), found["1.running_mean"], found["1.running_var"]).isfinite()).all()
    found["1.running_mean"] += 1
    assert model[1].running_mean.abs().max() == 0


def test_kinds_that_are_asked_for() -> None:
    made: dict[Any, dict[str, Tensor]] = site_statistics(Small(), site_data("s", 20), TWO, {"fisher", "gram"}, seed=0)
    assert set(made) == {"fisher", "gram"}
    assert set(made["gram"]) == {"0.weight", "6.weight"}
