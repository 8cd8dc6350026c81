"""Eight optimizers with the same budget, on Imagenette at 64 px: writes since_2019.csv beside itself, a training at a time.

    python experiments/since_2019.py [--arms SGD Adam …] [--seeds 0 1 2] [--most N]

rate    each optimizer with rates a factor of √10 apart, on 3,000 pictures of four fifths of the training set; accuracy on the fifth that
        is held out. Five rates, and more as long as the best is at an end of those tried. One seed.
final   each with its best rate, on 3,000 pictures of the whole training set, which the seed chooses; accuracy on the validation set.
time    CPU milliseconds (all threads) of a training batch and of the optimizer's step in it, all optimizers in turn, medians.

All: the lesson's CNN with batch norm, batch size 64, 4 epochs of one cycle, momentum constant, no weight decay, no augmentation. Only
schedule-free has no cycle: its rate rises for a quarter of the time and stays. Nothing but rates is chosen; the other hyper-parameters are
the defaults. A row that the csv holds is not made again, so a broken-off run goes on where it stopped.
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
from PIL import Image

from exp.batchnorm import conv_layer
from exp.callbacks import AvgStatsCallback, BatchTransformXCallback, CudaCallback, DataBunch, Dataset, accuracy, get_dls
from exp.convnets import get_cnn_model, init_cnn, keep_freed_memory
from exp.datasets import URLs, untar_data
from exp.learner import Learner, one_group, set_seed
from exp.optimizers import adam_opt, lamb, sgd_mom_opt, sgd_opt
from exp.since_2019 import ScheduleFree, ademamix, lion, muon, muon_groups, schedule_free

OUT = Path(__file__).with_suffix('.csv')
FIELDS = ['kind', 'arm', 'seed', 'rate', 'train_loss', 'loss', 'accuracy', 'cpu_seconds', 'batch_ms', 'step_ms']
NFS, SIZE, N_TRAIN, BS, EPOCHS, TUNING_SEED = [32, 32, 64, 128], 64, 3000, 64, 4, 9
STEPS = EPOCHS*-(-N_TRAIN//BS)
ARMS = {'SGD': (sgd_opt, -1), 'momentum': (sgd_mom_opt, -3), 'Adam': (adam_opt(), -5), 'LAMB': (lamb, -4), 'Lion': (lion, -7),
        'AdEMAMix': (partial(ademamix, warm=STEPS), -6), 'schedule-free': (partial(schedule_free, warmup=STEPS//4), -4),
        'Muon': (muon, -4)}                                             # function, and the first rate to try: 10^(n/2)


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
def rows(ds, idx): return Dataset(ds.x[idx], ds.y[idx])
def shuffled(n, seed): return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def get_learner(arm, lr, train, seed):
    set_seed(seed)
    opt_func, _ = ARMS[arm]
    train_dl, _ = get_dls(train, train, BS, seed=seed)
    data = DataBunch(train_dl, None, c_in=3, c_out=10)
    model = init_cnn(get_cnn_model(data, NFS, conv_layer)).to(memory_format=torch.channels_last)
    cbs = [CudaCallback(), BatchTransformXCallback(normalize), AvgStatsCallback(accuracy, silent=True)]
    return Learner(model, data, F.cross_entropy, opt_func, lr, muon_groups if arm == 'Muon' else one_group,
                   cbs + [ScheduleFree()]*(arm == 'schedule-free'))


def train(kind, arm, seed, n, train_ds, valid_ds):
    "One training at the rate 10^(n/2): a row of the csv."
    started, lr = time.process_time(), 10**(n/2)
    learn = get_learner(arm, lr, train_ds, seed)
    if arm == 'schedule-free': learn.fit(EPOCHS)
    else: learn.fit_one_cycle(EPOCHS, moms=None)
    _, valid_dl = get_dls(valid_ds, valid_ds, 256)
    stats = learn.validate(valid_dl)
    return dict(kind=kind, arm=arm, seed=seed, rate=f'{lr:.3g}', train_loss=learn.cb(AvgStatsCallback).rows[-1]['train_loss'], **stats,
                cpu_seconds=time.process_time() - started)


def next_rate(arm, tried):
    "The next n to try, given `{n: accuracy}`: five around the first guess, then beyond the best while that is at an end. None: enough."
    guess = ARMS[arm][1]
    for n in (guess, guess + 1, guess - 1, guess + 2, guess - 2):
        if n not in tried: return n
    best = max(tried, key=tried.get)
    if best == max(tried): return best + 1
    return best - 1 if best == min(tried) else None


def times(train_ds, rounds=60):
    "Medians over `rounds`, in each of which every optimizer has one batch. CPU time: on a machine that others use, the clock would time them too."
    spent, learners = {a: [] for a in ARMS}, {a: get_learner(a, 1e-6, train_ds, 0) for a in ARMS}
    xb, yb = normalize(train_ds.x[:BS]).contiguous(memory_format=torch.channels_last), train_ds.y[:BS]
    for learn in learners.values(): learn.ready_opt()
    for _ in range(rounds + 3):
        for arm, learn in learners.items():
            started = time.process_time()
            F.cross_entropy(learn.model(xb), yb).backward()
            stepping = time.process_time()
            learn.opt.step()
            done = time.process_time()
            learn.opt.zero_grad()
            spent[arm].append((done - started, done - stepping))
    for arm, ts in spent.items():
        batch, step = (1e3*statistics.median(t) for t in zip(*ts[3:]))
        yield dict(kind='time', arm=arm, batch_ms=f'{batch:.2f}', step_ms=f'{step:.3f}')


def write(row):
    row = {k: f'{v:.5g}' if isinstance(v, float) else v for k, v in row.items()}
    with open(OUT, 'a', newline='') as f: csv.DictWriter(f, FIELDS, lineterminator='\n').writerow(row)
    print(*(v for v in row.values()), flush=True)


def written():
    return list(csv.DictReader(l for l in open(OUT) if l[0] != '#'))


def tried(arm):
    "`{n: accuracy}` on the held-out pictures so far."
    of = {f'{10**(n/2):.3g}': n for n in range(-30, 30)}
    return {of[r['rate']]: float(r['accuracy']) for r in written() if r['kind'] == 'rate' and r['arm'] == arm}


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--arms', nargs='+', default=list(ARMS), choices=list(ARMS), metavar='ARM', help=f'of {", ".join(ARMS)}')
    p.add_argument('--most', type=int, default=10**6, help='stop after this many trainings')
    a = p.parse_args()
    keep_freed_memory()
    if not OUT.exists():
        OUT.write_text(f'# python experiments/since_2019.py: {N_TRAIN:,} training pictures, batch size {BS}, {EPOCHS} epochs of one cycle; rate: seed {TUNING_SEED}, '
                       f'1,894 held-out training pictures\n# imagenette2-160 at {SIZE} px, final: 3,925 validation images; torch {torch.__version__}, '
                       f'python {platform.python_version()}, {CudaCallback().device}, {torch.get_num_threads()} threads; seeds choose pictures, order and weights\n'
                       + ','.join(FIELDS) + '\n')
    path = untar_data(URLs.IMAGENETTE_160)
    classes = sorted(d.name for d in (path/'train').iterdir() if d.is_dir())
    full, valid = (load(path/s, classes) for s in ('train', 'val'))
    order, left = shuffled(len(full), 2019), a.most
    held = order[:len(full)//5 + 1]
    part = order[len(held):][:N_TRAIN]
    for arm in a.arms:
        while left and (n := next_rate(arm, tried(arm))) is not None:
            write(train('rate', arm, TUNING_SEED, n, rows(full, part), rows(full, held)))
            left -= 1
    for seed in a.seeds:
        chosen = shuffled(len(full), seed)[:N_TRAIN]
        done = {r['arm'] for r in written() if r['kind'] == 'final' and r['seed'] == str(seed)}
        for arm in [arm for arm in a.arms if arm not in done][:left]:
            best = max(tried(arm), key=tried(arm).get)
            write(train('final', arm, seed, best, rows(full, chosen), valid))
            left -= 1
    if left and a.arms == list(ARMS) and not any(r['kind'] == 'time' for r in written()):
        for row in times(full): write(row)


if __name__ == '__main__': main()
