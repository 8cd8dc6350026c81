"""Several processes end where one would: weights, metrics, files; killed, silent, broken off or gone on with.

All that can be asked of two processes is asked in one launch of them (tests/dist_work.py); starting them is what costs time."""
import os
import re
import signal
import subprocess
import sys
from functools import partial

import dist_work as work
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from exp import distributed as D
from exp.fast_batches import ItemLoader
from exp.fault_tolerance import any_process, launch, no_launch_because, report_lost, ProcessLost, share_loader


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "What two processes give, once for all tests; and the folder they wrote into."
    folder = tmp_path_factory.mktemp('two')
    torch.set_num_threads(1)
    work.part(folder/'started', 13)
    before = signal.getsignal(signal.SIGINT)
    got = launch(work.everything, 2, str(folder), str(folder/'started'), timeout=200)
    assert signal.getsignal(signal.SIGINT) is before                                   # Ctrl-C is the reader's own again
    return got, folder


def close(a, b, tol=1e-9): return a.keys() == b.keys() and all((a[k].double() - b[k].double()).abs().max() <= tol for k in a)


def rows_close(a, b, tol=1e-6):
    return len(a) == len(b) and all(r.keys() == s.keys() and all(abs(r[k] - s[k]) < tol for k in r) for r, s in zip(a, b))


# ---------------------------------------------------------------- the same training


def test_twenty_steps_of_two_processes_are_those_of_a_bare_loop(two):
    "An independent reference: the whole batches, and momentum written out (torch.optim would cost 4 s to import)."
    data, model = work.plain(), work.net()
    avgs = [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(4):
        for xb, yb in data.train_dl:
            grads = torch.autograd.grad(F.cross_entropy(model(xb), yb), list(model.parameters()))
            with torch.no_grad():
                for p, g, a in zip(model.parameters(), grads, avgs): a.mul_(.9).add_(g); p.sub_(.1*a)
    with torch.no_grad(): right = torch.cat([model(xb).argmax(1) == yb for xb, yb in data.valid_dl])
    for r in two[0]:
        got = r['jobs']['plain SGD']
        assert got['n_iter'] == 20 and close(got['state'], model.state_dict())
        assert abs(got['rows'][-1]['valid_accuracy'] - right.double().mean().item()) < 1e-12


@pytest.mark.parametrize('name', work.JOBS)
def test_two_processes_end_as_one(two, name):
    one, twice = work.JOBS[name](False), 'last batch of one' in name or name == 'any loader'          # then its row is counted twice
    for r in two[0]:
        got = r['jobs'][name]
        assert close(got['state'], two[0][0]['jobs'][name]['state'], 0)                # not one bit between the processes
        assert got['n_iter'] == one['n_iter'] and np.allclose(got['losses'], one['losses'], atol=1e-6)
        assert close(got['state'], one['state'])
        keys = [k for k in one['rows'][0] if not (twice and k.startswith('train'))]
        assert rows_close(*[[{k: row[k] for k in keys} for row in x['rows']] for x in (got, one)])


def test_no_item_twice_and_none_left_out_and_the_model_is_the_readers_own(two):
    a, b = (r['seen'] for r in two[0])
    for train, want in ((True, work.numbers(68)[0]), (False, work.numbers(work.N_VALID, 1)[0])):
        assert sorted(a['ids'][train] + b['ids'][train]) == sorted(want[:, 0].tolist()) and a['ids'][train] and b['ids'][train]
    assert a['same'] and b['same'] and a['kinds'] == b['kinds'] == {'Sequential'}
    assert close(a['state'], b['state'], 0)                                            # running statistics of batch norm among them
    assert not {*a['draws']} & {*b['draws']}                                           # dropout is another one in each


@pytest.mark.parametrize('n', range(8))
@pytest.mark.parametrize('world', [1, 2, 3, 5])
def test_shares_are_all_rows_once(n, world):
    parts = [[*range(n)][D.share(n, r, world)] for r in range(world)]
    assert sum(parts, []) == [*range(n)] and max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize('data', [work.items, work.plain, work.listed])
@pytest.mark.parametrize('world', [2, 3, 16])
def test_in_training_as_many_batches_for_everyone(data, world):
    want = sorted(work.numbers(65)[0][:, 0].tolist())
    for train in (True, False):
        parts = [[xb[:, 0].tolist() for xb, yb in share_loader(data(65).train_dl, partial(D.part, rank=r, world=world, train=train))] for r in range(world)]
        ids = sum(sum(parts, []), [])
        if train: assert {len(p) for p in parts} == {5} and {*ids} == {*want} and len(ids) == 64 + world             # the last batch: one row, for all
        else: assert sorted(ids) == want


def test_workers_share_as_the_main_process_does():
    mine, source = partial(D.part, rank=1, world=2, train=True), work.items().train_dl.source
    a, b = (share_loader(ItemLoader(source, 16, True, 5, num_workers=n), mine) for n in (0, 1))
    for _ in range(2): assert all(torch.equal(x, y) for x, y in zip([xb for xb, _ in a], [xb for xb, _ in b], strict=True))


def test_batch_norm_over_all_processes_is_that_of_the_whole_batch(two):
    for r in two[0]:
        for name, err in r['norms'].items(): assert err < 2e-5, (name, err)            # numbers of size 10 in float32


def test_mixed_precision_stays_near(two):
    first = work.net().float().state_dict()
    one = work.result(work.learner(work.plain(dtype=torch.float32), work.net().float(), work.GradientAccumulation(2), dist=False).fit(2))
    for r in two[0]:
        got = r['mixed']['bf16']
        for k in first: assert (got['state'][k] - one['state'][k]).norm() < .1*(one['state'][k] - first[k]).norm()
        assert r['mixed']['fp16']['skipped'] > 0
    assert close(two[0][0]['mixed']['fp16']['state'], two[0][1]['mixed']['fp16']['state'], 0)


def test_a_model_in_shards(two):
    if two[0][0]['fsdp'] is None: pytest.skip(f'FSDP2 of torch {torch.__version__} does not run on CPUs')
    one = work.job()(False)
    for r in two[0]: assert close(r['fsdp']['state'], one['state']) and r['fsdp']['local'] < .6*r['fsdp']['all']


# ---------------------------------------------------------------- one bar, one log, one checkpoint; decided together; mistakes


def test_the_first_process_reports(two):
    first, second = (r['outputs'] for r in two[0])
    assert second['lines'] == 0 and first['lines'] == 4                                # heads and three epochs
    assert len(first['csv']) == 4 and first['csv'][0][0] == 'epoch'
    assert [int(f.split('.')[1]) for f in first['checkpoints']] == [2, 4, 5, 6, 8, 10, 12, 14, 15] and len({f[:11] for f in first['checkpoints']}) == 1
    assert first['cbs'] == second['cbs'] and {'ProgressCallback', 'CSVLogger'} < {*second['cbs']}      # only for the time of the fit
    assert list(first['best']) == list(work.net().state_dict())                        # no 'module.' in front
    assert first['hello'] == 'hello' and second['hello'] is None


def test_alone_it_does_nothing():
    a, b = (work.learner(dist=d) for d in (True, False))
    for x in (a, b): torch.manual_seed(0); x.fit(2)
    assert close(a.model.state_dict(), b.model.state_dict(), 0) and D.rank_and_size() == (0, 1) and D.rank0_only(lambda: 1)() == 1
    assert any_process(True) and not any_process(False)
    with D.process_group() as rank: assert rank == 0 and not torch.distributed.is_initialized()


def test_what_one_asks_for_all_do(two):
    assert [r['stopped']['n_iter'] for r in two[0]] == [3, 3] and close(*[r['stopped']['state'] for r in two[0]], 0)


def test_mistakes_are_told_in_every_process(two):
    want = {'other data': 'ValueError', 'other epochs': 'ValueError', 'a sampler': 'ValueError', 'nothing wrong': None}
    assert [r['errors'] for r in two[0]] == [want, want]


def test_what_cannot_be_launched(monkeypatch):
    assert no_launch_because(lambda: 1) and no_launch_because(work.numbers) == ''
    f = lambda: 1
    f.__module__ = '__main__'
    monkeypatch.setitem(sys.modules, '__main__', type(sys)('__main__'))                # as in a notebook: no file
    assert '%%writefile' in no_launch_because(f)
    with pytest.raises(ValueError): launch(lambda: 1, 2)


@pytest.mark.parametrize('said, lost', [('Connection closed by peer', True), ('Timed out waiting 5000ms', True), ('DataLoader timed out after 5 seconds', False), ('shapes', False)])
def test_other_errors_are_let_through(said, lost):
    with pytest.raises(ProcessLost if lost else RuntimeError) as e:
        with report_lost(): raise RuntimeError(said)
    assert isinstance(e.value, ProcessLost) == lost


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize('name', work.PARTS)
def test_two_go_on_where_two_were(two, name):
    for r in two[0]:
        a, b = r['parts'][f'{name} unbroken'], r['parts'][f'{name} 2 to 2']
        assert close(a['state'], b['state'], 1e-12) and a['n_iter'] == b['n_iter'] == 20 and b['start'] == (2, 3 if name == 'accumulated' else 2) and rows_close(a['rows'], b['rows'])


def test_two_go_on_where_one_was(two):
    one = work.part(None)
    for r in two[0]:
        got = r['parts']['1 to 2']
        assert got['start'] == (2, 2) and close(got['state'], one['state']) and rows_close(got['rows'], one['rows'])


@pytest.mark.parametrize('name, start', [('to one', (2, 2)), ('to one at epoch', (2, 0))])
def test_one_goes_on_where_two_were(two, name, start):
    got, one = work.part(two[1]/name, every=100 if 'epoch' in name else 3), work.part(None)
    assert got['start'] == start and close(got['state'], one['state']) and rows_close(got['rows'], one['rows'])
    assert np.allclose(got['losses'], one['losses'], atol=1e-6) and len(got['losses']) == 20


# ---------------------------------------------------------------- killed, silent, restarted


ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}


def start(rank, port, *args):
    env = {**ENV, 'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    return subprocess.Popen([sys.executable, ROOT/'tests'/'dist_work.py', *map(str, args)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize('how, timeout', [('kill', 60), ('stop', 15)])
def test_a_process_that_is_gone_ends_the_others_and_the_run_goes_on(tmp_path, how, timeout):
    from torch.distributed.elastic.utils.distributed import get_free_port
    port = get_free_port()
    ps = [start(r, port, tmp_path/'ck', tmp_path/'out', how, timeout) for r in (0, 1)]
    try:
        out, err = ps[0].communicate(timeout=400)                       # a process that falls silent: within the timeout
        assert ps[0].returncode == 1 and re.search(r'ProcessLost: process 0 ends: .*the last checkpoint', err), err[-2000:]
        assert out == 'this is printed once, by process 0 of 2\n'
    finally:
        for p in ps:
            try: os.killpg(p.pid, signal.SIGKILL)
            except ProcessLookupError: pass
        ps[1].communicate(timeout=100)
    assert ps[1].returncode == -signal.SIGKILL
    work.main(tmp_path/'ck', tmp_path/'out')                           # one process goes on
    got, one = torch.load(tmp_path/'out'), work.learner(dist=False).fit(4)
    assert got['start'] == (1, 3) and close(got['state'], one.model.state_dict()) and got['n_iter'] == 20


@pytest.mark.parametrize('how', ['kill', 'error'])
def test_torchrun_starts_again_and_the_run_goes_on(tmp_path, how):
    r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '--max-restarts', '1', ROOT/'tests'/'dist_work.py',
                        tmp_path/'ck', tmp_path/'out', how], env=ENV, capture_output=True, text=True, timeout=600)
    assert r.returncode == 0, r.stderr[-3000:]
    assert r.stdout.count('this is printed once, by process 0 of 2') == 2              # before and after
    got, one = torch.load(tmp_path/'out'), work.learner(dist=False).fit(4)
    assert got['start'] == (1, 3) and close(got['state'], one.model.state_dict()) and rows_close(got['rows'], work.result(one)['rows'])
