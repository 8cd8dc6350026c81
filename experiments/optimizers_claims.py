"""Three claims about optimizers, on Imagenette at 64 px: writes optimizers_claims.csv beside itself, an arm at a time.

    python experiments/optimizers_claims.py [--claims l2 three large] [--seeds 0 1 2]

l2      L2, decoupled decay or neither, SGD with momentum and batch norm: accuracy and the effective rate lr/|w|^2 per epoch.
        (van Laarhoven 2017, arXiv 1706.05350; Zhang et al. 2019, arXiv 1810.12281.)
three   SGD with momentum, Adam, LAMB: 3 epochs, lr by LR_Find on the training set, one cycle.
large   SGD, LARS, LAMB at batch size 1,024, on the whole training set, lr by LR_Find.

l2 and three train on 3,000 pictures (every class, chosen by the seed) at batch size 64. An arm that the csv already holds
is not run again, so a broken-off run goes on where it stopped; seeds come first, so that whole seeds are done.
"""
import argparse
import csv
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from exp.annealing import ParamScheduler, combine_scheds, cos_1cycle_anneal
from exp.batchnorm import conv_layer
from exp.callbacks import AvgStatsCallback, BatchTransformXCallback, Callback, CudaCallback, DataBunch, Dataset, Runner, accuracy, get_dls
from exp.convnets import get_cnn_model, init_cnn, keep_freed_memory
from exp.datasets import URLs, untar_data
from exp.lr_find import LR_Find
from exp.optimizers import AverageGrad, StatefulOptimizer, adam_opt, l2_reg, lamb, lars, momentum_step, norm_bias_groups, sgd_mom_opt

OUT = Path(__file__).with_suffix('.csv')
FIELDS = ['claim', 'arm', 'seed', 'epoch', 'lr', 'train_loss', 'valid_loss', 'valid_accuracy', 'norm', 'effective_lr', 'seconds']
NFS, SIZE = [32, 32, 64, 128], 64


def load(folder, classes):
    "All pictures of `folder`/CLASS at SIZE px: uint8 (N, 3, SIZE, SIZE), class indices (N,)."
    items = [(f, i) for i, c in enumerate(classes) for f in sorted((folder/c).iterdir()) if f.name[0] != '.']
    x = torch.empty(len(items), 3, SIZE, SIZE, dtype=torch.uint8)
    for n, (f, _) in enumerate(items):
        with Image.open(f) as im:
            im.draft('RGB', (2*SIZE, 2*SIZE))
            im = im.convert('RGB').resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        x[n] = torch.frombuffer(bytearray(im.tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3).permute(2, 0, 1)
    return Dataset(x, torch.tensor([i for _, i in items]))


def normalize(xb): return (xb.float() - 118)/71                        # about the mean and deviation of Imagenette's bytes


class Norms(Callback):
    "Per epoch: the norm of the conv weights that a batch norm follows, and lr over its square, at the cycle's highest lr."
    def begin_fit(self, run): self.rows = []
    def after_epoch(self, run):
        ws = [m.weight for m in run.model.modules() if isinstance(m, torch.nn.Conv2d)]
        self.rows.append(torch.stack([w.detach().norm() for w in ws]).mean().item())


def sgd_l2(params, **kw): return StatefulOptimizer(params, [l2_reg, momentum_step], AverageGrad(), **kw)


def arms(claim):
    "`{arm: (optimizer function, hypers, lr or None for LR_Find)}`."
    if claim == 'l2':
        return {'neither': (sgd_mom_opt, {}, .05), 'L2 0.005': (sgd_l2, dict(wd=.005), .05), 'decay 0.005': (sgd_mom_opt, dict(wd=.005), .05),
                'L2 0.005, lr × 4': (sgd_l2, dict(wd=.005), .2), 'neither, lr × 4': (sgd_mom_opt, {}, .2)}
    if claim == 'three': return {'SGD + momentum': (sgd_mom_opt, {}, None), 'Adam': (adam_opt(), {}, None), 'LAMB': (lamb, {}, None)}
    return {'SGD + momentum': (sgd_mom_opt, {}, None), 'LARS': (lars, dict(wd=1e-4), None), 'LAMB': (lamb, dict(wd=1e-4), None)}


def fit(data, opt_func, hypers, lr, seed, epochs, cbs, adapt=False):
    torch.manual_seed(seed)
    model = init_cnn(get_cnn_model(data, NFS, conv_layer), leak=0.).to(memory_format=torch.channels_last)
    opt = opt_func(norm_bias_groups(model, no_adapt='adapt' in opt_func(list(model.parameters()), lr=.1).hypers[0]) if hypers else model.parameters(), lr=lr, **hypers)
    return Runner(model, data, F.cross_entropy, opt, [CudaCallback(), BatchTransformXCallback(normalize), *cbs]).fit(epochs)


def run_arm(claim, name, seed, train, valid):
    "One training: rows of the csv."
    started, (opt_func, hypers, lr) = time.perf_counter(), arms(claim)[name]
    bs = 1024 if claim == 'large' else 64
    idx = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:len(train) if claim == 'large' else 3000]
    part = Dataset(train.x[idx], train.y[idx])
    data = DataBunch(*get_dls(part, valid, bs, seed=seed), c_in=3, c_out=10)
    if lr is None:                                                       # on training pictures only; LR_Find never validates
        find = LR_Find(max_iter=60, min_lr=1e-5 if opt_func is not lars else 1e-2, max_lr=10. if opt_func is not lars else 1e3)
        look = DataBunch(*get_dls(part, valid, 64 if claim != 'large' else 256, seed=seed), c_in=3, c_out=10)
        fit(look, opt_func, hypers, .01, seed, 10, [find])
        lr = find.suggestion
    epochs, norms, st = 4 if claim == 'large' else 3, Norms(), AvgStatsCallback(accuracy, silent=True)
    sched = [] if claim == 'l2' else [ParamScheduler('lr', combine_scheds([.3, .7], cos_1cycle_anneal(lr/10, lr, lr/100)))]
    fit(data, opt_func, hypers, lr, seed, epochs, [norms, st, *sched])
    return [dict(claim=claim, arm=name, seed=seed, epoch=r['epoch'], lr=lr, **{k: r[k] for k in FIELDS[5:8]}, norm=n,
                 effective_lr=lr/n**2, seconds=time.perf_counter() - started) for r, n in zip(st.rows, norms.rows)]


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--claims', nargs='+', default=['l2', 'three', 'large'])
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--most', type=int, default=10**6, help='stop after this many arms')
    a = p.parse_args()
    keep_freed_memory()
    if not OUT.exists():
        OUT.write_text(f'# python experiments/optimizers_claims.py (claims l2, three: 3,000 training pictures, batch size 64, 3 epochs; large: 9,469, 1,024, 4)\n'
                       f'# imagenette2-160 at {SIZE} px, 3,925 validation images; torch {torch.__version__}, python {platform.python_version()}, '
                       f'{CudaCallback().device}, {torch.get_num_threads()} threads; seeds choose pictures, order and weights\n' + ','.join(FIELDS) + '\n')
    done = {(r['claim'], r['arm'], int(r['seed'])) for r in csv.DictReader(l for l in open(OUT) if l[0] != '#')}
    todo = [(c, n, s) for s in a.seeds for c in a.claims for n in arms(c) if (c, n, s) not in done][:a.most]
    if not todo: return
    path = untar_data(URLs.IMAGENETTE_160)
    classes = sorted(d.name for d in (path/'train').iterdir() if d.is_dir())
    cache = Path('/tmp')/f'imagenette-{SIZE}.pt'                         # decoding takes a while; a copy of the bytes for the next call
    if not cache.exists(): torch.save([(d.x, d.y) for d in (load(path/s, classes) for s in ('train', 'val'))], cache)
    train, valid = (Dataset(*d) for d in torch.load(cache, weights_only=True))
    for claim, name, seed in todo:
        rows = run_arm(claim, name, seed, train, valid)
        with open(OUT, 'a', newline='') as f: csv.DictWriter(f, FIELDS, lineterminator='\n').writerows(rows)
        print(claim, name, seed, f"lr {rows[-1]['lr']:.3g}, accuracy {rows[-1]['valid_accuracy']:.3f}, {rows[-1]['seconds']:.0f} s", flush=True)


if __name__ == '__main__': main()
