"""Networks with batch normalization and bounds."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Net(nn.Module):
    """Normalizations behind a convolution, behind two side by side, in front of one, and where they cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.n1, self.a1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)
        self.c2, self.c3 = nn.Conv2d(8, 4, 3, groups=2), nn.Conv2d(8, 4, 3)
        self.n2, self.a2 = nn.BatchNorm2d(8), nn.Hardtanh(-1, 2)
        self.c4, self.n3, self.c5 = nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, groups=2)
        self.c6, self.n4, self.c7 = nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.f1, self.n5, self.f2 = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a1(self.n1(self.c1(x)))
        x = self.a2(self.n2(torch.cat([self.c2(x), self.c3(x)], 1)))
        x = self.c5(self.n3(self.c4(x).relu()))
        x = self.c7(self.n4(self.c6(x).relu()))
        return self.f2(self.n5(F.relu6(self.f1(x.mean((2, 3))))))


def trained(net: nn.Module) -> nn.Module:
    """In double precision and evaluation mode, with statistics and gains like those of training."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_var, module.weight):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 2)
            for tensor in (module.running_mean, module.bias):
                if tensor is not None:
                    tensor.data.normal_()
    return net.double().eval()
