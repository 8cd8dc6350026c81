"""LSUV against Kaiming and torch's own initialisation: MNIST and Imagenette, lesson CNN and 22 plain layers, with and without batch norm.

    EXP_MIRROR=../shared/mirror python experiments/lsuv_claims.py      # about 20 minutes on two cores; goes on where it stopped

One row of lsuv_claims.csv per run. `lsuv` starts from exactly drawn orthonormal matrices here (all are small), `lsuv-woven` from woven ones. For one seed everything but the initialisation is the same: pictures, their order, net, schedule.
On MNIST the nets without norm are run at two learning rates: a bad initialisation can be hidden, or made, by the rate.
"""
import argparse
import csv
import itertools
import math
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from exp.annealing import ParamScheduler, combine_scheds, cos_1cycle_anneal
from exp.batchnorm import conv_layer
from exp.callbacks import AvgStatsCallback, DataBunch, Dataset, accuracy, get_dls, get_runner
from exp.convnets import Lambda, flatten, get_cnn_model, init_cnn
from exp.datasets import URLs, mnist, untar_data
from exp.lsuv_any import lsuv_any, orthonormal_

CSV = Path(__file__).with_suffix('.csv')
KEYS = ['data', 'net', 'norm', 'lr', 'seed', 'init']
EPOCHS, BS = {'mnist': 1, 'imagenette': 3}, {'mnist': 64, 'imagenette': 32}
LRS = {('mnist', 'none'): (.01, .05), ('imagenette', 'none'): (.01,), ('mnist', 'batch'): (.05,), ('imagenette', 'batch'): (.05,)}


def pictures(items, size=64):
    "(N, 3, size, size) floats, mean 0 and std 1 over all."
    def one(p):
        with Image.open(p) as im: im = im.convert('RGB').resize((size, size), Image.Resampling.BILINEAR)
        return torch.frombuffer(bytearray(im.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)
    return torch.stack([one(p) for p, _ in items]), torch.tensor([c for _, c in items])


def load(name):
    "`(train, valid)` datasets: 6,000 and 2,000 digits, or 1,500 and 500 pictures of 64 px, evenly over the whole sets."
    if name == 'mnist':
        xt, yt, xv, yv = mnist()
        parts = [(x[::s].view(-1, 1, 28, 28), y[::s]) for x, y, s in ((xt, yt, 10), (xv, yv, 5))]
    else:
        path, parts = untar_data(URLs.IMAGENETTE_160), []
        for split, n in (('train', 1500), ('val', 500)):
            items = [(p, i) for i, c in enumerate(sorted(d for d in (path/split).iterdir() if d.is_dir())) for p in sorted(c.iterdir())]
            parts.append(pictures([items[i*len(items)//n] for i in range(n)]))
    m, s = parts[0][0].float().mean(), parts[0][0].float().std()
    return [Dataset((x.float() - m)/s, y) for x, y in parts]


def plain22(c_in, c_out, norm):
    "22 convolutions with nothing to help the signal along (but `norm`), and a linear layer."
    cs = [c_in] + [16]*8 + [32]*7 + [64]*7
    strides = {0: 2, 1: 2, 8: 2, 15: 2}
    convs = [conv_layer(i, o, stride=strides.get(n, 1), norm=norm) for n, (i, o) in enumerate(itertools.pairwise(cs))]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), Lambda(flatten), nn.Linear(cs[-1], c_out))


def run(name, sets, net, norm, lr, seed, init):
    "Train once; the numbers of a row."
    data = DataBunch(*get_dls(*sets, BS[name], seed=seed), c_in=sets[0].x.shape[1], c_out=10)
    torch.manual_seed(seed)
    bn = nn.BatchNorm2d if norm == 'batch' else None
    if net == 'lesson': model = get_cnn_model(data, [16, 32] if name == 'mnist' else [64, 64, 128], conv_layer, norm=bn)
    else: model = plain22(data.c_in, 10, bn)
    if init == 'kaiming': init_cnn(model)
    g = torch.Generator().manual_seed(seed)
    if init == 'lsuv': lsuv_any(model, sets[0].x[:256], generator=g)
    if init == 'lsuv-woven': lsuv_any(model, sets[0].x[:256], orthonormal=partial(orthonormal_, qr_limit=0), generator=g)
    sched = combine_scheds([.3, .7], cos_1cycle_anneal(lr/3, lr, lr/10))
    st = AvgStatsCallback(accuracy, silent=True)
    t = time.perf_counter()
    get_runner(model, data, lr, [st, ParamScheduler('lr', sched)], opt_func=lambda ps, lr: torch.optim.SGD(ps, lr, momentum=.9)).fit(EPOCHS[name])
    r = st.rows[-1]
    loss = r['train_loss'] if math.isfinite(r['train_loss']) else math.nan
    return dict(train_loss=f'{loss:.4f}', accuracy=f"{r['valid_accuracy']:.4f}", seconds=f'{time.perf_counter() - t:.1f}')


def arms(seeds):
    "Every run, a whole seed after the other."
    for seed in range(seeds):
        for name, net, norm in itertools.product(EPOCHS, ('lesson', 'plain22'), ('none', 'batch')):
            for lr, init in itertools.product(LRS[name, norm], ('torch', 'kaiming', 'lsuv', 'lsuv-woven')):
                if init != 'lsuv-woven' or (norm, lr) == ('none', .01): yield name, net, norm, lr, seed, init


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--seeds', type=int, default=3, help='seeds 0, 1, … (3)')
    p.add_argument('--limit', type=int, default=10**9, help='stop after this many runs; called again it goes on (all)')
    a = p.parse_args()
    if not CSV.exists():
        CSV.write_text(f'# EXP_MIRROR=../shared/mirror python experiments/lsuv_claims.py --seeds {a.seeds}\n'
                       f'# torch {torch.__version__}, CPU, {torch.get_num_threads()} threads; SGD, momentum 0.9, one cycle; kaiming: init_cnn, lsuv: on 256 training pictures\n'
                       '# mnist: 6,000 training and 2,000 validation digits, 1 epoch, batch 64; imagenette (v2, 160 px): 1,500 and 500 at 64 px, 3 epochs, batch 32\n'
                       + ','.join([*KEYS, 'train_loss', 'accuracy', 'seconds']) + '\n')
    with open(CSV) as f: done = {tuple(r[k] for k in KEYS) for r in csv.DictReader(l for l in f if l[0] != '#')}
    todo = [arm for arm in arms(a.seeds) if tuple(map(str, arm)) not in done][:a.limit]
    sets = {}
    for arm in todo:
        name = arm[0]
        if name not in sets: sets[name] = load(name)
        row = {**dict(zip(KEYS, arm)), **run(name, sets[name], *arm[1:])}
        with open(CSV, 'a') as f: f.write(','.join(map(str, row.values())) + '\n')
        print(row, flush=True)
    print(f'{len(todo)} runs done')


if __name__ == '__main__': main()
