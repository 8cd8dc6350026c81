"""16 times the batch: with the same rate, with 16 times the rate, and with a warm-up. MNIST, three seeds. Writes scaling_rule.csv beside itself.

    python experiments/scaling_rule.py [--epochs 3] [--seeds 0 1 2]

One process: for the rule it does not matter how many make the batch. An arm that the csv already holds is not run again.
"""
import argparse
import csv
import platform
from pathlib import Path

import torch
import torch.nn.functional as F

from exp.annealing import ParamScheduler, combine_scheds, sched_lin
from exp.batchnorm import conv_layer
from exp.callbacks import AvgStatsCallback, DataBunch, Dataset, accuracy
from exp.convnets import get_cnn_model
from exp.datasets import mnist
from exp.fast_batches import ItemLoader
from exp.learner import Learner
from exp.optimizers import sgd_mom_opt

OUT = Path(__file__).with_suffix('.csv')
FIELDS = ['rate', 'arm', 'seed', 'epoch', 'train_loss', 'valid_loss', 'valid_accuracy']
ARMS = {'batch 32': (32, 1, 0), 'batch 512': (512, 1, 0), 'rate × 16': (512, 16, 0), '… and warm-up': (512, 16, 1)}      # of the first epoch


def arm(rate, name, seed, epochs):
    "One training: rows of the csv."
    bs, k, warm_up = ARMS[name]
    x, y, xv, yv = (t.view(-1, 1, 28, 28) if t.dim() == 2 else t for t in mnist())
    data = DataBunch(ItemLoader(Dataset(x, y), bs, True, seed), ItemLoader(Dataset(xv, yv), 1000), 1, 10)
    torch.manual_seed(seed)
    cbs = [st := AvgStatsCallback(accuracy)]
    if warm_up: cbs.append(ParamScheduler('lr', combine_scheds([warm_up/epochs, 1 - warm_up/epochs], [sched_lin(rate, k*rate), sched_lin(k*rate, k*rate)])))
    Learner(get_cnn_model(data, [8, 16, 32], conv_layer), data, F.cross_entropy, sgd_mom_opt, k*rate, cbs=cbs).fit(epochs)
    return [dict(rate=rate, arm=name, seed=seed, **{k: round(r[k], 5) for k in FIELDS[3:]}) for r in st.rows]


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--epochs', type=int, default=3)
    p.add_argument('--rates', type=float, nargs='+', default=[.02, .1])
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    a = p.parse_args()
    if not OUT.exists():
        OUT.write_text(f'# OMP_NUM_THREADS={torch.get_num_threads()} python experiments/scaling_rule.py --epochs {a.epochs}\n# MNIST, 60,000 training and 10,000 validation images, '
                       f'28 px, momentum 0.9; torch {torch.__version__}, python {platform.python_version()}, cpu\n' + ','.join(FIELDS) + '\n', encoding='utf-8')
    done = {(float(r['rate']), r['arm'], int(r['seed'])) for r in csv.DictReader(l for l in open(OUT, encoding='utf-8') if l[0] != '#')}
    for seed in a.seeds:
        for rate in a.rates:
            for name in ARMS:
                if (rate, name, seed) in done: continue
                rows = arm(rate, name, seed, a.epochs)
                print(rate, name, 'seed', seed, [r['valid_accuracy'] for r in rows], flush=True)
                with open(OUT, 'a', newline='', encoding='utf-8') as f: csv.DictWriter(f, FIELDS, lineterminator='\n').writerows(rows)


if __name__ == '__main__': main()
