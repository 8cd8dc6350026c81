"""Several processes end where one would: weights, metrics, files; whatever is cancelled, killed, broken off or gone on with.

All that can be asked of two processes is asked in one launch of them (tests/dist_work.py); starting them is what costs time."""
import copy
import os
import pickle
import re
import signal
import socket
import subprocess
import sys

import dist_work as work
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from exp.callbacks import CancelBatchException, CancelEpochException
from exp.fast_batches import ItemLoader
from exp.distributed import (free_port, launch, no_launch_because, pick_backend, process_group, rank0_only, rank_and_size,
                             read_env, share, shared)


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "What two processes give, once for all tests; and the folder they wrote into."
    folder = tmp_path_factory.mktemp('two')
    torch.set_num_threads(1)
    work.part(folder/'started', 13)
    return launch(work.everything, 2, str(folder), str(folder/'started'), timeout=200, limit=800, threads=1), folder


def close(a, b, tol=1e-9): return a.keys() == b.keys() and all((a[k].double() - b[k].double()).abs().max() <= tol for k in a)


def rows_close(a, b, tol=1e-6):
    return len(a) == len(b) and all(r.keys() == s.keys() and all(abs(r[k] - s[k]) < tol or r[k] != r[k] and s[k] != s[k] for k in r) for r, s in zip(a, b))


# ---------------------------------------------------------------- the same training


def by_hand(data, epochs=4, lr=.1, mom=.9):
    "An independent reference: the whole batches, and momentum written out (torch.optim would cost 4 s to import)."
    model = work.net()
    avgs = [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(epochs):
        for xb, yb in data.train_dl:
            grads = torch.autograd.grad(F.cross_entropy(model(xb), yb), list(model.parameters()))
            with torch.no_grad():
                for p, g, a in zip(model.parameters(), grads, avgs): a.mul_(mom).add_(g); p.sub_(lr*a)
    with torch.no_grad(): preds = torch.cat([model(xb) for xb, yb in data.valid_dl])
    return model.state_dict(), (preds.argmax(1) == torch.cat([yb for _, yb in data.valid_dl])).double().mean().item()


@pytest.mark.parametrize('name, data', [('plain SGD', work.items), ('a last batch of one, torch loaders', lambda: work.plain(65))])
def test_twenty_steps_of_two_processes_are_those_of_a_bare_loop(two, name, data):
    state, acc = by_hand(data())
    for r in two[0]:
        assert r['jobs'][name]['n_iter'] == 20 and close(r['jobs'][name]['state'], state)
        assert abs(r['jobs'][name]['rows'][-1]['valid_accuracy'] - acc) < 1e-12


@pytest.mark.parametrize('name', work.JOBS)
def test_two_processes_end_as_one(two, name):
    one = work.JOBS[name](False)
    for r in two[0]:
        got = r['jobs'][name]
        assert close(got['state'], two[0][0]['jobs'][name]['state'], 0)                # not one bit between the processes
        assert close(got['state'], one['state']) and got['n_iter'] == one['n_iter']
        assert rows_close(got['rows'], one['rows'])
        assert len(got['losses']) == len(one['losses']) and max(abs(a - b) for a, b in zip(got['losses'], one['losses'])) < 1e-6


def test_no_item_twice_and_none_left_out(two):
    for train, want in ((True, work.numbers(65)[0]), (False, work.numbers(work.N_VALID, 1)[0])):
        ids = [i for r in two[0] for i in r['seen'][train]]
        assert sorted(ids) == sorted(want[:, 0].tolist())
    assert all(len(r['seen'][False]) for r in two[0])


@pytest.mark.parametrize('n', range(8))
@pytest.mark.parametrize('world', [1, 2, 3, 5])
def test_shares_are_all_rows_once(n, world):
    parts = [list(range(n))[share(n, r, world)] for r in range(world)]
    assert sum(parts, []) == list(range(n)) and max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize('data', [work.items, work.plain, work.listed])
@pytest.mark.parametrize('world', [2, 3, 16])
def test_as_many_batches_for_everyone(data, world):
    n = 65
    for pad in (True, False):
        dls = [shared(data(n=n).train_dl, r, world, pad=pad) for r in range(world)]
        batches = [[(dl.n, len(xb), xb[:, 0].tolist()) for xb, yb in dl] for dl in dls]
        if pad: assert {len(b) for b in batches} == {5} and all(m == (n or 1) for b in batches for n, m, _ in b)
        assert sum(n for b in batches for n, _, _ in b) == n
        real = [i for b in batches for n, _, ids in b for i in ids[:n]]
        assert sorted(real) == sorted(work.numbers(n)[0][:, 0].tolist())


@pytest.mark.parametrize('again', [copy.copy, copy.deepcopy, lambda dl: pickle.loads(pickle.dumps(dl))])
def test_a_shared_loader_can_be_copied(again):
    dl = shared(work.listed().train_dl, 1, 2)
    assert [xb.tolist() for xb, _ in dl] == [xb.tolist() for xb, _ in again(dl)] and len(again(dl).batches) == 5
    assert not hasattr(dl, 'no_such_thing')


def test_workers_share_as_the_main_process_does():
    d = work.items(65)
    for r in range(2):
        same = [xb for xb, _ in shared(work.items(65).train_dl, r, 2, pad=True)]
        dl = ItemLoader(d.train_dl.source, 16, True, 5, num_workers=1)
        assert all(torch.equal(a, b) for a, b in zip(same, [xb for xb, _ in shared(dl, r, 2, pad=True)], strict=True))


def test_batch_norm_over_all_processes_is_that_of_the_whole_batch(two):
    for r in two[0]:
        for name, err in r['norms'].items(): assert err < 2e-6*10, (name, err)         # numbers of size 10 in float32


def test_mixed_precision_stays_near(two):
    from exp.callbacks import DataBunch, Dataset, get_dls
    from exp.training_callbacks import GradientAccumulation
    data = DataBunch(*get_dls(Dataset(*work.numbers(71, 0, torch.float32)), Dataset(*work.numbers(work.N_VALID, 1, torch.float32)), 16, seed=5))
    one = work.result(work.learner(data, work.net().float(), GradientAccumulation(2), dist=False).fit(2))
    first = work.net().float().state_dict()
    for r in two[0]:
        got = r['mixed']['bf16']
        for k in first: assert (got['state'][k] - one['state'][k]).norm() < .1*(one['state'][k] - first[k]).norm()
        assert r['mixed']['fp16']['skipped'] > 0
    assert close(two[0][0]['mixed']['fp16']['state'], two[0][1]['mixed']['fp16']['state'], 0)


def test_files_that_cannot_be_read_are_skipped_in_step(two):
    from exp.callbacks import DataBunch
    ll_one = work.Some([i for i in range(16) if i not in (0, 1, 2, 9, 12, 13, 14, 15)], '.', [lambda x: x*.1])
    x = torch.stack([ll_one[i] for i in range(len(ll_one))])
    y = torch.tensor([i % 3 for i in ll_one.items])
    batches = [(x[[i in range(k, k + 4) for i in ll_one.items]], y[[i in range(k, k + 4) for i in ll_one.items]]) for k in (0, 4, 8)]
    one = work.learner(DataBunch(batches, None, 10, 3), work.net(), dist=False).fit(2)
    for r in two[0]: assert close(r['skipping']['state'], one.model.state_dict())


def test_a_model_in_shards(two):
    if two[0][0]['fsdp'] is None: pytest.skip(f'FSDP2 of torch {torch.__version__} does not run on CPUs')
    one = work.job()(False)                                            # ours; torch's optimizer in the shards
    for r in two[0]: assert close(r['fsdp']['state'], one['state']) and r['fsdp']['local'] < .6*r['fsdp']['all']


def test_dropout_differs_between_processes(two):
    a, b = (r['draws'] for r in two[0])
    both = [(i, j) for i, j in zip(a, b) if i is not None]
    assert both and all(i != j for i, j in both)


# ---------------------------------------------------------------- one bar, one log, one checkpoint; the model is the reader's own


def test_the_first_process_reports(two):
    first, second = (r['outputs'] for r in two[0])
    assert second['lines'] == 0 and first['lines'] == 4                                # heads and three epochs
    assert len(first['csv']) == 4 and first['csv'][0][0] == 'epoch'
    runs = {f.rsplit('.', 2)[0] for f in first['checkpoints']}
    assert len(runs) == 1 and [int(f.split('.')[1]) for f in first['checkpoints']] == [2, 4, 5, 6, 8, 10, 12, 14, 15]
    assert first['cbs'] == second['cbs'] and 'ProgressCallback' in second['cbs'] and 'CSVLogger' in second['cbs']       # only for the time of the fit
    assert list(first['best']) == list(work.net().state_dict())                        # no 'module.' in front
    assert first['hello'] == 'hello' and second['hello'] is None


def test_the_model_is_the_readers_own(two):
    for r in two[0]:
        u = r['unwrapping']
        assert u['kinds'] == {'Sequential'} and u['same'] and u['same again'] and u['alone'] and u['error'] in ('ZeroDivisionError', 'ProcessLost')
        assert u['epoch'] == 2
    a, b = (r['unwrapping']['ema'] for r in two[0])
    assert all(torch.equal(p, q) for p, q in zip(a, b))


def test_alone_it_does_nothing():
    a, b = (work.learner(dist=d) for d in (True, False))
    for x in (a, b): torch.manual_seed(0); x.fit(2)
    assert close(a.model.state_dict(), b.model.state_dict(), 0) and rank_and_size() == (0, 1) and rank0_only(lambda: 1)() == 1
    with process_group() as rank: assert rank == 0 and not torch.distributed.is_initialized()


# ---------------------------------------------------------------- cancelling


def test_what_one_cancels_all_cancel(two):
    for i, c in enumerate(work.CANCELS):
        one, (a, b) = work.cancelled(*c, dist=False), (r['cancels'][i] for r in two[0])
        assert close(a['state'], b['state'], 0) and a['n_iter'] == b['n_iter'] and rows_close(a['rows'], b['rows'], 1e-12), c
        assert close(a['state'], one['state']), c
        late = c[0] == 'after_step'                                    # then the step is taken, and counts
        assert a['n_iter'] == one['n_iter'] + late, c
        if not late: assert rows_close(a['rows'], one['rows']), c


@pytest.mark.parametrize('name, args, cbs', [('early cancel', ('begin_batch', CancelBatchException, 3), ()), ('late cancel', ('after_loss', CancelEpochException, 3), ()),
                                             ('accumulated cancel', ('after_backward', CancelBatchException, 4), (2,))])
def test_cancelling_at_the_edges(two, name, args, cbs):
    a, b = (r[name] for r in two[0])
    assert close(a['state'], b['state'], 0) and a['n_iter'] == b['n_iter']
    if not cbs: assert close(a['state'], work.cancelled(*args, dist=False)['state'])


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize('name', ['drop', 'plain', 'accumulated'])
def test_two_go_on_where_two_were(two, name):
    for r in two[0]:
        a, b = r['parts'][f'{name} unbroken'], r['parts'][f'{name} 2 to 2']
        assert close(a['state'], b['state'], 1e-12) and a['n_iter'] == b['n_iter'] == 20 and b['start'] == (2, 2) and rows_close(a['rows'], b['rows'])


def test_two_go_on_where_one_was(two):
    one = work.part(None)
    for r in two[0]:
        got = r['parts']['1 to 2']
        assert got['start'] == (2, 2) and close(got['state'], one['state']) and rows_close(got['rows'], one['rows'])


@pytest.mark.parametrize('name, start', [('to one', (2, 2)), ('to one at epoch', (2, 0))])
def test_one_goes_on_where_two_were(two, name, start):
    got, one = work.part(two[1]/name, every=100 if 'epoch' in name else 3), work.part(None)
    assert got['start'] == start and close(got['state'], one['state']) and rows_close(got['rows'], one['rows'])
    assert max(abs(a - b) for a, b in zip(got['losses'], one['losses'])) < 1e-6 and len(got['losses']) == 20


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize('name, says', [('small batch', 'a batch of 1 cannot be shared by 2 processes'), ('other data', 'batches an epoch: 7 in process 0 and 5 in process 1'),
                                        ('other epochs', 'epochs: 1 in process 0 and 2 in process 1'), ('sampler', 'leave it out')])
def test_mistakes_are_named_in_every_process(two, name, says):
    for r in two[0]: assert says in r['errors'][name] and r['errors'][name].startswith('ValueError')


def test_an_error_in_one_process_ends_all(two):
    first, second = (r['errors'] for r in two[0])
    for name in first:
        if not name.startswith('fault'): continue
        assert second[name] == 'ZeroDivisionError: mine'
        assert first[name] == 'ProcessLost: process 1 of 2 stopped with an error (its own output has it), and so all stop', name
    assert first['nothing wrong'] is None and second['nothing wrong'] is None


@pytest.mark.parametrize('env, says', [({'RANK': '0'}, 'WORLD_SIZE, MASTER_ADDR, MASTER_PORT'), ({'RANK': 'x', 'WORLD_SIZE': '2', 'MASTER_ADDR': 'a', 'MASTER_PORT': '1'}, "RANK is 'x'"),
                                       ({'RANK': '2', 'WORLD_SIZE': '2', 'MASTER_ADDR': 'a', 'MASTER_PORT': '1'}, 'ranks go from 0 to 1')])
def test_an_environment_that_cannot_be(env, says):
    with pytest.raises(ValueError, match=re.escape(says)): read_env(env)


def test_environment():
    assert read_env({}) is None and read_env({'MASTER_ADDR': 'a'}) is None
    assert read_env({'RANK': '3', 'WORLD_SIZE': '8', 'LOCAL_RANK': '1', 'LOCAL_WORLD_SIZE': '2', 'MASTER_ADDR': 'a', 'MASTER_PORT': '1'}) == (3, 1, 8, 2)


def test_backend():
    assert pick_backend(None, 2, 0) == 'gloo' and pick_backend('gloo', 4, 2) == 'gloo' and pick_backend('nccl', 2, 2) == 'cpu:gloo,cuda:nccl'
    with pytest.raises(ValueError, match='no.* here'): pick_backend('nccl', 1, 0)
    with pytest.raises(ValueError, match='4 processes on this machine share 2 GPUs'): pick_backend(None if torch.distributed.is_nccl_available() else 'nccl', 4, 2)


def test_port_in_use(monkeypatch):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); s.listen()
        for k, v in dict(RANK=0, WORLD_SIZE=2, MASTER_ADDR='127.0.0.1', MASTER_PORT=s.getsockname()[1]).items(): monkeypatch.setenv(k, str(v))
        with pytest.raises(ValueError, match=f'port {s.getsockname()[1]} .* in use'):          # a setting is wrong; nobody was lost
            with process_group(timeout=5): pass


@pytest.mark.parametrize('local', [{}, {'LOCAL_WORLD_SIZE': '2'}, {'LOCAL_RANK': '1'}])
def test_gpus_want_the_local_rank_where_they_are_fewer_than_processes(monkeypatch, local):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    for k in ('LOCAL_RANK', 'LOCAL_WORLD_SIZE'): monkeypatch.delenv(k, raising=False)
    for k, v in {'RANK': '3', 'WORLD_SIZE': '4', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '1', **local}.items(): monkeypatch.setenv(k, v)
    with pytest.raises(ValueError, match='4 processes are more than the 2 GPUs here, and LOCAL_RANK or LOCAL_WORLD_SIZE is not set'):
        with process_group('nccl'): pass


def test_what_cannot_be_launched(monkeypatch):
    assert 'cannot be sent' in no_launch_because(lambda: 1) and no_launch_because(work.numbers) == ''
    f = lambda: 1
    f.__module__ = '__main__'
    monkeypatch.setitem(sys.modules, '__main__', type(sys)('__main__'))                # as in a notebook: no file
    assert '%%writefile' in no_launch_because(f)
    with pytest.raises(ValueError, match='cannot be sent'): launch(lambda: 1, 2)


# ---------------------------------------------------------------- killed, silent, restarted


def start(rank, port, *args):
    env = {**os.environ, 'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    return subprocess.Popen([sys.executable, ROOT/'tests'/'dist_work.py', *map(str, args)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize('how, timeout', [('kill', 60), ('stop', 15)])
def test_a_process_that_is_gone_ends_the_others_and_the_run_goes_on(tmp_path, how, timeout):
    port = free_port()
    ps = [start(r, port, tmp_path/'ck', tmp_path/'out', how, timeout) for r in (0, 1)]
    try:
        out, err = ps[0].communicate(timeout=400)                       # a process that falls silent: within the timeout
        assert ps[0].returncode == 1
        assert re.search(rf'ProcessLost: process 0 of 2 ends: another one has ended or has not answered within {timeout} s\..*goes on from the last', err), err[-2000:]
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


def test_torchrun_starts_again_and_the_run_goes_on(tmp_path):
    r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '--max-restarts', '1', ROOT/'tests'/'dist_work.py',
                        tmp_path/'ck', tmp_path/'out', 'kill'], env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, timeout=600)
    assert r.returncode == 0, r.stderr[-3000:]
    assert r.stdout.count('this is printed once, by process 0 of 2') == 2              # once in each life
    got, one = torch.load(tmp_path/'out'), work.learner(dist=False).fit(4)
    assert got['start'] == (1, 3) and close(got['state'], one.model.state_dict()) and rows_close(got['rows'], work.result(one)['rows'])
