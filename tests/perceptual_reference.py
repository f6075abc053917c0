"""The networks and distances of perceptual metrics in torch, narrow, under the names of published state dicts."""

import copy
import functools

import numpy as np
import pytest

VGG_WIDTHS, VGG_DEPTHS = (4, 6, 8, 10, 12), (2, 2, 3, 3, 3)
ALEX_WIDTHS = (6, 8, 10, 12, 14)
VGG_TAPS, ALEX_TAPS = (3, 8, 15, 22, 29), (1, 4, 7, 9, 11)  # the last layer of each LPIPS slice
NARROW = 16  # of the small Inception


def import_torch():
    """The package torch; skips the test where it is absent."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


def photos(count=2, height=40, width=51, seed=0) -> np.ndarray:
    """uint8 images with structure at several scales."""
    random = np.random.RandomState(seed)
    images = np.zeros((count, height, width, 3))
    for step in (1, 4, 16):
        coarse = random.normal(0, 25, (count, -(-height // step), -(-width // step), 3))
        images += coarse.repeat(step, 1).repeat(step, 2)[:, :height, :width]
    return np.clip(images + 128, 0, 255).astype(np.uint8)


def planes(images):
    """Images as a torch tensor of float64, channels first."""
    return import_torch().from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1), np.float64))


def lively(module, seed=3):
    """The module with seeded weights under which every layer keeps the size of its input."""
    torch, random = import_torch(), np.random.RandomState(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            normal = random.standard_normal(tuple(value.shape))
            if name.endswith("num_batches_tracked"):
                continue
            if value.ndim > 1:
                array = normal * np.sqrt(2 / np.prod(value.shape[1:]))
            else:
                array = 0.2 * normal + name.endswith(("bn.weight", "running_var"))
            value.copy_(torch.from_numpy(np.asarray(np.abs(array) if "var" in name else array, np.float32)))
    return module.eval()


def state_of(module) -> dict[str, np.ndarray]:
    """The state dict as NumPy arrays."""
    return {key: value.numpy() for key, value in module.state_dict().items()}


# -- torchvision's networks -------------------------------------------------------------------------------------------


def _with_classifier(features):
    nn = import_torch().nn
    net = nn.Module()
    net.features = features
    net.classifier = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 3))
    return lively(net)


@functools.cache
def vgg():
    """A network with the `features` of VGG16, narrow, and a classifier."""
    nn, layers, last = import_torch().nn, [], 3
    for width, depth in zip(VGG_WIDTHS, VGG_DEPTHS):
        for _ in range(depth):
            layers += [nn.Conv2d(last, width, 3, padding=1), nn.ReLU()]
            last = width
        layers.append(nn.MaxPool2d(2, 2))
    return _with_classifier(nn.Sequential(*layers))


@functools.cache
def alexnet():
    """A network with the `features` of AlexNet, narrow, and a classifier."""
    nn = import_torch().nn
    a, b, c, d, e = ALEX_WIDTHS
    return _with_classifier(
        nn.Sequential(
            nn.Conv2d(3, a, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(a, b, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(b, c, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(c, d, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(d, e, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
        )
    )


def taps(net, x, at, l2=False) -> list:
    """What the layers `at` some places give in float64, with L2 pools in place of maxima if asked for."""
    torch, found = import_torch(), []
    features = copy.deepcopy(net.features[: max(at) + 1]).double()
    for i, layer in enumerate(features):
        x = _l2_pool(x) if l2 and isinstance(layer, torch.nn.MaxPool2d) else layer(x)
        if i in at:
            found.append(x)
    return found


def _l2_pool(x):
    torch = import_torch()
    window = np.hanning(5)[1:-1]
    window = torch.from_numpy(np.outer(window, window) / window.sum() ** 2).to(x.dtype)
    kernel = window.expand(x.shape[1], 1, 3, 3)
    return torch.sqrt(torch.nn.functional.conv2d(x * x, kernel, stride=2, padding=1, groups=x.shape[1]) + 1e-12)


# -- distances, in float64 --------------------------------------------------------------------------------------------


def draw_lins(widths, seed=4) -> dict[str, np.ndarray]:
    """An LPIPS file: weights that are not negative, some of them zero."""
    random = np.random.RandomState(seed)
    return {
        f"lin{i}.model.1.weight": np.maximum(random.standard_normal((1, width, 1, 1)), 0).astype(np.float32)
        for i, width in enumerate(widths)
    }


def lpips(net, at, lins, x, y) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distance of each pair of images in 0..255, its map, and the gradient of their sum by `y` in 0..1."""
    torch = import_torch()
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).reshape(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).reshape(3, 1, 1)
    x, y = planes(x) / 255, (planes(y) / 255).requires_grad_()
    distance, maps = 0, 0
    for i, pair in enumerate(zip(*(taps(net, (2 * images - 1 - shift) / scale, at) for images in (x, y)))):
        # Without the tiny number autograd divides zero by zero where no channel answers.
        one, two = (tap / ((tap.pow(2).sum(1, keepdim=True) + 1e-60).sqrt() + 1e-10) for tap in pair)
        weighted = torch.nn.functional.conv2d((one - two) ** 2, torch.tensor(lins[f"lin{i}.model.1.weight"]).double())
        distance = distance + weighted.mean((1, 2, 3))
        resize = torch.nn.Upsample(size=x.shape[2:], mode="bilinear", align_corners=False)
        maps = maps + resize(weighted)[:, 0]
    (gradient,) = torch.autograd.grad(distance.sum(), y)
    return distance.detach().numpy(), maps.detach().numpy(), np.moveaxis(gradient.numpy(), 1, -1)


def dists(net, weights, x, y) -> np.ndarray:
    """The distance of each pair of images in 0..255."""
    torch = import_torch()
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).reshape(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).reshape(3, 1, 1)
    alpha, beta = (np.float64(weights[name]).ravel() for name in ("alpha", "beta"))
    with torch.no_grad():
        pair = [planes(images) / 255 for images in (x, y)]
        found = [[z, *taps(net, (z - mean) / std, VGG_TAPS, l2=True)] for z in pair]
    total, start = 0, 0
    for one, two in zip(*found):
        one, two = (z.numpy().reshape(*z.shape[:2], -1) for z in (one, two))
        stop = start + one.shape[1]
        mean_one, mean_two = one.mean(-1), two.mean(-1)
        covariance = (one * two).mean(-1) - mean_one * mean_two
        texture = (2 * mean_one * mean_two + 1e-6) / (mean_one**2 + mean_two**2 + 1e-6)
        structure = (2 * covariance + 1e-6) / (one.var(-1) + two.var(-1) + 1e-6)
        total += texture @ alpha[start:stop] + structure @ beta[start:stop]
        start = stop
    return 1 - total / (alpha.sum() + beta.sum())


# -- FID's Inception --------------------------------------------------------------------------------------------------


def inception_module(narrow=NARROW):
    """The network with all widths divided by `narrow` and its classifier of 1008 classes."""
    torch = import_torch()
    nn, F = torch.nn, torch.nn.functional

    class Unit(nn.Module):
        def __init__(self, i, o, size, stride=1, pad=0):
            super().__init__()
            self.conv = nn.Conv2d(i, o // narrow, size, stride, pad, bias=False)
            self.bn = nn.BatchNorm2d(o // narrow, eps=0.001)

        def forward(self, x):
            return F.relu(self.bn(self.conv(x)))

    def across(i, o, n):
        return Unit(i, o, (1, n), pad=(0, n // 2))

    def down(i, o, n):
        return Unit(i, o, (n, 1), pad=(n // 2, 0))

    def average(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    class Base(nn.Module):
        def run(self, x, *names):
            for name in names:
                x = getattr(self, name)(x)
            return x

    class A(Base):
        def __init__(self, i, pool):
            super().__init__()
            i //= narrow
            self.branch1x1 = Unit(i, 64, 1)
            self.branch5x5_1, self.branch5x5_2 = Unit(i, 48, 1), Unit(48 // narrow, 64, 5, pad=2)
            self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(i, 64, 1), Unit(64 // narrow, 96, 3, pad=1)
            self.branch3x3dbl_3 = Unit(96 // narrow, 96, 3, pad=1)
            self.branch_pool = Unit(i, pool, 1)

        def forward(self, x):
            five = self.run(x, "branch5x5_1", "branch5x5_2")
            three = self.run(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
            return torch.cat([self.branch1x1(x), five, three, self.branch_pool(average(x))], 1)

    class B(Base):
        def __init__(self):
            super().__init__()
            i = 288 // narrow
            self.branch3x3 = Unit(i, 384, 3, 2)
            self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(i, 64, 1), Unit(64 // narrow, 96, 3, pad=1)
            self.branch3x3dbl_3 = Unit(96 // narrow, 96, 3, 2)

        def forward(self, x):
            three = self.run(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
            return torch.cat([self.branch3x3(x), three, F.max_pool2d(x, 3, 2)], 1)

    class C(Base):
        def __init__(self, inner):
            super().__init__()
            i, n = 768 // narrow, inner // narrow
            self.branch1x1, self.branch_pool = Unit(i, 192, 1), Unit(i, 192, 1)
            self.branch7x7_1, self.branch7x7_2 = Unit(i, inner, 1), across(n, inner, 7)
            self.branch7x7_3 = down(n, 192, 7)
            self.branch7x7dbl_1, self.branch7x7dbl_2 = Unit(i, inner, 1), down(n, inner, 7)
            self.branch7x7dbl_3, self.branch7x7dbl_4 = across(n, inner, 7), down(n, inner, 7)
            self.branch7x7dbl_5 = across(n, 192, 7)

        def forward(self, x):
            seven = self.run(x, *(f"branch7x7_{j}" for j in range(1, 4)))
            double = self.run(x, *(f"branch7x7dbl_{j}" for j in range(1, 6)))
            return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(average(x))], 1)

    class D(Base):
        def __init__(self):
            super().__init__()
            i, n = 768 // narrow, 192 // narrow
            self.branch3x3_1, self.branch3x3_2 = Unit(i, 192, 1), Unit(n, 320, 3, 2)
            self.branch7x7x3_1, self.branch7x7x3_2 = Unit(i, 192, 1), across(n, 192, 7)
            self.branch7x7x3_3, self.branch7x7x3_4 = down(n, 192, 7), Unit(n, 192, 3, 2)

        def forward(self, x):
            three = self.run(x, "branch3x3_1", "branch3x3_2")
            seven = self.run(x, *(f"branch7x7x3_{j}" for j in range(1, 5)))
            return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)

    class E(Base):
        def __init__(self, i, pool):
            super().__init__()
            self.pool = pool
            i, n = i // narrow, 384 // narrow
            self.branch1x1, self.branch_pool = Unit(i, 320, 1), Unit(i, 192, 1)
            self.branch3x3_1 = Unit(i, 384, 1)
            self.branch3x3_2a, self.branch3x3_2b = across(n, 384, 3), down(n, 384, 3)
            self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(i, 448, 1), Unit(448 // narrow, 384, 3, pad=1)
            self.branch3x3dbl_3a, self.branch3x3dbl_3b = across(n, 384, 3), down(n, 384, 3)

        def forward(self, x):
            three = self.branch3x3_1(x)
            double = self.run(x, "branch3x3dbl_1", "branch3x3dbl_2")
            forks = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
            forks += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
            return torch.cat([self.branch1x1(x), *forks, self.branch_pool(self.pool(x))], 1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.Conv2d_1a_3x3 = Unit(3, 32, 3, 2)
            self.Conv2d_2a_3x3 = Unit(32 // narrow, 32, 3)
            self.Conv2d_2b_3x3 = Unit(32 // narrow, 64, 3, pad=1)
            self.Conv2d_3b_1x1 = Unit(64 // narrow, 80, 1)
            self.Conv2d_4a_3x3 = Unit(80 // narrow, 192, 3)
            self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
            self.Mixed_6a = B()
            self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = C(128), C(160), C(160), C(192)
            self.Mixed_7a = D()
            self.Mixed_7b = E(1280, average)
            self.Mixed_7c = E(2048, lambda x: F.max_pool2d(x, 3, 1, 1))
            self.fc = nn.Linear(2048 // narrow, 1008)

        def forward(self, x):
            x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)
            x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
            for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
                x = getattr(self, f"Mixed_{name}")(x)
            return x.mean((2, 3))

    return Net()


@functools.cache
def inception():
    """A small Inception with lively weights."""
    return lively(inception_module())
