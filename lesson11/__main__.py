"""`exp-lab DIR`: the course, out of an installed package, where it can be read, run and changed."""
import argparse
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
COURSE = HERE/'course'                                  # setup.py puts it into the wheel
OPEN = 'jupyter lab --LabApp.default_url=/lab/tree/nbs/index.ipynb'
CLONE = f'lesson11 is installed from {HERE.parent}, which is the course itself: open that'


def copy_new(course, to):
    """Copies the files of the folder `course` to the same places in `to`, over none that is there.

    Returns how many are new, and how many were there."""
    files = [p for p in sorted(course.rglob('*')) if p.is_file() and p.parent.name != '__pycache__']
    new = 0
    for file in files:
        there = to/file.relative_to(course)
        if os.path.lexists(there): continue
        there.parent.mkdir(parents=True, exist_ok=True)
        begun = there.with_name(f'.{there.name}.part')  # one that is broken off is under this name
        shutil.copyfile(file, begun)
        begun.rename(there)
        new += 1
    return new, len(files) - new


def main(args=None):
    "`exp-lab`. Returns the exit status: 0, the course is in DIR; 2, it is not, and why."
    p = argparse.ArgumentParser('exp-lab', description='The course into DIR, over nothing there.')
    p.add_argument('dir', metavar='DIR', type=Path, help='a folder, made where there is none')
    to = p.parse_args(args).dir.expanduser()
    try:
        if not COURSE.is_dir(): raise OSError(CLONE)
        new, old = copy_new(COURSE, to)
    except OSError as e:
        print(f'exp-lab: {e}', file=sys.stderr)
        return 2
    kept = f'; {old} stay as they were' if old else ''
    need = '' if find_spec('jupyterlab') else '    pip install "lesson11[nb]"\n'
    print(f'{new} new files in {to}{kept}\nTo open the course:\n\n    cd "{to}"\n{need}    {OPEN}\n'
          '\nTo change the package as well: pip install -e . in that folder.')
    return 0


if __name__ == '__main__': sys.exit(main())
