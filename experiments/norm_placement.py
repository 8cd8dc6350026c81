"""Batch norm before or after the nonlinearity, on Imagenette: both ways, three seeds. Writes norm_placement.csv beside itself.

    python experiments/norm_placement.py [--epochs 3] [--size 64] [--seeds 0 1 2]

An arm that the csv already holds is not run again, so a broken-off run goes on where it stopped.
"""
import argparse
import csv
import platform
from functools import partial
from pathlib import Path

import torch

from exp.annealing import ParamScheduler, combine_scheds, cos_1cycle_anneal
from exp.batchnorm import conv_layer
from exp.callbacks import AvgStatsCallback, BatchTransformXCallback, CudaCallback, accuracy, get_runner
from exp.convnets import get_cnn_model, init_cnn, keep_freed_memory
from exp.data_block import NormalizeBytes
from exp.datasets import URLs, untar_data
from exp.fast_batches import fast_dl, in_memory
from exp.recipes import NFS, get_items

OUT = Path(__file__).with_suffix('.csv')
FIELDS = ['order', 'seed', 'epoch', 'train_loss', 'valid_loss', 'valid_accuracy']


def arm(order, seed, a):
    "One training: rows of the csv."
    data = in_memory(get_items(untar_data(URLs.IMAGENETTE_160), a.size)).to_databunch(a.bs, seed=seed, make_dl=fast_dl)
    torch.manual_seed(seed)
    layer = partial(conv_layer, norm_first=order == 'conv, norm, ReLU')
    model = init_cnn(get_cnn_model(data, NFS, layer)).to(memory_format=torch.channels_last)
    sched = combine_scheds([.3, .7], cos_1cycle_anneal(a.lr/3, a.lr, a.lr/6))
    cbs = [CudaCallback(), BatchTransformXCallback(NormalizeBytes.fit(data.train_ds)), ParamScheduler('lr', sched),
           st := AvgStatsCallback(accuracy)]
    get_runner(model, data, a.lr, cbs).fit(a.epochs)
    return [dict(order=order, seed=seed, **{k: r[k] for k in FIELDS[2:]}) for r in st.rows]


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--epochs', type=int, default=3)
    p.add_argument('--size', type=int, default=64)
    p.add_argument('--bs', type=int, default=64)
    p.add_argument('--lr', type=float, default=.3)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    a = p.parse_args()
    keep_freed_memory()
    if not OUT.exists():
        OUT.write_text(f'# python experiments/norm_placement.py --epochs {a.epochs} --size {a.size} --bs {a.bs} --lr {a.lr}\n'
                       f'# imagenette2-160, 9469 training and 3925 validation images; torch {torch.__version__}, python {platform.python_version()}, '
                       f'{CudaCallback().device}\n' + ','.join(FIELDS) + '\n')
    done = {(r['order'], int(r['seed'])) for r in csv.DictReader(l for l in open(OUT) if l[0] != '#')}
    for seed in a.seeds:
        for order in ('conv, norm, ReLU', 'conv, ReLU, norm'):
            if (order, seed) in done: continue
            print(order, 'seed', seed, flush=True)
            rows = arm(order, seed, a)
            with open(OUT, 'a', newline='') as f: csv.DictWriter(f, FIELDS, lineterminator='\n').writerows(rows)


if __name__ == '__main__': main()
