"""How small may a random crop be? The lesson's CNN on crops of at least 8 % and of at least 35 % of the picture, and on whole pictures. Writes transforms_min_scale.csv.

    python experiments/transforms_min_scale.py                                  # 3 arms, 3 seeds: about 90 s each on one core
    python experiments/transforms_min_scale.py --arms 0.35 --seeds 0 --most 1   # one of them

Imagenette at 64 px: 3,000 training pictures, spread evenly over the set, all 3,925 validation pictures squeezed whole to 64 px, one cycle of 8 epochs.
An arm 'whole' squeezes the training pictures too. A row is written when its arm is done; what the csv already holds is not run again.
"""
import argparse
import csv
import os
import platform
import time
from functools import partial
from pathlib import Path

from exp.batchnorm import conv_layer
from exp.callbacks import AvgStatsCallback, BatchTransformXCallback, CudaCallback, accuracy
from exp.convnets import keep_freed_memory
from exp.data_block import (ImageList, NormalizeBytes, ResizeFixed, SplitData, grandparent_splitter, label_by_func, make_rgb, parent_labeler,
                            to_byte_tensor)
from exp.datasets import URLs, untar_data
from exp.fast_batches import fast_dl
from exp.learner import get_learner, set_seed
from exp.transforms import RandomResizedCrop

OUT = Path(__file__).with_suffix('.csv')
COLS = ['arm', 'seed', 'epochs', 'size', 'train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy', 'seconds', 'cpu_seconds', 'n_train', 'n_valid', 'data',
        'device', 'threads', 'torch']
NFS = [32, 32, 64, 128]


def get_data(arm, seed, a):
    "Batches for one arm: training pictures cropped or squeezed, validation pictures squeezed."
    path = untar_data(URLs.IMAGENETTE_160)
    sd = SplitData.split_by_func(ImageList.from_files(path), partial(grandparent_splitter, valid_name='val'))
    ll = label_by_func(sd, parent_labeler)
    ll.train = ll.train.pick([i*len(ll.train)//a.train for i in range(min(a.train, len(ll.train)))])
    ll.valid = ll.valid.pick(slice(None, None, a.valid_every))
    whole = ResizeFixed(a.size)
    ll.train.x.tfms = [make_rgb, whole if arm == 'whole' else RandomResizedCrop(a.size, float(arm)), to_byte_tensor]
    ll.valid.x.tfms = [make_rgb, whole, to_byte_tensor]
    return ll.to_databunch(a.bs, seed=seed, num_workers=a.workers, make_dl=fast_dl), path.name


def run_arm(arm, seed, a):
    "One training, as a row of the csv."
    import torch
    set_seed(seed)
    started, cpu = time.perf_counter(), sum(os.times()[:4])
    data, name = get_data(arm, seed, a)
    norm, valid = NormalizeBytes.fit(data.train_ds), data.valid_dl
    learn = get_learner(NFS, data, a.lr, conv_layer, cbs=[CudaCallback(), BatchTransformXCallback(norm), st := AvgStatsCallback(accuracy, silent=True)])
    data.valid_dl = None                                                  # validated once, at the end
    learn.fit_one_cycle(a.epochs, a.lr)
    v, r = learn.validate(valid), st.rows[-1]
    values = dict(train_loss=r['train_loss'], train_accuracy=r['train_accuracy'], valid_loss=v['loss'], valid_accuracy=v['accuracy'])
    return dict(arm=arm, seed=seed, epochs=a.epochs, size=a.size, **{k: round(x, 5) for k, x in values.items()}, seconds=round(time.perf_counter() - started, 1),
                cpu_seconds=round(sum(os.times()[:4]) - cpu, 1), n_train=len(data.train_ds), n_valid=len(valid.source), data=name, device=next(learn.model.parameters()).device.type,
                threads=torch.get_num_threads(), torch=torch.__version__)


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--arms', nargs='*', default=['0.35', '0.08', 'whole'], help="smallest share of the area, or 'whole'")
    p.add_argument('--seeds', type=int, nargs='*', default=[0, 1, 2])
    p.add_argument('--epochs', type=int, default=8)
    p.add_argument('--size', type=int, default=64)
    p.add_argument('--train', type=int, default=3000, help='training pictures')
    p.add_argument('--valid-every', type=int, default=1, help='validate on every n-th picture')
    p.add_argument('--bs', type=int, default=64)
    p.add_argument('--lr', type=float, default=.3)
    p.add_argument('--workers', type=int, default=0)
    p.add_argument('--most', type=int, help='stop after so many arms')
    p.add_argument('--out', type=Path, default=OUT)
    a = p.parse_args()
    keep_freed_memory()
    if not a.out.exists():
        a.out.write_text(f'# command: python experiments/{Path(__file__).name}, arms one after the other: RandomResizedCrop(size, arm), or ResizeFixed for whole\n'
                         f'# lr {a.lr}, one cycle, batch size {a.bs}, channels {NFS}; python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores\n{",".join(COLS)}\n')
    done, todo = {(r['arm'], int(r['seed']), int(r['epochs'])) for r in csv.DictReader(l for l in open(a.out) if l[0] != '#')}, a.most
    for seed in a.seeds:
        for arm in a.arms:
            if (arm, seed, a.epochs) in done or todo == 0: continue
            row = run_arm(arm, seed, a)
            with open(a.out, 'a', newline='') as f: csv.DictWriter(f, COLS, lineterminator='\n').writerow(row)
            print(f'{arm:>6} seed {seed}: accuracy {row["valid_accuracy"]:.4f}, {row["cpu_seconds"]} CPU seconds', flush=True)
            todo = todo and todo - 1


if __name__ == '__main__': main()
