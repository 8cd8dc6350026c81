"""Does augmentation pay, and after how many epochs? The lesson's CNN with and without it, on all of Imagenette. Writes augmentation.csv.

    python experiments/augmentation.py                                # 2 arms, 5 and 20 epochs, 3 seeds: hours on 2 CPU cores
    python experiments/augmentation.py --epochs 5 --seeds 0 --most 1  # one of them

Network, optimizer and schedule are those of `exp-train`, pictures squeezed to 128 px and kept in memory. The arm 'augmented' adds, for each training picture
and each epoch anew, a flip, a turn of up to 10 degrees, a zoom of 1 to 1.25 and a shift of up to a tenth, and smooths the labels by 0.1. These numbers were
chosen beforehand and not tuned. A row is written when its training is done, and what the csv already holds is not run again; a training that was
broken off goes on from its last whole epoch, to the bit (checkpoints in runs/). `cpu_seconds`: of all threads, from the beginning of the fit; loading is not in them.
"""
import argparse
import csv
import platform
import shutil
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from sittings import RUNS, sitting

from exp.batch_transforms import Augment
from exp.callbacks import AvgStatsCallback, accuracy
from exp.checkpoints import Checkpoint
from exp.convnets import keep_freed_memory
from exp.fast_batches import fast_dl, in_memory
from exp.progress import ProgressCallback
from exp.recipes import get_items, get_training
from exp.train import find_data
from exp.transforms import BatchAugment, RandomAffine, RandomFlip

OUT = Path(__file__).with_suffix('.csv')
COLS = ['arm', 'epochs', 'seed', 'accuracy', 'valid_loss', 'train_accuracy', 'cpu_seconds', 'size', 'n_train', 'n_valid', 'data', 'device', 'threads', 'torch']


def augmentation(seed):
    aug = Augment(RandomFlip(), RandomAffine(rotate=10., zoom=(1., 1.25), translate=.1))
    return BatchAugment(aug, seed=seed)


def one(arm, epochs, seed, a):
    "One training, as a row of the csv."
    path, name = find_data(a.data)
    data = in_memory(get_items(path, a.size)).to_databunch(64, seed=seed, valid_bs=64, make_dl=fast_dl)
    folder = RUNS/f'augmentation/{name}-{a.size}px-{arm}-{epochs}-epochs-seed-{seed}'
    learn = get_training(data, 'lesson', seed=seed, cbs=[st := AvgStatsCallback(accuracy), ProgressCallback()])
    extra = [ck := Checkpoint(folder, keep=1)]
    if arm == 'augmented': learn.loss_func = partial(F.cross_entropy, label_smoothing=.1); extra.append(augmentation(seed))
    with sitting(folder) as seconds:
        learn.fit(epochs, extra, start=ck.start(learn))
        r = st.rows[-1]
        row = dict(arm=arm, epochs=epochs, seed=seed, accuracy=round(r['valid_accuracy'], 5), valid_loss=round(r['valid_loss'], 5),
                   train_accuracy=round(r['train_accuracy'], 5), cpu_seconds=round(seconds()), size=a.size, n_train=len(data.train_ds), n_valid=len(data.valid_ds),
                   data=name, device=next(learn.model.parameters()).device.type, threads=torch.get_num_threads(), torch=torch.__version__)
    return row, folder


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--epochs', type=int, nargs='+', default=[5, 20])
    p.add_argument('--arms', nargs='+', default=['augmented', 'plain'])
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--size', type=int, default=128)
    p.add_argument('--data', default='imagenette', help='as exp-train takes it')
    p.add_argument('--most', type=int, default=10**6, help='stop after this many trainings')
    a = p.parse_args()
    keep_freed_memory()
    if not OUT.exists(): OUT.write_text(f'# command: python experiments/{Path(__file__).name}; python {platform.python_version()}, {platform.machine()}\n{",".join(COLS)}\n')
    rows = csv.DictReader(l for l in OUT.read_text().splitlines() if l[0] != '#')
    done = {(r['arm'], int(r['epochs']), int(r['seed']), int(r['size'])) for r in rows}
    todo = [(arm, e, s) for e in a.epochs for s in a.seeds for arm in a.arms if (arm, e, s, a.size) not in done]
    for arm, e, s in todo[:a.most]:
        print(f'{arm}, {e} epochs, seed {s}', flush=True)
        row, folder = one(arm, e, s, a)
        with OUT.open('a', newline='') as f: csv.DictWriter(f, COLS, lineterminator='\n').writerow(row)
        shutil.rmtree(folder)


if __name__ == '__main__': main()
