"""Smaller pictures train faster: the lesson's CNN by `exp-train`, 5 epochs of one cycle, at three sizes and three seeds on all of Imagenette.

Each (size, seed) is a process of its own, appended to data_block_sizes.csv when it is done; what is there already is not run again.

    python experiments/data_block_sizes.py                        # all nine, about an hour on 2 CPU cores
    python experiments/data_block_sizes.py --sizes 64 --seeds 0   # one of them
"""
import argparse
import csv
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

OUT = Path(__file__).with_suffix('.csv')
COLS = ['size', 'seed', 'epochs', 'accuracy', 'fit_seconds', 'total_seconds', 'cpu_seconds', 'n_train', 'n_valid', 'data', 'device', 'threads', 'torch']


def done(out):
    if not out.exists(): return set()
    rows = csv.DictReader(l for l in out.read_text().splitlines() if l[0] != '#')
    return {(int(r['size']), int(r['seed'])) for r in rows}


def one(size, seed, epochs, keep, data):
    "Run `exp-train` and return its result as a row."
    def cpu(): r = resource.getrusage(resource.RUSAGE_CHILDREN); return r.ru_utime + r.ru_stime      # less at the mercy of neighbours than the clock
    before = cpu()
    file = Path(keep or tempfile.mkdtemp())/f'size{size}_seed{seed}.json'
    subprocess.run([sys.executable, '-m', 'exp.train', '--recipe', 'lesson', *(['--data', data] if data else []), '--epochs', str(epochs), '--size', str(size),
                    '--seed', str(seed), '--json', str(file)], check=True, cwd=OUT.parent.parent)
    r = json.loads(file.read_text())
    return {**{c: r.get(c) for c in COLS}, 'accuracy': round(r['accuracy'], 5), 'fit_seconds': round(sum(e['time'] for e in r['rows']), 1),
            'total_seconds': round(r['seconds'], 1), 'cpu_seconds': round(cpu() - before, 1),
            'threads': os.environ.get('OMP_NUM_THREADS', os.cpu_count())}


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--sizes', type=int, nargs='*', default=[64, 96, 128])
    p.add_argument('--seeds', type=int, nargs='*', default=[0, 1, 2])
    p.add_argument('--epochs', type=int, default=5)
    p.add_argument('--data', default='imagenette', help='as exp-train takes it')
    p.add_argument('--json', metavar='FOLDER', help="keep exp-train's json files here")
    p.add_argument('--out', type=Path, default=OUT)
    a = p.parse_args()
    if not a.out.exists():
        a.out.write_text(f'# command: python experiments/{Path(__file__).name}; each row: exp-train --recipe lesson --epochs {a.epochs} --size SIZE --seed SEED\n'
                         f'# data set: {a.data}; python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores\n{",".join(COLS)}\n')
    for size in a.sizes:
        for seed in a.seeds:
            if (size, seed) in done(a.out): continue
            row = one(size, seed, a.epochs, a.json, a.data)
            with a.out.open('a', newline='') as f: csv.DictWriter(f, COLS, lineterminator='\n').writerow(row)


if __name__ == '__main__': main()
