"""A notebook, from standard input to standard output, as it is committed: without what JupyterLab notes when it opens, runs and saves one.

Outputs and their numbers stay. As a filter of git, for those who want it:

    git config filter.notebook.clean '.venv/bin/python tests/clean_notebook.py'
    echo '*.ipynb filter=notebook' >> .git/info/attributes"""
import json
import sys

OURS = dict(kernelspec=dict(display_name='python3', language='python', name='python3'), language_info=dict(name='python'))
KEPT = {'jupyter', 'tags'}                                 # of what a cell says of itself: folded answers, cells that are not for the README


def clean(nb):
    nb['metadata'] = OURS
    for c in nb['cells']: c['metadata'] = {k: v for k, v in c['metadata'].items() if k in KEPT}
    return nb


def written(nb): return (json.dumps(nb, ensure_ascii=False, indent=1, sort_keys=True) + '\n').encode()


if __name__ == '__main__': sys.stdout.buffer.write(written(clean(json.load(sys.stdin.buffer))))
