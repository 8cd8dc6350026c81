"""What a `Learner` costs: an empty model, where nothing hides the price of the loop around it.

Functions shaped as `benchmarks.__main__` wants them; run alone with `python -m benchmarks.learner [NAME …]`.
"""
import contextlib
import io

import torch
import torch.nn.functional as F
from torch import nn


class Batches(list):
    "Ready-made batches: a loader that costs nothing."


def batches(n, bs=64, ni=10, no=10):
    g = torch.Generator().manual_seed(0)
    return Batches((torch.randn(bs, ni, generator=g), torch.randint(0, no, (bs,), generator=g)) for _ in range(n))


def bare_loop(dl, lr=.1):
    "Loss and accuracy kept, read once at the end."
    model = nn.Linear(10, 10)
    opt = torch.optim.SGD(model.parameters(), lr=lr)
    def run():
        total, count = torch.zeros(2), 0
        for xb, yb in dl:
            pred = model(xb)
            loss = F.cross_entropy(pred, yb)
            loss.backward()
            opt.step()
            opt.zero_grad()
            with torch.no_grad(): total += torch.stack([loss.detach(), (pred.argmax(1) == yb).float().mean()])*len(xb)
            count += len(xb)
        return (total/count).tolist()
    return run


def ours(dl, opt_func, metrics=True, cls=None):
    from exp.callbacks import AvgStatsCallback, DataBunch, Runner, accuracy
    from exp.learner import Learner
    model, data = nn.Linear(10, 10), DataBunch(dl, None)
    cbs = [AvgStatsCallback(accuracy, silent=True)] if metrics else []
    if cls is Runner:
        data.valid_dl = []                                       # a Runner always validates
        learn = Runner(model, data, F.cross_entropy, opt_func(model.parameters(), lr=.1), cbs)
    else: learn = Learner(model, data, F.cross_entropy, opt_func, lr=.1, cbs=cbs)
    return lambda: learn.fit(1)


def fastai(dl):
    "fastai's Learner on the same batches: silent, no bar, its recorder as it comes (it keeps loss and metric)."
    try: from fastai.basics import SGD, DataLoader, DataLoaders, Learner, accuracy
    except ImportError: return None
    class Ready(DataLoader):
        def __iter__(self): return iter(self.dataset)
        def __len__(self): return len(self.dataset)
    fdl = Ready(dl, bs=None)
    learn = Learner(DataLoaders(fdl, Ready(dl[:1], bs=None)), nn.Linear(10, 10), F.cross_entropy, lr=.1, opt_func=SGD, metrics=accuracy)
    def run():
        with learn.no_logging(), contextlib.redirect_stdout(io.StringIO()): learn.fit(1)
    return run


def learner(n=2000):
    "An epoch of `n` batches of 64 through Linear(10, 10), loss and accuracy kept, no validation, no bar."
    from exp.callbacks import Runner
    dl = batches(n)
    sgd = torch.optim.SGD
    return {'bare loop': bare_loop(dl), 'exp Learner': ours(dl, sgd), 'exp Learner, nothing kept': ours(dl, sgd, False),
            'exp Runner': ours(dl, sgd, cls=Runner), 'fastai Learner': fastai(dl)}


def progress(n=1000):
    "An epoch of `n` batches of 2 ms: no bar, a bar on a terminal, and one for a notebook (every page built, none sent)."
    import time
    from unittest import mock

    from exp.callbacks import AvgStatsCallback, DataBunch
    from exp.learner import Learner
    from exp.progress import ProgressCallback
    class TwoMilliseconds(nn.Linear):
        def forward(self, x):
            end = time.perf_counter() + .002
            y = super().forward(x)
            while time.perf_counter() < end: pass
            return y
    class Page:
        "In the place of IPython's output: formats what is shown as that does, and keeps it."
        def update(self, page): self.shown = page._repr_html_()
    def unsent(page, **kwargs): return Page()
    dl = batches(n, 8)
    def run(*cbs):
        learn = Learner(TwoMilliseconds(10, 10), DataBunch(dl, None), F.cross_entropy, torch.optim.SGD, lr=.1, cbs=[AvgStatsCallback(), *cbs])
        def fit():
            with contextlib.redirect_stdout(io.StringIO()), mock.patch('IPython.display.display', unsent): learn.fit(1)
        return fit
    return {'no bar': run(), 'terminal bar': run(ProgressCallback('terminal')), 'notebook bar': run(ProgressCallback('html'))}


BENCHMARKS = {'learner': learner, 'progress': progress}

if __name__ == '__main__':
    from benchmarks import __main__ as bench
    bench.BENCHMARKS = BENCHMARKS
    bench.main()
