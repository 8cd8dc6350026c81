"""What `Distributed` costs: two processes, the same network and batches, in a bare loop around torch's DDP and in a `Learner`.

Functions shaped as `benchmarks.__main__` wants them; run alone with `python -m benchmarks.distributed`.
"""
import multiprocessing
import os
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F


def _data(n, size):
    from exp.callbacks import Dataset
    g = torch.Generator().manual_seed(0)
    return Dataset(torch.randn(n, 3, size, size, generator=g), torch.randint(0, 10, (n,), generator=g))


def _model():
    from types import SimpleNamespace

    from exp.batchnorm import conv_layer
    from exp.convnets import get_cnn_model, init_cnn
    torch.manual_seed(0)
    return init_cnn(get_cnn_model(SimpleNamespace(c_in=3, c_out=10), [32, 64, 128], conv_layer))


def _bare(ds, bs):
    "Each process its rows of each batch; loss and accuracy kept, and summed at the end."
    from torch.nn.parallel import DistributedDataParallel
    rank, world = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(_model())
    opt = torch.optim.SGD(model.parameters(), lr=.01, momentum=.9)
    def run():
        total, order = torch.zeros(3, dtype=torch.float64), torch.randperm(len(ds), generator=torch.Generator().manual_seed(0))
        for idxs in order.split(bs):
            xb, yb = ds[idxs[rank*len(idxs)//world:(rank + 1)*len(idxs)//world]]
            pred = model(xb)
            loss = F.cross_entropy(pred, yb)
            loss.backward(); opt.step(); opt.zero_grad()
            total += torch.tensor([loss.item()*len(xb), (pred.argmax(1) == yb).sum().item(), len(xb)], dtype=torch.float64)
        dist.all_reduce(total)
        return (total[:2]/total[2]).tolist()
    return run


def _ours(ds, bs):
    from exp.callbacks import AvgStatsCallback, DataBunch, accuracy
    from exp.distributed import Distributed
    from exp.fast_batches import ItemLoader
    from exp.fault_tolerance import share_any
    from exp.learner import Learner
    from exp.optimizers import sgd_mom_opt
    learn = Learner(_model(), DataBunch(ItemLoader(ds, bs, shuffle=True, seed=0), None, 3, 10), F.cross_entropy, sgd_mom_opt, .01,
                    cbs=[Distributed(loaders=share_any), AvgStatsCallback(accuracy, silent=True)])
    return lambda: learn.fit(1)


def _serve(rank, pipe, meet, n, size, bs):
    "A process that runs what it is told to, until the pipe is closed."
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{meet}', rank=rank, world_size=2)
    ds = _data(n, size)
    works = {'bare': _bare(ds, bs), 'ours': _ours(ds, bs)}
    for w in works.values(): w()                                            # the first time is not like the others
    pipe.send('ready')
    while True:
        try: name = pipe.recv()
        except EOFError: return dist.destroy_process_group()
        dist.barrier(); works[name](); pipe.send(name)


def distributed(n=512, size=64, bs=64):
    "An epoch of `n` pictures by two processes (gloo, one thread each): a bare DDP loop, and a `Learner` with `Distributed`, which also weighs and sums."
    context, pipes, meet = multiprocessing.get_context('spawn'), [], os.path.join(tempfile.mkdtemp(), 'meet')
    for i in range(2):
        here, there = context.Pipe()
        context.Process(target=_serve, args=(i, there, meet, n, size, bs), daemon=True).start()
        pipes.append(here); there.close()
    for p in pipes: p.recv()

    def work(name):
        for p in pipes: p.send(name)
        for p in pipes: p.recv()
    return {'bare DDP loop': lambda: work('bare'), 'exp Learner, Distributed': lambda: work('ours')}


BENCHMARKS = {'distributed': distributed}

if __name__ == '__main__':
    fs = distributed()
    times = {k: [] for k in fs}
    for _ in range(7):
        for k, f in fs.items(): t = time.perf_counter(); f(); times[k].append(time.perf_counter() - t)
    base = statistics.median(times['bare DDP loop'])
    for k, ts in times.items(): print(f'{k:<28} {statistics.median(ts):7.3f} s   {statistics.median(ts)/base:5.2f}')
