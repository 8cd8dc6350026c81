"""`make bench`: ours and the peers on the same work, turn by turn in one run; one table of medians and ratios.

A benchmark is a function that returns `{name: callable}`; the first name is the one the ratios are to. It may raise `Skip`,
and puts `None` for a peer that is not installed. Every turn runs each callable once, so that a noisy machine disturbs all alike.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import Skip, data_block, distributed, interpret, learner, lsuv, mixed_precision, optimizers, transforms, xresnet

ROOT = Path(__file__).resolve().parent.parent


def python(code): subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)


def import_time():
    "A fresh process that imports torch alone, and one that imports every module of exp."
    mods = [p.stem for p in (ROOT/'exp').glob('*.py') if p.stem[0] != '_']
    return {'import torch': lambda: python('import torch'),
            'import torch, matplotlib, PIL': lambda: python('import torch, PIL.Image, PIL.ImageOps, matplotlib.pyplot'),
            'all of exp': lambda: python('import ' + ', '.join(f'exp.{m}' for m in mods))}


def export():
    "All notebooks to modules, each command in a fresh process and a copy of the project."
    import shutil
    d = Path(tempfile.mkdtemp())
    for f in ('nbs', 'exp'): shutil.copytree(ROOT/f, d/f, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    shutil.copy(ROOT/'pyproject.toml', d)
    exe = Path(sys.executable).with_name('nbdev-export')
    if not exe.exists(): raise Skip('nbdev is not installed')
    def run(*args): subprocess.run([str(a) for a in args], cwd=d, check=True, capture_output=True, env={**os.environ, 'PYTHONPATH': str(d)})
    return {'nbdev-export': lambda: run(exe), 'exp-export': lambda: run(sys.executable, '-m', 'exp.export')}


def epoch(n=1024, size=128):
    "One training epoch of the lesson's CNN on `n` pictures in memory: a bare PyTorch loop, the same with our memory order, and ours with loss and accuracy kept."
    import torch
    import torch.nn.functional as F
    from exp.batchnorm import conv_layer
    from exp.callbacks import AvgStatsCallback, DataBunch, Dataset, accuracy, get_dls
    from exp.convnets import get_cnn_model, init_cnn
    from exp.data_block import NormalizeBytes
    from exp.recipes import NFS, get_training
    g = torch.Generator().manual_seed(0)
    ds = Dataset(torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=g), torch.randint(0, 10, (n,), generator=g))
    none = Dataset(ds.x[:2], ds.y[:2])
    data, norm = DataBunch(*get_dls(ds, none, 64, seed=0), c_in=3, c_out=10), NormalizeBytes.fit(ds)

    def bare(memory_format=torch.contiguous_format):
        torch.manual_seed(0)
        model = init_cnn(get_cnn_model(data, NFS, conv_layer)).to(memory_format=memory_format)
        opt = torch.optim.SGD(model.parameters(), lr=.1)
        model.train()
        total = torch.zeros(2)
        for idx in torch.randperm(n).split(64):
            xb, yb = norm(ds.x[idx]), ds.y[idx]
            pred = model(xb)
            loss = F.cross_entropy(pred, yb)
            loss.backward()
            opt.step()
            opt.zero_grad()
            total += torch.stack([loss.detach(), (pred.argmax(1) == yb).float().mean()])*len(xb)
    return {'bare loop': bare, 'bare loop, channels last': lambda: bare(torch.channels_last),
            'exp Learner': lambda: get_training(data, 'lesson', 'cpu', 0, cbs=[AvgStatsCallback(accuracy, silent=True)]).fit(1)}


BENCHMARKS = {'epoch': epoch, 'export': export, 'import': import_time,
              **{k: f for m in (lsuv, data_block, optimizers, learner, transforms, mixed_precision, xresnet, interpret, distributed) for k, f in m.BENCHMARKS.items()}}


def measure(work, turns):
    "Median seconds of each callable over `turns` turns, after one turn to warm up."
    times = {k: [] for k in work}
    for turn in range(turns + 1):
        for k, f in work.items():
            t = time.perf_counter()
            f()
            if turn: times[k].append(time.perf_counter() - t)
    return {k: statistics.median(v) for k, v in times.items()}


def main(args=None):
    p = argparse.ArgumentParser('benchmarks', description=__doc__.split('\n')[0])
    p.add_argument('names', nargs='*', help=f'which ({", ".join(BENCHMARKS)}; default all)')
    p.add_argument('--turns', type=int, default=5, help='turns after the warm-up; medians are over these (5)')
    p.add_argument('--json', metavar='FILE', help='write the result here too')
    a = p.parse_args(args)
    import torch
    if unknown := set(a.names) - set(BENCHMARKS): p.error(f'no benchmark {", ".join(unknown)}; there is {", ".join(BENCHMARKS)}')
    head = dict(torch=torch.__version__, python=platform.python_version(), threads=torch.get_num_threads(), cpu=platform.processor() or platform.machine(), turns=a.turns)
    print(' · '.join(f'{k} {v}' for k, v in head.items()), f'\n\n{"benchmark":<14} {"what":<34} {"median s":>9} {"ratio":>7}', sep='')
    rows = []
    for name in a.names or BENCHMARKS:
        try: work = BENCHMARKS[name]()
        except (Skip, ImportError) as e: print(f'{name:<14} skipped: {e}'); continue
        for k in [k for k, f in work.items() if f is None]: print(f'{name:<14} {k:<34} skipped: not installed'); del work[k]
        times = measure(work, a.turns)
        first = next(iter(times.values()))
        for k, t in times.items():
            rows.append(dict(benchmark=name, what=k, seconds=t, ratio=t/first))
            print(f'{name:<14} {k:<34} {t:>9.3f} {t/first:>7.3f}', flush=True)
    if a.json: Path(a.json).write_text(json.dumps({**head, 'rows': rows}, indent=1))


if __name__ == '__main__': main()
