"""What tests of the loop share: a small set of three classes, a net that learns it, callbacks of one event, batches as a list."""
import torch
from torch import nn

from exp.callbacks import AvgStatsCallback, DataBunch, Dataset, get_dls

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(140, 10, generator=G), torch.randint(0, 3, (140,), generator=G)                       # 100 to train, 40 to validate


def toy(bs=32, seed=0): return DataBunch(*get_dls(Dataset(X[:100], Y[:100]), Dataset(X[100:], Y[100:]), bs, seed=seed), 10, 3)
def batches(bs, n=100): return [(X[i:min(i + bs, n)], Y[i:min(i + bs, n)]) for i in range(0, n, bs)]


def net(norm=False):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 20), *([nn.BatchNorm1d(20), nn.Dropout(.3)] if norm else []), nn.ReLU(), nn.Linear(20, 3))


class Takes(nn.Module):
    "A net whose inputs come in a dictionary, a tuple or a list."
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, b): return self.net(next(iter(b.values())) if isinstance(b, dict) else b[0])


class At:
    "A callback of one event: calls `f(learn)` there."
    def __init__(self, event, f, order=0): self._order = order; setattr(self, event, f)


def raises(error, when=lambda learn: True):
    def f(learn):
        if when(learn): raise error
    return f


def flat(model): return torch.cat([t.detach().flatten().double() for t in model.state_dict().values()])
def stats(*metrics): return AvgStatsCallback(*metrics, silent=True)
def rows(table): return [{k: v for k, v in r.items() if k != 'time'} for r in table.rows]
