"""False training labels, and what label smoothing and mixup do about them: writes mixup_noise.csv beside itself, a row per run.

    EXP_MIRROR=../shared/mirror python experiments/mixup_noise.py [--noise .05 .5] [--arms plain smoothing mixup] [--seeds 0 1 2] [--most N]

Imagenette at 64 px, the lesson's CNN; the pictures, the false labels (exp.distillation.noisy_labels), the order and the weights follow from the seed,
so that for one seed and one share of noise the arms differ in nothing else. About 90 seconds a run on one core. Of the training pictures with a
false label, `false_label` is the share for which the network gives that label back, `true_label` the share for which it gives the true one.
A run that the csv already holds is not made again; whole seeds come first.
"""
import argparse
import csv
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from exp.batchnorm import conv_layer
from exp.callbacks import AvgStatsCallback, BatchTransformXCallback, CudaCallback, DataBunch, Dataset, accuracy, get_dls
from exp.convnets import keep_freed_memory
from exp.datasets import URLs, untar_data
from exp.learner import get_learner, set_seed
from exp.distillation import noisy_labels
from exp.mixup import LabelSmoothing, Mixup
from exp.optimizers import sgd_mom_opt

FIELDS = ['noise', 'arm', 'seed', 'train_loss', 'valid_loss', 'valid_accuracy', 'false_label', 'true_label', 'seconds']
NFS, SIZE, BS, LR = [32, 32, 64, 128], 64, 64, .1
ARMS = {'plain': lambda seed: (F.cross_entropy, []), 'smoothing': lambda seed: (LabelSmoothing(.1), []),
        'mixup': lambda seed: (F.cross_entropy, [Mixup(1., seed=seed)])}


def load(folder, classes):
    "All pictures of `folder`/CLASS at SIZE px: uint8 (N, 3, SIZE, SIZE), class indices (N,)."
    items = [(f, i) for i, c in enumerate(classes) for f in sorted((folder/c).iterdir()) if f.name[0] != '.']
    x = torch.empty(len(items), 3, SIZE, SIZE, dtype=torch.uint8)
    for n, (f, _) in enumerate(items):
        with Image.open(f) as im:
            im.draft('RGB', (2*SIZE, 2*SIZE))
            im = im.convert('RGB').resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        x[n] = torch.frombuffer(bytearray(im.tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3).permute(2, 0, 1)
    return x, torch.tensor([i for _, i in items])


def normalize(xb): return (xb.float() - 118)/71                        # about the mean and deviation of Imagenette's bytes


def run(share, arm, seed, train, valid, a):
    "Train once; the numbers of a row."
    started = time.perf_counter()
    idx = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))[:a.pictures]
    x, true = train[0][idx], train[1][idx]
    noisy = noisy_labels(true, share, 10, seed=seed)
    data = DataBunch(*get_dls(Dataset(x, noisy), Dataset(*valid), BS, seed=seed), c_in=3, c_out=10)
    loss, cbs = ARMS[arm](seed)
    set_seed(seed)
    stats = AvgStatsCallback(accuracy, silent=True)
    learn = get_learner(NFS, data, LR, conv_layer, loss, opt_func=sgd_mom_opt, cbs=[CudaCallback(), BatchTransformXCallback(normalize), stats])
    learn.model.to(memory_format=torch.channels_last)
    whole, data.valid_dl = data.valid_dl, None                          # validated once, at the end
    learn.fit_one_cycle(a.epochs, cbs=cbs)
    learn.loss_func, wrong = F.cross_entropy, noisy != true
    r = learn.validate(whole)
    answer = learn.get_preds(data.train_dl)[0].argmax(1)                # in the order of the items, whatever the loader's
    of_wrong = [(answer == t)[wrong].float().mean().item() if wrong.any() else float('nan') for t in (noisy, true)]
    return [stats.rows[-1]['train_loss'], r['loss'], r['accuracy'], *of_wrong, time.perf_counter() - started]


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--noise', type=float, nargs='+', default=[.05, .5], help='shares of false labels (.05 .5)')
    p.add_argument('--arms', nargs='+', default=list(ARMS), choices=list(ARMS))
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--most', type=int, default=10**6, help='stop after this many runs; called again it goes on (all)')
    p.add_argument('--pictures', type=int, default=2000, help='training pictures (2000)')
    p.add_argument('--epochs', type=int, default=14, help='epochs (14)')
    p.add_argument('--valid', type=int, help='validation pictures, evenly over the set (all)')
    p.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.csv'), help='the csv; one file holds one setting of pictures and epochs')
    a = p.parse_args()
    keep_freed_memory()
    path = untar_data(URLs.IMAGENETTE_160)
    classes = sorted(d.name for d in (path/'train').iterdir() if d.is_dir())
    cache = Path('/tmp')/f'{path.name}-mixup-noise-{SIZE}.pt'           # decoding takes a while; a copy of the bytes for the next call
    if not cache.exists(): torch.save([load(path/s, classes) for s in ('train', 'val')], cache)
    train, valid = torch.load(cache, weights_only=True)
    if a.valid: valid = [t[::-(-len(t)//a.valid)] for t in valid]
    what = f'# {path.name} at {SIZE} px: {a.pictures} training, {len(valid[1])} validation images, {a.epochs} epochs, batch size {BS}'
    if not a.out.exists():
        a.out.write_text(f'# python experiments/mixup_noise.py --pictures {a.pictures} --epochs {a.epochs}\n{what}\n'
                         f'# channels {NFS}, SGD with momentum, one cycle to lr {LR}; smoothing 0.1, mixup with alpha 1; seeds choose pictures, false labels, order and weights\n'
                         f'# torch {torch.__version__}, {CudaCallback().device}, {torch.get_num_threads()} threads\n' + ','.join(FIELDS) + '\n')
    elif what not in a.out.read_text().splitlines(): p.error(f'{a.out} was made with another setting; this one is: {what[2:]}. Choose another --out')
    done = {(float(r['noise']), r['arm'], int(r['seed'])) for r in csv.DictReader(l for l in open(a.out) if l[0] != '#')}
    todo = [(n, m, s) for s in a.seeds for n in a.noise for m in a.arms if (n, m, s) not in done][:a.most]
    for share, arm, seed in todo:
        row = dict(zip(FIELDS, [share, arm, seed, *(f'{v:.4f}' for v in run(share, arm, seed, train, valid, a))]))
        with open(a.out, 'a', newline='') as f: csv.DictWriter(f, FIELDS, lineterminator='\n').writerow(row)
        print(' '.join(f'{k} {v}' for k, v in row.items()), flush=True)
    print(f'{len(todo)} runs made, {len(done)} were there')


if __name__ == '__main__': main()
