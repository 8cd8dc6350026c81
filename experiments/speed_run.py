"""The most accuracy that two cores give in a few minutes: each try a row of speed_run.csv beside this file, also those that did not help.

    EXP_MIRROR=../shared/mirror OMP_NUM_THREADS=1 python experiments/speed_run.py [--ideas A …] [--seeds 100 …] [--most N]

As in five_minutes.py, every fifth picture of Imagenette's training set is held out and judges (1,894), and the other 7,575 train: the validation
set has no say. An idea of IDEAS is what it changes in `START`, the recipe of the five minutes before; `opt` and `cbs` are functions of this script.
`cpu_seconds` counts the training and its one validation, not the decoding before it; `step_seconds` is the optimizer's share of them. On a
busy machine they are up to a fifth too many, so ideas are compared by both columns, and by a clock only in the end. An idea and seed that the csv
holds is not run again.
"""
import argparse
import csv
import platform
import time
from datetime import date
from functools import partial
from pathlib import Path

import torch
from five_minutes import held_out
from torch import nn

from exp import recipes as T
from exp.annealing import combine_scheds, sched_lin
from exp.callbacks import AvgStatsCallback, accuracy
from exp.convnets import init_cnn, keep_freed_memory
from exp.fast_batches import fast_dl, in_memory
from exp.faster import ChannelsLast, cpu_bf16, native_precision
from exp.optimizers import AverageGrad, AverageSqrGrad, Optimizer, StepCount, adam_step, weight_decay
from exp.speed_run import fast_muon_step
from exp.xresnet import XResNet, conv_norm, relu

OUT = Path(__file__).with_suffix('.csv')
FIELDS = ['idea', 'seed', 'accuracy', 'valid_loss', 'train_loss', 'n_train', 'n_valid', 'cpu_seconds', 'step_seconds', 'date', 'settings']


class Timed(Optimizer):
    seconds = 0.
    def step(self):
        started = time.process_time()
        super().step()
        Timed.seconds += time.process_time() - started


STATS = [AverageGrad(dampening=True), AverageSqrGrad(), StepCount()]
adam = partial(Timed, steppers=[weight_decay, adam_step], stats=STATS)
muon = partial(Timed, steppers=[weight_decay, fast_muon_step], stats=STATS)
OPTS = dict(adam=adam, timed_muon=muon)
T.SCHEDS['linear'] = lambda lr: combine_scheds([.2, .8], [sched_lin(lr/10, lr), sched_lin(lr, 0.)])


def get_net(options, c_in, c_out, width):
    "XResNet-18 with changes; `two`: both strides of the stem in its convolutions, no pooling."
    options = {'layers': (2, 2, 2, 2), 'width': width, **options}
    two = options.pop('two', False)
    net = XResNet(**options, c_in=c_in, c_out=c_out)
    if two:
        net.stem = init_cnn(nn.Sequential(*conv_norm(c_in, 16, 3, 2, act=relu), *conv_norm(16, 32, 3, 2, act=relu)))
        net.pool = nn.Identity()
    return net


TWO = dict(two=True)
START = dict(epochs=20, size=96, crops=(48, 80), wd=.03, validate=0)
SILU = dict(act=partial(nn.SiLU, inplace=True))
M = dict(opt='timed_muon')
M128 = dict(M, bs=128)
BF = dict(half=True)
IDEAS = {                                                        # name: (changes of START, of the optimizer's hypers, of XResNet)
    'Adam': ({}, {}, {}),
    'Muon, 20 epochs': (M, {}, {}),
    'Muon, batches of 128': (dict(M, bs=128), {}, {}),
    'Muon, batches of 128, rate 0.02': (dict(M, bs=128, lr=.02), {}, {}),
    'Muon, batches of 128, 16 epochs': (dict(M, bs=128, epochs=16), {}, {}),
    'Muon, 128, two strides in the stem': (M128, {}, TWO),
    'Muon, 128, 2-2-2-1 blocks': (M128, {}, dict(layers=(2, 2, 2, 1))),
    'Muon, 128, rotated and coloured': (dict(M128, tfms='strong'), {}, {}),
    'Muon, 128, SiLU': (M128, {}, SILU),
    'Muon, 128, wd 0.1': (dict(M128, wd=.1), {}, {}),
    'Muon, 128, flat then cosine': (dict(M128, sched='flat'), {}, {}),
    'Muon, 128, SiLU, products in bfloat16': (M128, BF, SILU),
    'Muon, 128, SiLU, rate 0.02': (dict(M128, lr=.02), BF, SILU),
    'Muon, 128, SiLU, Muon at 5 times the rate': (M128, dict(BF, times=5.), SILU),
    'Muon, 128, SiLU, two layers in the stem': (M128, BF, dict(SILU, stem=(32, 64))),
    'Muon, 128, SiLU, wd 0.1': (dict(M128, wd=.1), BF, SILU),
    'Muon, 128, SiLU, linear down to 0': (dict(M128, sched='linear'), BF, SILU),
    'Muon, 128, SiLU, crops 32-96': (dict(M128, crops=(32, 96), size=112), BF, SILU),
    'Muon, 128, SiLU, mixup 0.1': (dict(M128, mixup=.1), BF, SILU),
    'Muon, 128, SiLU, EMA 0.99': (dict(M128, ema=.99), BF, SILU),
    'Muon, 128, SiLU, momentum 0.95': (M128, dict(BF, mom=.95), SILU),
    'Muon, 128, SiLU, smoothing 0.2': (dict(M128, smooth=.2), BF, SILU),
    'Muon, 128, SiLU, squeeze-excite': (M128, BF, dict(SILU, se=True)),
    'Muon, 128, SiLU, wd 0.1, 2-2-2-1 blocks, 26 epochs': (dict(M128, wd=.1, epochs=26), BF, dict(SILU, layers=(2, 2, 2, 1))),
    'Muon, 128, SiLU, wd 0.2': (dict(M128, wd=.2), BF, SILU),
    'Muon, 128, wd 0.1, half': (dict(M128, wd=.1), BF, {}),
    'Muon, 128, wd 0.1, half, crops 64-112, 128 px, 38 epochs': (dict(M128, wd=.1, crops=(64, 112), size=128, epochs=38), BF, {}),
    'Muon, 128, wd 0.1, half, crops 64-112, 128 px, 38 epochs, strong': (dict(M128, wd=.1, crops=(64, 112), size=128, epochs=38, tfms='strong'), BF, {}),
    'Muon, 128, wd 0.1, half, crops 56-88, 112 px, 16 epochs': (dict(M128, wd=.1, crops=(56, 88), size=112, epochs=16), BF, {}),
    'Adam, again on the machine of the others': ({}, {}, {}),
    'Muon, 128, 3 times the pictures: crops 64-96, 112 px, 13 epochs': (dict(M128, size=112, crops=(64, 96), epochs=13), {}, {}),
}


def run(idea, seed, path):
    "One training: a row of the csv."
    changes, hypers, network = IDEAS[idea]
    T.ARCHS['arm'] = partial(get_net, network)
    changes = {**START, 'opt': 'adam', 'lr': .01, **changes}
    for k, f in OPTS.items():
        T.OPTS[k] = partial(f, **hypers)
        T.LRS[k] = .01
    r = T.get_recipe('cpu', 'cpu', arch='arm', **changes)
    items = T.get_items(path, r['size'], round(1.25*max(r['crops'])))
    data = in_memory(items, 1e9).to_databunch(r['bs'], seed=seed, valid_bs=128, make_dl=fast_dl)
    st, started, Timed.seconds = AvgStatsCallback(accuracy, silent=True), time.process_time(), 0.
    T.get_training(data, r, 'cpu', seed, [ChannelsLast(), st, *native_precision('cpu')]).fit(r['epochs'])
    row = st.rows[-1]
    return dict(idea=idea, seed=seed, accuracy=round(row['valid_accuracy'], 4), valid_loss=round(row['valid_loss'], 4), train_loss=round(row['train_loss'], 4),
                n_train=len(items.train), n_valid=len(items.valid), cpu_seconds=round(time.process_time() - started), step_seconds=round(Timed.seconds),
                date=date.today(), settings={**changes, **hypers, **{k: str(v)[:40] for k, v in network.items()}})


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--ideas', nargs='+', choices=list(IDEAS), default=list(IDEAS), metavar='A')
    p.add_argument('--seeds', type=int, nargs='+', default=[100])
    p.add_argument('--most', type=int, default=10**6, help='stop after this many trainings')
    p.add_argument('--folder', type=Path, default=Path(__file__).parent.parent/'runs/held_out', help='the two parts of the training set (made here if there is none)')
    p.add_argument('--out', type=Path, default=OUT, help='another file, to try the script')
    a = p.parse_args()
    keep_freed_memory()
    if not a.out.exists():
        a.out.write_text(f'# python experiments/speed_run.py; imagenette2-160, torch {torch.__version__}, python {platform.python_version()}, {cpu_bf16() or "float32"}, '
                         f'{torch.get_num_threads()} thread(s)\n' + ','.join(FIELDS) + '\n')
    done = {(r['idea'], int(r['seed'])) for r in csv.DictReader(l for l in a.out.read_text().splitlines() if l[0] != '#')}
    todo = [(idea, s) for s in a.seeds for idea in a.ideas if (idea, s) not in done][:a.most]
    if todo: held_out(a.folder)
    for idea, seed in todo:
        row = run(idea, seed, a.folder)
        with a.out.open('a', newline='') as f: csv.DictWriter(f, FIELDS, lineterminator='\n').writerow(row)
        print(row, flush=True)


if __name__ == '__main__': main()
