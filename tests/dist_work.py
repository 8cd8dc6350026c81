"""What the processes of tests/test_distributed.py do; a module of its own, so that they can import it.

Run as a program it is one training that `torchrun` starts: `dist_work.py FOLDER OUT [how rank 1 ends itself] [timeout]`."""
import csv
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from exp.batchnorm import BatchNorm
from exp.callbacks import AvgStatsCallback, Callback, CancelFitException, DataBunch, Dataset, Recorder, accuracy, get_dls
from exp.distributed import Distributed, process_group, rank0_only, rank_and_size
from exp.fast_batches import ItemLoader
from exp.fault_tolerance import SharedCheckpoint, any_process, report_lost, share_any, synchronised
from exp.learner import Learner
from exp.mixed_precision import MixedPrecision
from exp.optimizers import adam_opt, sgd_mom_opt
from exp.progress import ProgressCallback
from exp.training_callbacks import CSVLogger, EarlyStopping, GradientAccumulation, GradientClip, SaveBest

N_VALID = 21


def numbers(n, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 10, generator=g, dtype=dtype)
    return x, (x[:, :3] + .5*torch.randn(n, 3, generator=g, dtype=dtype)).argmax(1)


def items(n=71, bs=16, seed=5, cls=Dataset):
    "Loaders of notebook 08b, shuffled."
    return DataBunch(ItemLoader(cls(*numbers(n)), bs, True, seed), ItemLoader(cls(*numbers(N_VALID, 1)), 8), 10, 3)


def plain(n=71, bs=16, seed=5, cls=Dataset, dtype=torch.float64):
    "torch's own loaders, shuffled."
    return DataBunch(*get_dls(cls(*numbers(n, 0, dtype)), cls(*numbers(N_VALID, 1, dtype)), bs, seed=seed), 10, 3)


class Several(torch.utils.data.Dataset):
    "Inputs as a dictionary."
    def __init__(self, x, y): self.x, self.y = x, y
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return {'x': self.x[i], 'twice': 2*self.x[i]}, self.y[i]


def listed(n=65, cls=Dataset): d = plain(n, cls=cls); return DataBunch(list(d.train_dl), list(d.valid_dl), 10, 3)


class OfSeveral(nn.Module):
    def __init__(self): super().__init__(); self.net = net()
    def forward(self, b): return self.net(b['twice'] - b['x'])


def net(norm=None, drop=0., seed=0):
    torch.manual_seed(seed)
    mid = [norm(16)] if norm else []
    return nn.Sequential(nn.Linear(10, 16), *mid, nn.ReLU(), nn.Dropout(drop), nn.Linear(16, 3)).double()


def picture_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Unflatten(1, (1, 2, 5)), nn.Conv2d(1, 4, 3, padding=1), BatchNorm(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1),
                         nn.BatchNorm2d(4, momentum=None), nn.Flatten(), nn.Linear(40, 3)).double()


def learner(data=None, model=None, *cbs, opt=sgd_mom_opt, dist=True, **kwargs):
    stats = AvgStatsCallback(accuracy, silent=True)
    return Learner(model or net(), data or plain(), F.cross_entropy, opt, .1, cbs=[*([Distributed(**kwargs)] if dist else []), stats, Recorder(), *cbs])


def result(learn):
    rows = [{k: v for k, v in r.items() if k != 'time'} for r in learn.cb(AvgStatsCallback).rows]
    return {'state': {k: v.clone() for k, v in learn.model.state_dict().items()}, 'rows': rows, 'n_iter': learn.n_iter, 'losses': learn.cb(Recorder).losses}


# ---------------------------------------------------------------- trainings that must come out as with one process
# each a function of `dist` (whether Distributed is there): the test calls it with False, in one process


def job(data=plain, model=net, *cbs, epochs=2, opt=sgd_mom_opt, sync=False, loaders=share_any):
    def run(dist):
        learn = learner(data(), model(), *[c() for c in cbs], opt=opt, dist=dist, **({'loaders': loaders} if dist else {}))
        if not sync: return result(learn.fit(epochs))
        with synchronised(learn.model): return result(learn.fit(epochs))
    return run


class Swapped(Callback):
    "Puts something else in the model's place for the call, as `Compile` does (which would cost 6 s to import)."
    _order = 7
    def begin_batch(self, run):
        self.model = run.model
        if run.in_train: run.model = lambda xb: self.model(xb)
    def after_pred(self, run): run.model = self.model


JOBS = {
    'plain SGD': job(epochs=4),
    'a last batch of one': job(partial(items, 65), epochs=4),
    'a last batch of one, torch loaders': job(partial(plain, 65)),
    'any loader': job(listed),
    'whole batches, cut': job(partial(items, 66), loaders=None),
    'several inputs': job(partial(plain, cls=Several), OfSeveral),
    'several inputs, any loader, accumulation': job(partial(listed, 67, Several), OfSeveral, partial(GradientAccumulation, 2)),
    'Adam': job(items, opt=adam_opt()),
    'batch norm, shares of one and two': job(partial(plain, 67), picture_net, sync=True),
    'accumulation and clipping': job(plain, net, partial(GradientAccumulation, 2), partial(GradientClip, .05)),
    'another model in its place': job(plain, net, Swapped),
    'early stopping': job(plain, net, partial(EarlyStopping, patience=1, min_delta=.3), epochs=8),
    'best': job(plain, net, SaveBest),
}


# ---------------------------------------------------------------- breaking off and going on


class Stop(Callback):
    "Ends the process's fit, as Ctrl-C would, after so many batches: after the checkpoint of this batch was written."
    _order = 2000
    def __init__(self, at): self.at = at
    def after_batch(self, run):
        if run.in_train and run.n_iter == self.at: raise KeyboardInterrupt


def part(folder, stop=None, drop=0., cbs=(), every=3, data=plain):
    "One training of 4 epochs (20 batches), to be broken off after `stop` batches or gone on with."
    learn, ck = learner(data(), net(drop=drop), *cbs, **{'loaders': share_any}), SharedCheckpoint(folder, every=every) if folder else None
    torch.manual_seed(3)
    start = ck.start(learn) if ck else (0, 0)
    try: learn.fit(4, [c for c in (ck, stop and Stop(stop)) if c], start=start)
    except KeyboardInterrupt: pass
    if dist.is_initialized(): dist.barrier()                # rank 0 has written
    return {**result(learn), 'start': start}


PARTS = {'plain': {}, 'items': {'data': items}, 'drop': {'drop': .3}, 'accumulated': {'cbs': [GradientAccumulation(2)], 'every': 1}}


def parts_of(folder, started):
    out = {'1 to 2': part(started)}
    for name, kwargs in PARTS.items():
        out[f'{name} unbroken'] = part(None, **kwargs)
        part(f'{folder}/{name}', 13, **kwargs); out[f'{name} 2 to 2'] = part(f'{folder}/{name}', **kwargs)
    part(f'{folder}/to one', 13); part(f'{folder}/to one at epoch', 11, every=100)
    return out


# ---------------------------------------------------------------- all that one launch of two processes does


class See(Callback):
    "What is seen in a fit: the items, the model's class, a random number in each batch."
    _order = 60
    def __init__(self): self.ids, self.kinds, self.draws = {True: [], False: []}, set(), []
    def after_batch(self, run):
        self.ids[run.in_train] += run.xb[:, 0].tolist(); self.kinds.add(type(run.model).__name__)
    def after_pred(self, run): self.kinds.add(type(run.model).__name__); self.draws += [torch.rand(1).item()] if run.in_train else []


def seen():
    see = See()
    learn = learner(plain(68, seed=rank_and_size()[0]), net(nn.BatchNorm1d), see)          # the order is that of rank 0
    model, loader = learn.model, learn.data.train_dl
    learn.fit(1)
    same = learn.model is model and learn.data.train_dl is loader and not hasattr(learn, 'rows')
    return {**vars(see), 'state': model.state_dict(), 'same': same}


def outputs(folder):
    "One bar, one log, one checkpoint: what each process has printed, and the files."
    lines, f = [], Path(folder)/'out'
    learn = Learner(net(), plain(), F.cross_entropy, sgd_mom_opt, .1, cbs=[Distributed(), AvgStatsCallback(accuracy), ProgressCallback('lines'), CSVLogger(f/'history.csv'), SaveBest(path=str(f/'best.pt'))])
    ProgressCallback.log = lambda self, *args: lines.append(args)
    learn.fit(3, SharedCheckpoint(f/'ck', every=2, keep=100))
    dist.barrier()
    return {'lines': len(lines), 'csv': list(csv.reader(open(f/'history.csv'))), 'checkpoints': sorted(p.name for p in (f/'ck').iterdir()),
            'cbs': [type(cb).__name__ for cb in learn.cbs], 'best': torch.load(f/'best.pt'), 'hello': rank0_only(lambda: 'hello')()}


class StopTogether(Callback):
    "Rank 1 alone wants to stop; all do."
    def after_batch(self, run):
        if run.in_train and any_process(rank_and_size()[0] == 1 and run.n_iter == 3): raise CancelFitException


def errors():
    "What is said about mistakes; each leaves the group usable."
    rank, out = rank_and_size()[0], {}
    d = plain()
    sampler = torch.utils.data.DistributedSampler(d.train_ds)
    for name, f in {'other data': lambda: learner(plain(71 if rank else 100)).fit(1), 'other epochs': lambda: learner().fit(1 + rank),
                    'a sampler': lambda: learner(DataBunch(torch.utils.data.DataLoader(d.train_ds, 8, sampler=sampler), None), loaders=share_any).fit(1), 'nothing wrong': lambda: learner().fit(1)}.items():
        try: f(); out[name] = None
        except Exception as e: out[name] = type(e).__name__
    return out


def fsdp():
    "A model in shards, by FSDP2: the same weights. None where this torch's FSDP2 does not run on CPUs (2.6)."
    try:
        from torch.distributed.fsdp import fully_shard
        model = net()
        for m in (model[0], model[-1], model): fully_shard(m)
        learn = learner(None, model, GradientClip(1e9), opt=partial(torch.optim.SGD, momentum=.9), wrap=lambda m: m)
        learn.fit(2)
    except (AttributeError, ImportError): return None
    return {'state': {k: v.full_tensor() for k, v in learn.model.state_dict().items()},
            'local': sum(p.to_local().numel() for p in model.parameters()), 'all': sum(p.numel() for p in model.parameters())}


def norms():
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
    "Mixed precision, forced: near float32; in fp16 steps are skipped, in all or in none."
    out = {}
    for name in ('bf16', 'fp16'):
        learn = learner(plain(dtype=torch.float32), net().float(), MixedPrecision(name, init_scale=2.**30), GradientAccumulation(2)).fit(2)
        out[name] = {**result(learn), 'skipped': learn.cb(MixedPrecision).skipped}
    return out


def everything(folder, started):
    "The one launch: `started` is a folder with a training broken off by one process."
    return {'jobs': {k: f(True) for k, f in JOBS.items()}, 'seen': seen(), 'outputs': outputs(folder), 'errors': errors(), 'norms': norms(), 'mixed': mixed(),
            'parts': parts_of(folder, started), 'fsdp': fsdp(), 'stopped': result(learner(None, None, StopTogether()).fit(2))}


# ---------------------------------------------------------------- as a program


class End(Callback):
    "Rank 1 ends itself, or falls silent, in the middle of the second epoch; not after a restart."
    _order = 40
    def __init__(self, how): self.how = how
    def after_pred(self, run):
        if run.n_iter == 8 and rank_and_size()[0] == 1 and os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0':
            if self.how == 'error': raise ZeroDivisionError('mine')
            os.kill(os.getpid(), {'kill': signal.SIGKILL, 'stop': signal.SIGSTOP}[self.how])


def main(folder, out, how=None, timeout='60'):
    with report_lost(), process_group(timeout=float(timeout)) as rank:
        learn, ck = learner(None, None, *([End(how)] if how else [])), SharedCheckpoint(folder, every=2)
        print(f'this is printed once, by process {rank} of {rank_and_size()[1]}')
        start = ck.start(learn)
        learn.fit(4, ck, start=start)
        if rank == 0: torch.save({**result(learn), 'start': start}, out)


if __name__ == '__main__':
    main(*sys.argv[1:])
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(0)                              # the interpreter's tidying up aborts now and then over gloo's threads
