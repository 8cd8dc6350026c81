"""How much of a training step the optimizer is, by the plain loop and compiled: writes optimizer_share.csv beside itself.

    python experiments/optimizer_share.py [--turns N]

Half an XResNet-18, 64 random pictures of 64 px, channels last, in bfloat16 where this CPU computes in it: as `make run` trains. A step is forward, loss, backward and optimizer; what is under `step`
is the rest without the optimizer. All optimizers take turns in one run, medians of N turns; `compile` are the seconds of the optimizer's
second and third step, where its programs are made (with an empty cache of the compiler)."""
import argparse
import csv
import os
import platform
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from exp.fast_optimizers import Compiled
from exp.faster import cpu_bf16
from exp.optimizers import adam_opt, each, lamb, sgd_mom_opt
from exp.xresnet import xresnet18

OPTS = {'momentum': partial(sgd_mom_opt, wd=.01), 'adam': partial(adam_opt(), wd=.01), 'lamb': partial(lamb, wd=.01)}


def clock(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def main(turns=25):
    torch.manual_seed(0)
    os.environ['TORCHINDUCTOR_CACHE_DIR'] = tempfile.mkdtemp()
    net = xresnet18(3, 10, width=.5).to(memory_format=torch.channels_last)
    xb, yb = torch.randn(64, 3, 64, 64).to(memory_format=torch.channels_last), torch.randint(0, 10, (64,))
    def gradients():
        net.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=bool(cpu_bf16())): pred = net(xb)
        F.cross_entropy(pred.float(), yb).backward()
    gradients()
    opts = {(name, how): f(net.parameters(), lr=1e-6, run=run) for name, f in OPTS.items() for how, run in (('loop', each), ('compiled', Compiled()))}
    made = {}
    for k, opt in opts.items():
        opt.step()
        made[k] = clock(lambda opt=opt: (opt.step(), opt.step()))
    rest, times = [], {k: [] for k in opts}
    for _ in range(turns):
        rest.append(clock(gradients))
        for k, opt in opts.items(): times[k].append(clock(opt.step))
    step = statistics.median(rest)
    with open(Path(__file__).with_suffix('.csv'), 'w', newline='', encoding='utf-8') as f:
        print('# python experiments/optimizer_share.py: half XResNet-18, 64 pictures of 64 px; milliseconds, compile in seconds', file=f)
        print(f'# torch {torch.__version__}, python {platform.python_version()}, cpu ({"bfloat16, " + cpu_bf16() if cpu_bf16() else "float32"}), {torch.get_num_threads()} threads, medians of {turns} turns; seed 0', file=f)
        out = csv.writer(f, lineterminator='\n')
        out.writerow(['optimizer', 'loop', 'compiled', 'step', 'share loop', 'share compiled', 'compile'])
        for name in OPTS:
            a, b = (statistics.median(times[name, how]) for how in ('loop', 'compiled'))
            out.writerow([name, *(f'{1e3*t:.2f}' for t in (a, b, step)), *(f'{t/(t + step):.3f}' for t in (a, b)), f'{made[name, "compiled"]:.1f}'])


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--turns', type=int, default=25)
    main(p.parse_args().turns)
