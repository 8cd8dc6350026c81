"""Checkpoints: a killed run ends as the run never killed, to the bit; what does not belong to a run changes nothing in it.

Run as a program, this file is the driver of the kill test: `python tests/test_checkpoints.py WORKERS FOLDER`."""
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
from exp.convnets import Lambda, flatten
from exp.data_block import ImageList, NormalizeBytes, ResizeFixed, SplitData, grandparent_splitter, item_dl, label_by_func, make_rgb, parent_labeler, to_byte_tensor
from exp.fast_batches import fast_dl
from exp.files import CheckpointError, load, save, write_atomic
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
    "Ends the fit as Ctrl-C would, after training batch `at`."
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


def drive(workers, folder, rounds=12):
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


@pytest.mark.parametrize('workers', [0, 2])
def test_killed_anywhere_ends_as_the_run_never_killed(workers, tmp_path, data_home):
    env = {**small_env(data_home), 'PYTHONPATH': str(ROOT)}
    p = subprocess.run([sys.executable, __file__, str(workers), str(tmp_path)], env=env, capture_output=True, text=True, timeout=800)
    assert p.returncode == 0, p.stderr[-3000:]
    res = json.loads(p.stdout.splitlines()[-1])
    assert res['ref']['events'] > 60 and len(res['places']) == 12
    for pl in res['places']:
        assert pl['killed'] == signal.SIGKILL and pl['again'] in (None, signal.SIGKILL) and pl['resumed'] == 0 and pl['same'], pl
        assert len([n for n in pl['left'] if n.endswith('.pt')]) == 2, pl
        in_first_save = pl['where'].get('in_save', [0])[0] == 1                     # then there is nothing yet to know its remains by
        assert in_first_save or not any('tmp' in n for n in pl['left']), pl
    starts = {tuple(pl['start']) for pl in res['places']}
    assert any(b for _, b in starts) and any(e and not b for e, b in starts), starts          # in epochs and between them


def test_batches_before_the_place_are_not_loaded(tmp_path):
    make_pictures(tmp_path/'pictures')
    seen = []
    class Counting(ImageList):
        def get(self, fn): seen.append(fn); return super().get(fn)
    def go(ck, *cbs):
        learn = pictures_learner(tmp_path/'pictures', 0, 1, Counting)
        start = ck.start(learn)
        seen.clear()
        learn.fit(1, [BatchTransformXCallback(NormalizeBytes([.5]*3, [.5]*3)), ck, *cbs], start=start)
    with pytest.raises(KeyboardInterrupt): go(Checkpoint(tmp_path/'c', every=1), StopAt(4))
    go(Checkpoint(tmp_path/'c'))
    assert len(seen) == 33 - 4*6 + 11


# ---------------------------------------------------------------- resumed, place by place, in this process

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(140, 10, generator=G), torch.randint(0, 3, (140,), generator=G)


def toy(seed=0, opt=sgd_mom_opt, dl_seed=0, n_hid=20, n=100, bs=16, lr=.05, cbs=()):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, n_hid), nn.BatchNorm1d(n_hid), nn.ReLU(), nn.Dropout(.3), nn.Linear(n_hid, 3))
    data = DataBunch(*get_dls(Dataset(X[:n], Y[:n]), Dataset(X[100:], Y[100:]), bs, seed=dl_seed), c_in=10, c_out=3)
    return Learner(model, data, F.cross_entropy, opt, lr=lr, cbs=[AvgStatsCallback(accuracy, silent=True), Recorder(), *cbs])


def stopped(folder, at, epochs=3, fit=(), every=1, keep=3, make=toy, **kw):
    learn = make(**kw)
    seed_all(9)
    with pytest.raises(KeyboardInterrupt): learn.fit(epochs, [*fit, Checkpoint(folder, every=every, keep=keep), StopAt(at)])
    return learn


def resumed(folder, epochs=3, fit=(), seed=1, make=toy, **kw):
    learn, ck = make(seed, **kw), Checkpoint(folder)
    return learn.fit(epochs, [*fit, ck], start=ck.start(learn))


def never_stopped(epochs=3, fit=(), make=toy, **kw):
    learn = make(**kw)
    seed_all(9)
    return learn.fit(epochs, fit)


def sched(top=.1): return [ParamScheduler('lr', combine_scheds([.3, .7], cos_1cycle_anneal(.001, top, .001)))]
def weights(learn): return {k: v.clone() if torch.is_tensor(v) else v for k, v in learn.model.state_dict().items()}
def same(a, b): return all(v.equal(b[k]) if torch.is_tensor(v) else v == b[k] for k, v in a.items())


@pytest.mark.parametrize('opt', [sgd_mom_opt, adam_opt(), torch.optim.AdamW], ids=['sgd', 'adam', 'torch-adamw'])
@pytest.mark.parametrize('dl_seed', [0, None])
def test_every_kind_of_place(opt, dl_seed, tmp_path):
    "First batch, middle, last batch of an epoch, first of the next, the very last; torch's plain loader, with a generator and without."
    ref = never_stopped(fit=sched(), opt=opt, dl_seed=dl_seed)
    for at in (1, 4, 7, 8, 21):
        stopped(tmp_path/f'{at}', at, fit=sched(), opt=opt, dl_seed=dl_seed)
        assert Checkpoint(tmp_path/f'{at}').start(toy(opt=opt)) in (divmod(at, 7), (at//7 - 1, 7))       # before its validation
        new = resumed(tmp_path/f'{at}', fit=sched(), opt=opt, dl_seed=77 if dl_seed == 0 else None)
        assert digest(new) == digest(ref)
        assert [h['lr'] for h in get_hypers(new.opt)] == [h['lr'] for h in get_hypers(ref.opt)] == [.05]


class Draws:
    "A data set that draws from the global generators, as most of the world's transforms do; a sampler and a callback that draw from numpy's."
    def __init__(self, seed=0, kind=np.random.PCG64): self.dice = np.random.Generator(kind(seed))
    def __len__(self): return 40
    def __getitem__(self, i): return (X[i] + torch.randn(10)*.1 + random.random() + np.random.rand()).float(), Y[i]
    def __iter__(self): return iter(self.dice.permutation(40).tolist())


class Noise(Draws, Callback):
    def begin_batch(self, run): run.xb = run.xb + torch.from_numpy(self.dice.normal(size=run.xb.shape).astype(np.float32))
    def after_epoch(self, run): random.gauss(0, 1), np.random.randn()


@pytest.mark.parametrize('kind', [None, np.random.MT19937])
def test_everything_that_draws(kind, tmp_path):
    def make(seed=0):
        order = {'shuffle': True} if kind is None else {'sampler': Draws(seed, kind)}
        train, valid = torch.utils.data.DataLoader(Draws(), 8, **order), torch.utils.data.DataLoader(Draws(), 16)
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(10, 5), nn.Dropout(.5), nn.Linear(5, 3))
        return Learner(model, DataBunch(train, valid), F.cross_entropy, cbs=[AvgStatsCallback(accuracy, silent=True), Recorder(), Noise(seed)])
    want = digest(never_stopped(make=make))
    for at in (2, 5, 8):
        stopped(tmp_path/f'{at}', at, make=make)
        assert digest(resumed(tmp_path/f'{at}', make=make)) == want


class Sum(Callback):
    def begin_fit(self, run): self.total = 0
    def after_loss(self, run): self.total = self.total + run.loss.detach()
    def state_dict(self): return {'total': self.total}
    def load_state_dict(self, sd): self.total = sd['total']


def test_callbacks_remember_and_those_without_a_partner_are_named(tmp_path):
    class Lone(Sum): pass
    a, b = [Sum(), Sum()], [Sum(), Sum()]
    want = digest(never_stopped(fit=a))
    stopped(tmp_path, 9, fit=[Sum(), Sum()])
    assert digest(resumed(tmp_path, fit=b)) == want and b[0].total == b[1].total == a[0].total
    stopped(tmp_path, 9, fit=[Sum()])
    with pytest.warns(UserWarning, match='Lone 1, Sum 1') as w: resumed(tmp_path, fit=[Lone()])       # in mid-epoch, where callbacks are loaded twice
    assert len(w) == 1
    class Bad(Callback):
        def state_dict(self): return {'f': print}
    with pytest.raises(TypeError, match='builtin_function'): toy().fit(1, [Bad(), Checkpoint(tmp_path/'bad')])
    assert not list((tmp_path/'bad').glob('*'))


def test_a_module_with_a_state_beside_its_tensors(tmp_path):
    class Counting(nn.Linear):
        calls = 0
        def forward(self, x): self.calls += 1; return super().forward(x)
        def get_extra_state(self): return {'calls': self.calls}
        def set_extra_state(self, s): self.calls = s['calls']
    def make(seed=0):
        learn = toy(seed)
        learn.model = nn.Sequential(Counting(10, 3))
        return learn
    learn = stopped(tmp_path/'c', 10, 2, make=make)
    assert load(make(), save(learn, tmp_path/'a.pt')).model[0].calls == learn.model[0].calls > 0
    assert resumed(tmp_path/'c', 2, make=make).model[0].calls == make().fit(2).model[0].calls


# ---------------------------------------------------------------- the folder


def test_the_last_k_of_each_run_stay_and_nothing_else_is_touched(tmp_path):
    mine = [tmp_path/n for n in ('notes.txt', 'best.pt', '.notes.pt.0123abcd.tmp')]
    for f in mine: f.write_bytes(b'mine')
    toy().fit(2, Checkpoint(tmp_path, every=1, keep=3))
    first = Checkpoint(tmp_path).files()
    assert [f.name.split('.')[1] for f in first] == ['000000014', '000000013', '000000012']
    toy(1).fit(2, Checkpoint(tmp_path, every=1, keep=2))                             # the same folder, again from the start
    files = Checkpoint(tmp_path).files()
    assert len(files) == 5 and files[2:] == first and all(f.read_bytes() == b'mine' for f in mine)        # newest run first
    for _ in range(4): toy().fit(1, Checkpoint(tmp_path))
    assert len({f.name[:6] for f in Checkpoint(tmp_path).files()}) == 6                # whatever the random letters say
    with pytest.raises(ValueError): Checkpoint(tmp_path, keep=0)
    assert Checkpoint('~/c').folder == Path.home()/'c'


def test_an_unreadable_newest_is_said_and_the_one_before_taken(tmp_path):
    stopped(tmp_path, 9)
    files = Checkpoint(tmp_path).files()
    for i, f in enumerate(files): os.utime(f, (0, 1e9 + i))                          # a clock put back changes nothing
    assert Checkpoint(tmp_path).start(toy()) == (1, 2)
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
    assert learn.n_iter == 14 and (tmp_path/'w.pt').read_bytes() == before and len(w) == 7 and len([*(tmp_path/'c').iterdir()]) == 2
    assert Checkpoint(tmp_path/'c').start(toy(n_hid=2000)) == (0, 4)


@pytest.mark.parametrize('room,left', [(3, [7, 6]), (2, [7]), (1, [1])])
def test_where_a_disk_has_little_room_the_oldest_goes_first_and_never_the_newest(room, left, tmp_path, monkeypatch):
    real = checkpoints.write_file
    def small(path, kind, state):
        if len([*tmp_path.glob('*.pt')]) < room: return real(path, kind, state)
        raise CheckpointError('full') from OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(checkpoints, 'write_file', small)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        toy().fit(1, Checkpoint(tmp_path, every=1, keep=3))
    assert [int(f.name.split('.')[1]) for f in Checkpoint(tmp_path).files()] == left and bool(w) == (room == 1)
    assert Checkpoint(tmp_path).start(toy()) == ((0, 1) if room == 1 else (1, 0))


# ---------------------------------------------------------------- another fit


@pytest.mark.parametrize('kw,epochs,said', [(dict(n=60), 3, 'batches'), (dict(bs=15), 3, 'batch size'), (dict(n_hid=30), 3, '0.weight'), ({}, 5, 'epochs'),
                                            (dict(lr=.001), 3, 'lr'), (dict(opt=adam_opt()), 3, 'optimizer'), (dict(opt=torch.optim.SGD), 3, 'optimizer'),
                                            (dict(opt=partial(sgd_mom_opt, mom=.5)), 3, 'mom'), (dict(cbs=sched(.2)), 3, 'schedule')])
def test_another_fit_is_refused_and_nothing_changes(kw, epochs, said, tmp_path):
    cycle = dict(cbs=sched()) if 'cbs' in kw else {}
    stopped(tmp_path, 9, **cycle)
    learn, ck = toy(3, **kw), Checkpoint(tmp_path)
    before = weights(learn)
    with pytest.raises(CheckpointError, match=said): learn.fit(epochs, ck, start=ck.start(learn))
    assert same(weights(learn), before) and learn.n_iter == 0 and not (learn.opt and learn.opt.state)
    assert resumed(tmp_path, **cycle).n_iter == 21


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
    stopped(tmp_path/'c', 9)
    for start in ((1, 0), (1, 5), (0, 2), (0, 0)):
        new, ck = toy(1), Checkpoint(tmp_path/'c')
        before = weights(new)
        ck.start(new)
        with pytest.raises(CheckpointError): new.fit(3, ck, start=start)
        assert same(weights(new), before) and new.n_iter == 0
        ck.folder = tmp_path/'new'
        new.fit(1, ck)                                                               # the choice has gone with the fit that was refused
    new, ck = toy(1), Checkpoint(tmp_path/'c')
    new.fit(3, ck, start=list(ck.start(new)))                                        # a list will do
    for again in (toy(), new):
        with pytest.raises(CheckpointError, match='start=ck.start'): again.fit(3, ck, start=(1, 2))


def test_what_cannot_be_put_back_changes_nothing(tmp_path):
    class Stubborn(Sum):
        def load_state_dict(self, sd): raise RuntimeError('not mine')
    stopped(tmp_path, 9, fit=[Sum()])
    Stubborn.__name__ = 'Sum'
    new, ck = toy(3), Checkpoint(tmp_path)
    before, start = weights(new), ck.start(new)
    dice = torch.get_rng_state()
    with pytest.raises(CheckpointError): new.fit(3, [Stubborn(), ck], start=start)
    assert same(weights(new), before) and not new.opt.state and torch.get_rng_state().equal(dice)


# ---------------------------------------------------------------- save and load


def test_save_and_load(tmp_path):
    learn = toy(opt=adam_opt()).fit(1)
    path, bare = save(learn, tmp_path/'w.pt'), tmp_path/'bare.pt'
    new = load(toy(5, adam_opt()), path)
    assert same(weights(new), weights(learn))
    assert [s['grad_avg'].equal(t['grad_avg']) for s, t in zip(new.opt.state.values(), learn.opt.state.values())] == [True]*6
    torch.save(learn.model.state_dict(), bare)
    for f, opt in ((bare, True), (path, False), (save(learn, tmp_path/'v.pt', opt=False), True)):
        new = load(toy(6, adam_opt()), f, opt=opt)
        assert same(weights(new), weights(learn)) and new.opt is None
    with pytest.raises(CheckpointError): load(toy(6, sgd_mom_opt), path)
    stopped(tmp_path/'c', 9, opt=adam_opt())
    assert load(toy(7, adam_opt()), Checkpoint(tmp_path/'c').files()[0]).opt.state                  # a checkpoint will do
    with pytest.warns(UserWarning, match='lr'): assert load(toy(opt=adam_opt(), lr=.001), path).opt.hypers[0]['lr'] == .05
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load(toy(opt=adam_opt()), path)
        load(toy(opt=adam_opt(), lr=.001), path, opt=False)


def test_names_that_wrappers_put_in_front(tmp_path):
    learn, wrapped = toy(), toy(5)
    for front in ('module.', '_orig_mod.', 'module._orig_mod.'):
        torch.save({front + k: v for k, v in learn.model.state_dict().items()}, tmp_path/'w.pt')
        assert same(weights(load(toy(5), tmp_path/'w.pt')), weights(learn))
    for l in (learn, wrapped): l.model = nn.ModuleDict({'a': nn.ModuleDict({'module': l.model})})     # a net may have a layer of that name
    torch.save({'module.' + k: v for k, v in learn.model.state_dict().items()}, tmp_path/'w.pt')
    for f in (tmp_path/'w.pt', save(learn, tmp_path/'v.pt')): assert same(weights(load(wrapped, f)), weights(learn))
    learn.model = nn.DataParallel(toy(8).model)                                      # and a wrapped one is saved without
    assert same(weights(load(toy(5), save(learn, tmp_path/'u.pt'))), weights(toy(8)))


class Trips(torch.optim.SGD):
    "An optimizer whose own loading fails when it is half done, writing into tensors that are there."
    def load_state_dict(self, sd):
        for s in self.state.values(): s['momentum_buffer'].zero_()
        self.param_groups[0]['lr'] = 77.
        raise RuntimeError('not mine')


def test_what_is_refused_changes_nothing(tmp_path):
    trips = partial(Trips, momentum=.9)
    for opt, change in ((trips, {}), (adam_opt(), {'model': toy(n_hid=30).model.state_dict()})):
        learn, path = toy(2, opt).fit(1), save(toy(3, opt).fit(1), tmp_path/'w.pt')
        torch.save({**torch.load(path, weights_only=True), **change}, path)
        before, state = weights(learn), {p: {k: v.clone() if torch.is_tensor(v) else v for k, v in s.items()} for p, s in learn.opt.state.items()}
        with pytest.raises(CheckpointError): load(learn, path)
        assert same(weights(learn), before) and get_hypers(learn.opt)[0]['lr'] == .05
        assert state and all(same(s, learn.opt.state[p]) for p, s in state.items())


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
    drive(int(sys.argv[1]), Path(sys.argv[2]))
