"""The progress bar of 09c where it is used: a browser, a terminal, a pipe; and where IPython is absent."""
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from exp.callbacks import AvgStatsCallback, CancelEpochException, DataBunch, Dataset, Runner, accuracy, get_dls
from exp.learner import EarlyStopping, Learner
from exp.progress import SCREENS, HtmlScreen, Pace, ProgressCallback, TerminalScreen, bar_html, bar_text, clock, curve_svg, front_end, table_html, table_text

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(100, 10, generator=G), torch.randint(0, 3, (100,), generator=G)
HEADS = ['epoch', 'train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy', 'time']


def toy(bs=10): return DataBunch(*get_dls(Dataset(X, Y), Dataset(X[:40], Y[:40]), bs, seed=0), 10, 3)
def learner(*cbs, metrics=(accuracy,), data=None):
    return Learner(nn.Linear(10, 3), data or toy(), F.cross_entropy, torch.optim.SGD, lr=.1, cbs=[*([AvgStatsCallback(*metrics)] if metrics is not None else []), *cbs])


class Terminal(io.StringIO):
    encoding = 'utf-8'
    def isatty(self): return True


class Stop:
    def __init__(self, error=KeyboardInterrupt, epoch=1): self.error, self.epoch = error, epoch
    def after_loss(self, run):
        if run.epoch == self.epoch and run.in_train and run.iter == 4: raise self.error('stopped on purpose')


def seen(text):
    "What an eye sees of it on a terminal: `\\r` goes back to the start of the line, what comes after goes over it."
    lines = []
    for line in text.split('\n'):
        shown = []
        for part in line.split('\r'): shown[:len(part)] = part
        lines.append(''.join(shown).rstrip())
    return '\n'.join(lines)


SCRIPT = '''
import sys, time, torch, torch.nn.functional as F
from functools import partial
from torch import nn
from exp.callbacks import AvgStatsCallback, CancelEpochException, DataBunch, Dataset, accuracy, get_dls
from exp.learner import Learner
from exp.optimizers import sgd_opt
from exp.progress import ProgressCallback

class Slow(nn.Linear):
    def forward(self, x): time.sleep(.05); return super().forward(x)

torch.manual_seed(0)
x, y = torch.randn(400, 10), torch.randint(0, 3, (400,))
data = DataBunch(*get_dls(Dataset(x, y), Dataset(x[:80], y[:80]), 10, seed=0))
learn = Learner(Slow(10, 3), data, F.cross_entropy, sgd_opt, lr=.1, cb_funcs=[partial(AvgStatsCallback, accuracy), partial(ProgressCallback, every=.1)])
learn.fit(2)
'''


@pytest.fixture
def script(tmp_path):
    (tmp_path/'fit.py').write_text(SCRIPT)
    return tmp_path/'fit.py'


def env(**kw): return {**{k: v for k, v in os.environ.items() if k != 'EXP_NO_BAR'}, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'PYTHONIOENCODING': 'utf-8', **kw}


def check_table(lines, epochs=2):
    assert lines[0].split() == HEADS
    assert [l.split()[0] for l in lines[1:]] == [str(i) for i in range(epochs)] and all(re.fullmatch(r'\s*\d+(\s+\d\.\d{4}){4}\s+\d+\.\d s', l) for l in lines[1:])


# a pipe, a terminal, no IPython

def test_in_a_pipe_a_line_per_epoch_as_it_happens_and_no_carriage_return(script, tmp_path):
    "A log that is buffered to the end of the run is no log."
    with open(tmp_path/'err', 'w+b') as err:
        p = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=err, env=env(), cwd=ROOT)
        came = [(time.perf_counter(), line) for line in p.stdout]
        assert p.wait(200) == 0 and not err.seek(0) and not err.read()
    assert not any(b'\r' in l for _, l in came) and came[2][0] - came[1][0] > .2
    check_table([l.decode().rstrip('\n') for _, l in came])


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no pseudo-terminals on this system')
@pytest.mark.parametrize('no_bar', [False, True])
def test_in_a_real_terminal(script, no_bar):
    import pty
    kw = {'EXP_NO_BAR': '1'} if no_bar else {}
    main, side = pty.openpty()
    subprocess.run(['stty', 'cols', '100'], stdin=side, check=True)
    p = subprocess.Popen([sys.executable, script], stdin=side, stdout=side, stderr=side, env=env(TERM='xterm', **kw), cwd=ROOT, close_fds=True)
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
    check_table([l for l in seen(text).splitlines() if l.strip()])                # the table is whole, and no rest of a bar is left
    bars = re.findall(r'\r(\|[█-]+\| [^\r]*)', text)
    if no_bar: assert not bars and '\r' not in text; return
    at = [b.count('█') for b in bars if 'epoch 1/2 training' in b]
    assert len(bars) >= 4 and at == sorted(at) and len(set(at)) >= 2, 'the bar moves'
    assert any('validation' in b for b in bars) or len(bars) < 12
    assert all(len(b) < 100 for b in bars) and all(re.search(r'\d+/\d+ · \d+:\d\d so far, \d+:\d\d to go', b) for b in bars if '·' in b)


def test_without_ipython_and_fastprogress(script):
    block = textwrap.dedent('''
        import sys
        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.split('.')[0] in ('IPython', 'ipykernel', 'fastprogress', 'fasthtml', 'matplotlib'): raise ImportError(name + ' is blocked')
        sys.meta_path.insert(0, Block())
    ''')
    script.write_text(block + SCRIPT)
    p = subprocess.run([sys.executable, script], capture_output=True, env=env(), cwd=ROOT, timeout=300)
    assert p.returncode == 0, p.stderr.decode()
    check_table(p.stdout.decode().splitlines())


# which place is which

def test_front_end(monkeypatch):
    for k in ('EXP_NO_BAR', 'TERM'): monkeypatch.delenv(k, raising=False)
    monkeypatch.delitem(sys.modules, 'IPython', raising=False)
    assert front_end(io.StringIO()) == 'lines' and front_end(Terminal()) == 'terminal'
    monkeypatch.setenv('TERM', 'dumb')
    assert front_end(Terminal()) == 'lines'
    monkeypatch.setenv('TERM', 'xterm')
    class Shell: kernel = None
    class FakeIPython: get_ipython = staticmethod(lambda: Shell)
    monkeypatch.setitem(sys.modules, 'IPython', FakeIPython)
    assert front_end(Terminal()) == 'terminal'                                    # IPython in a terminal has no kernel
    Shell.kernel = object()
    assert front_end(Terminal()) == 'html'
    monkeypatch.setenv('EXP_NO_BAR', '1')
    assert front_end(Terminal()) == 'lines'
    with pytest.raises(ValueError, match="'html', 'terminal', 'lines'"): ProgressCallback('htm')


# the parts

def test_time_left_knows_two_paces():
    p = Pace()
    assert p.seconds(1, 1) is None
    p.add(True, 10, 10.)
    assert p.seconds(3, 3) == pytest.approx(6)
    p.add(False, 2, 8.)
    assert p.seconds(3, 3) == pytest.approx(3 + 12)
    assert [clock(s) for s in (None, 0, 59.9, 60, 3599, 3600, 86400)] == ['?', '0:00', '0:59', '1:00', '59:59', '1:00:00', '24:00:00']


@given(st.floats(0, 1), st.text(st.characters(codec='utf-8', exclude_characters='\r\n'), max_size=150), st.integers(5, 200))
def test_a_text_bar_never_wraps(share, text, width): assert len(bar_text(share, text, width)) <= width


@given(st.lists(st.floats(width=32), max_size=1000), st.lists(st.tuples(st.integers(0, 1000), st.floats(width=32)), max_size=4))
@settings(deadline=None, max_examples=60)
def test_a_curve_of_anything_is_a_picture_or_nothing(losses, valid):
    svg = curve_svg(losses, valid)
    assert 'nan' not in svg and 'inf' not in svg and len(svg) < 20_000
    if svg:
        import xml.dom.minidom
        xml.dom.minidom.parseString(svg)
        for x, y in re.findall(r'([\d.-]+),([\d.-]+)', re.search('points="([^"]*)"', svg)[1]): assert -1 <= float(x) <= 361 and -1 <= float(y) <= 141


def test_names_are_escaped():
    assert '<script>' not in table_html(['<script>'], [['<script>']]) and '<b>' not in bar_html(.1, '<b>')
    assert table_text(['a', 'b'], [['1', '2222222222']]).splitlines()[0] == '       a           b'


# the callback on screens that remember

class Page(HtmlScreen):
    def show(self, data): self.shown = getattr(self, 'shown', []) + [data]


@pytest.fixture
def page(monkeypatch):
    pages = []
    def make(logger): pages.append(Page(logger)); return pages[-1]
    make.draws_table = True
    monkeypatch.setitem(SCREENS, 'html', make)
    return pages


def test_a_notebook_gets_one_output_that_ends_as_a_table(page, capsys, monkeypatch):
    now = [0.]                                                        # a clock that only batches move: drawing costs nothing here
    monkeypatch.setattr('exp.progress.time', SimpleNamespace(perf_counter=lambda: now[0]))
    class Talks:
        _order = -10
        def after_batch(self, run): now[0] += .01
        def after_epoch(self, run): run.logger('epoch', run.epoch, '<ends>')
    learn = learner(ProgressCallback('html', every=0), Talks()).fit(2)
    shown, rows = [d['text/html'] for d in page[0].shown], learn.cb(AvgStatsCallback).rows
    assert len(page) == 1 and '<progress' in shown[0] and '<progress' not in shown[-1]
    shares = [float(re.search('value="([^"]*)"', h)[1]) for h in shown if 'epoch 1/2 training' in h]
    assert shares == [pytest.approx((i + 1)/10) for i in range(10)]
    cells = re.findall('<td>([^<]*)</td>', shown[-1])
    assert re.findall('<th>([^<]*)</th>', shown[-1]) == HEADS and len(cells) == 12
    assert float(cells[1]) == pytest.approx(rows[0]['train_loss'], abs=1e-4) and float(cells[10]) == pytest.approx(rows[1]['valid_accuracy'], abs=1e-4)
    assert 'epoch 1 &lt;ends&gt;' in shown[-1] and 'valid_accuracy' in page[0].shown[-1]['text/plain']
    assert capsys.readouterr().out == '' and not learn.cb(AvgStatsCallback).silent and learn.logger is print


@pytest.mark.parametrize('error, words', [(KeyboardInterrupt, 'interrupted: epoch 2/3 training 4/10'), (ZeroDivisionError, 'stopped by ZeroDivisionError: epoch 2/3 training 4/10')])
@pytest.mark.parametrize('loop', ['Learner', 'Runner'])
def test_what_is_left_when_it_breaks_off(page, error, words, loop):
    cbs, model = [AvgStatsCallback(accuracy), ProgressCallback('html'), Stop(error)], nn.Linear(10, 3)
    run = Learner(model, toy(), F.cross_entropy, torch.optim.SGD, cbs=cbs) if loop == 'Learner' else Runner(model, toy(), F.cross_entropy, torch.optim.SGD(model.parameters(), lr=.1), cbs)
    with pytest.raises(error): run.fit(3)
    last = page[0].shown[-1]['text/html']
    assert words in last and '<progress' in last and '#c62828' in last and last.count('<tr>') == 2      # heads, and the epoch that was completed
    assert run.logger is print and not cbs[0].silent
    run.cbs = [cb for cb in run.cbs if not isinstance(cb, Stop)]
    if loop == 'Learner': run.add_cbs([])
    run.fit(1)
    assert 'interrupted' not in page[1].shown[-1]['text/html'] and page[1].shown[-1]['text/html'].count('<tr>') == 2


def test_a_fit_that_goes_well_while_another_error_is_handled(page):
    try: raise ZeroDivisionError
    except ZeroDivisionError: learner(ProgressCallback('html')).fit(1)
    assert 'stopped' not in page[0].shown[-1]['text/html']


def test_ended_by_a_callback_is_no_accident(page):
    learner(ProgressCallback('html'), EarlyStopping('valid_accuracy', patience=1, min_delta=1.)).fit(9)
    assert 'ended early: epoch 2/9' in page[0].shown[-1]['text/html'] and '#c62828' not in page[0].shown[-1]['text/html']


def test_the_place_is_right_where_a_pass_fails_before_its_first_batch(page):
    class Broken:
        def __len__(self): return 8
        def __iter__(self): raise OSError('the disk is gone')
    with pytest.raises(OSError): learner(ProgressCallback('html'), data=DataBunch(toy().train_dl, Broken())).fit(3)
    assert 'stopped by OSError: epoch 1/3 training 10/10' in page[0].shown[-1]['text/html']       # it said validation 9/8


def test_ended_by_a_callback_after_the_validation(page):
    learner(ProgressCallback('html'), EarlyStopping('valid_accuracy', patience=1, min_delta=1.)).fit(9)
    assert 'epoch 2/9 validation 2/2' in page[0].shown[-1]['text/html']


def test_a_resumed_epoch_has_the_pace_of_what_was_done(page, monkeypatch):
    now = [0.]
    monkeypatch.setattr('exp.progress.time', SimpleNamespace(perf_counter=lambda: now[0]))
    class Slow:
        _order = -10
        def after_batch(self, run): now[0] += 1.
    p = ProgressCallback('html', every=0)
    learner(p, Slow()).fit(1, start=(0, 6))
    assert p.pace.done[True] == 4 and p.pace.seconds(10, 0) == pytest.approx(10.)                  # it was 4 s: ten batches in four


def test_validations_that_are_skipped_are_not_waited_for(page, monkeypatch):
    now, guesses = [0.], []
    monkeypatch.setattr('exp.progress.time', SimpleNamespace(perf_counter=lambda: now[0]))
    class Clock:
        _order = -10
        def after_batch(self, run): now[0] += 1.
    class Last:
        _order = -20
        def begin_validate(self, run):
            if run.epoch + 1 < run.n_epochs: raise CancelEpochException
    class Guess:
        _order = 6
        def after_batch(self, run): guesses.append(p.text.rsplit(', ', 1)[1])
    p = ProgressCallback('html', every=0)
    learner(p, Clock(), Guess()).fit(3)
    assert guesses[12 + 9] == '0:14 to go' and len(guesses) == 36                          # the second epoch's tenth batch: 2 + 10 + 2, as before
    guesses.clear(); now[0] = 0.
    learner(p := ProgressCallback('html', every=0), Clock(), Last(), Guess()).fit(3)
    assert guesses[10 + 9] == '0:10 to go' and guesses[-1] == '0:00 to go'                   # it was 0:14


def test_the_curve_reads_only_when_it_draws(page):
    p = ProgressCallback('html', plot=True, every=1e9)
    learn = learner(p).fit(2)
    assert len(page[0].shown) == 2 and '<polyline' in page[0].shown[-1]['text/html']           # at the beginning, and at the end
    assert len(p.losses) == learn.n_iter == 20 and p.ends == [10, 20]


def test_terminal_and_lines(monkeypatch, capsys):
    out = Terminal()
    monkeypatch.setattr(sys, 'stdout', out)
    learner(ProgressCallback('terminal', every=0), data=toy(5)).fit(2)
    monkeypatch.undo()
    check_table([l for l in seen(out.getvalue()).splitlines() if l])
    learner(ProgressCallback('lines'), metrics=None).fit(2)
    assert [l.split(' done')[0] for l in capsys.readouterr().out.splitlines()] == ['epoch 1/2', 'epoch 2/2']       # no table: a line all the same


def test_a_terminal_that_has_no_blocks():
    class Ascii(Terminal): encoding = 'ascii'
    s = TerminalScreen(print, out := Ascii())
    s.draw(.5, 'half')
    out.getvalue().encode('ascii')


def test_drawing_limits_itself():
    "A screen so slow that it would take all the time: draws are rare in return."
    class Molasses:
        draws_table, n = False, 0
        def draw(self, *args, **kwargs): Molasses.n += 1; time.sleep(.02)
        def end(self, *args, **kwargs): pass
        def log(self, *args): pass
        def __init__(self, logger): pass
    SCREENS['molasses'] = Molasses
    try:
        p = ProgressCallback('molasses', every=0)
        t = time.perf_counter()
        learner(p, data=DataBunch([(X[:4], Y[:4])]*1000, None), metrics=None).fit(1)
        t = time.perf_counter() - t
    finally: del SCREENS['molasses']
    assert Molasses.n <= 3 + t/1.9, 'after the first two, every two seconds at the most'


def test_a_silent_table_stays_silent(page):
    learn = Learner(nn.Linear(10, 3), toy(), F.cross_entropy, torch.optim.SGD, cbs=[AvgStatsCallback(accuracy, silent=True), ProgressCallback('html')]).fit(1)
    assert '<table' not in page[0].shown[-1]['text/html'] and learn.cb(AvgStatsCallback).silent


def test_it_is_not_at_work_in_looks(page):
    learn = learner(ProgressCallback('html'))
    learn.validate(); learn.get_preds(); learn.lr_find(max_iter=5); learn.predict(X[0])
    assert page == []


def test_the_slides_cell(page):
    cbfs = [partial(AvgStatsCallback, accuracy), ProgressCallback]
    learn = Learner(nn.Linear(10, 3), toy(), F.cross_entropy, torch.optim.SGD, lr=.4, cb_funcs=cbfs)
    learn.cb(ProgressCallback).show = 'html'
    learn.fit(2)
    assert [re.findall('<th>([^<]*)</th>', page[0].shown[-1]['text/html'])] == [HEADS]


# a browser

def chromium(): return os.environ.get('EXP_CHROMIUM') or shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab of its own on a free port, in a folder with one notebook: `(address, folder)`."
    pytest.importorskip('jupyterlab', reason='JupyterLab is not installed')
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    first, *rest = SCRIPT.replace('time.sleep(.05)', 'time.sleep(.08)').split('learn = ')           # on a busy machine the bar is drawn every two seconds
    kernelspec = {'display_name': 'Python 3 (ipykernel)', 'language': 'python', 'name': 'python3'}                # without one a dialog asks
    nb = nbformat.v4.new_notebook(metadata={'kernelspec': kernelspec, 'language_info': {'name': 'python'}},
                                  cells=[nbformat.v4.new_code_cell(first), nbformat.v4.new_code_cell('learn = ' + rest[0].replace('every=.1', 'every=.1, plot=True').replace('fit(2)', 'fit(3)')),
                                         nbformat.v4.new_code_cell("print('all cells', 'ran')")])
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
        page.wait_for_selector('.exp-bar progress', state='attached', timeout=300_000)
        values, texts, rows, began = [], [], [], time.time()
        while time.time() - began < 120:
            now = page.evaluate("""() => { const p = document.querySelector('.exp-bar progress');
                return [p && p.value, p && p.parentElement.innerText, document.querySelectorAll('.exp-progress tbody tr').length, document.querySelectorAll('.exp-bar').length] }""")
            if now[0] is None: break
            if not values or values[-1] != now[0]: values.append(now[0]); texts.append(now[1]); rows.append(now[2])
            if len(values) == 3: page.screenshot(path=tmp_path/'moving.png')
            assert now[3] == 1, 'one bar, not several'
            time.sleep(.05)
        page.wait_for_selector("text=all cells ran", state='attached', timeout=60_000)
        table = page.evaluate("[...document.querySelectorAll('.exp-progress tr')].map(tr => [...tr.children].map(c => c.innerText))")
        curve, left = page.evaluate("[document.querySelectorAll('.exp-curve polyline').length, document.querySelectorAll('.exp-bar').length]")
        page.screenshot(path=tmp_path/'done.png')
        page.evaluate("() => { window.jupyterapp.commands.execute('docmanager:save') }")
        for _ in range(100):
            saved = json.loads((folder/'fit.ipynb').read_text())
            if any(c.get('outputs') for c in saved['cells']): break
            time.sleep(.1)
        browser.close()
    if keep := os.environ.get('EXP_SCREENSHOTS'):
        for f in ('moving.png', 'done.png'):
            if (tmp_path/f).exists(): shutil.copy(tmp_path/f, Path(keep)/f'jupyterlab-{f}')
    assert len(set(values)) >= 4 and any('to go' in t for t in texts) and any('epoch 3/3' in t for t in texts), texts
    assert rows == sorted(rows) and rows[0] == 0 and rows[-1] >= 2, 'the table grows while the bar moves'
    assert table[0] == HEADS and [r[0] for r in table[1:]] == ['0', '1', '2'] and all(0 < float(r[1]) < 10 for r in table[1:])
    assert curve == 1 and left == 0, 'the curve stays, the bar goes'
    html = ''.join(''.join(o.get('data', {}).get('text/html', [])) for o in saved['cells'][1]['outputs'])
    assert html.count('<tr>') == 4 and '<progress' not in html, 'what is saved stands on its own'
