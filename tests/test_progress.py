"""The progress bar of 09c where it is used: a pipe, a terminal, a notebook, a browser; with and without IPython."""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from types import SimpleNamespace

import nbformat
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn
from toys import At, raises, toy

from exp.callbacks import AvgStatsCallback, DataBunch, Runner, accuracy
from exp.learner import Learner
from exp.progress import ProgressCallback, front_end
from exp.training_callbacks import EarlyStopping

HEADS = ['epoch', 'train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy', 'time']
COMMON = '''
import sys, time, torch, torch.nn.functional as F
from functools import partial
from torch import nn
from exp.callbacks import AvgStatsCallback, DataBunch, Dataset, accuracy, get_dls
from exp.learner import Learner
from exp.optimizers import sgd_opt
from exp.progress import ProgressCallback

class Slow(nn.Linear):
    def forward(self, x): time.sleep(.05); return super().forward(x)

torch.manual_seed(0)
x, y = torch.randn(400, 10), torch.randint(0, 3, (400,))
data = DataBunch(*get_dls(Dataset(x, y), Dataset(x[:80], y[:80]), 10, seed=0))
'''
SLIDES = '''
cbfs = [partial(AvgStatsCallback, accuracy), partial(ProgressCallback, every=.1)]
learn = Learner(Slow(10, 3), data, F.cross_entropy, sgd_opt, lr=.1, cb_funcs=cbfs)
learn.fit(2)
'''
BLOCK = '''
import sys
class Block:
    def find_spec(self, name, *a):
        if name.split('.')[0] in BLOCKED: raise ImportError(name + ' is blocked')
sys.meta_path.insert(0, Block())
'''


def env(**kw):
    kw = {'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]), 'OMP_NUM_THREADS': '1', 'PYTHONIOENCODING': 'utf-8', **kw}
    return {**{k: v for k, v in os.environ.items() if k not in ('EXP_NO_BAR', 'PYTHONUNBUFFERED')}, **kw}


def learner(*cbs, stats=True, data=None, loop=Learner):
    model = nn.Linear(10, 3)
    opt = torch.optim.SGD if loop is Learner else torch.optim.SGD(model.parameters(), lr=.1)
    return loop(model, data or toy(10), F.cross_entropy, opt, cbs=[*([AvgStatsCallback(accuracy)] if stats else []), *cbs])


def bar(**kw): return ProgressCallback('terminal', **kw)


class Broken:
    def __len__(self): return 8
    def __iter__(self): raise OSError('the disk is gone')


def seen(text):
    "What an eye sees of it on a terminal: `\\r` goes back to the start of the line, what comes after goes over it."
    lines = []
    for line in text.split('\n'):
        shown = []
        for part in line.split('\r'): shown[:len(part)] = part
        lines.append(''.join(shown).rstrip())
    return [l for l in lines if l]


def check_table(lines, epochs=2):
    assert lines[0].split() == HEADS
    assert [l.split()[0] for l in lines[1:]] == [str(i) for i in range(epochs)]
    assert all(re.fullmatch(r'\s*\d+(\s+\d\.\d{4,}){4}\s+\d+\.\d s', l) for l in lines[1:])


# a pipe, a terminal; no IPython

def test_in_a_pipe_a_line_per_epoch_as_it_happens(tmp_path):
    "A log that is buffered to the end of the run is no log. Neither IPython nor fastprogress is needed for it."
    code = f"BLOCKED = 'IPython', 'ipykernel', 'fastprogress', 'fasthtml', 'matplotlib'\n{BLOCK}{COMMON}{SLIDES}"
    with open(tmp_path/'err', 'w+b') as err:
        p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=err, env=env(), cwd=ROOT)
        came = [(time.perf_counter(), line.decode()) for line in p.stdout]
        assert p.wait(200) == 0 and not err.seek(0) and not err.read()
    assert not any('\r' in l for _, l in came) and came[2][0] - came[1][0] > .2
    check_table([l.rstrip('\n') for _, l in came])


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no pseudo-terminals on this system')
def test_in_a_real_terminal():
    import pty
    code = f"BLOCKED = 'IPython', 'ipykernel', 'matplotlib'\n{BLOCK}{COMMON}{SLIDES}"
    main, side = pty.openpty()
    subprocess.run(['stty', 'cols', '100'], stdin=side, check=True)
    p = subprocess.Popen([sys.executable, '-c', code], stdin=side, stdout=side, stderr=side, env=env(TERM='xterm'), cwd=ROOT, close_fds=True)
    os.close(side)
    out = b''
    while True:
        try: chunk = os.read(main, 4096)
        except OSError: break                                                     # the other side has closed
        if not chunk: break
        out += chunk
    os.close(main)
    assert p.wait(200) == 0
    text = out.decode().replace('\r\n', '\n')
    check_table(seen(text))                                                       # whole, and no rest of a bar is left
    done = [int(d) for d in re.findall(r'Epoch 1/2 : \|[█-]+\| [\d.]+% \[(\d+)/40', text)]
    assert done[0] == 0 and done == sorted(done) and len(set(done)) >= 4 and '/4 ' in text, 'the bar moves, in training and validation'


@pytest.mark.parametrize('ipython, tty, vars, want', [
    (None, True, {}, 'terminal'), (None, False, {}, 'lines'), (None, True, {'TERM': 'dumb'}, 'lines'), (None, True, {'EXP_NO_BAR': '1'}, 'lines'),
    ('terminal', True, {}, 'terminal'), ('kernel', False, {}, 'html'), ('kernel', False, {'EXP_NO_BAR': '1'}, 'lines')])
def test_front_end(monkeypatch, ipython, tty, vars, want):
    for k in ('EXP_NO_BAR', 'TERM'): monkeypatch.delenv(k, raising=False)
    for k, v in vars.items(): monkeypatch.setenv(k, v)
    shell = SimpleNamespace(kernel='a kernel' if ipython == 'kernel' else None)
    if ipython: monkeypatch.setitem(sys.modules, 'IPython', SimpleNamespace(get_ipython=lambda: shell))
    else: monkeypatch.delitem(sys.modules, 'IPython', raising=False)
    monkeypatch.setattr(sys, 'stdout', SimpleNamespace(isatty=lambda: tty))
    assert front_end() == want
    with pytest.raises(ValueError): ProgressCallback('htm')


# the end of a fit, and what others print

def at_14(run): return run.epoch == 1 and run.in_train and run.iter == 4


@pytest.mark.parametrize('show', ['lines', 'terminal'])
@pytest.mark.parametrize('loop', [Learner, Runner])
@pytest.mark.parametrize('error, data, words', [
    (KeyboardInterrupt, None, 'KeyboardInterrupt: epoch 2/3, training batch 4/10'), (ZeroDivisionError, None, 'ZeroDivisionError: epoch 2/3, training batch 4/10'),
    (OSError, DataBunch(toy(10).train_dl, Broken()), 'OSError: epoch 1/3, validation batch 0/8')])
def test_a_fit_that_breaks_off_says_so_and_where(capsys, show, loop, error, data, words):
    run = learner(ProgressCallback(show, every=0), At('after_loss', raises(error, at_14)), data=data, loop=loop)
    with pytest.raises(error): run.fit(3)
    lines = seen(capsys.readouterr().out)
    assert lines[-1].endswith(words) and '%' not in ''.join(lines) and run.logger is print
    if data: return
    run.fit(1)
    check_table(seen(capsys.readouterr().out), 1)


@pytest.mark.parametrize('show', ['lines', 'terminal'])
def test_other_ends(capsys, show):
    try: raise ZeroDivisionError
    except ZeroDivisionError: learner(ProgressCallback(show)).fit(2)                # somebody else's error
    check_table(seen(capsys.readouterr().out))
    learner(ProgressCallback(show), EarlyStopping('valid_accuracy', patience=1, min_delta=1.)).fit(9)
    assert seen(capsys.readouterr().out)[-1] == 'ended early: epoch 2/9, validation batch 2/2'
    learner(ProgressCallback(show)).fit(0)
    assert seen(capsys.readouterr().out)[0].split() == HEADS
    with pytest.raises(OSError): learner(ProgressCallback(show), At('begin_fit', raises(OSError), -100), loop=Runner).fit(1)       # not an error about the bar


def test_lines_of_others_are_whole_in_a_terminal(capsys):
    learner(bar(every=0), At('after_batch', lambda run: run.logger('I', run.iter), 20)).fit(1)
    said = seen(capsys.readouterr().out)
    assert said[1:-1] == [f'I {i}' for i in [*range(10), *range(2)]] and said[0].split() == HEADS


def test_a_log_without_a_table_has_a_line_per_epoch(capsys):
    learner(ProgressCallback('lines'), stats=False).fit(3)
    assert [re.findall(r'\d+', l) for l in seen(capsys.readouterr().out)] == [[i, '3'] for i in '123']
    learner(bar(), stats=False).fit(3)
    assert seen(capsys.readouterr().out) == []                                       # the bar is gone


def test_it_is_not_at_work_in_looks(capsys):
    learn = learner(bar())
    learn.validate(); learn.get_preds(); learn.lr_find(max_iter=5)
    assert '%' not in capsys.readouterr().out


# how often it draws; a clock that only batches move

@pytest.mark.parametrize('seconds, want', [([.002]*1000, range(4, 6)), ([.001]*500 + [1.]*20, range(20, 23)), ([.6]*50, range(50, 52))])
def test_it_draws_by_the_clock(monkeypatch, capsys, seconds, want):
    now = [0.]
    monkeypatch.setattr('exp.progress.time', SimpleNamespace(perf_counter=lambda: now[0]))
    def tick(run): now[0] += seconds[run.iter]
    batch = torch.randn(4, 10), torch.zeros(4).long()
    learner(bar(), At('after_batch', tick, -10), data=DataBunch([batch]*len(seconds), None), stats=False).fit(1)
    drawn = [int(d) for d in re.findall(r'% \[(\d+)/', capsys.readouterr().out)]
    assert drawn[0] == 0 and len(drawn) in want and drawn == sorted(set(drawn))


def test_a_fit_that_goes_on_in_the_middle(capsys):
    learner(bar(every=0)).fit(9, start=(7, 6))
    drawn = re.findall(r'Epoch (\d)/9 : \|[^[]*\[(\d+)/10', capsys.readouterr().out)
    assert drawn == [('8', '0'), *(('8', str(i)) for i in range(7, 11)), *(('9', str(i)) for i in range(11))]


@pytest.mark.filterwarnings('error')
def test_passes_without_batches(capsys):
    learner(bar(every=0), data=DataBunch(toy(10).train_dl, []), loop=Runner).fit(1)
    learner(bar()).fit(0)
    assert '0/0' not in capsys.readouterr().out


# a notebook

CELLS = {
    'names': '''
class Talks(Callback):
    def begin_fit(self, learn):
        bar = learn.cb(ProgressCallback)
        self.page, bar.mbar.out = bar.mbar.out, self
        self.drawn = []
    _order = ProgressCallback._order + 1
    def update(self, page): self.drawn.append(getattr(page, 'data', None) or str(page)); self.page.update(page)
    def begin_validate(self, learn): time.sleep(learn.epoch)
    def after_epoch(self, learn): learn.logger('epoch', learn.epoch, '<ends>'); learn.logger('x  2.5  3  4  5  6')
t = Talks()
stats = AvgStatsCallback(lambda p, y: accuracy(p, y))
Learner(nn.Linear(10, 3), data, F.cross_entropy, cbs=[stats, ProgressCallback(every=0), t]).fit(2)
assert any(d.count('<progress') == 2 and d.count('<tr') == 1 for d in t.drawn)
assert [sum('[%d/40' % i in d for d in t.drawn) for i in range(41)] >= [1]*41''',
    'breaks': '''
class Stop(Callback):
    def after_loss(self, learn):
        if (learn.epoch, learn.in_train, learn.iter) == (1, True, 4): raise KeyboardInterrupt
learn = Learner(nn.Linear(10, 3), data, F.cross_entropy, cbs=[AvgStatsCallback(accuracy), ProgressCallback(), Stop()])
try: learn.fit(3)
except KeyboardInterrupt: pass''',
    'plot': '''
learn = Learner(nn.Linear(10, 3), data, F.cross_entropy, cbs=[AvgStatsCallback(accuracy), ProgressCallback(plot=True)]).fit(2)
import matplotlib.pyplot as plt
assert not plt.get_fignums()''',
    'no validation': 'Learner(nn.Linear(10, 3), DataBunch(data.train_dl, None), F.cross_entropy, cbs=[AvgStatsCallback(), ProgressCallback(plot=True)]).fit(1)',
    'no table': 'Learner(nn.Linear(10, 3), data, F.cross_entropy, cbs=[AvgStatsCallback(silent=True), ProgressCallback()]).fit(1)',
    'lines': 'Learner(nn.Linear(10, 3), data, F.cross_entropy, cbs=[AvgStatsCallback(accuracy), ProgressCallback("lines")]).fit(2)',
    'nothing': 'Learner(nn.Linear(10, 3), data, F.cross_entropy, cbs=[ProgressCallback()]).fit(0)'}


@pytest.fixture(scope='module')
def cells():
    "What each cell leaves in a saved notebook: its HTML, pictures and text."
    from nbclient import NotebookClient
    sources = [COMMON + 'from exp.callbacks import Callback', *(c + ';' for c in CELLS.values())]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    NotebookClient(nb, timeout=200, kernel_name='python3', startup_timeout=200).execute(cwd=ROOT, env=env())
    def joined(cell, kind): return ''.join(o.get('data', {}).get(kind, '') for o in cell.outputs)
    return {k: SimpleNamespace(html=re.sub('(?s)<style>.*?</style>', '', joined(c, 'text/html')), pngs=sum('image/png' in o.get('data', {}) for o in c.outputs),
                               text=''.join(o.text for o in c.outputs if o.output_type == 'stream')) for k, c in zip(CELLS, nb.cells[1:])}


def test_a_notebook_keeps_the_table(cells):
    html = cells['names'].html
    rows = [re.findall('<t[hd]>([^<]*)</t[hd]>', r) for r in re.split('<tr', html)[1:]]
    assert rows[0] == ['epoch', 'train_loss', 'train_&lt;lambda&gt;', 'valid_loss', 'valid_&lt;lambda&gt;', 'time'] and '<progress' not in html
    assert [r[0] for r in rows[1:]] == ['0', 'x', '1', 'x'] and rows[2] == rows[4] == ['x', '2.5', '3', '4', '5', '6']
    for r in (rows[1], rows[3]): assert all(re.fullmatch(r'\d\.\d{6}', v) for v in r[1:5]) and re.fullmatch(r'00:\d\d', r[5])
    assert rows[3][5] >= '00:01'
    assert cells['names'].text == 'epoch 0 <ends>\nepoch 1 <ends>\n'


def test_a_notebook_says_where_a_fit_broke_off(cells):
    assert cells['breaks'].text.strip().endswith('epoch 2/3, training batch 4/40')
    assert cells['breaks'].html.count('<tr') == 2 and '<progress' not in cells['breaks'].html


def test_curves_and_odd_fits_in_a_notebook(cells):
    assert [cells[k].pngs for k in CELLS] == [0, 0, 1, 1, 0, 0, 0]
    assert cells['no validation'].html.count('<td>-</td>') == 1 and 'nan' not in cells['no validation'].html
    assert '<table' not in cells['no table'].html + cells['nothing'].html and not cells['no table'].text
    assert not cells['lines'].html
    check_table(seen(cells['lines'].text))


# a browser

def chromium(): return os.environ.get('EXP_CHROMIUM') or shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab of its own on a free port, in a folder with one notebook: `(address, folder)`."
    pytest.importorskip('jupyterlab', reason='JupyterLab is not installed')
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    kernelspec = {'display_name': 'Python 3 (ipykernel)', 'language': 'python', 'name': 'python3'}                # without one a dialog asks
    sources = [COMMON, SLIDES.replace('every=.1', 'every=.1, plot=True').replace('fit(2)', 'fit(3)'), "print('all cells', 'ran')"]
    nb = nbformat.v4.new_notebook(metadata={'kernelspec': kernelspec, 'language_info': {'name': 'python'}}, cells=[nbformat.v4.new_code_cell(s) for s in sources])
    (tmp_path/'work').mkdir()
    nbformat.write(nb, tmp_path/'work'/'fit.ipynb')
    args = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', f'--port={port}', '--ServerApp.port_retries=0', '--IdentityProvider.token=', '--ServerApp.password=',
            '--LabApp.expose_app_in_browser=True', '--LabApp.news_url=', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate', f'--ServerApp.root_dir={tmp_path/"work"}']
    dirs = {f'JUPYTER_{k}_DIR': str(tmp_path/k) for k in ('CONFIG', 'DATA', 'RUNTIME')} | {'JUPYTERLAB_SETTINGS_DIR': str(tmp_path/'s'), 'JUPYTERLAB_WORKSPACES_DIR': str(tmp_path/'w')}
    log = open(tmp_path/'lab.log', 'w')
    p = subprocess.Popen(args, env=env(**dirs), stdout=log, stderr=log, cwd=tmp_path)
    try:
        for _ in range(300):
            try: urllib.request.urlopen(f'http://127.0.0.1:{port}/api', timeout=2); break
            except OSError: time.sleep(.3)
            assert p.poll() is None, (tmp_path/'lab.log').read_text()
        else: pytest.fail('JupyterLab did not start:\n' + (tmp_path/'lab.log').read_text())
        yield f'http://127.0.0.1:{port}', tmp_path/'work'
    finally:
        p.terminate()
        try: p.wait(20)
        except subprocess.TimeoutExpired: p.kill()
        log.close()


def test_in_jupyterlab_in_a_browser(lab, tmp_path):
    "The notebook is opened, all cells run; the bar is seen moving, the table read from the page."
    sync = pytest.importorskip('playwright.sync_api', reason='Playwright is not installed: pip install playwright')
    exe = chromium()
    if exe is None: pytest.skip('there is no Chromium here (Debian: apt-get install chromium), or name it in EXP_CHROMIUM')
    address, folder = lab
    flags = '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()
    with sync.sync_playwright() as pw:
        browser = pw.chromium.launch(executable_path=exe, args=flags)
        page = browser.new_page(viewport={'width': 1100, 'height': 800})
        page.goto(f'{address}/lab/tree/fit.ipynb?reset', timeout=120_000)
        page.wait_for_selector('.jp-Notebook .jp-CodeCell', timeout=120_000)
        for _ in range(6):                                                        # a run asked for while the kernel still connects opens a dialog
            page.wait_for_function("[...window.jupyterapp.shell.widgets('main')].some(w => w.sessionContext?.session?.kernel?.status === 'idle')", timeout=120_000)
            page.wait_for_function("document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'", timeout=120_000)
            page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")      # braces: what it returns is no JSON
            try: page.wait_for_function("/\\[(\\*|\\d+)\\]/.test(document.querySelector('.jp-CodeCell .jp-InputPrompt').innerText)", timeout=20_000); break
            except sync.TimeoutError:
                if page.query_selector('.jp-Dialog .jp-mod-accept'): page.click('.jp-Dialog .jp-mod-accept')
        page.wait_for_selector('.jp-Notebook progress', state='attached', timeout=300_000)
        bars, rows, began = [], [], time.time()
        while time.time() - began < 120:
            now, n = page.evaluate("[[...document.querySelectorAll('.jp-Notebook progress')].map(p => p.parentElement.innerText), document.querySelectorAll('.jp-Notebook tbody tr').length]")
            if not now: break
            if len(now) == 2 and now not in bars: bars.append(now); rows.append(n)
            assert len(now) <= 2, 'two bars, not several'
            time.sleep(.05)
        page.wait_for_selector("text=all cells ran", state='attached', timeout=60_000)
        table = page.evaluate("[...document.querySelectorAll('.jp-Notebook .jp-OutputArea tr')].map(tr => [...tr.children].map(c => c.innerText))")
        curves = page.evaluate("document.querySelectorAll('.jp-OutputArea img').length")
        page.evaluate("() => { window.jupyterapp.commands.execute('docmanager:save') }")
        for _ in range(100):
            saved = json.loads((folder/'fit.ipynb').read_text())
            if any(c.get('outputs') for c in saved['cells']): break
            time.sleep(.1)
        browser.close()
    assert len(bars) >= 4 and any('2/3' in epochs and '/4 ' not in batches for epochs, batches in bars), bars
    assert rows == sorted(rows) and rows[0] == 0 and rows[-1] >= 2, 'the table grows while the bars move'
    assert table[0] == HEADS and [r[0] for r in table[1:]] == ['0', '1', '2'] and all(0 < float(r[1]) < 10 for r in table[1:])
    html = ''.join(''.join(o.get('data', {}).get('text/html', [])) for o in saved['cells'][1]['outputs'])
    assert html.count('<tr') == 4 and '<progress max' not in html and curves == 1, 'what is saved stands on its own'
