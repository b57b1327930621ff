"""Windows of rows that start inside convolutions: the same bounds as whole maps, in every dimension and graph."""

import pytest
import torch
from smallest_checks import windows_equal_maps
from torch import nn

from certify.frames import Frame
from certify.graph import trace
from certify.propagate.backward import plan_windows


class _Residual(nn.Module):
    """A strided block with a shortcut, a channel join and batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.left = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.right = nn.Conv2d(4, 6, 1, stride=2)
        self.last = nn.Conv2d(12, 2, 3, padding=1)
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        y = torch.relu(self.left(x) + self.right(x) - 0.1)
        return torch.relu(self.last(torch.cat([y, torch.relu(self.left(x))], 1)))


class _Varying(nn.Module):
    """A factor that differs over the map ends the windows behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.factor = nn.Buffer(torch.rand(14, 14))

    def forward(self, x):
        return torch.relu(self.conv(torch.relu(x - 0.5) * self.factor))


NETS = {
    "residual": (_Residual, (2, 17, 14)),
    "line": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3, padding=2, dilation=2), nn.Tanh(),
                                   nn.Conv1d(3, 2, 4, stride=3, padding=1), nn.ReLU()), (2, 29)),
    "space": (lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.ReLU(), nn.Conv3d(2, 2, 2, padding=1), nn.ReLU()),
              (1, 6, 5, 7)),
    "pooled": (lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 3, 2), nn.ReLU(),
                                     nn.AvgPool2d(2), nn.Conv2d(3, 2, 2), nn.ReLU()), (1, 16, 16)),
    "varying": (_Varying, (1, 14, 14)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_windows_change_no_bound(name):
    torch.manual_seed(0)
    build, shape = NETS[name]
    windows_equal_maps(build().eval(), shape)


@pytest.mark.parametrize("name", ["residual", "line", "space"])
def test_windows_are_used(name):
    torch.manual_seed(0)
    build, shape = NETS[name]
    graph = trace(build().eval(), torch.rand(1, *shape))
    assert any(len(plan_windows(graph, node)) > 1 for node in graph.nodes)


def test_cut_and_spread_are_adjoint():
    generator = torch.Generator().manual_seed(0)
    frame = Frame((2, 1), (-2, 0), (3, 4))
    position = torch.tensor([[0, 0], [3, 1], [1, 5]])
    values = torch.randn(3, 2, 6, 7, generator=generator)
    A = torch.randn(3, 1, 2, 3, 4, generator=generator)
    cut = frame.cut(values, torch.arange(3), position)
    spread = frame.spread(A, position, (6, 7))
    torch.testing.assert_close((cut * A[:, 0]).sum(), (spread[:, 0] * values).sum())
    # position (3, 1) has the origin (4, 1): rows 4, 5 and one beyond the map, columns 1 to 4
    assert torch.equal(cut[1, :, :2], values[1, :, 4:6, 1:5])
    assert bool((cut[1, :, 2] == 0).all())
