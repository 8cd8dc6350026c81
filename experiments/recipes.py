"""What the recipes of exp-train reach on all of Imagenette: writes recipes.csv beside itself, a row for each training.

    EXP_MIRROR=../shared/mirror python experiments/recipes.py [--rows lesson "5 epochs" …] [--seeds 0 1 2] [--most N] [--again]

A row of RUNS is a name and the options of exp-train behind it. Optimizer, rate and batch size were chosen on a fifth of the training set that was
held out, for 5 epochs; the rows of 13, 38 and 42 epochs take them over and no setting of theirs was compared. (38 is what two threads
have time for in a quarter of an hour, by the 16 minutes that 42 took them.) The row of 26 epochs was chosen by five_minutes.py, on held-out training
pictures too, and 26 is what two threads have time for in five minutes, by what 6 took them; its optimizer and decay of '26 epochs, Muon' by speed_run.py. The rows of 60 and 85 have a deeper network
and pictures that are harder to know by heart (DEEPER): put together by what is usual, and judged once on held-out training pictures
(recipes_held_out.csv). The 3,925 validation pictures judge each row once for
each seed. `cpu_seconds` is what all threads together took, loading included: on a machine that is shared it says more than a clock. `arithmetic`
says what the convolutions were computed in: exp-train takes bfloat16 on a processor that has it ("AVX-512 BF16"), float32 elsewhere, and the seconds
of the two are of two machines. A row that the csv holds, in whichever arithmetic, is not run again unless --again asks for it in this machine's;
a training that was broken off goes on from its last whole epoch (runs/).
"""
import argparse
import csv
import platform
import shutil
from pathlib import Path

from sittings import RUNS as FOLDER
from sittings import sitting

from exp.faster import cpu_bf16
from exp.train import get_parser, train

OUT = Path(__file__).with_suffix('.csv')
FIELDS = ['recipe', 'seed', 'accuracy', 'valid_loss', 'train_loss', 'data', 'n_train', 'n_valid', 'size', 'epochs', 'device', 'arithmetic', 'threads', 'cpu_seconds', 'seconds', 'torch', 'command']
DEEPER = '--arch xresnet34 --tfms strong --mixup .2 --wd .03'
RUNS = {'lesson': '--recipe lesson',
        '5 epochs': '--recipe cpu',
        '26 epochs': '--recipe cpu --epochs 26 --wd .03 --validate 0',
        '26 epochs, Muon': '--recipe cpu --opt muon --bs 128 --wd .1 --epochs 26 --validate 0',
        '13 epochs': '--recipe cpu --epochs 13 --crops 64-96 --size 112 --validate 0',
        '38 epochs': '--recipe cpu --epochs 38 --crops 64-112 --size 128 --validate 0',
        '42 epochs': '--recipe cpu --epochs 42 --crops 64-112 --size 128 --validate 0',
        '60 epochs': f'--recipe cpu {DEEPER} --epochs 60 --crops 64-112 --size 128 --validate 0',
        '85 epochs': f'--recipe cpu {DEEPER} --epochs 85 --crops 64-112 --size 128 --validate 0'}


def arithmetic(r):
    "What `r`, the settings of a training on a CPU, computes in: float32, or bfloat16 and the instructions for it."
    how = cpu_bf16() if r['bf16'] is not False else None
    return f'bfloat16 ({how})' if how else 'float32'


def run(name, seed):
    options = f'--data imagenette {RUNS[name]} --seed {seed}'
    folder = FOLDER/f'recipes/{name.replace(" ", "-")}-seed-{seed}'
    with sitting(folder) as cpu:
        r = train(get_parser().parse_args([*options.split(), '--log-dir', str(folder), '--resume']))
        last = r['rows'][-1]
        row = {k: r[k] for k in FIELDS if k in r} | dict(recipe=name, accuracy=round(r['accuracy'], 5), valid_loss=round(last['valid_loss'], 5),
              train_loss=round(last['train_loss'], 5), arithmetic=arithmetic(r), seconds=round(r['seconds']), cpu_seconds=round(cpu()), command='exp-train ' + RUNS[name])
    return row, folder


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--rows', nargs='+', choices=list(RUNS), default=['lesson', '5 epochs', '26 epochs'])
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--most', type=int, default=10**6, help='stop after this many trainings')
    p.add_argument('--again', action='store_true', help="also rows that the csv holds in another arithmetic than this machine's")
    a = p.parse_args()
    if not OUT.exists():
        cpu = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), '') if Path('/proc/cpuinfo').exists() else ''
        OUT.write_text(f'# python experiments/recipes.py; python {platform.python_version()}, {platform.machine()}, {cpu}\n' + ','.join(FIELDS) + '\n')
    rows = [*csv.DictReader(l for l in OUT.read_text().splitlines() if l[0] != '#')]
    done = {(r['command'], int(r['seed'])) for r in rows if not a.again or r['arithmetic'] == arithmetic({'bf16': None})}
    todo = [(n, s) for n in a.rows for s in a.seeds if ('exp-train ' + RUNS[n], s) not in done]
    for name, seed in todo[:a.most]:
        row, folder = run(name, seed)
        with OUT.open('a', newline='') as f: csv.DictWriter(f, FIELDS, lineterminator='\n').writerow(row)
        shutil.rmtree(folder)


if __name__ == '__main__': main()
