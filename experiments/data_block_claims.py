"""Two claims of the slides on data, tried on Imagenette with the data block's own pieces: see nbs/08_data_block.ipynb.

`split`: the split of 2019, 12,894 pictures to train on and 500 to validate with, approximated by `split_by_random`: five of them, one
training each. How far apart are the five accuracies? `rank`: three networks at two sizes and three seeds, trained on every fourth
picture and validated with every second: do small pictures rank networks as large ones do? Each row is appended when it is done; what is there already is not run again.

    OMP_NUM_THREADS=1 python experiments/data_block_claims.py              # about 20 minutes of one CPU core
    python experiments/data_block_claims.py --claims split --seeds 0       # one row
"""
import argparse
import csv
import platform
import time
from functools import partial
from pathlib import Path

import torch

from exp.annealing import ParamScheduler, combine_scheds, cos_1cycle_anneal
from exp.batchnorm import conv_layer
from exp.callbacks import AvgStatsCallback, BatchTransformXCallback, Callback, CancelEpochException, accuracy, get_runner
from exp.convnets import conv_relu, get_cnn_model, init_cnn
from exp.data_block import (ImageList, NormalizeBytes, ResizeFixed, SplitData, get_files, grandparent_splitter, image_extensions,
                            label_by_func, make_rgb, parent_labeler, to_byte_tensor)
from exp.datasets import URLs, untar_data

OUT = Path(__file__).with_suffix('.csv')
COLS = ['claim', 'net', 'size', 'seed', 'epochs', 'accuracy', 'n_train', 'n_valid', 'cpu_seconds']
NETS = {'lesson': ([64, 64, 128, 256], conv_layer), 'half as wide': ([32, 32, 64, 128], conv_layer),
        'no batch norm': ([64, 64, 128, 256], conv_relu)}
BS, EPOCHS, LR = 64, {'split': 2, 'rank': 2}, {'lesson': .3, 'half as wide': .3, 'no batch norm': .1}


def opened(files, size):
    "Every picture once, as bytes: `{file: tensor (3, size, size)}`."
    il = ImageList(files, tfms=[make_rgb, ResizeFixed(size), to_byte_tensor])
    return {f: il.one(f) for f in files}


class ValidateAtTheEnd(Callback):
    def begin_validate(self, run):
        if run.epoch < run.n_epochs - 1: raise CancelEpochException


def fit(data, net, seed, epochs):
    "Train `net` with one cycle, and return its validation accuracy after the last epoch."
    nfs, layer = NETS[net]
    torch.manual_seed(seed)
    model = init_cnn(get_cnn_model(data, nfs, layer)).to(memory_format=torch.channels_last)
    lr = LR[net]
    sched = combine_scheds([.3, .7], cos_1cycle_anneal(lr/3, lr, lr/6))
    norm = NormalizeBytes.fit(data.train_ds)
    stats = AvgStatsCallback(accuracy, silent=True)
    get_runner(model, data, lr, [BatchTransformXCallback(norm), ParamScheduler('lr', sched), stats, ValidateAtTheEnd()]).fit(epochs)
    return stats.rows[-1]['valid_accuracy']


def split_2019(il, seed): return SplitData.split_by_random(il, valid_pct=500/len(il), seed=seed)


def every_fourth(il, seed):
    sd = SplitData.split_by_func(il, partial(grandparent_splitter, valid_name='val'))
    return SplitData(il.new(sd.train.items[::4]), il.new(sd.valid.items[::2]))


def jobs(claims, seeds):
    "`(claim, net, size, seed)` of all rows; the sizes one after the other, for the pictures of one are kept in memory."
    if 'split' in claims: yield from (('split', 'lesson', 64, s) for s in seeds)
    for size in (64, 128):
        if 'rank' in claims: yield from (('rank', net, size, s) for s in seeds[:3] for net in NETS)


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--claims', nargs='*', choices=EPOCHS, default=[*EPOCHS])
    p.add_argument('--seeds', type=int, nargs='*', default=[0, 1, 2, 3, 4], help='rank takes the first three')
    p.add_argument('--out', type=Path, default=OUT)
    a = p.parse_args()
    path = untar_data(URLs.IMAGENETTE_160)
    files = get_files(path, image_extensions, recurse=True)
    if not a.out.exists():
        a.out.write_text(f'# command: OMP_NUM_THREADS={torch.get_num_threads()} python experiments/{Path(__file__).name}; seeds 0–4 (split), 0–2 (rank)\n'
                         f'# data set: {path.name}; batches of {BS}, one cycle of the rate, peak {LR}\n'
                         f'# python {platform.python_version()}, torch {torch.__version__}, CPU {platform.machine()}, {torch.get_num_threads()} thread\n'
                         f'{",".join(COLS)}\n')
    with a.out.open() as f: done = {tuple(r[k] for k in COLS[:4]) for r in csv.DictReader(l for l in f if l[0] != '#')}
    at, kept = None, {}
    for claim, net, size, seed in jobs(a.claims, a.seeds):
        if (claim, net, str(size), str(seed)) in done: continue
        if size != at: at, kept = size, opened(files, size)
        il = ImageList(files, path, open=kept.__getitem__)
        ll = label_by_func((split_2019 if claim == 'split' else every_fourth)(il, seed), parent_labeler)
        t = time.process_time()
        acc = fit(ll.to_databunch(BS, num_workers=0, seed=seed), net, seed, EPOCHS[claim])
        row = [claim, net, size, seed, EPOCHS[claim], f'{acc:.5f}', len(ll.train), len(ll.valid), f'{time.process_time() - t:.1f}']
        with a.out.open('a', newline='') as f: csv.writer(f, lineterminator='\n').writerow(row)


if __name__ == '__main__': main()
