"""Every notebook is a test: it runs top to bottom in a real kernel, each cell twice; and what is committed is one whole, honest run."""
import json
import re
import time

import nbformat
import pytest
from conftest import NBS, ROOT, small_env
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ids = [p.stem for p in NBS]
TRAINS = 2.                                # seconds: a cell that takes longer runs once


def run_each_twice(client):
    "A learner runs cells again: what a cell makes or counts (a folder, a register, a step) may be there."
    for n, cell in enumerate(client.nb.cells, 1):
        if cell.cell_type != 'code' or not cell.source.strip(): continue
        start = time.perf_counter()
        client.execute_cell(cell, n - 1)
        if time.perf_counter() - start < TRAINS: client.execute_cell(cell, n - 1)


@pytest.mark.parametrize('path', NBS, ids=ids)
def test_runs_top_to_bottom(path, data_home, monkeypatch):
    for k, v in small_env(data_home).items(): monkeypatch.setenv(k, v)
    monkeypatch.setenv('MPLBACKEND', 'module://matplotlib_inline.backend_inline')
    for tried in range(3):
        nb = nbformat.read(path, 4)
        client = NotebookClient(nb, timeout=600, startup_timeout=300, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}})
        try:
            with client.setup_kernel(): run_each_twice(client)
            return
        except CellExecutionError as e:
            n, cell = next((i, c) for i, c in enumerate(nb.cells, 1) for o in c.get('outputs', []) if o.output_type == 'error')
            pytest.fail(f'{path.relative_to(ROOT)}:cell {n}, run for the first or the second time\n\n{cell.source}\n\n{e}', pytrace=False)
        except RuntimeError as e:                                    # the kernel died as it started: another process was quicker to take its port
            if 'before replying' not in str(e) or tried == 2: raise


@pytest.mark.parametrize('path', NBS, ids=ids)
def test_committed_outputs_are_one_whole_run(path):
    raw = json.loads(path.read_text(encoding='utf-8'))               # as it is in the file: reading by nbformat mends ids
    ids = [c.get('id') for c in raw['cells']]
    assert all(ids) and len(set(ids)) == len(ids), 'a cell without an id, or with that of another'
    assert not [c['id'] for c in raw['cells'] if 'execution' in c['metadata']], 'execution times change with every run'
    nb = nbformat.read(path, 4)
    nbformat.validate(nb)
    code = [c for c in nb.cells if c.cell_type == 'code' and c.source.strip()]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1)), 'cells run out of order, or not at all'
    for n, c in enumerate(nb.cells, 1):
        for o in c.get('outputs', []):
            assert o.output_type != 'error', f'cell {n} committed with an error'
            assert len(json.dumps(o)) < 300_000, f'cell {n} has an output of {len(json.dumps(o)):,} bytes'


@pytest.mark.parametrize('path', [p for p in NBS if p.stem != 'index'], ids=[i for i in ids if i != 'index'])
def test_teaches(path):
    "The shape of a lesson: a title and one sentence first, an assert beside the exports, exercises last. Its size: test_house.py."
    nb = nbformat.read(path, 4)
    first, code = nb.cells[0], [c.source for c in nb.cells if c.cell_type == 'code']
    assert re.match(r'# .+\n\n> .+', first.source), 'starts with a title and one sentence'
    assert any('## Exercises' in c.source for c in nb.cells if c.cell_type == 'markdown')
    assert sum('assert ' in s for s in code) >= 3
