"""What the processes of tests/test_distributed.py do; a module of its own, so that they can import it.

Run as a program it is one training that `torchrun` or `python` starts: `dist_work.py FOLDER OUT [how rank 1 ends itself]`."""
import copy
import csv
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from exp.batchnorm import BatchNorm
from exp.callbacks import (AvgStatsCallback, Callback, CancelBatchException, CancelEpochException, CancelFitException, DataBunch, Dataset,
                           Recorder, accuracy, get_dls)
from exp.checkpoints import Checkpoint
from exp.data_block import ItemList, LabeledData
from exp.datasets import DataError
from exp.distributed import Distributed, ProcessLost, process_group, rank0_only, rank_and_size, synchronised
from exp.fast_batches import ItemLoader
from exp.learner import CancelStepException, Learner
from exp.training_callbacks import CSVLogger, EarlyStopping, GradientAccumulation, GradientClip, SaveBest
from exp.mixed_precision import MixedPrecision
from exp.optimizers import adam_opt, sgd_mom_opt
from exp.progress import ProgressCallback

N_VALID = 21


def numbers(n, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 10, generator=g, dtype=dtype)
    return x, (x[:, :3] + .5*torch.randn(n, 3, generator=g, dtype=dtype)).argmax(1)


def items(n=71, bs=16, seed=5):
    "Loaders of notebook 08, shuffled."
    (x, y), (vx, vy) = numbers(n), numbers(N_VALID, 1)
    return DataBunch(ItemLoader(Dataset(x, y), bs, True, seed), ItemLoader(Dataset(vx, vy), 8), 10, 3)


def plain(n=71, bs=16, seed=5):
    "torch's own loaders, shuffled."
    return DataBunch(*get_dls(Dataset(*numbers(n)), Dataset(*numbers(N_VALID, 1)), bs, seed=seed), 10, 3)


class Listed:
    "A loader that is nothing but a list of batches."
    def __init__(self, dl): self.batches = list(dl)
    def __len__(self): return len(self.batches)
    def __iter__(self): return iter(self.batches)


class Several(torch.utils.data.Dataset):
    "Inputs as a dictionary."
    def __init__(self, x, y): self.x, self.y = x, y
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return {'x': self.x[i], 'twice': 2*self.x[i]}, self.y[i]


def several(n=65): return DataBunch(*get_dls(Several(*numbers(n)), Several(*numbers(N_VALID, 1)), 16, seed=5), 10, 3)
def several_listed(n=65): d = several(n); return DataBunch(Listed(d.train_dl), Listed(d.valid_dl), 10, 3)


class OfSeveral(nn.Module):
    def __init__(self): super().__init__(); self.net = net()
    def forward(self, b): return self.net(b['twice'] - b['x'])


def listed(n=65): d = plain(n); return DataBunch(Listed(d.train_dl), Listed(d.valid_dl), 10, 3)


def net(norm=None, drop=0., seed=0):
    torch.manual_seed(seed)
    mid = [norm(16)] if norm else []
    return nn.Sequential(nn.Linear(10, 16), *mid, nn.ReLU(), nn.Dropout(drop), nn.Linear(16, 3)).double()


def picture_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Unflatten(1, (1, 2, 5)), nn.Conv2d(1, 4, 3, padding=1), BatchNorm(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1),
                         nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(40, 3)).double()


def learner(data=None, model=None, *cbs, opt=sgd_mom_opt, lr=.1, dist=True, **kwargs):
    stats = AvgStatsCallback(accuracy, silent=True)
    return Learner(model or net(), data or items(), F.cross_entropy, opt, lr, cbs=[*([Distributed(**kwargs)] if dist else []), stats, Recorder(), *cbs])


def result(learn):
    rows = [{k: v for k, v in r.items() if k != 'time'} for r in learn.cb(AvgStatsCallback).rows]
    return {'state': {k: v.clone() for k, v in learn.model.state_dict().items()}, 'rows': rows, 'n_iter': learn.n_iter, 'losses': learn.cb(Recorder).losses}


# ---------------------------------------------------------------- trainings that must come out as with one process
# each a function of `dist` (whether Distributed is there): the test calls it with False, in one process


def job(data=None, model=None, cbs=(), epochs=2, opt=sgd_mom_opt, sync_bn=False):
    def run(dist): return result(learner(data and data(), model and model(), *[c() for c in cbs], opt=opt, dist=dist, **({'sync_bn': True} if dist and sync_bn else {})).fit(epochs))
    return run


class Swapped(Callback):
    "Puts something else in the model's place for the call, as `Compile` does (which would cost 6 s to import)."
    _order = 7
    def begin_batch(self, run):
        self.model = run.model
        if run.in_train: run.model = lambda xb: self.model(xb)
    def after_pred(self, run): run.model = self.model


class Norm1(nn.BatchNorm1d):
    "A subclass, with a cumulative average."
    def __init__(self, n): super().__init__(n, momentum=None)


JOBS = {
    'plain SGD': job(epochs=4),
    'a last batch of one': job(partial(items, 65)),
    'a last batch of one, torch loaders': job(partial(plain, 65), epochs=4),
    'any loader': job(listed),
    'several inputs': job(several, OfSeveral, epochs=4),
    'several inputs, any loader, accumulation': job(several_listed, OfSeveral, cbs=[partial(GradientAccumulation, 2)]),
    'Adam, torch loaders': job(plain, opt=adam_opt()),
    'batch norm': job(model=partial(net, nn.BatchNorm1d), epochs=4, sync_bn=True),
    'batch norm, a last batch of three': job(partial(items, 67), partial(net, Norm1), sync_bn=True),
    'batch norm, a share of none': job(partial(items, 66), picture_net, sync_bn=True),
    'accumulation and clipping': job(cbs=[partial(GradientAccumulation, 2), partial(GradientClip, .05)]),
    'accumulation, a last batch of one': job(partial(plain, 65), cbs=[partial(GradientAccumulation, 3)]),
    'another model in its place': job(cbs=[Swapped], epochs=2),
    'early stopping': job(cbs=[partial(EarlyStopping, patience=1, min_delta=.3)], epochs=8),
    'best': job(cbs=[SaveBest]),
}


# ---------------------------------------------------------------- cancelling in one process only


class CancelAt(Callback):
    "Raises `exc` in process `who` at event `event`, the `at`-th time."
    _order = 50
    def __init__(self, event, exc, at=3, who=1, order=50, valid=False): self.event, self.exc, self.at, self.who, self.n, self._order, self.valid = event, exc, at, who, 0, order, valid
    def __getattr__(self, name):
        if name != self.__dict__.get('event'): raise AttributeError(name)
        return self.tick
    def tick(self, run):
        if run.in_train == self.valid and self.event not in ('after_epoch', 'begin_epoch', 'begin_fit'): return
        self.n += 1
        if self.n == self.at and (self.who in (None, rank_and_size()[0]) or rank_and_size()[1] == 1): raise self.exc


BATCH_EVENTS = 'begin_batch', 'after_pred', 'after_loss', 'after_backward', 'after_step', 'after_batch'
CANCELS = ([(e, x, at) for e in BATCH_EVENTS for x in (CancelBatchException, CancelEpochException, CancelFitException) for at in ((3, 5) if e in ('begin_batch', 'after_batch') else (3,))]
           + [('after_backward', CancelStepException, 3), ('after_epoch', CancelFitException, 1), ('after_epoch', CancelFitException, 2),
              ('begin_epoch', CancelFitException, 2)])


def cancelled(event, exc, at, dist, order=50, cbs=()):
    learn = learner(None, None, CancelAt(event, exc, at, order=order), *cbs, dist=dist)
    return result(learn.fit(2))


# ---------------------------------------------------------------- breaking off and going on


class Stop(Callback):
    "Ends the process's fit, as Ctrl-C would, after so many batches: after the checkpoint of this batch was written."
    _order = 2000
    def __init__(self, at): self.at = at
    def after_batch(self, run):
        if run.in_train and run.n_iter == self.at: raise KeyboardInterrupt


def part(folder, stop=None, drop=0., cbs=(), data=items, every=3):
    "One training of 4 epochs (20 batches), to be broken off after `stop` batches or gone on with."
    learn, ck = learner(data(), net(drop=drop), *cbs), Checkpoint(folder, every=every) if folder else None
    torch.manual_seed(3)
    start = ck.start(learn) if ck else (0, 0)
    try: learn.fit(4, [c for c in (ck, stop and Stop(stop)) if c], start=start)
    except KeyboardInterrupt: pass
    return {**result(learn), 'start': start}


# ---------------------------------------------------------------- all that one launch of two processes does


def seen_rows():
    "Which items of training and validation each process has met, in the first epoch."
    class See(Callback):
        _order = 60
        def __init__(self): self.ids = {True: [], False: []}
        def after_batch(self, run):
            if not run.in_train or run.cb(Distributed).n: self.ids[run.in_train] += run.xb[:, 0].tolist()
    see = See()
    learner(items(65), None, see).fit(1)
    return see.ids


def outputs(folder):
    "One bar, one log, one checkpoint: what each process has printed, and the files."
    lines, f = [], Path(folder)/'out'
    learn = Learner(net(), items(), F.cross_entropy, sgd_mom_opt, .1, cbs=[Distributed(), AvgStatsCallback(accuracy), ProgressCallback('lines'), CSVLogger(f/'history.csv'), SaveBest(path=str(f/'best.pt'))])
    if rank_and_size()[0] == 0: f.mkdir()
    dist.barrier()
    learn.logger = lambda *args: lines.append(args)
    learn.fit(3, Checkpoint(f/'ck', every=2, keep=100))
    dist.barrier()
    after = [type(cb).__name__ for cb in learn.cbs]
    return {'lines': len(lines), 'csv': list(csv.reader(open(f/'history.csv'))), 'checkpoints': sorted(p.name for p in (f/'ck').iterdir()), 'cbs': after,
            'best': torch.load(f/'best.pt'), 'hello': rank0_only(lambda: 'hello')()}


class Wrapped(Callback):
    "What others see as the model, at each event: never DDP."
    def __init__(self): self.kinds = set()
    _order = 70
    def begin_fit(self, run): self.ema = copy.deepcopy(run.model); self.see(run)
    def see(self, run): self.kinds.add(type(run.model).__name__)
    begin_epoch = after_pred = after_loss = after_backward = after_batch = after_epoch = after_fit = see
    def after_step(self, run):
        with torch.no_grad():
            for e, p in zip(self.ema.parameters(), run.model.parameters()): e.lerp_(p, .1)


def unwrapping():
    "The model is the reader's own before, in the callbacks, afterwards, and after an error; and can be trained alone then."
    model, seen, out = net(nn.BatchNorm1d), Wrapped(), {}
    learn = learner(None, model, seen, sync_bn=True)
    learn.fit(1)
    out['kinds'], out['same'] = seen.kinds, learn.model is model and not any('forward' in vars(m) for m in model.modules())
    out['ema'] = [p.detach().clone() for p in seen.ema.parameters()]
    try: learn.fit(1, CancelAt('after_loss', ZeroDivisionError, who=None))
    except (ZeroDivisionError, ProcessLost) as e: out['error'] = type(e).__name__
    out['same again'] = learn.model is model and not any('forward' in vars(m) for m in model.modules()) and type(learn.data.train_dl) is ItemLoader
    out['epoch'] = learn.data.train_dl.epoch
    before = model[0].weight.clone()
    model(torch.randn(4, 10).double()).sum().backward()
    out['alone'] = torch.equal(before, model[0].weight) and model[0].weight.grad is not None
    return out


def errors():
    "What is said about mistakes; each leaves the group usable."
    rank, out = rank_and_size()[0], {}
    def attempt(name, f):
        try: f(); out[name] = None
        except Exception as e: out[name] = f'{type(e).__name__}: {e}'
    attempt('small batch', lambda: learner(items(bs=1)).fit(1))
    attempt('other data', lambda: learner(items(71 if rank else 100)).fit(1))
    attempt('other epochs', lambda: learner().fit(1 + rank))
    def sampler():
        d = plain()
        dl = torch.utils.data.DataLoader(d.train_ds, 8, sampler=torch.utils.data.distributed.DistributedSampler(d.train_ds))
        learner(DataBunch(dl, d.valid_dl)).fit(1)
    attempt('sampler', sampler)
    for e in BATCH_EVENTS: attempt(f'fault in {e}', lambda e=e: learner(None, None, CancelAt(e, ZeroDivisionError('mine'))).fit(1))
    attempt('fault in validation', lambda: learner(None, None, CancelAt('after_batch', ZeroDivisionError('mine'), 1, valid=True)).fit(1))
    attempt('fault in begin_fit', lambda: learner(None, None, CancelAt('begin_fit', ZeroDivisionError('mine'), 1, order=9)).fit(1))
    attempt('nothing wrong', lambda: learner().fit(1))
    return out


class Some(ItemList):
    "Numbers as items; some cannot be read."
    bad = frozenset()
    def get(self, i):
        if i in self.bad: raise DataError(f'{i}: cannot be read')
        return torch.full((10,), float(i), dtype=torch.float64)


def skipping():
    "Items that cannot be read, a whole share of them among those: as many steps in each process, and the weights of one process that skips them."
    class Bad(Some): bad = frozenset([0, 1, 2, 9, 12, 13, 14, 15])
    ll = LabeledData(Bad(list(range(16)), '.', [lambda x: x*.1]), [i % 3 for i in range(16)])
    data = DataBunch(ItemLoader(ll, 4, seed=0, on_error='skip'), None, 10, 3)
    model = net()
    learn = learner(data, model)
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(2)
    return result(learn)


def in_shards():
    from torch.distributed.fsdp import fully_shard
    model = net()
    for m in model: fully_shard(m) if list(m.parameters()) else None
    return fully_shard(model) or model


def fsdp():
    "A model in shards, by FSDP2: the same weights. None where this torch's FSDP2 does not run on CPUs (2.6)."
    try: in_shards()(torch.zeros(2, 10).double())
    except (AttributeError, ImportError): return None
    model = in_shards()
    learn = learner(None, model, GradientClip(1e9), opt=partial(torch.optim.SGD, momentum=.9))
    learn.fit(2)
    local = sum(p.to_local().numel() for p in model.parameters())
    return {'state': {k: v.full_tensor() for k, v in learn.model.state_dict().items()}, 'local': local,
            'all': sum(p.numel() for p in model.parameters())}


def norms(folder):
    "Synchronised batch norm against torch's on the whole batch: outputs, gradients, running statistics. Float32, unequal shares."
    torch.manual_seed(0)
    x, w, out = torch.randn(7, 3, 5, 5)*3 + 10, torch.randn(7, 3, 5, 5), {}
    for name, make in (('torch', lambda: nn.BatchNorm2d(3)), ('ours', lambda: BatchNorm(3)), ('not affine', lambda: nn.BatchNorm2d(3, affine=False)),
                       ('no statistics', lambda: nn.BatchNorm2d(3, track_running_stats=False))):
        whole, mine = make(), make()
        rows = slice(0, 4) if rank_and_size()[0] == 0 else slice(4, 7)
        a, b = x.clone().requires_grad_(), x[rows].clone().requires_grad_()
        ya = whole(a); (ya*w).sum().backward()
        with synchronised(mine): yb = mine(b); (yb*w[rows]).sum().backward()
        grads = [p.grad for p in mine.parameters()]
        for g in grads: dist.all_reduce(g)
        pairs = [(ya[rows], yb), (a.grad[rows], b.grad), *zip([p.grad for p in whole.parameters()], grads), *zip(whole.buffers(), mine.buffers())]
        out[name] = max((s.double() - t.double()).abs().max().item() for s, t in pairs)
    return out


def mixed():
    "Mixed precision, forced: near float32."
    model = net().float()
    data = DataBunch(*get_dls(Dataset(*numbers(71, 0, torch.float32)), Dataset(*numbers(N_VALID, 1, torch.float32)), 16, seed=5))
    out = {}
    for name in ('bf16', 'fp16'):
        torch.manual_seed(0)
        learn = learner(copy.deepcopy(data), copy.deepcopy(model), MixedPrecision(name, init_scale=2.**30), GradientAccumulation(2))
        learn.fit(2)
        out[name] = {**result(learn), 'skipped': learn.cb(MixedPrecision).skipped}
    return out


def draws():
    "Dropout differs between the processes."
    masks = []
    class See(Callback):
        def after_pred(self, run): masks.append(torch.rand(1).item() if run.in_train else None)
    learner(None, net(drop=.5), See()).fit(1)
    return masks


def everything(folder, started):
    "The one launch: `started` is a folder with a training broken off by one process."
    out, parts = {}, {
        'jobs': lambda: {k: f(True) for k, f in JOBS.items()}, 'cancels': lambda: [cancelled(*c, dist=True) for c in CANCELS], 'seen': seen_rows, 'outputs': lambda: outputs(folder),
        'early cancel': lambda: cancelled('begin_batch', CancelBatchException, 3, True, order=-50), 'late cancel': lambda: cancelled('after_loss', CancelEpochException, 3, True, order=5000),
        'accumulated cancel': lambda: cancelled('after_backward', CancelBatchException, 4, True, cbs=[GradientAccumulation(2)]),
        'unwrapping': unwrapping, 'errors': errors, 'norms': lambda: norms(folder), 'mixed': mixed, 'draws': draws, 'skipping': skipping,
        'parts': lambda: parts_of(folder, started), 'fsdp': fsdp}
    for k, f in parts.items(): t = time.perf_counter(); out[k] = f(); out.setdefault('times', {})[k] = round(time.perf_counter() - t, 2)
    return out


def parts_of(folder, started):
    out = {}
    for name, drop in (('drop', .3), ('plain', 0.)):
        out[f'{name} unbroken'] = part(None, drop=drop)
        part(f'{folder}/{name}', 13, drop); out[f'{name} 2 to 2'] = part(f'{folder}/{name}', drop=drop)
    out['1 to 2'] = part(started)
    part(f'{folder}/to one', 13); part(f'{folder}/to one at epoch', 11, every=100)
    two = [GradientAccumulation(2)]
    part(f'{folder}/accumulated', 13, cbs=two, every=1); out['accumulated 2 to 2'] = part(f'{folder}/accumulated', cbs=two, every=1)
    out['accumulated unbroken'] = part(None, cbs=two)
    return out


# ---------------------------------------------------------------- as a program


class End(Callback):
    "Process 1 ends itself, or falls silent, in the middle of the second epoch; only in its first life."
    _order = 40
    def __init__(self, how): self.how = how
    def after_pred(self, run):
        if run.n_iter == 8 and rank_and_size()[0] == 1 and os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0':
            os.kill(os.getpid(), {'kill': signal.SIGKILL, 'stop': signal.SIGSTOP}[self.how])


def main(folder, out, how=None, timeout='60'):
    with process_group(timeout=float(timeout)) as rank:
        learn, ck = learner(None, None, *([End(how)] if how else [])), Checkpoint(folder, every=2)
        print(f'this is printed once, by process {rank} of {rank_and_size()[1]}')
        start = ck.start(learn)
        learn.fit(4, ck, start=start)
        if rank == 0: torch.save({**result(learn), 'start': start}, out)


if __name__ == '__main__':
    main(*sys.argv[1:])
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(0)                              # the interpreter's tidying up aborts now and then over gloo's threads
