"""Checkpoints: a killed run ends as the run never killed, to the bit; what does not belong to a run changes nothing in it.

Run as a program, this file is the driver of the kill test: `python tests/test_checkpoints.py kills WORKERS FOLDER`."""
import errno
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, largest_file, small_env
from PIL import Image
from torch import nn

from exp import checkpoints
from exp.annealing import ParamScheduler, combine_scheds, cos_1cycle_anneal
from exp.callbacks import EVENTS, AvgStatsCallback, BatchTransformXCallback, Callback, DataBunch, Dataset, Recorder, accuracy, get_dls, get_hypers
from exp.checkpoints import Checkpoint, data_facts
from exp.files import load, save
from exp.convnets import Lambda, flatten
from exp.data_block import ImageList, NormalizeBytes, ResizeFixed, SplitData, grandparent_splitter, item_dl, label_by_func, make_rgb, parent_labeler, to_byte_tensor
from exp.fast_batches import fast_dl
from exp.files import CheckpointError, write_atomic
from exp.learner import CancelStepException, Learner
from exp.lr_find import rng_state
from exp.optimizers import adam_opt, sgd_mom_opt


@pytest.fixture
def tmp_path(tmp_path):
    "In memory where there is such a place: these tests write hundreds of files, and each waits for its disk."
    if not os.access('/dev/shm', os.W_OK): yield tmp_path; return
    folder = Path(tempfile.mkdtemp(dir='/dev/shm', prefix='exp-test-'))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def seed_all(s): torch.manual_seed(s); random.seed(s); np.random.seed(s)


class StopAt(Callback):
    "Ends the fit as Ctrl-C would, after training batch `at`, when all others have done."
    _order = 2000
    def __init__(self, at): self.at = at
    def after_batch(self, run):
        if run.in_train and run.n_iter == self.at: raise KeyboardInterrupt


def digest(learn):
    "Weights, statistics, optimizer, losses, rates, rows and generators in one number."
    h = hashlib.sha256()
    def add(o):
        if torch.is_tensor(o): h.update(o.detach().contiguous().numpy().tobytes())
        elif isinstance(o, dict): [add(v) for _, v in sorted(o.items(), key=lambda kv: str(kv[0]))]
        elif isinstance(o, (list, tuple)): [add(v) for v in o]
        else: h.update(repr(float(o) if isinstance(o, int) else o).encode())
    rows = [{k: v for k, v in r.items() if k != 'time'} for r in learn.cb(AvgStatsCallback).rows]
    hypers = [{k: v for k, v in h.items() if k != 'params'} for h in get_hypers(learn.opt)]
    add([learn.model.state_dict(), [learn.opt.state.get(p) for p in learn.model.parameters()], hypers,
         learn.cb(Recorder).losses, learn.cb(Recorder).hypers, rows, rng_state(), learn.n_iter])
    return h.hexdigest()


# ---------------------------------------------------------------- killed at random places: real files, augmentation, workers, all that draws


class Jitter:
    "Random flip and shift of a PIL image, drawn from the generator that the loader hands over."
    _order, generator = 15, None

    def __call__(self, im):
        u = torch.rand(2, generator=self.generator)
        im = im.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if u[0] < .5 else im
        k = int(u[1]*4)
        return im.crop((k, k, k + 12, k + 12))


class Half(Callback):
    "Draws from a generator of its own: it drops one input of each batch."
    _order = 3
    def __init__(self, seed): self.g = torch.Generator().manual_seed(seed)
    def begin_batch(self, run):
        if run.in_train: run.xb = run.xb*(torch.rand(len(run.xb), 1, 1, 1, generator=self.g) > .2)


class Pairs(Callback):
    "A step for every two batches: between them there are gradients under way, and a count."
    def __init__(self): self.n = 0
    def after_backward(self, run):
        self.n += 1
        if self.n % 2: raise CancelStepException
    def state_dict(self): return {'n': self.n}
    def load_state_dict(self, sd): self.n = sd['n']


def make_pictures(folder, n=44):
    "PNG files `train/a/…`, `valid/b/…` of noise with a bright or a dark corner."
    g = np.random.default_rng(0)
    for i in range(n):
        c, side = 'ab'[i % 2], 'valid' if i % 4 > 2 else 'train'
        a = g.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        a[:8, :8] = 255*(c == 'a')
        (folder/side/c).mkdir(parents=True, exist_ok=True)
        Image.fromarray(a).save(folder/side/c/f'{i:03d}.png')


def pictures_learner(folder, workers, seed, cls=ImageList):
    "What `seed` decides (first weights, order, draws) must all come out of the checkpoint."
    seed_all(seed)
    il = cls.from_files(folder, tfms=[make_rgb, to_byte_tensor])
    sd = label_by_func(SplitData.split_by_func(il, grandparent_splitter), parent_labeler)
    sd.train.x.tfms, sd.valid.x.tfms = [make_rgb, Jitter(), to_byte_tensor], [make_rgb, ResizeFixed(12), to_byte_tensor]
    data = sd.to_databunch(6, seed=seed, num_workers=workers, make_dl=item_dl if workers else fast_dl)          # both kinds of order come back
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.2), nn.AdaptiveAvgPool2d(2), Lambda(flatten), nn.Linear(16, 2))
    return Learner(model, data, F.cross_entropy, adam_opt(), lr=.01, cbs=[AvgStatsCallback(accuracy, silent=True), Recorder()])


def fit_cbs():
    return [ParamScheduler('lr', combine_scheds([.3, .7], cos_1cycle_anneal(.001, .03, .001))), Half(7), Pairs(),
            BatchTransformXCallback(NormalizeBytes([.5]*3, [.3]*3))]


class KillAt(Callback):
    "SIGKILLs its own process at event number `at` of the fit, whichever it is."
    _order = 2000
    def __init__(self, at): self.n, self.at = 0, at
    def tick(self, run):
        if self.n == self.at: os.kill(os.getpid(), signal.SIGKILL)
        self.n += 1


for _e in EVENTS: setattr(KillAt, _e, KillAt.tick)


def kill_in_save(at, where):
    "SIGKILL in the `at`-th save of this process: in the middle of writing, before the data is safe, or before or after the new name is."
    n, fsync, replace, write = [0], os.fsync, os.replace, checkpoints.write_file
    def die(k):
        if where == k and n[0] == at: os.kill(os.getpid(), signal.SIGKILL)
    def count(path, *args):
        n[0] += 1
        if where == 'write' and n[0] == at: write_atomic(path, lambda f: (f.write(b'PK\3\4 half'), f.flush(), die('write')))
        write(path, *args)
    checkpoints.write_file = count
    os.fsync = lambda fd: (die('fsync'), fsync(fd))
    os.replace = lambda a, b: (die('replace'), replace(a, b), die('after'))


def run_once(pictures, workers, folder, seed, kill=None, in_save=None):
    "Fit from where the folder stands. With no checkpoint yet it is a first start, and the script's own seed counts."
    seed = seed if any(folder.glob('*.pt')) else 0
    learn, ck = pictures_learner(pictures, workers, seed), Checkpoint(folder, every=2, keep=2)
    start, killer = ck.start(learn), KillAt(-1 if kill is None else kill)
    if in_save: kill_in_save(*in_save)
    if start == (0, 0): seed_all(3)
    learn.fit(2, [*fit_cbs(), ck, killer], start=start)
    learn.data.train_dl._iterator = learn.data.valid_dl._iterator = None             # lets the workers go
    return {'digest': digest(learn), 'events': killer.n, 'start': start}


def in_child(out, f, *args, **kw):
    "`f` in a child process that is a fork of this one, which has never trained: `(signal that killed it or 0, result)`."
    out.unlink(missing_ok=True)
    pid = os.fork()
    if not pid:
        try: out.write_text(json.dumps(f(*args, **kw))); gc.collect()
        except BaseException as e: out.write_text(json.dumps({'error': repr(e)}))
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return (os.WTERMSIG(status), {}) if os.WIFSIGNALED(status) else (0, json.loads(out.read_text()))


def drive(workers, folder, rounds=20):
    "The reference, then `rounds` times: killed at a random place, some twice, and resumed. Prints a line of json."
    pictures, out, rng = folder/'pictures', folder/'out.json', random.Random(workers)
    make_pictures(pictures)
    _, ref = in_child(out, run_once, pictures, workers, folder/'ref', 0)
    places = []
    for i in range(rounds):
        ck = folder/f'run{i}'
        where = {'in_save': (rng.randint(1, 8), ('write', 'fsync', 'replace', 'after')[i % 4])} if i % 5 >= 3 else {'kill': rng.randrange(ref['events'])}
        sig, _ = in_child(out, run_once, pictures, workers, ck, 0, **where)
        again = in_child(out, run_once, pictures, workers, ck, 500 + i, kill=10)[0] if i % 5 == 0 else None
        last, end = in_child(out, run_once, pictures, workers, ck, 1000 + i)
        places.append({'where': where, 'killed': sig, 'again': again, 'resumed': last, 'same': end.get('digest') == ref['digest'],
                       'start': end.get('start'), 'error': end.get('error'), 'left': sorted(p.name for p in ck.iterdir())})
        shutil.rmtree(ck)
    print(json.dumps({'ref': ref, 'places': places}))


def program(*args, home):
    env = {**small_env(home), 'PYTHONPATH': str(ROOT)}
    return subprocess.run([sys.executable, __file__, *map(str, args)], env=env, capture_output=True, text=True, timeout=800)


@pytest.mark.parametrize('workers', [0, 2])
def test_killed_anywhere_ends_as_the_run_never_killed(workers, tmp_path, data_home):
    p = program('kills', workers, tmp_path, home=data_home)
    assert p.returncode == 0, p.stderr[-3000:]
    res = json.loads(p.stdout.splitlines()[-1])
    places = res['places']
    assert res['ref']['events'] > 60 and len(places) == 20
    assert all(pl['killed'] == signal.SIGKILL and pl['again'] in (None, signal.SIGKILL) for pl in places), places
    assert all(pl['resumed'] == 0 and pl['same'] for pl in places), [pl for pl in places if not pl['same']]
    starts = {tuple(pl['start']) for pl in places}
    assert len(starts) >= 5 and any(b for _, b in starts) and any(e and not b for e, b in starts), starts          # in epochs and between them
    for pl in places:
        assert len([n for n in pl['left'] if n.endswith('.pt')]) == 2, pl
        in_first_save = pl['where'].get('in_save', [0])[0] == 1                     # then there is nothing yet to know its remains by
        assert in_first_save or not any('tmp' in n for n in pl['left']), pl


def test_killed_and_resumed_in_interpreters_of_their_own(tmp_path, data_home):
    make_pictures(tmp_path/'pictures')
    def go(seed, folder, *kill): return program('once', tmp_path, folder, seed, *kill, home=data_home)
    ref, killed = go(0, 'ref'), go(0, 'a', 47)
    assert killed.returncode == -signal.SIGKILL and not killed.stdout
    ref, resumed = (json.loads(p.stdout.splitlines()[-1]) for p in (ref, go(99, 'a')))
    assert ref['start'] == [0, 0] and resumed['start'] != [0, 0] and ref['digest'] == resumed['digest']


def test_batches_before_the_place_are_not_loaded(tmp_path):
    make_pictures(tmp_path/'pictures')
    seen = []
    class Counting(ImageList):
        def get(self, fn): seen.append(fn); return super().get(fn)
    def go(*cbs, start=lambda learn: (0, 0)):
        learn = pictures_learner(tmp_path/'pictures', 0, 1, Counting)
        begin = start(learn)
        seen.clear()
        learn.fit(1, [BatchTransformXCallback(NormalizeBytes([.5]*3, [.5]*3)), *cbs], start=begin)
    with pytest.raises(KeyboardInterrupt): go(Checkpoint(tmp_path/'c', every=1), StopAt(4))
    ck = Checkpoint(tmp_path/'c')
    go(ck, start=ck.start)
    assert len(seen) == 33 - 4*6 + 11


# ---------------------------------------------------------------- resumed, place by place, in this process

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(140, 10, generator=G), torch.randint(0, 3, (140,), generator=G)


def toy(seed=0, opt=sgd_mom_opt, dl_seed=0, n_hid=20, n=100, bs=16, lr=.05, cbs=()):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, n_hid), nn.BatchNorm1d(n_hid), nn.ReLU(), nn.Dropout(.3), nn.Linear(n_hid, 3))
    data = DataBunch(*get_dls(Dataset(X[:n], Y[:n]), Dataset(X[100:], Y[100:]), bs, seed=dl_seed), c_in=10, c_out=3)
    return Learner(model, data, F.cross_entropy, opt, lr=lr, cbs=[AvgStatsCallback(accuracy, silent=True), Recorder(), *cbs])


def stopped(folder, at, epochs=3, fit=(), every=1, keep=3, **kw):
    learn = toy(**kw)
    seed_all(9)
    try: learn.fit(epochs, [*fit, Checkpoint(folder, every=every, keep=keep), StopAt(at)])
    except KeyboardInterrupt: pass
    return learn


def resumed(folder, epochs=3, fit=(), seed=1, **kw):
    learn, ck = toy(seed, **kw), Checkpoint(folder)
    return learn.fit(epochs, [*fit, ck], start=ck.start(learn))


def never_stopped(epochs=3, fit=(), **kw):
    learn = toy(**kw)
    seed_all(9)
    return learn.fit(epochs, fit)


def weights(learn): return {k: v.clone() if torch.is_tensor(v) else v for k, v in learn.model.state_dict().items()}
def same(a, b): return all(v.equal(b[k]) if torch.is_tensor(v) else v == b[k] for k, v in a.items())


@pytest.mark.parametrize('opt', [sgd_mom_opt, adam_opt(), partial(torch.optim.SGD, momentum=.9), torch.optim.AdamW], ids=['sgd', 'adam', 'torch-sgd', 'torch-adamw'])
@pytest.mark.parametrize('dl_seed', [0, None])
def test_every_kind_of_place(opt, dl_seed, tmp_path):
    "First batch, middle, last batch of an epoch, first of the next, the very last; torch's plain loader, with a generator and without."
    def sched(): return [ParamScheduler('lr', combine_scheds([.3, .7], cos_1cycle_anneal(.001, .1, .001)))]
    ref = never_stopped(fit=sched(), opt=opt, dl_seed=dl_seed)
    want = digest(ref)
    for at in (1, 4, 7, 8, 21):
        stopped(tmp_path/f'{at}', at, fit=sched(), opt=opt, dl_seed=dl_seed)
        assert Checkpoint(tmp_path/f'{at}').start(toy(opt=opt)) in (divmod(at, 7), (at//7 - 1, 7))       # before its validation
        new = resumed(tmp_path/f'{at}', fit=sched(), opt=opt, dl_seed=77 if dl_seed == 0 else None)
        assert digest(new) == want
        assert [h['lr'] for h in get_hypers(new.opt)] == [h['lr'] for h in get_hypers(ref.opt)] == [.05]


def test_gradients_under_way_are_kept(tmp_path):
    want = digest(never_stopped(2, [Pairs()]))
    stopped(tmp_path, 3, 2, [Pairs()])
    assert digest(resumed(tmp_path, 2, [Pairs()])) == want


class GlobalDraws(torch.utils.data.Dataset):
    "Draws from the global generators, as most of the world's transforms do."
    def __len__(self): return 40
    def __getitem__(self, i): return (X[i] + torch.randn(10)*.1 + random.random() + np.random.rand()).float(), Y[i]


class NumpyOrder(torch.utils.data.Sampler):
    "Draws the order of each pass from a generator of numpy's."
    def __init__(self, kind, seed): self.dice = np.random.Generator(kind(seed))
    def __len__(self): return 40
    def __iter__(self): return iter(self.dice.permutation(40).tolist())


class Noise(Callback):
    "Draws from a generator of numpy's, and between epochs from the global ones."
    def __init__(self, seed): self.dice = np.random.default_rng(seed)
    def begin_batch(self, run): run.xb = run.xb + torch.from_numpy(self.dice.normal(size=run.xb.shape).astype(np.float32))
    def after_epoch(self, run): random.gauss(0, 1), np.random.randn()


@pytest.mark.parametrize('kind', [None, np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64])
def test_everything_that_draws(kind, tmp_path):
    def make(seed):
        seed_all(seed)
        order = {'shuffle': True} if kind is None else {'sampler': NumpyOrder(kind, seed)}
        train, valid = torch.utils.data.DataLoader(GlobalDraws(), 8, **order), torch.utils.data.DataLoader(GlobalDraws(), 16)
        model = nn.Sequential(nn.Linear(10, 5), nn.Dropout(.5), nn.Linear(5, 3))
        return Learner(model, DataBunch(train, valid), F.cross_entropy, cbs=[AvgStatsCallback(accuracy, silent=True), Recorder(), Noise(seed)])
    want = digest(make(0).fit(3))
    for at in (2, 5, 8):
        with pytest.raises(KeyboardInterrupt): make(0).fit(3, [Checkpoint(tmp_path/f'{at}', every=1), StopAt(at)])
        new, ck = make(1), Checkpoint(tmp_path/f'{at}')
        assert digest(new.fit(3, ck, start=ck.start(new))) == want


def test_callbacks_remember_and_those_without_a_partner_are_named(tmp_path):
    class Sum(Callback):
        def begin_fit(self, run): self.total = 0
        def after_loss(self, run): self.total = self.total + run.loss.detach()
        def state_dict(self): return {'total': self.total}
        def load_state_dict(self, sd): self.total = sd['total']
    class Lone(Sum): pass
    a = [Sum(), Half(1), Sum()]
    a[1].begin_batch = lambda run: None
    want = digest(never_stopped(fit=a))
    stopped(tmp_path, 9, fit=[Sum(), Half(1), Sum()][::2])
    b = [Sum(), Sum()]
    assert digest(resumed(tmp_path, fit=b)) == want and b[0].total == b[1].total == a[0].total
    stopped(tmp_path, 9, fit=[Sum(), Half(1)][:1])
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        resumed(tmp_path, fit=[Lone()])                                              # in mid-epoch, where callbacks are loaded twice
    assert len(w) == 1 and 'Lone 1, Sum 1' in str(w[0].message)


def test_what_is_not_plain_ends_the_fit_at_the_first_checkpoint(tmp_path):
    class Bad(Callback):
        def state_dict(self): return {'f': print}
    with pytest.raises(TypeError, match='builtin_function'): toy().fit(1, [Bad(), Checkpoint(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_module_with_a_state_beside_its_tensors(tmp_path):
    class Counting(nn.Linear):
        calls = 0
        def forward(self, x): self.calls += 1; return super().forward(x)
        def get_extra_state(self): return {'calls': self.calls}
        def set_extra_state(self, s): self.calls = s['calls']
    def make():
        learn = toy()
        learn.model = nn.Sequential(Counting(10, 3))
        return learn
    learn = make().fit(1)
    assert load(make(), save(learn, tmp_path/'a.pt')).model[0].calls == learn.model[0].calls > 0
    with pytest.raises(KeyboardInterrupt): make().fit(2, [Checkpoint(tmp_path, every=1), StopAt(10)])
    new, ck = make(), Checkpoint(tmp_path)
    new.fit(2, ck, start=ck.start(new))
    assert new.model[0].calls == make().fit(2).model[0].calls
    torch.save({k: v for k, v in learn.model.state_dict().items() if torch.is_tensor(v)}, tmp_path/'bare.pt')
    was = weights(learn)
    with pytest.raises(CheckpointError, match='extra_state'): load(learn, tmp_path/'bare.pt')
    assert same(weights(learn), was)


# ---------------------------------------------------------------- the folder


def test_the_last_k_of_each_run_stay_and_nothing_else_is_touched(tmp_path):
    mine = [tmp_path/n for n in ('notes.txt', 'best.pt', '.notes.pt.0123abcd.tmp')]
    for f in mine: f.write_bytes(b'mine')
    toy().fit(2, Checkpoint(tmp_path, every=1, keep=3))
    first = {f: f.read_bytes() for f in Checkpoint(tmp_path).files()}
    assert len(first) == 3 and len({f.name.split('.')[1] for f in first}) == 3
    toy(1).fit(2, Checkpoint(tmp_path, every=1, keep=2))                             # the same folder, again from the start
    files = Checkpoint(tmp_path).files()
    assert len(files) == 5 and all(f.read_bytes() == b for f, b in first.items()) and not {*files[:2]} & {*first}      # newest run first
    assert all(f.read_bytes() == b'mine' for f in mine)
    for _ in range(4): toy().fit(1, Checkpoint(tmp_path))
    assert len({f.name[:6] for f in Checkpoint(tmp_path).files()}) == 6                # whatever the clock says, and the random letters


def test_a_clock_put_back_changes_nothing(tmp_path, monkeypatch):
    toy().fit(1, Checkpoint(tmp_path))
    monkeypatch.setattr('time.time', lambda: 1e9)
    stopped(tmp_path, 9, keep=1)
    for f in tmp_path.iterdir(): os.utime(f, (0, 1e9 - int(f.name[:6])))
    assert Checkpoint(tmp_path).start(toy()) == (1, 2)


def test_an_unreadable_newest_is_said_and_the_one_before_taken(tmp_path):
    stopped(tmp_path, 9)
    files = Checkpoint(tmp_path).files()
    files[0].write_bytes(files[0].read_bytes()[:500])
    with pytest.warns(UserWarning, match=files[0].name): assert Checkpoint(tmp_path).start(toy()) == (1, 1)
    for f in files: f.write_bytes(b'x')
    with pytest.warns(UserWarning), pytest.raises(CheckpointError): Checkpoint(tmp_path).start(toy())
    assert Checkpoint(tmp_path/'nowhere').start(toy()) == (0, 0)


def test_a_full_disk_costs_a_warning_and_not_the_run(tmp_path):
    "A real refusal of the operating system: no file may grow beyond the limit."
    learn = toy(n_hid=2000)
    before = save(learn, tmp_path/'w.pt').read_bytes()
    class Fill(Callback):
        def after_batch(self, run):
            if run.n_iter == 5: limit.__enter__()
    limit = largest_file(20_000)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        learn.fit(2, [Fill(), Checkpoint(tmp_path/'c', every=2)])
        with pytest.raises(CheckpointError): save(learn, tmp_path/'w.pt')
    limit.__exit__(None, None, None)
    assert learn.n_iter == 14 and (tmp_path/'w.pt').read_bytes() == before and len(w) == 7
    assert len([*tmp_path.iterdir()]) == 2 and sorted(f.name.split('.')[1] for f in (tmp_path/'c').iterdir()) == ['000000002', '000000004']
    assert Checkpoint(tmp_path/'c').start(toy(n_hid=2000)) == (0, 4)


def test_where_a_disk_has_room_for_two_the_oldest_goes_first(tmp_path, monkeypatch):
    real = checkpoints.write_file
    def small(path, kind, state):
        if len([*tmp_path.glob('*.pt')]) < 2: return real(path, kind, state)
        raise CheckpointError('full') from OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(checkpoints, 'write_file', small)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        toy().fit(1, Checkpoint(tmp_path, every=1, keep=3))
    assert Checkpoint(tmp_path).start(toy()) == (1, 0)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    learn = toy().fit(1, Checkpoint('~/c'))
    assert save(learn, '~/w.pt') == tmp_path/'w.pt' and load(toy(), '~/w.pt') and Checkpoint('~/c').start(toy()) == (1, 0) and not Path('~').exists()


# ---------------------------------------------------------------- another fit


def one_group_swapped(learn):
    learn.splitter = lambda m: [list(m[4].parameters()), [p for k in (0, 1) for p in m[k].parameters()]]


CYCLE = ParamScheduler('lr', combine_scheds([.3, .7], cos_1cycle_anneal(.001, .2, .001)))


@pytest.mark.parametrize('kw,epochs,said', [(dict(n=60), 3, 'batches'), (dict(bs=15), 3, 'batch size'), (dict(n_hid=30), 3, '0.weight'), ({}, 5, 'epochs'),
                                            (dict(lr=.001), 3, 'lr'), (dict(opt=adam_opt()), 3, 'optimizer'), (dict(opt=torch.optim.SGD), 3, 'optimizer'),
                                            (dict(opt=partial(sgd_mom_opt, mom=.5)), 3, 'mom'), (dict(cbs=[CYCLE]), 3, None)])
def test_another_fit_is_refused_and_nothing_changes(kw, epochs, said, tmp_path):
    stopped(tmp_path, 9, fit=[ParamScheduler('lr', combine_scheds([.3, .7], cos_1cycle_anneal(.001, .1, .001)))] if said is None else [])
    learn, ck = toy(3, **kw), Checkpoint(tmp_path)
    before = weights(learn)
    with pytest.raises(CheckpointError, match=said): learn.fit(epochs, ck, start=ck.start(learn))
    assert same(weights(learn), before) and learn.n_iter == 0 and not learn.opt or not learn.opt.state
    assert resumed(tmp_path, fit=[ParamScheduler('lr', combine_scheds([.3, .7], cos_1cycle_anneal(.001, .1, .001)))] if said is None else [])


def test_the_split_is_part_of_it(tmp_path):
    make_pictures(tmp_path)
    def facts(seed):
        sd = SplitData.split_by_random(ImageList.from_files(tmp_path, tfms=[make_rgb, to_byte_tensor]), .3, seed)
        return data_facts(label_by_func(sd, parent_labeler).to_databunch(4, num_workers=0))
    a, b = facts(1), facts(2)
    assert a == facts(1) and a['classes'] == ['a', 'b']
    assert all(a[k] != b[k] for k in ('names of train items', 'names of valid items'))


def test_a_choice_serves_one_fit_at_its_own_place(tmp_path):
    "Elsewhere batches would be trained twice, or left out; without a choice, fresh weights from the middle."
    for at, others in ((9, [(1, 0), (1, 1), (1, 5), (0, 2)]), (8, [(1, 3), (0, 0), (2, 0)])):
        folder = tmp_path/f'{at}'
        stopped(folder, at, every=1 if at == 9 else None)
        for start in others:
            new, ck = toy(1), Checkpoint(folder)
            before = weights(new)
            ck.start(new)
            with pytest.raises(CheckpointError): new.fit(3, ck, start=start)
            assert same(weights(new), before) and new.n_iter == 0
            ck.folder = tmp_path/'new'
            new.fit(1, ck)                                                           # the choice has gone with the fit that was refused
        new, ck = toy(1), Checkpoint(folder)
        start = list(ck.start(new))                                                  # a list will do
        new.fit(3, ck, start=start)
        for again in (toy(), new):
            with pytest.raises(CheckpointError, match='start=ck.start'): again.fit(3, ck, start=start)


@pytest.mark.parametrize('kw', [dict(keep=0), dict(every=0), dict(every=-3)])
def test_arguments(kw, tmp_path):
    with pytest.raises(ValueError): Checkpoint(tmp_path, **kw)


# ---------------------------------------------------------------- crafted checkpoints


def spoilt(d):
    "Copies of the checkpoint `d`, each with one thing in it that is not as it should be: `(where, copy)`."
    odd = [None, -1, 10**30, float('nan'), 'x'*50, '../escape', [], [1, [2]], {}, {'a': 1}, torch.ones(2, 3), True]
    def walk(o, path):
        yield path
        inside = list(o.items()) if isinstance(o, dict) else list(enumerate(o)) if isinstance(o, (list, tuple)) else []
        for k, v in inside[:4 if path else None]: yield from walk(v, (*path, k))
    def put(o, path, new):
        if not path: return new
        pairs = {k: put(v, path[1:], new) if k == path[0] else v for k, v in (o.items() if isinstance(o, dict) else enumerate(o))}
        return pairs if isinstance(o, dict) else type(o)(pairs.values())
    rng = random.Random(0)
    for path in walk(d, ()):
        for new in rng.sample(odd, 2): yield path, put(d, path, new)


def test_crafted_checkpoints_are_refused_or_harmless(tmp_path):
    "Whatever stands in a file: a sentence and nothing changed, or a fit; no other file is touched, nothing hangs."
    (tmp_path/'precious').mkdir()
    stopped(tmp_path/'run', 9, epochs=2, keep=1, opt=adam_opt())
    precious = tmp_path/'precious'/'000001-aaaa.000000009.pt'
    precious.write_bytes(b'mine')
    [file] = (tmp_path/'run').iterdir()
    d, refused, fitted = torch.load(file, weights_only=True), 0, 0
    for path, o in spoilt(d):
        torch.save(o, file)
        learn, ck = toy(3, adam_opt()), Checkpoint(tmp_path/'run')
        before, dice = weights(learn), torch.get_rng_state()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try: start = ck.start(learn)
            except CheckpointError: refused += 1; continue
            try: learn.fit(2, [ck, StopAt(10)], start=start)
            except CheckpointError:
                refused += 1
                assert same(weights(learn), before) and not learn.opt.state and torch.get_rng_state().equal(dice), path
            except KeyboardInterrupt: fitted += 1
            except (AttributeError, TypeError, RuntimeError, ZeroDivisionError):         # what a class lets into its own state is its own affair
                assert path[:3] == ('parts', 'opt', 'state') or 'stats' in path, path
            for f in ck.files(): f.unlink()
    assert refused > 120 and fitted > 10 and precious.read_bytes() == b'mine'
    assert {p.name for p in tmp_path.iterdir()} == {'precious', 'run'} and len([*(tmp_path/'precious').iterdir()]) == 1


# ---------------------------------------------------------------- save and load


def test_save_and_load(tmp_path):
    learn = toy(opt=adam_opt()).fit(1)
    path, bare = save(learn, tmp_path/'w.pt'), tmp_path/'bare.pt'
    new = load(toy(5, adam_opt()), path)
    assert same(weights(new), weights(learn)) and digest(new.fit(0))
    assert [s['grad_avg'].equal(t['grad_avg']) for s, t in zip(new.opt.state.values(), learn.opt.state.values())] == [True]*len(learn.opt.state) and learn.opt.state
    torch.save(learn.model.state_dict(), bare)
    for f, opt in ((bare, True), (path, False), (save(learn, tmp_path/'v.pt', opt=False), True)):
        new = load(toy(6, adam_opt()), f, opt=opt)
        assert same(weights(new), weights(learn)) and new.opt is None
    with pytest.raises(CheckpointError): load(toy(6, sgd_mom_opt), path)
    stopped(tmp_path/'c', 9, opt=adam_opt())
    assert load(toy(7, adam_opt()), Checkpoint(tmp_path/'c').files()[0]).opt.state                  # a checkpoint will do


@pytest.mark.parametrize('front', ['module.', '_orig_mod.', 'module._orig_mod.'])
def test_names_that_wrappers_put_in_front(front, tmp_path):
    learn = toy()
    torch.save({front + k: v for k, v in learn.model.state_dict().items()}, tmp_path/'w.pt')
    assert same(weights(load(toy(5), tmp_path/'w.pt')), weights(learn))
    torch.save({k.replace('.', f'.{front}'): v for k, v in learn.model.state_dict().items()}, tmp_path/'w.pt')       # a part of it compiled
    assert same(weights(load(toy(5), tmp_path/'w.pt')), weights(learn))
    learn.model, wrapped = nn.ModuleDict({'module': learn.model}), toy(5)            # a net may have a layer of that name
    wrapped.model = nn.ModuleDict({'module': wrapped.model})
    assert same(weights(load(wrapped, save(learn, tmp_path/'v.pt'))), weights(learn))
    if front == 'module.':
        learn.model = nn.DataParallel(toy(8).model)                                  # and a wrapped one is saved without
        assert same(weights(load(toy(5), save(learn, tmp_path/'u.pt'))), weights(toy(8)))


def test_what_weights_say_of_a_checkpoint_is_not_heard(tmp_path):
    learn = toy()
    d = torch.load(save(learn, tmp_path/'w.pt'), weights_only=True)
    for more in ({'parts': 5}, {'parts': 'opt'}, {'callbacks': 5}, {'callbacks': {'EMA 1': 5}}):
        torch.save({**d, **more}, tmp_path/'w.pt')
        assert same(weights(load(toy(5), tmp_path/'w.pt')), weights(learn))


def test_another_rate_is_said(tmp_path):
    path = save(toy(lr=.1).fit(1), tmp_path/'w.pt')
    with pytest.warns(UserWarning, match='lr'): assert load(toy(lr=.001), path).opt.hypers[0]['lr'] == .1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load(toy(lr=.1), path)
        load(toy(lr=.001), path, opt=False)


def test_what_is_refused_changes_nothing(tmp_path):
    learn = toy(8, adam_opt()).fit(1)
    path, before, steps = save(toy(9, adam_opt()).fit(1), tmp_path/'w.pt'), weights(learn), [dict(s) for s in learn.opt.state.values()]
    d = torch.load(path, weights_only=True)
    for bad in ({'opt': 5}, {'opt': {**d['opt'], 'groups': [['a']]}}, {'opt': {**d['opt'], 'state': {}}}, {'model': {**d['model'], '0.weight': torch.ones(3)}},
                {'model': {k: v for k, v in d['model'].items() if k != '4.bias'}}, {'model': {**d['model'], '1.num_batches_tracked': torch.tensor(1.5)}}, {'model': {**d['model'], 'more': torch.ones(3)}}):
        torch.save({**d, **bad}, path)
        with pytest.raises(CheckpointError): load(learn, path)
        assert same(weights(learn), before)
        for s, t in zip(learn.opt.state.values(), steps): assert same(s, t)


class Trips(torch.optim.SGD):
    "An optimizer whose own loading fails when it is half done, writing into tensors that are there."
    def load_state_dict(self, sd):
        for s in self.state.values(): s['momentum_buffer'].zero_()
        self.param_groups[0]['lr'] = 77.
        raise RuntimeError('not mine')


@pytest.mark.parametrize('opt,spoil', [(torch.optim.AdamW, lambda sd: sd['state'][0].pop('step')),       # torch notices after taking over the rest
                                       (partial(Trips, momentum=.9), lambda sd: None)], ids=['adamw', 'trips'])
def test_an_optimizer_that_fails_to_load_is_as_it_was(opt, spoil, tmp_path):
    learn = toy(2, opt).fit(1)
    d = torch.load(save(toy(3, opt).fit(1), tmp_path/'w.pt'), weights_only=True)
    spoil(d['opt']['state'])
    torch.save(d, tmp_path/'w.pt')
    groups, state = learn.opt.param_groups[0], {p: dict(s) for p, s in learn.opt.state.items()}
    values, before = {(p, k): v.clone() for p, s in state.items() for k, v in s.items()}, weights(learn)
    with pytest.raises(CheckpointError): load(learn, tmp_path/'w.pt')
    assert learn.opt.param_groups[0] is groups and groups['lr'] == .05 and learn.opt.state.keys() == state.keys()
    for p, s in state.items():
        for k, v in s.items(): assert learn.opt.state[p][k] is v and v.equal(values[p, k])
    assert same(weights(learn), before) and learn.fit(1)


@pytest.mark.parametrize('opt', [partial(torch.optim.SGD, momentum=.9), sgd_mom_opt])
def test_an_optimizer_knows_its_parameters_by_name(opt, tmp_path):
    "Two groups in another order: shapes agree, and each average would go to the other's weights."
    def two(order):
        learn = toy(opt=opt, n_hid=10)
        learn.splitter = lambda m: [[m[0].weight, m[0].bias], [m[1].weight, m[1].bias, *m[4].parameters()]][::order]
        return learn
    path = save(two(1).fit(1), tmp_path/'w.pt')
    load(two(1), path)
    with pytest.raises(CheckpointError, match='groups'): load(two(-1), path)


if __name__ == '__main__':
    torch.set_num_threads(1)
    if sys.argv[1] == 'kills': drive(int(sys.argv[2]), Path(sys.argv[3]))
    else:
        base, folder, seed, *kill = sys.argv[2:]
        print(json.dumps(run_once(Path(base)/'pictures', 0, Path(base)/folder, int(seed), *(int(k) for k in kill))))
