"""What the slides say of LSUV, measured (its accuracy beside the other starts: lsuv_claims.py): each claim a csv beside this file, a row a run, written as soon as it is done.

    EXP_MIRROR=../shared/mirror python experiments/lsuv_slides.py start       # or once, cost, mnist; goes on where it stopped
    EXP_MIRROR=../shared/mirror python experiments/lsuv_slides.py mnist --held-out 10000     # to choose a recipe: prints, writes nothing

`start`  orthonormal weights (LSUV) beside Kaiming's, both scaled to unit variance, on nets of 5 and 20 layers; Kaiming and LSUV on a thin and deep net beside a wide one
`once`   standard deviations by layer at steps 0, 100 and 1,000 for Kaiming, LSUV and batch norm
`cost`   seconds of a training step without and with batch norm and of `lsuv_init`, turn by turn in one run
`mnist`  the lesson's CNN on all 60,000 digits, judged once by the 10,000
For one seed everything but what an arm is named for is the same: pictures, their order, net, schedule. No rate was chosen by these results.
"""
import argparse
import csv
import itertools
import math
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from exp.annealing import ParamScheduler, combine_scheds, cos_1cycle_anneal
from exp.batchnorm import conv_layer
from exp.callbacks import AvgStatsCallback, DataBunch, Dataset, Recorder, accuracy, get_dls, get_runner
from exp.convnets import Hooks, Lambda, flatten, get_cnn_model, init_cnn
from exp.datasets import URLs, mnist, untar_data
from exp.lsuv import lsuv_init

HERE = Path(__file__).parent


# data

def digits(n_train=6_000, n_valid=2_000):
    "Datasets of every so many of MNIST's digits, (N, 1, 28, 28), mean 0 and std 1."
    xt, yt, xv, yv = mnist()
    m, s = xt.mean(), xt.std()
    def part(x, y, n): return Dataset(((x[::max(1, len(x)//n)] - m)/s).view(-1, 1, 28, 28), y[::max(1, len(x)//n)])
    return part(xt, yt, n_train), part(xv, yv, n_valid)


def photos(n_train=1_500, n_valid=1_000, size=32):
    "Datasets of Imagenette's pictures, evenly over all of them, (N, 3, 32, 32); 117 and 72: about the mean and deviation of these pixels."
    def pixels(p):
        with Image.open(p) as im: im = im.convert('RGB').resize((size, size), Image.Resampling.BILINEAR)
        return torch.frombuffer(bytearray(im.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)
    def part(split, n):
        root = untar_data(URLs.IMAGENETTE_160)/split
        items = [(p, i) for i, c in enumerate(sorted(d for d in root.iterdir() if d.is_dir())) for p in sorted(c.iterdir())]
        items = [items[i*len(items)//n] for i in range(n)]
        return Dataset((torch.stack([pixels(p) for p, _ in items]).float() - 117)/72, torch.tensor([c for _, c in items]))
    return part('train', n_train), part('val', n_valid)


# nets

def plain(c_in, widths, halve, norm=None):
    "A convolution for each of `widths`, stride 2 at the places in `halve`, with nothing to help the signal along but `norm`; then pool and linear layer."
    convs = [conv_layer(i, o, stride=2 if n in halve else 1, norm=norm) for n, (i, o) in enumerate(itertools.pairwise([c_in, *widths]))]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), Lambda(flatten), nn.Linear(widths[-1], 10))


def get_net(name, data, norm=None):
    if name == 'lesson5': return get_cnn_model(data, [16, 32] if data.c_in == 1 else [64, 64], conv_layer, norm=norm)
    if name == 'plain20': return plain(data.c_in, [16]*6 + [32]*7 + [64]*7, (0, 1, 6, 13), norm)
    if name == 'thin22': return plain(data.c_in, [16]*22, (0, 1, 7, 14), norm)
    if name == 'wide8': return plain(data.c_in, [64]*8, (0, 1, 3, 5), norm)


def started(model, start, xb):
    "`model` with the weights of this start."
    if start.startswith('kaiming'): init_cnn(model)
    if start == 'kaiming scaled': lsuv_init(model, xb, orthonormal=None)
    if start == 'lsuv': lsuv_init(model, xb)
    return model


def sgd(ps, lr): return torch.optim.SGD(ps, lr, momentum=.9)


def one_cycle(lr): return ParamScheduler('lr', combine_scheds([.3, .7], cos_1cycle_anneal(lr/3, lr, lr/10)))


def shown(v): return f'{v:.4g}' if math.isfinite(v) else 'nan'


# claims: for each its fields (the key of an arm, then what is measured), its arms, and what runs one

SETS, EPOCHS, BS = {'mnist': digits, 'imagenette': photos}, {'mnist': 1, 'imagenette': 3}, {'mnist': 64, 'imagenette': 32}
loaded = {}


def start_arms(seeds):
    for seed in range(seeds):
        for (name, lr), net, start in itertools.product((('mnist', .01), ('imagenette', .02)), ('lesson5', 'plain20'), ('kaiming scaled', 'lsuv')): yield name, net, lr, start, seed
        for net, start in itertools.product(('thin22', 'wide8'), ('kaiming', 'lsuv')): yield 'mnist', net, .02, start, seed


def start_run(name, net, lr, start, seed):
    "One training; the curve is the mean loss of each tenth of it."
    if name not in loaded: loaded[name] = SETS[name]()
    sets = loaded[name]
    data = DataBunch(*get_dls(*sets, BS[name], seed=seed), c_in=sets[0].x.shape[1], c_out=10)
    torch.manual_seed(seed)
    model = started(get_net(net, data), start, sets[0].x[:256])
    st, rec = AvgStatsCallback(accuracy, silent=True), Recorder()
    get_runner(model, data, lr, [st, rec, one_cycle(lr)], opt_func=sgd).fit(EPOCHS[name])
    tenths = [statistics.mean(l) for l in zip(*[iter(rec.losses)]*(len(rec.losses)//10))][:10]
    yield {'accuracy': shown(st.rows[-1]['valid_accuracy']), 'valid_loss': shown(st.rows[-1]['valid_loss']), 'curve': ' '.join(map(shown, tenths))}


def once_arms(seeds): return itertools.product(('kaiming', 'lsuv', 'batch'), range(seeds))


def once_run(start, seed, steps=(0, 100, 1000)):
    """1,000 steps of plain20 on 60,000 digits at a constant rate. By layer: std of the convolution's output, of what the layer hands on (after the ReLU, and the norm
    where there is one), and the root mean square of the channels' means of that."""
    ds, _ = digits(60_000)
    data = DataBunch(*get_dls(ds, ds, 16, seed=seed), c_in=1, c_out=10)
    torch.manual_seed(seed)
    model = started(get_net('plain20', data, nn.BatchNorm2d if start == 'batch' else None), 'kaiming' if start == 'batch' else start, ds.x[:256])
    opt, losses = sgd(model.parameters(), .01), []
    def look():
        def keep(hook, mod, inp, out): hook.std, hook.means = out.std().item(), out.mean((0, 2, 3)).square().mean().sqrt().item()
        blocks = list(model)[:20]
        with torch.no_grad(), Hooks([b[0] for b in blocks], keep) as convs, Hooks(blocks, keep) as outs:
            buffers = [b.clone() for b in model.buffers()]
            model(ds.x[:256])
            for b, old in zip(model.buffers(), buffers): b.copy_(old)
        by_layer = {'conv_std': [h.std for h in convs], 'out_std': [h.std for h in outs], 'channel_means': [h.means for h in outs]}
        return {k: ' '.join(map(shown, v)) for k, v in by_layer.items()}
    batches = itertools.islice((b for _ in range(2) for b in data.train_dl), steps[-1] + 1)
    for step, (xb, yb) in enumerate(batches):
        seen = look() if step in steps else None
        loss = F.cross_entropy(model(xb), yb)
        losses.append(loss.item())
        if seen: yield {'step': step, 'loss': shown(statistics.mean(losses[-20:])), **seen}
        loss.backward()
        opt.step()
        opt.zero_grad()


def cost_arms(seeds): return itertools.product(('lesson5', 'plain20'), range(seeds))


def cost_run(net, seed, turns=40):
    "Medians of `turns` turns, each of which does all of it once: a batch of 64 digits."
    ds, _ = digits(6_000)
    data, x, y = DataBunch(None, None, 1, 10), ds.x[:64], ds.y[:64]
    torch.manual_seed(seed)
    models = {k: init_cnn(get_net(net, data, norm)) for k, norm in (('none', None), ('batch', nn.BatchNorm2d))}
    opts = {k: sgd(m.parameters(), .001) for k, m in models.items()}
    def step(k):
        F.cross_entropy(models[k](x), y).backward()
        opts[k].step()
        opts[k].zero_grad()
    fresh = get_net(net, data)
    work = {'step_none': lambda: step('none'), 'step_batch': lambda: step('batch'), 'lsuv_init': lambda: lsuv_init(fresh, x)}
    times = {k: [] for k in work}
    for turn in range(turns + 5):
        for k, f in work.items():
            t = time.perf_counter()
            f()
            if turn >= 5: times[k].append(time.perf_counter() - t)
    yield {k: f'{1e3*statistics.median(v):.3f}' for k, v in times.items()}


def mnist_arms(seeds): return [*((seed, 'lsuv') for seed in range(seeds)), *itertools.product(range(seeds), ('kaiming', 'batch'))]


def moved(x, turn=.12, scale=.1, shift=1.5):
    "Each picture of the batch turned by up to `turn` radians, scaled by up to `scale` and moved by up to `shift` pixels."
    n, r = len(x), 2*torch.rand(4, len(x)) - 1
    a, s = r[0]*turn, 1 + r[1]*scale
    theta = torch.stack([s*a.cos(), -s*a.sin(), r[2]*2*shift/28, s*a.sin(), s*a.cos(), r[3]*2*shift/28], 1).view(n, 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), padding_mode='border', align_corners=False)


MNIST = dict(nfs=[64, 128, 256], lr=.05, wd=5e-4, epochs=8, bs=128)


def mnist_run(seed, start, held_out=0):
    "The lesson's CNN on all digits but the last `held_out` of the training set, which are then the judges in place of the test set."
    a = argparse.Namespace(**MNIST)
    train, test = digits(60_000, 10_000)
    if held_out: train, test = Dataset(train.x[:-held_out], train.y[:-held_out]), Dataset(train.x[-held_out:], train.y[-held_out:])
    data = DataBunch(*get_dls(train, test, a.bs, seed=seed), c_in=1, c_out=10)
    torch.manual_seed(seed)
    model = get_cnn_model(data, a.nfs, conv_layer, norm=nn.BatchNorm2d if start == 'batch' else None)
    model = started(model, 'kaiming' if start == 'batch' else start, train.x[:256]).to(memory_format=torch.channels_last)
    class Move:
        _order = 2
        def begin_batch(self, run):
            if run.in_train: run.xb = moved(run.xb)
            run.xb = run.xb.to(memory_format=torch.channels_last)

    class Halves(nn.Module):
        "The model in bfloat16 where autocast thinks so; scores in float32. Half the time on this CPU."
        def __init__(self): super().__init__(); self.model = model
        def forward(self, x):
            with torch.autocast('cpu', torch.bfloat16): return self.model(x).float()
    def opt(ps, lr): return torch.optim.SGD(ps, lr, momentum=.9, weight_decay=a.wd, nesterov=True)
    st, t = AvgStatsCallback(accuracy, silent=bool(not held_out)), time.process_time()
    get_runner(Halves(), data, a.lr, [Move(), st, one_cycle(a.lr)], opt_func=opt).fit(a.epochs)
    yield {'params': sum(p.numel() for p in model.parameters()), 'accuracy': f"{st.rows[-1]['valid_accuracy']:.4f}", 'train_loss': shown(st.rows[-1]['train_loss']),
           'cpu_seconds': f'{time.process_time() - t:.0f}'}


CLAIMS = {
    'start': (['data', 'net', 'lr', 'start', 'seed'], ['accuracy', 'valid_loss', 'curve'], start_arms, start_run,
              'mnist: 6,000 training and 2,000 validation digits, 1 epoch, batch 64; imagenette (160 px): 1,500 and 1,000 pictures of 32 px, 3 epochs, batch 32; SGD, momentum 0.9, one cycle'),
    'once': (['start', 'seed'], ['step', 'loss', 'conv_std', 'out_std', 'channel_means'], once_arms, once_run,
             'plain20 on 60,000 digits of MNIST, batch 16, SGD, lr 0.01, momentum 0.9; loss: mean of the last 20 batches; layers looked at on 256 training digits in training mode'),
    'cost': (['net', 'seed'], ['step_none', 'step_batch', 'lsuv_init'], cost_arms, cost_run, 'milliseconds, a batch of 64 digits of MNIST; medians of 40 turns'),
    'mnist': (['seed', 'start'], ['params', 'accuracy', 'train_loss', 'cpu_seconds'], mnist_arms, mnist_run, f'all 60,000 digits, each turned, scaled and moved a little; bfloat16 autocast; accuracy on the 10,000 after the last epoch; {MNIST}'),
}


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('claim', choices=CLAIMS)
    p.add_argument('--seeds', type=int, default=3, help='seeds 0, 1, … (3)')
    p.add_argument('--limit', type=int, default=10**9, help='stop after this many runs; called again it goes on (all)')
    p.add_argument('--held-out', type=int, default=0, help='mnist: judge by this many training digits that are not trained on, with seed 100; nothing is written')
    p.add_argument('--arms', nargs='+', default=['kaiming', 'lsuv', 'batch'], help='mnist with --held-out: these starts only')
    a = p.parse_args()
    keys, measured, arms, run, what = CLAIMS[a.claim]
    if a.held_out:
        for start in a.arms: print(start, *mnist_run(100, start, a.held_out), flush=True)
        return
    out = HERE/f'lsuv_{a.claim}.csv'
    if not out.exists():
        out.write_text(f'# EXP_MIRROR=../shared/mirror python experiments/lsuv_slides.py {a.claim} --seeds {a.seeds}\n'
                       f'# torch {torch.__version__}, python {platform.python_version()}, CPU, {torch.get_num_threads()} threads\n# {what}\n' + ','.join(keys + measured) + '\n')
    with open(out) as f: done = {tuple(r[k] for k in keys) for r in csv.DictReader(l for l in f if l[0] != '#')}
    for arm in [x for x in arms(a.seeds) if tuple(map(str, x)) not in done][:a.limit]:
        rows = [{**dict(zip(keys, arm)), **r} for r in run(*arm)]                 # a run's rows together, or none
        with open(out, 'a', newline='') as f: csv.DictWriter(f, keys + measured, lineterminator='\n').writerows(rows)
        print(*arm, *(r.get('accuracy', r.get('loss', '')) for r in rows), flush=True)


if __name__ == '__main__': main()
