"""What to do with five minutes of two cores that compute in bfloat16: writes five_minutes.csv beside itself, an arm at a time.

    EXP_MIRROR=../shared/mirror OMP_NUM_THREADS=1 python experiments/five_minutes.py [--arms A …] [--seeds 100 …] [--most N] [--folder F]

Every fifth picture of Imagenette's training set (by path, the first of each five) is held out and judges, the other 7,575 train: the validation set has
no say. An arm is what it changes in recipe `cpu` (BASE: thirteen epochs on crops of 64 to 96 px, judged at 112, which was the recipe before), in the
network and in the settings; epochs are chosen so that all arms cost about the same. Only the training counts in `cpu_seconds`, not the decoding before
it; on a busy machine they are up to a tenth too many. An arm and seed that the csv holds is not run again.
"""
import argparse
import csv
import platform
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

from exp import recipes as T
from exp.callbacks import AvgStatsCallback, accuracy
from exp.convnets import keep_freed_memory
from exp.datasets import URLs, untar_data
from exp.fast_batches import fast_dl, in_memory
from exp.faster import ChannelsLast, cpu_bf16, native_precision
from exp.xresnet import XResNet

OUT = Path(__file__).with_suffix('.csv')
FIELDS = ['arm', 'seed', 'accuracy', 'valid_loss', 'train_loss', 'n_train', 'n_valid', 'cpu_seconds', 'network', 'settings']
BASE = dict(epochs=13, size=112, crops=(64, 96), validate=0)
SILU = dict(act=partial(nn.SiLU, inplace=True))
SMALL = dict(epochs=20, size=96, crops=(48, 80))
ARMS = {                                                                            # name: (options of XResNet, changes of BASE)
    '13 epochs, 64-96': ({}, {}), 'lr 0.02': ({}, dict(lr=.02)), 'lr 0.005': ({}, dict(lr=.005)), 'wd 0.05': ({}, dict(wd=.05)), 'bs 32': ({}, dict(bs=32)),
    'SiLU': (SILU, {}), '7 × 7 stem': (dict(stem=(64,)), {}), 'squeeze-excite': (dict(se=True), {}), '1-2-2-1 blocks, 18 epochs': (dict(layers=(1, 2, 2, 1)), dict(epochs=18)),
    '20 epochs, 48-80': ({}, SMALL), '20 epochs, 56-72': ({}, {**SMALL, 'crops': (56, 72)}), '18 epochs, 64-80': ({}, {**SMALL, 'epochs': 18, 'crops': (64, 80)}),
    '28 epochs, 40-64': ({}, dict(epochs=28, size=80, crops=(40, 64))),
    '27 epochs, 48-80, width 0.375': (dict(width=.375), {**SMALL, 'epochs': 27}), '20 epochs, 48-80, SiLU': (SILU, SMALL),
    '20 epochs, 48-80, wd 0.03': ({}, {**SMALL, 'wd': .03}), '20 epochs, 48-80, wd 0.1': ({}, {**SMALL, 'wd': .1}),
    '20 epochs, 48-80, EMA 0.995': ({}, {**SMALL, 'ema': .995}), '20 epochs, 48-80, no zero gamma': (dict(zero_gamma=False), SMALL)}


def held_out(folder):
    "The training set of Imagenette in two parts, as links: `folder`/train and `folder`/val."
    if folder.exists(): return folder
    for i, f in enumerate(sorted((untar_data(URLs.IMAGENETTE_160)/'train').glob('*/*'))):
        d = folder/('train' if i % 5 else 'val')/f.parent.name
        d.mkdir(parents=True, exist_ok=True)
        (d/f.name).symlink_to(f)
    return folder


def run_arm(arm, seed, path):
    "One training: a row of the csv."
    network, changes = ARMS[arm]
    T.ARCHS['arm'] = lambda c_in, c_out, width: XResNet(**{'layers': (2, 2, 2, 2), 'width': width, **network}, c_in=c_in, c_out=c_out)
    r = T.get_recipe('cpu', 'cpu', arch='arm', **{**BASE, **changes})
    items = T.get_items(path, r['size'], round(1.25*max(r['crops'])))
    data = in_memory(items, 1e9).to_databunch(r['bs'], seed=seed, valid_bs=128, make_dl=fast_dl)
    st, started = AvgStatsCallback(accuracy, silent=True), time.process_time()
    T.get_training(data, r, 'cpu', seed, [ChannelsLast(), st, *native_precision('cpu')]).fit(r['epochs'])
    row = st.rows[-1]
    said = {k: getattr(getattr(v, 'func', v), '__name__', v) for k, v in network.items()}
    return dict(arm=arm, seed=seed, accuracy=round(row['valid_accuracy'], 4), valid_loss=round(row['valid_loss'], 4), train_loss=round(row['train_loss'], 4),
                n_train=len(items.train), n_valid=len(items.valid), cpu_seconds=round(time.process_time() - started), network=said or '', settings={**BASE, **changes})


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--arms', nargs='+', choices=list(ARMS), default=list(ARMS), metavar='A')
    p.add_argument('--seeds', type=int, nargs='+', default=[100])
    p.add_argument('--most', type=int, default=10**6, help='stop after this many arms')
    p.add_argument('--folder', type=Path, default=Path(__file__).parent.parent/'runs/held_out', help='the two parts of the training set (made here if there is none)')
    p.add_argument('--out', type=Path, default=OUT, help='another file, to try the script')
    a = p.parse_args()
    keep_freed_memory()
    if not a.out.exists():
        a.out.write_text(f'# python experiments/five_minutes.py; imagenette2-160, torch {torch.__version__}, python {platform.python_version()}, {cpu_bf16() or "float32"}, '
                         f'{torch.get_num_threads()} thread(s)\n' + ','.join(FIELDS) + '\n')
    done = {(r['arm'], int(r['seed'])) for r in csv.DictReader(l for l in a.out.read_text().splitlines() if l[0] != '#')}
    todo = [(arm, s) for s in a.seeds for arm in a.arms if (arm, s) not in done][:a.most]
    if todo: held_out(a.folder)
    for arm, seed in todo:
        row = run_arm(arm, seed, a.folder)
        with a.out.open('a', newline='') as f: csv.DictWriter(f, FIELDS, lineterminator='\n').writerow(row)
        print(row, flush=True)


if __name__ == '__main__': main()
