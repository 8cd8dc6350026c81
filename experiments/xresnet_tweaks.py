"""What each tweak of XResNet gains, same budget for all, on Imagenette at 64 px: writes xresnet_tweaks.csv beside itself, an arm at a time.

    python experiments/xresnet_tweaks.py [--claims lr tweaks final] [--arms A …] [--seeds 0 1 2] [--most N] [--pictures N --epochs N --out FILE]

lr      the plain ResNet-18 and the one with all tweaks at several learning rates, seed 100: what LR below was chosen by.
tweaks  ResNet-18 plain (2015), with each tweak alone, with all, and all with each option more. Tweak B moves a stride inside a bottleneck,
        and an 18 has none: B is compared on a pair of 26-layer bottleneck networks (2-2-2-2 blocks of three convolutions).
final   plain, all, and the arm with the best mean of `tweaks`, on the 3,925 validation pictures; asked for by name, when tweaks is done.

Half width, 3,000 training pictures (always the same), 4 epochs, batch size 32, flips, SGD with momentum, one cycle. lr and tweaks are measured on
the 1,894 training pictures held out (every fifth), the others train. An arm that the csv already holds is not run again, so a broken-off
run goes on where it stopped; seeds (weights, order, flips) come first, so that whole seeds are done.
"""
import argparse
import csv
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from exp.annealing import ParamScheduler, combine_scheds, cos_1cycle_anneal
from exp.callbacks import AvgStatsCallback, BatchTransformXCallback, CudaCallback, DataBunch, Dataset, accuracy, get_dls
from exp.convnets import keep_freed_memory
from exp.data_block import ImageList, NormalizeBytes, ResizeFixed, SplitData, grandparent_splitter, label_by_func, make_rgb, parent_labeler, to_byte_tensor
from exp.datasets import URLs, untar_data
from exp.fast_batches import decode_side
from exp.learner import Learner
from exp.lsuv_any import lsuv_any
from exp.optimizers import norm_bias_groups, sgd_mom_opt
from exp.xresnet import PLAIN, MaxBlurPool, XResNet

OUT = Path(__file__).with_suffix('.csv')
FIELDS = ['claim', 'arm', 'seed', 'lr', 'measured_on', 'n_valid', 'accuracy', 'valid_loss', 'train_loss', 'params', 'cpu_seconds']
SIZE, WIDTH, WD, BS = 64, .5, .005, 32
LR, LRS = .03, (.03, .1, .01)

C, D, ZERO, NO_DECAY = dict(stem=(32, 32, 64)), dict(pool_shortcut=True), dict(zero_gamma=True), dict(no_decay=True)
ALL, BOTTLENECK = {**C, **D, **ZERO, **NO_DECAY}, dict(expansion=4)
ARMS = {'plain': {}, '+ C': C, '+ D': D, '+ zero gamma': ZERO, '+ no decay': NO_DECAY, 'all': ALL,
        'all + Mish': {**ALL, 'act': nn.Mish}, 'all + MaxBlurPool': {**ALL, 'pool': MaxBlurPool}, 'all + squeeze-excite': {**ALL, 'se': True},
        'all + self-attention': {**ALL, 'sa': True}, 'all + LSUV': {**ALL, 'lsuv': True},
        'bottleneck': BOTTLENECK, 'bottleneck + B': {**BOTTLENECK, 'stride_3x3': True}}


class Flip:
    "Each training picture mirrored with a chance of one half, drawn from a generator of its own."
    _order = 1
    def __init__(self, seed): self.g = torch.Generator().manual_seed(seed)
    def begin_batch(self, run):
        if run.in_train:
            flip = torch.rand(len(run.xb), generator=self.g).to(run.xb.device) < .5
            run.xb = torch.where(flip[:, None, None, None], run.xb.flip(-1), run.xb)


def load(pictures, final):
    "`(training set, set to measure on)`: Datasets of uint8 (N, 3, 64, 64) and class indices."
    path = untar_data(URLs.IMAGENETTE_160)
    il = ImageList.from_files(path, include=('train', 'val'), tfms=[make_rgb, ResizeFixed(SIZE), to_byte_tensor])
    ll = label_by_func(SplitData.split_by_func(il, partial(grandparent_splitter, valid_name='val')), parent_labeler)
    rest = [i for i in range(len(ll.train)) if i % 5]                              # files come class by class: every class keeps its share
    train = [rest[i*len(rest)//pictures] for i in range(min(pictures, len(rest)))]
    sides = (decode_side(p) for p in (ll.train.pick(train), ll.valid if final else ll.train.pick(slice(0, None, 5))))
    return tuple(Dataset(s.x.items, s.y.items) for s in sides)


def run_arm(claim, arm, seed, lr, train, valid, epochs):
    "One training: a row of the csv."
    started, options = time.process_time(), {**PLAIN, **ARMS[arm]}
    no_decay, lsuv = (options.pop(k, False) for k in ('no_decay', 'lsuv'))
    norm = NormalizeBytes.fit(train)
    torch.manual_seed(seed)
    model = XResNet(c_out=10, width=WIDTH, **options).to(memory_format=torch.channels_last)
    if lsuv: lsuv_any(model, norm(train.x[::max(1, len(train)//128)][:128]), generator=torch.Generator().manual_seed(seed))
    train_dl, _ = get_dls(train, valid, BS, seed=seed, drop_last=False)
    valid_dl = get_dls(valid, valid, 128)[1]
    st = AvgStatsCallback(accuracy, silent=True)
    sched = ParamScheduler('lr', combine_scheds([.3, .7], cos_1cycle_anneal(lr/10, lr, lr/100)))
    def opt_func(params, lr): return sgd_mom_opt(norm_bias_groups(model, no_decay=no_decay), lr=lr, wd=WD)
    learn = Learner(model, DataBunch(train_dl, None, 3, 10), F.cross_entropy, opt_func, lr,
                    cbs=[CudaCallback(), Flip(seed), BatchTransformXCallback(norm), sched, st])
    learn.fit(epochs)
    r = learn.validate(valid_dl, [accuracy])
    return dict(claim=claim, arm=arm, seed=seed, lr=lr, measured_on='validation set' if claim == 'final' else 'held-out training pictures', n_valid=len(valid),
                accuracy=round(r['accuracy'], 5), valid_loss=round(r['loss'], 4), train_loss=round(st.rows[-1]['train_loss'], 4),
                params=sum(p.numel() for p in model.parameters()), cpu_seconds=round(time.process_time() - started, 1))


def read(out): return [*csv.DictReader(l for l in open(out) if l[0] != '#')] if out.exists() else []


def to_do(claim, seeds, rows):
    "`[(arm, seed, lr)]` of a claim, whole seeds first."
    if claim == 'lr': return [(a, 100, lr) for lr in LRS for a in ('plain', 'all')]
    arms = list(ARMS)
    if claim == 'final':
        of = {a: {int(r['seed']): float(r['accuracy']) for r in rows if r['claim'] == 'tweaks' and r['arm'] == a} for a in ARMS}
        of = {a: [v[s] for s in seeds] for a, v in of.items() if v.keys() >= set(seeds) and 'bottleneck' not in a}
        if not of: raise SystemExit('final needs the rows of tweaks: run --claims tweaks with these seeds first')
        arms = list(dict.fromkeys(['plain', 'all', max(of, key=lambda a: statistics.mean(of[a]))]))
    return [(a, s, LR) for s in seeds for a in arms]


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--claims', nargs='+', default=['lr', 'tweaks'], choices=['lr', 'tweaks', 'final'])
    p.add_argument('--arms', nargs='+', choices=list(ARMS), help='these only (all)')
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--most', type=int, default=10**6, help='stop after this many arms')
    p.add_argument('--pictures', type=int, default=3000)
    p.add_argument('--epochs', type=int, default=4)
    p.add_argument('--out', type=Path, default=OUT, help='another file, to try the script with few pictures')
    a = p.parse_args()
    keep_freed_memory()
    if not a.out.exists():
        a.out.write_text(f'# python experiments/xresnet_tweaks.py: {a.pictures:,} training pictures, {a.epochs} epochs, batch size {BS}, wd {WD}, flips, width {WIDTH}\n'
                         f'# imagenette2-160 at {SIZE} px; torch {torch.__version__}, python {platform.python_version()}, {CudaCallback().device}, '
                         f'{torch.get_num_threads()} thread(s); seeds choose weights, order and flips\n' + ','.join(FIELDS) + '\n')
    left = a.most
    for claim in a.claims:
        rows = read(a.out)
        done = {(r['claim'], r['arm'], int(r['seed']), float(r['lr'])) for r in rows}
        todo = [t for t in to_do(claim, a.seeds, rows) if (claim, *t) not in done and (not a.arms or t[0] in a.arms)][:left]
        left -= len(todo)
        data = load(a.pictures, claim == 'final') if todo else None
        for arm, seed, lr in todo:
            row = run_arm(claim, arm, seed, lr, *data, a.epochs)
            with open(a.out, 'a', newline='') as f: csv.DictWriter(f, FIELDS, lineterminator='\n').writerow(row)
            print(*(f'{k} {row[k]}' for k in ('claim', 'arm', 'seed', 'lr', 'accuracy', 'train_loss', 'cpu_seconds')), flush=True)


if __name__ == '__main__': main()
