"""Checkpoints: a killed run ends as the run never killed, to the bit; a file that is not whole, not ours or not harmless is refused.

Run as a program, this file is the driver of the kill test: `python tests/test_checkpoints.py kills WORKERS FOLDER`."""
import gc
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, small_env
from PIL import Image
from torch import nn

from exp.annealing import ParamScheduler, combine_scheds, cos_1cycle_anneal
from exp.batchnorm import BatchNorm
from exp.callbacks import (EVENTS, AvgStatsCallback, BatchTransformXCallback, Callback, DataBunch, Dataset, Recorder, accuracy,
                           get_dls, get_hypers)
from exp.checkpoints import (Checkpoint, CheckpointError, data_facts, keeps, load_learner, pack, plain, read_file, register, rng_state,
                             set_rng_state, unpack, write_file)
from exp.convnets import GeneralRelu, Lambda, conv_relu, flatten
from exp.data_block import (ImageList, NormalizeBytes, ResizeFixed, SplitData, grandparent_splitter, label_by_func, make_rgb,
                            parent_labeler, to_byte_tensor)
from exp.learner import EarlyStopping, GradientAccumulation, Learner, SaveBest
from exp.optimizers import adam_opt, sgd_mom_opt

@pytest.fixture
def tmp_path(tmp_path):
    "In memory where there is such a place: these tests write hundreds of files, and each waits for its disk."
    if not os.access('/dev/shm', os.W_OK): yield tmp_path; return
    folder = Path(tempfile.mkdtemp(dir='/dev/shm', prefix='exp-test-'))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------- a tiny real training, with everything that draws in it


class Jitter:
    "Random flip and shift of a PIL image, drawn from the generator that the loader hands over."
    _order, generator = 15, None

    def __call__(self, im):
        u = torch.rand(2, generator=self.generator)
        im = im.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if u[0] < .5 else im
        k = int(u[1]*4)
        return im.crop((k, k, k + 12, k + 12))


def make_pictures(folder, n=44):
    "PNG files `train/a/…`, `valid/b/…` of noise with a bright or a dark corner."
    g = np.random.default_rng(0)
    for i in range(n):
        c, side = 'ab'[i % 2], 'valid' if i % 4 > 2 else 'train'
        a = g.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        a[:8, :8] = 255*(c == 'a')
        (folder/side/c).mkdir(parents=True, exist_ok=True)
        Image.fromarray(a).save(folder/side/c/f'{i:03d}.png')


class Half(Callback):
    "Draws from a generator of its own: it drops one input of each batch."
    _order = 3

    def __init__(self, seed): self.g = torch.Generator().manual_seed(seed)
    def begin_batch(self, run):
        if run.in_train: run.xb = run.xb*(torch.rand(len(run.xb), 1, 1, 1, generator=self.g) > .2)


EPOCHS = 2


def make_learner(folder, workers, seed):
    "The learner of the kill test; what `seed` decides (first weights, order, draws) must all come out of the checkpoint."
    torch.manual_seed(seed); random.seed(seed); np.random.seed(seed)
    sd = label_by_func(SplitData.split_by_func(ImageList.from_files(folder, tfms=[make_rgb, to_byte_tensor]), grandparent_splitter), parent_labeler)
    sd.train.x.tfms = [make_rgb, Jitter(), to_byte_tensor]
    sd.valid.x.tfms = [make_rgb, ResizeFixed(12), to_byte_tensor]
    data = sd.to_databunch(6, seed=seed, num_workers=workers)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.2), nn.AdaptiveAvgPool2d(2), Lambda(flatten), nn.Linear(16, 2))
    return Learner(model, data, F.cross_entropy, adam_opt(), lr=.01, cbs=[AvgStatsCallback(accuracy, silent=True), Recorder()])


def fit_cbs():
    return [ParamScheduler('lr', combine_scheds([.3, .7], cos_1cycle_anneal(.001, .03, .001))), Half(7), GradientAccumulation(2),
            BatchTransformXCallback(NormalizeBytes([.5]*3, [.3]*3))]


class KillAt(Callback):
    "SIGKILLs its own process at event number `at` of the fit, whichever it is."
    _order = 2000

    def __init__(self, at): self.n, self.at = 0, at
    def tick(self, run, e=''):
        if self.n == self.at: os.kill(os.getpid(), signal.SIGKILL)
        self.n += 1


for _e in EVENTS: setattr(KillAt, _e, KillAt.tick)


def kill_in_save(at, where):
    "SIGKILL in the `at`-th save of this process: in the middle of writing, before the data is safe, or before or after the new name is."
    n, save, fsync, replace = [0], torch.save, os.fsync, os.replace
    def die(k):
        if where == k and n[0] == at: os.kill(os.getpid(), signal.SIGKILL)
    def in_save(obj, f):
        n[0] += 1
        if where == 'write' and n[0] == at: f.write(b'PK\3\4 half a file'); f.flush(); die('write')
        save(obj, f)
    torch.save = in_save
    os.fsync = lambda fd: (die('fsync'), fsync(fd))
    os.replace = lambda a, b: (die('replace'), replace(a, b), die('after'))


def digest(learn):
    "Weights, statistics, optimizer, losses, rates, rows and generators in one number."
    h = hashlib.sha256()
    def add(o):
        if torch.is_tensor(o): h.update(o.detach().contiguous().numpy().tobytes())
        elif isinstance(o, dict): [add(v) for _, v in sorted(o.items(), key=lambda kv: str(kv[0]))]
        elif isinstance(o, (list, tuple)): [add(v) for v in o]
        else: h.update(repr(o).encode())
    rows = [{k: v for k, v in r.items() if k != 'time'} for r in learn.cb(AvgStatsCallback).rows]
    ps = [p for p in learn.model.parameters()]
    hypers = [{k: v for k, v in h.items() if k != 'params'} for h in get_hypers(learn.opt)]
    add([learn.model.state_dict(), [learn.opt.state.get(p) for p in ps], hypers, learn.cb(Recorder).losses, learn.cb(Recorder).hypers, rows, rng_state(), learn.n_iter])
    return h.hexdigest()


def run_once(pictures, workers, folder, seed, kill=None, in_save=None):
    "Fit from where the folder stands; the digest at the end. With no checkpoint yet it is a first start, and the script's own seed counts."
    seed = seed if any(folder.glob('*.pt')) else 0
    learn, ck = make_learner(pictures, workers, seed), Checkpoint(folder, every=2, keep=2)
    start = ck.start(learn)
    killer = KillAt(-1 if kill is None else kill)
    if in_save: kill_in_save(*in_save)
    if start == (0, 0): seed_all(3)
    learn.fit(EPOCHS, [*fit_cbs(), ck, killer], start=start)
    res = {'digest': digest(learn), 'events': killer.n, 'start': start, 'sampler': learn.data.train_dl.epoch}
    learn.data.train_dl._iterator = learn.data.valid_dl._iterator = None             # lets the workers go
    return res


def seed_all(s): torch.manual_seed(s); random.seed(s); np.random.seed(s)


def in_child(out, f, *args, **kw):
    "`f` in a child process that is a fork of this one, which has never trained: `(signal that killed it or 0, result)`."
    out.unlink(missing_ok=True)
    pid = os.fork()
    if not pid:
        try: out.write_text(json.dumps(f(*args, **kw))); gc.collect()
        except BaseException as e: out.write_text(json.dumps({'error': repr(e)}))
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return (os.WTERMSIG(status), None) if os.WIFSIGNALED(status) else (0, json.loads(out.read_text()))


def drive(workers, folder, rounds=20):
    "The reference, then `rounds` times: killed at a random place, some twice, and resumed. Prints a line of json."
    pictures, out, rng = folder/'pictures', folder/'out.json', random.Random(workers)
    make_pictures(pictures)
    _, ref = in_child(out, run_once, pictures, workers, folder/'ref', 0)
    places = []
    for i in range(rounds):
        ck = folder/f'run{i}'
        where = {'in_save': (rng.randint(1, 8), ('write', 'fsync', 'replace', 'after')[i % 4])} if i % 5 >= 3 else {'kill': rng.randrange(ref['events'])}
        sig, res = in_child(out, run_once, pictures, workers, ck, 0, **where)
        twice = i % 5 == 0 and sig
        again = in_child(out, run_once, pictures, workers, ck, 500 + i, kill=10)[0] if twice else 0
        last, end = in_child(out, run_once, pictures, workers, ck, 1000 + i)
        places.append({'where': where, 'killed': sig, 'again': again, 'resumed': last, 'same': end is not None and end.get('digest') == ref['digest'],
                       'start': end and end.get('start'), 'error': (end or {}).get('error'), 'left': sorted(p.name for p in ck.iterdir())})
        shutil.rmtree(ck)
    print(json.dumps({'ref': ref, 'places': places}))


@pytest.mark.parametrize('workers', [0, 2])
def test_killed_anywhere_ends_as_the_run_never_killed(workers, tmp_path, data_home):
    env = {**small_env(data_home), 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    p = subprocess.run([sys.executable, __file__, 'kills', str(workers), str(tmp_path)], env=env, capture_output=True, text=True, timeout=800)
    assert p.returncode == 0, p.stderr[-3000:]
    res = json.loads(p.stdout.splitlines()[-1])
    places = res['places']
    assert res['ref']['events'] > 60 and len(places) == 20
    assert sum(pl['killed'] == signal.SIGKILL for pl in places) == 20, places
    assert all(pl['resumed'] == 0 and pl['same'] for pl in places), [pl for pl in places if not pl['same']]
    starts = {tuple(pl['start']) for pl in places}
    assert len(starts) >= 5 and any(b for _, b in starts) and any(e and not b for e, b in starts), starts          # in epochs and between them
    assert any(pl['again'] == signal.SIGKILL for pl in places)
    for pl in places:
        assert len([n for n in pl['left'] if n.endswith('.pt')]) == 2, pl
        in_first_save = pl['where'].get('in_save', [0])[0] == 1                     # then there is nothing yet to know its remains by
        assert in_first_save or not any('tmp' in n for n in pl['left']), pl


def test_killed_and_resumed_in_interpreters_of_their_own(tmp_path, data_home):
    env = {**small_env(data_home), 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    make_pictures(tmp_path/'pictures')
    def go(seed, folder, *kill):
        return subprocess.run([sys.executable, __file__, 'once', str(tmp_path), folder, str(seed), *map(str, kill)], env=env, capture_output=True, text=True, timeout=300)
    ref, killed = go(0, 'ref'), go(0, 'a', 47)
    assert killed.returncode == -signal.SIGKILL and not killed.stdout
    resumed = go(99, 'a')
    ref, resumed = (json.loads(p.stdout.splitlines()[-1]) for p in (ref, resumed))
    assert ref['start'] == [0, 0] and resumed['start'] != [0, 0] and ref['digest'] == resumed['digest']


# ---------------------------------------------------------------- resuming, place by place, in this process

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(140, 10, generator=G), torch.randint(0, 3, (140,), generator=G)


class Stop(Exception): pass


class StopAt(Callback):
    _order = 2000
    def __init__(self, at): self.at = at
    def after_batch(self, run):
        if run.in_train and run.n_iter == self.at: raise Stop


def toy(seed=0, opt=sgd_mom_opt, dl_seed=0, n_hid=20, n=100, cbs=()):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, n_hid), nn.BatchNorm1d(n_hid), nn.ReLU(), nn.Dropout(.3), nn.Linear(n_hid, 3))
    data = DataBunch(*get_dls(Dataset(X[:n], Y[:n]), Dataset(X[100:], Y[100:]), 16, seed=dl_seed), c_in=10, c_out=3)
    return Learner(model, data, F.cross_entropy, opt, lr=.05, cbs=[AvgStatsCallback(accuracy, silent=True), Recorder(), *cbs])


def stopped(folder, at, epochs=3, fit=(), every=1, **kw):
    learn = toy(**kw)
    seed_all(9)
    try: learn.fit(epochs, [*fit, Checkpoint(folder, every=every), StopAt(at)])
    except Stop: pass
    return learn


@pytest.mark.parametrize('opt', [sgd_mom_opt, adam_opt(), partial(torch.optim.SGD, momentum=.9), torch.optim.AdamW], ids=['sgd', 'adam', 'torch-sgd', 'torch-adamw'])
@pytest.mark.parametrize('dl_seed', [0, None])
def test_every_kind_of_place(opt, dl_seed, tmp_path):
    "First batch, middle, last batch of an epoch, first of the next, the very last; torch's plain loader, with a generator and without."
    def sched(): return [ParamScheduler('lr', combine_scheds([.3, .7], cos_1cycle_anneal(.001, .1, .001)))]
    ref = toy(0, opt, dl_seed); seed_all(9); ref.fit(3, sched())
    want = digest(ref)
    for at in (1, 4, 7, 8, 21):
        stopped(tmp_path/f'{at}', at, fit=sched(), opt=opt, dl_seed=dl_seed)
        new, ck = toy(1, opt, 77 if dl_seed == 0 else None), Checkpoint(tmp_path/f'{at}', every=1)
        start = ck.start(new)
        assert start == divmod(at, 7) or start == (at//7 - 1, 7)                    # the end of an epoch's training is before its validation
        new.fit(3, [*sched(), ck], start=start)
        assert digest(new) == want
        assert [h['lr'] for h in get_hypers(new.opt)] == [h['lr'] for h in get_hypers(ref.opt)] == [.05]


class Gone(Exception): pass


class GlobalDraws(torch.utils.data.Dataset):
    "Draws from the global generators, as most of the world's transforms do."
    def __len__(self): return 40
    def __getitem__(self, i): return (X[i] + torch.randn(10)*.1 + random.random() + np.random.rand()).float(), Y[i]


def test_transforms_that_draw_from_the_global_generators(tmp_path):
    def make(seed):
        seed_all(seed)
        return Learner(nn.Sequential(nn.Linear(10, 5), nn.Dropout(.5), nn.Linear(5, 3)), DataBunch(*get_dls(GlobalDraws(), GlobalDraws(), 8)), F.cross_entropy,
                       cbs=[AvgStatsCallback(accuracy, silent=True), Recorder()])
    class Gap(Callback):
        def after_epoch(self, run): random.random(), np.random.rand()
    ref = make(0); ref.fit(3, Gap())
    want = digest(ref)
    for at in (2, 5, 8):
        try: make(0).fit(3, [Gap(), Checkpoint(tmp_path/f'{at}', every=1), StopAt(at)])
        except Stop: pass
        new, ck = make(1), Checkpoint(tmp_path/f'{at}')
        new.fit(3, [Gap(), ck], start=ck.start(new))
        assert digest(new) == want


def test_batches_before_the_place_are_not_loaded(tmp_path):
    make_pictures(tmp_path/'pictures')
    seen = []
    class Counting(ImageList):
        def get(self, fn): seen.append(fn); return super().get(fn)
    def make():
        sd = label_by_func(SplitData.split_by_func(Counting.from_files(tmp_path/'pictures', tfms=[make_rgb, to_byte_tensor]), grandparent_splitter), parent_labeler)
        net = nn.Sequential(Lambda(flatten), nn.Linear(768, 2))
        return Learner(net, sd.to_databunch(6, seed=1, num_workers=0), F.cross_entropy, cbs=BatchTransformXCallback(NormalizeBytes([.5]*3, [.5]*3)))
    try: make().fit(1, [Checkpoint(tmp_path/'c', every=1), StopAt(4)])
    except Stop: pass
    new, ck = make(), Checkpoint(tmp_path/'c')
    start = ck.start(new)
    seen.clear()
    new.fit(1, ck, start=start)
    assert start == (0, 4) and len(seen) == 33 - 4*6 + 11


def test_gradients_under_way_are_kept(tmp_path):
    ref = toy(); seed_all(9); ref.fit(2, GradientAccumulation(3))
    want = digest(ref)
    stopped(tmp_path, 4, 2, [GradientAccumulation(3)])
    d = read_file(Checkpoint(tmp_path).files()[0], 'checkpoint')
    assert set(d['grads']) == {n for n, _ in ref.model.named_parameters()}
    new, ck = toy(1, dl_seed=5), Checkpoint(tmp_path)
    new.fit(2, [GradientAccumulation(3), ck], start=ck.start(new))
    assert digest(new) == want


def test_callbacks_remember(tmp_path):
    "Patience goes on being used up, the best weights are those from before the kill; a callback of one's own by `keeps`."
    @keeps('total')
    class Sum(Callback):
        def begin_fit(self, run): self.total = 0.
        def after_loss(self, run): self.total += run.loss.item()
    def cbs(): return [EarlyStopping('train_loss', patience=2, min_delta=10.), SaveBest('valid_loss'), Sum()]
    a, ref = cbs(), toy(); seed_all(9); ref.fit(6, a)
    want = digest(ref)
    stopped(tmp_path, 9, 6, cbs())
    b, new, ck = cbs(), toy(1), Checkpoint(tmp_path)
    new.fit(6, [*b, ck], start=ck.start(new))
    assert len(ref.cb(AvgStatsCallback).rows) == 3 and digest(new) == want
    assert b[0].waited == a[0].waited == 2 and b[1].best == a[1].best and b[2].total == a[2].total
    new, ck = toy(1), Checkpoint(tmp_path)
    stopped(tmp_path, 3, 6, cbs())
    with pytest.warns(UserWarning, match='EarlyStopping, SaveBest, Sum, which this fit lacks'): new.fit(6, ck, start=ck.start(new))


def test_keeps_the_last_k_and_names_never_collide(tmp_path):
    toy().fit(2, Checkpoint(tmp_path, every=1, keep=3))
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert len(first) == 3 and [n.split('.')[2] for n in sorted(first)] == ['00000012', '00000013', '00000014']
    toy(1).fit(2, Checkpoint(tmp_path, every=1, keep=2))                         # the same folder, again from the start
    now = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert len(now) == 5 and all(now[n] == b for n, b in first.items())
    ck = Checkpoint(tmp_path)
    assert ck.files()[0].name not in first                                        # the newest run comes first
    (tmp_path/'notes.txt').write_text('mine'); (tmp_path/'best.pt').write_bytes(b'mine')
    toy(2).fit(1, Checkpoint(tmp_path, keep=1))
    assert (tmp_path/'notes.txt').exists() and (tmp_path/'best.pt').exists()


def test_another_data_set_model_optimizer_or_length_is_refused_and_nothing_changes(tmp_path):
    stopped(tmp_path, 9)
    ck = Checkpoint(tmp_path)
    for learn, words in ((toy(n=60), 'batches: 7 in the file, 4 here'), (toy(n_hid=30), r'0.weight is \(20, 10\) in the file and \(30, 10\) in the model; 6 more')):
        with pytest.raises(CheckpointError, match=words): ck.start(learn)
    for kw, epochs, words in ((dict(opt=adam_opt()), 3, 'optimizer'), (dict(opt=torch.optim.SGD), 3, 'optimizer'), ({}, 5, '3 epochs and this one has 5')):
        learn, ck = toy(3, **kw), Checkpoint(tmp_path)
        before = {k: v.clone() for k, v in learn.model.state_dict().items()}
        with pytest.raises(CheckpointError, match=words): learn.fit(epochs, ck, start=ck.start(learn))
        assert all(v.equal(before[k]) for k, v in learn.model.state_dict().items()) and learn.n_iter == 0
    learn, ck = toy(3), Checkpoint(tmp_path)
    ck.start(learn)
    with pytest.raises(CheckpointError, match='start=ck.start'): learn.fit(3, ck)


def test_the_split_is_part_of_it(tmp_path):
    make_pictures(tmp_path)
    def facts(seed): return data_facts(label_by_func(SplitData.split_by_random(ImageList.from_files(tmp_path, tfms=[make_rgb, to_byte_tensor]), .3, seed), parent_labeler).to_databunch(4, num_workers=0))
    assert facts(1) == facts(1) and facts(1)['names of training items'] != facts(2)['names of training items'] and facts(1)['classes'] == ['a', 'b']


# ---------------------------------------------------------------- files

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    learn = toy(opt=adam_opt()).fit(1)
    path = learn.save(tmp_path_factory.mktemp('w')/'w.pt')
    return learn, path, path.read_bytes()


def same(a, b): return all(x.equal(y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values()))


def test_save_and_load(saved, tmp_path):
    learn, path, _ = saved
    new = toy(5, adam_opt()).load(path)
    assert same(new, learn) and new.opt.state_dict()['state']['0.weight']['grad_avg'].equal(learn.opt.state_dict()['state']['0.weight']['grad_avg'])
    torch.save(learn.model.state_dict(), tmp_path/'bare.pt')                       # what everybody else writes
    assert same(toy(6).load(tmp_path/'bare.pt'), learn) and toy(6).load(tmp_path/'bare.pt').opt is None
    assert toy(6).load(path, opt=False).opt is None
    assert torch.load(path, weights_only=True)['kind'] == 'weights'


def test_safetensors(tmp_path, monkeypatch):
    st = pytest.importorskip('safetensors.torch')
    learn = toy().fit(1)
    learn.model[0].weight.data = learn.model[0].weight.data.t().contiguous().t()    # not contiguous, which the format does not know
    path = learn.save(tmp_path/'w.safetensors')
    assert same(toy(7).load(path), learn) and set(st.load_file(path)) == set(learn.model.state_dict())
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match='safetensors'): toy().load(path)
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    with pytest.raises(ImportError, match='pip install safetensors'): learn.save(tmp_path/'x.safetensors')


def test_truncated_at_any_length(saved, tmp_path):
    _, _, whole = saved
    f, learn = tmp_path/'t.pt', toy(8)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    for n in [0, 1, 3, 4, 30, *range(100, len(whole), 611), len(whole) - 1]:
        f.write_bytes(whole[:n])
        with pytest.raises(CheckpointError, match='empty' if not n else 'cut off|not written by exp'): learn.load(f)
    assert all(v.equal(before[k]) for k, v in learn.model.state_dict().items())


def test_a_flipped_bit_never_goes_in_unnoticed(saved, tmp_path):
    "torch.load itself takes such a file without a word."
    learn, path, whole = saved
    rng, f, refused, silent = random.Random(0), tmp_path/'t.pt', 0, 0
    good = torch.load(path, weights_only=True)
    def equal(a, b): return a.equal(b) if torch.is_tensor(a) else a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a) if isinstance(a, dict) else a == b
    flips = [(rng.randrange(len(whole)), rng.randrange(8)) for _ in range(150)]
    flips += [(i, bit) for i in range(whole.index(b'PK\1\2'), len(whole)) for bit in (0, 4)]       # its directory, whole: there bit 4 can make a folder of a tensor
    for i, bit in flips:
        b = bytearray(whole); b[i] ^= 1 << bit
        f.write_bytes(b)
        try: d = read_file(f, 'weights')
        except CheckpointError: refused += 1; continue
        assert equal(d, good)                                                       # padding, time stamps
    for _ in range(30):
        b = bytearray(whole); i = whole.find(good['model']['0.weight'].numpy().tobytes()); b[i + rng.randrange(800)] ^= 8
        f.write_bytes(b)
        silent += not torch.load(f, weights_only=True)['model']['0.weight'].equal(good['model']['0.weight'])
        with pytest.raises(CheckpointError, match='checksum'): read_file(f, 'weights')
    assert refused > 40 and silent == 30


class Bomb:
    def __init__(self, marker): self.marker = marker
    def __reduce__(self): return os.mkdir, (str(self.marker),)


def test_hostile_files_run_nothing(saved, tmp_path):
    learn, path, whole = saved
    d, marker, new = torch.load(path, weights_only=True), tmp_path/'marker', toy(9)
    before = {k: v.clone() for k, v in new.model.state_dict().items()}
    torch.save({**d, 'model': Bomb(marker)}, tmp_path/'a.pt')
    torch.save({**d, 'model': {**d['model'], '0.bias': Bomb(marker)}}, tmp_path/'b.pt')
    torch.save(toy().model, tmp_path/'model.pt')                                    # a whole model, as people save them
    (tmp_path/'c.pt').write_bytes(pickle.dumps(Bomb(marker)))
    with zipfile.ZipFile(path) as z, zipfile.ZipFile(tmp_path/'d.pt', 'w') as o:    # a good file with the pickle exchanged
        for i in z.infolist(): o.writestr(i, pickle.dumps(Bomb(marker), 2) if i.filename.endswith('data.pkl') else z.read(i))
    with zipfile.ZipFile(path) as z, zipfile.ZipFile(tmp_path/'e.pt', 'w', zipfile.ZIP_DEFLATED) as o:
        for i in z.infolist(): o.writestr(i.filename, z.read(i))
    for n in 'abde':
        with pytest.raises(CheckpointError, match='refused') as e: new.load(tmp_path/f'{n}.pt')
        assert 'weights_only' not in str(e.value) and '\n' not in str(e.value), e.value          # torch's own message says how to run it
        with pytest.raises(CheckpointError): load_learner(tmp_path/f'{n}.pt')
    with pytest.raises(CheckpointError, match='holds code .*mkdir.* none of it was run'): new.load(tmp_path/'a.pt')
    with pytest.raises(CheckpointError, match='holds code'): new.load(tmp_path/'model.pt')
    with pytest.raises(CheckpointError, match='a bare pickle, and none of it was run'): new.load(tmp_path/'c.pt')
    assert not marker.exists() and all(v.equal(before[k]) for k, v in new.model.state_dict().items())
    pickle.loads(pickle.dumps(Bomb(marker))); assert marker.exists()               # the bomb is a real one


def test_foreign_newer_and_other_kinds(saved, tmp_path):
    learn, path, whole = saved
    d = torch.load(path, weights_only=True)
    np.savez(tmp_path/'a.npz', x=np.ones(3)); (tmp_path/'a.txt').write_text('hello'); Image.new('RGB', (9, 9)).save(tmp_path/'a.png')
    torch.save([1, 2], tmp_path/'list.pt'); torch.save({'model': {}, 'epoch': 3}, tmp_path/'other.pt'); torch.save({}, tmp_path/'nothing.pt')
    for n in ('a.npz', 'a.txt', 'a.png', 'list.pt', 'other.pt', 'nothing.pt'):
        with pytest.raises(CheckpointError, match=f'{n}: refused'): learn.load(tmp_path/n)
    for n in ('none.pt', '.'):
        with pytest.raises(CheckpointError, match='cannot be read'): learn.load(tmp_path/n)
    for v in (2, 99, 'x', None):
        torch.save({**d, 'version': v}, tmp_path/'v.pt')
        with pytest.raises(CheckpointError, match=f'format {v} and this version of exp reads up to 1'): learn.load(tmp_path/'v.pt')
    with pytest.raises(CheckpointError, match="kind 'weights' where 'export' is wanted"): load_learner(path)
    torch.save({k: v for k, v in d.items() if k != 'model'}, tmp_path/'half.pt')
    with pytest.raises(CheckpointError, match='lacks model'): learn.load(tmp_path/'half.pt')
    for n_hid, what in ((30, r'0.weight is \(20, 10\) in the file and \(30, 10\) in the model'),):
        with pytest.raises(CheckpointError, match=what): toy(n_hid=n_hid).load(path)
    net = toy(); net.model.add_module('extra', nn.Linear(3, 3))
    with pytest.raises(CheckpointError, match=r'extra.weight \(3, 3\) is not in the file; 1 more'): net.load(path)
    net = toy(); del net.model[4]
    with pytest.raises(CheckpointError, match='4.weight is in the file only'): net.load(path)


def test_a_full_disk_leaves_the_previous_whole(tmp_path):
    "A real refusal of the operating system: no file may grow beyond the limit."
    learn = toy(n_hid=2000)
    path = learn.save(tmp_path/'w.pt')
    before, ck = path.read_bytes(), Checkpoint(tmp_path/'c', every=3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    class Fill(Callback):
        def after_batch(self, run):
            if run.n_iter == 4: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with warnings.catch_warnings(record=True) as w:
            warnings.simplefilter('always')
            learn.fit(2, [Fill(), ck])                                              # training goes on
        with pytest.raises(CheckpointError, match='w.pt: not written .File too large.; what was there before is untouched'): learn.save(path)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert learn.n_iter == 14 and path.read_bytes() == before and sum('without this checkpoint' in str(x.message) for x in w) == 6 - 1
    assert [p.name for p in tmp_path.iterdir() if p.name not in ('w.pt', 'c')] == [] and len(list((tmp_path/'c').iterdir())) == 1
    assert Checkpoint(tmp_path/'c').start(toy(n_hid=2000)) == (0, 3)


def test_an_unreadable_newest_is_said_and_the_one_before_taken(tmp_path):
    stopped(tmp_path, 9)
    files = Checkpoint(tmp_path).files()
    files[0].write_bytes(files[0].read_bytes()[:500])
    with pytest.warns(UserWarning, match='cut off.*taking the one before'): assert Checkpoint(tmp_path).start(toy()) == (1, 1)
    for f in files: f.write_bytes(b'x')
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match='none of the 3'): Checkpoint(tmp_path).start(toy())
    assert Checkpoint(tmp_path/'nowhere').start(toy()) == (0, 0)


def test_plain(tmp_path):
    big = torch.zeros(1000, 1000)
    write_file(tmp_path/'v.pt', 'weights', {'model': {'row': big[0], 'n': np.float64(2.5), 'i': Image.Resampling.BILINEAR}})
    assert (tmp_path/'v.pt').stat().st_size < 20_000                                # a view does not drag its base along
    d = read_file(tmp_path/'v.pt', 'weights')['model']
    assert type(d['n']) is float and type(d['i']) is int and d['row'].shape == (1000,)
    with pytest.raises(TypeError, match=r'a\.b\[1\] is a function'): plain({'b': [1, lambda: 0]}, 'a')


def test_rng_state_covers_all_three(tmp_path):
    seed_all(1); torch.randn(3), random.gauss(0, 1), np.random.randn()              # leave the half-used pairs in there
    write_file(tmp_path/'r.pt', 'weights', {'model': rng_state()})
    want = [torch.rand(5), random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand()]
    seed_all(2)
    set_rng_state(read_file(tmp_path/'r.pt', 'weights')['model'])
    got = [torch.rand(5), random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand()]
    assert got[0].equal(want[0]) and got[1:] == want[1:]


# ---------------------------------------------------------------- export

def pictures_learner(tmp_path, norm=BatchNorm, tfms=()):
    make_pictures(tmp_path/'pictures')
    il = ImageList.from_files(tmp_path/'pictures', tfms=[make_rgb, ResizeFixed(12), *tfms, to_byte_tensor])
    data = label_by_func(SplitData.split_by_func(il, grandparent_splitter), parent_labeler).to_databunch(8, seed=0, num_workers=0)
    torch.manual_seed(0)
    model = nn.Sequential(conv_relu(3, 4, leak=.1, sub=.2), norm(4), nn.Conv2d(4, 4, 1), GeneralRelu(), nn.AdaptiveAvgPool2d(1), Lambda(flatten), nn.Dropout(.5), nn.Linear(4, 2))
    return Learner(model, data, F.cross_entropy, sgd_mom_opt, lr=.05, cbs=[BatchTransformXCallback(NormalizeBytes([.5]*3, [.3]*3)), AvgStatsCallback(silent=True)])


def test_export_predicts_the_same_elsewhere(tmp_path, data_home):
    said, files = '', []
    for norm in (BatchNorm, nn.BatchNorm2d):
        learn = pictures_learner(tmp_path/norm.__name__, norm).fit(1)
        path, fn = learn.export(tmp_path/f'{norm.__name__}.pt'), learn.data.valid_ds.x.items[0]
        label, probs = learn.predict(fn)
        said, files = said + f"{label} {probs.tolist()} ['a', 'b']\n", [*files, (str(path), str(fn))]
        there = load_learner(path)
        assert there.get_preds(learn.data.valid_dl)[0].equal(learn.get_preds()[0])
        assert there.predict(Image.open(fn))[1].equal(probs) and not there.model.training
    code = f'from exp.checkpoints import load_learner\nfor path, fn in {files!r}: l = load_learner(path); r = l.predict(fn); print(r[0], r[1].tolist(), l.data.classes)'
    p = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=small_env(data_home), capture_output=True, text=True)
    assert p.stdout == said, p.stderr


def test_what_cannot_travel_is_named(tmp_path):
    class Own(nn.Module):
        def forward(self, x): return x
    def blur(im): return im
    blur._order = 12
    for change, words in ((lambda l: setattr(l.data.source.valid.x, 'tfms', [make_rgb, blur]), 'a transform is .*blur, which cannot travel.*register'),
                          (lambda l: l.model.add_module('own', Own()), r'the model.own is Own, which cannot'),
                          (lambda l: setattr(l.model[5], 'func', lambda x: x), r'the model.5.func is .*lambda'),
                          (lambda l: l.add_cbs(Half(1)), 'the callback Half is Half')):
        learn = pictures_learner(tmp_path)
        change(learn)
        with pytest.raises(CheckpointError, match=words): learn.export(tmp_path/'e.pt')
        assert not (tmp_path/'e.pt').exists()
    learn.export(tmp_path/'e.pt', cbs=[])
    learn.model.add_module('own', Own())
    learn.export(tmp_path/'f.pt', model=False, cbs=[])
    with pytest.raises(CheckpointError, match='without layers'): load_learner(tmp_path/'f.pt')
    other = pictures_learner(tmp_path).model; other.add_module('own', Own())
    x = torch.rand(2, 3, 12, 12)
    assert load_learner(tmp_path/'f.pt', other).model(x).equal(learn.model.eval()(x))
    with pytest.raises(CheckpointError, match='another architecture'): load_learner(tmp_path/'f.pt', nn.Linear(2, 2))


def test_an_exported_file_can_name_nothing_but_what_is_registered(tmp_path):
    learn = pictures_learner(tmp_path)
    d = torch.load(learn.export(tmp_path/'e.pt'), weights_only=True)
    for name in ('os.system', 'builtins.eval', 'exp.datasets.untar_data', 'torch.nn.modules.os', 'torch.nn.init', 'torch.nn.functional', 'torch.nn.Module.forward', 'torch.nn.'):
        for where in ({'data': {**d['data'], 'tfms': [{'name': name}]}}, {'layers': {**d['layers'], 'object': name}}, {'cbs': [{'object': name, 'vars': {}}]}):
            torch.save({**d, **where}, tmp_path/'x.pt')
            with pytest.raises(CheckpointError, match='is not registered'): load_learner(tmp_path/'x.pt')
    for broken in ({'layers': {'object': 'torch.nn.Linear'}}, {'layers': 3}, {'data': {}}, {'cbs': None}, {'c_in': None, 'layers': {'object': 'exp.data_block.make_rgb', 'vars': {}}}):
        torch.save({**d, **broken}, tmp_path/'x.pt')
        with pytest.raises(CheckpointError): load_learner(tmp_path/'x.pt')


def test_pack_keeps_what_a_layer_is():
    "Every attribute: stride, groups, padding mode, buffers that are not saved, a layer of one's own once registered."
    @register
    class Scale(nn.Module):
        def __init__(self): super().__init__(); self.by = (2., [3]); self.register_buffer('b', torch.ones(2), persistent=False); self.none = nn.Identity()
        def forward(self, x): return self.none(x*self.by[0] + self.b)
    net = nn.Sequential(nn.Conv1d(2, 4, 3, stride=2, groups=2, padding=1, padding_mode='circular', bias=False), nn.GroupNorm(2, 4), nn.GELU('tanh'), nn.Linear(4, 2), Scale()).eval()
    x = torch.randn(3, 2, 8)
    again = unpack(plain(pack(net)))
    assert again(x).equal(net(x)) and str(again) == str(net) and again.state_dict().keys() == net.state_dict().keys() and not again.training


# found by a second reading

def test_a_choice_is_used_up_by_the_fit(tmp_path):
    stopped(tmp_path, 9)
    learn, ck = toy(), Checkpoint(tmp_path)
    start = ck.start(learn)
    assert start == (1, 2)
    learn.fit(3, ck, start=start)
    with pytest.raises(CheckpointError, match='no checkpoint is chosen'): toy().fit(3, ck, start=start)              # it trained fresh weights from there


def test_a_choice_in_the_first_epoch_is_used_up_too(tmp_path):
    stopped(tmp_path, 2)
    learn, ck = toy(), Checkpoint(tmp_path, every=1)
    start = ck.start(learn)
    assert start == (0, 2)
    learn.fit(3, ck, start=start)
    with pytest.raises(CheckpointError, match='no checkpoint is chosen'): toy().fit(3, ck, start=start)


def test_places_that_cannot_be_written_to(tmp_path):
    from exp.checkpoints import write_atomic
    (tmp_path/'file').touch()
    for path in (tmp_path/'file/x.pt', tmp_path/('x'*300)):
        with pytest.raises(CheckpointError, match='not written'): write_atomic(path, lambda f: f.write(b'x'))


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path, monkeypatch):
    from exp import checkpoints as C
    real = os.fsync
    def no_folders(fd):
        if os.path.isdir(f'/proc/self/fd/{fd}'): raise OSError(22, 'Invalid argument')
        real(fd)
    monkeypatch.setattr(C.os, 'fsync', no_folders)
    C.write_atomic(tmp_path/'x', lambda f: f.write(b'x'))
    assert (tmp_path/'x').read_bytes() == b'x'


def test_a_text_of_an_enum_is_its_text():
    from enum import Enum
    class C(str, Enum): RED = 'red'
    assert plain(C.RED) == 'red' and type(plain(C.RED)) is str


def test_an_old_file_of_torchs_is_told_as_what_it_is(tmp_path):
    torch.save({'w': torch.ones(2)}, tmp_path/'old.pt', _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match='before version 1.6'): read_file(tmp_path/'old.pt', 'weights')


def test_a_state_that_is_none_and_layers_that_set_what_all_have(tmp_path):
    from exp.checkpoints import load_opt, unpack
    with pytest.raises(CheckpointError, match='no state of an optimizer'): load_opt('x.pt', toy().make_opt(), toy().model, 5)
    r = pack(nn.Linear(2, 2))
    r['vars']['_modules'] = 5
    with pytest.raises(CheckpointError, match='_modules of a layer'): unpack(r)


def test_another_batch_size_is_refused_and_older_files_are_not(tmp_path, monkeypatch):
    stopped(tmp_path/'new', 9)
    with monkeypatch.context() as m:
        m.setattr('exp.checkpoints.data_facts', lambda data: {k: v for k, v in data_facts(data).items() if k != 'batch size'})
        stopped(tmp_path/'old', 9)
    other = toy()
    other.data = DataBunch(*get_dls(other.data.train_ds, other.data.valid_ds, 15, seed=0), c_in=10, c_out=3)
    for learn, folder in ((toy(), 'new'), (toy(), 'old')):
        learn.fit(3, ck := Checkpoint(tmp_path/folder), start=ck.start(learn))
    with pytest.raises(CheckpointError, match='batch size: 16 in the file, 15 here'): Checkpoint(tmp_path/'new').start(other)


def test_a_missing_safetensors_file(tmp_path):
    pytest.importorskip('safetensors')
    with pytest.raises(CheckpointError, match='cannot be read'): toy().load(tmp_path/'none.safetensors')


# found by a third reading

@pytest.mark.parametrize('at,starts', [(9, [(1, 0), (1, 1), (1, 5), (0, 2)]), (7, [(1, 3), (0, 0), (2, 0)])])
def test_a_fit_that_begins_elsewhere_than_its_checkpoint_is_refused(at, starts, tmp_path):
    "The batch counts as well as the epoch: others would be trained twice, or left out."
    learn = toy(); seed_all(9)
    try: learn.fit(3, [Checkpoint(tmp_path, every=None if at == 7 else 1), StopAt(8 if at == 7 else at)])
    except Stop: pass
    for start in starts:
        new, ck = toy(1), Checkpoint(tmp_path)
        before = {k: v.clone() for k, v in new.model.state_dict().items()}
        stands = ck.start(new)
        with pytest.raises(CheckpointError, match=rf'stands at epoch {stands[0]}, batch {stands[1]}, and the fit begins at epoch {start[0]}, batch {start[1]}: fit'):
            new.fit(3, ck, start=start)
        assert all(v.equal(before[k]) for k, v in new.model.state_dict().items()) and new.n_iter == 0
    new, ck = toy(1), Checkpoint(tmp_path)
    new.fit(3, ck, start=list(ck.start(new)))                                        # a list will do


class Trips(torch.optim.SGD):
    "An optimizer whose own loading fails when it is half done, writing into tensors that are there."
    def load_state_dict(self, sd):
        for s in self.state.values(): s['momentum_buffer'].zero_()
        self.param_groups[0]['lr'] = 77.
        raise RuntimeError('not mine')


def test_an_optimizer_that_fails_to_load_is_as_it_was(tmp_path):
    for opt, spoil, words in ((torch.optim.AdamW, lambda sd: sd['state'][0].pop('step'), "its optimizer: KeyError.'step'"),      # torch notices after taking over the rest
                              (partial(Trips, momentum=.9), lambda sd: None, r"its optimizer: RuntimeError.'not mine'")):
        learn = toy(2, opt).fit(1)
        d = torch.load(toy(3, opt).fit(1).save(tmp_path/'w.pt'), weights_only=True)
        spoil(d['opt']['state'])
        torch.save(d, tmp_path/'w.pt')
        groups, state = learn.opt.param_groups[0], {p: dict(s) for p, s in learn.opt.state.items()}
        values = {(p, k): v.clone() for p, s in state.items() for k, v in s.items()}
        weights = {k: v.clone() for k, v in learn.model.state_dict().items()}
        with pytest.raises(CheckpointError, match=words): learn.load(tmp_path/'w.pt')
        assert learn.opt.param_groups[0] is groups and groups['lr'] == .05 and learn.opt.state.keys() == state.keys()
        for p, s in state.items():
            for k, v in s.items(): assert learn.opt.state[p][k] is v and v.equal(values[p, k])
        assert all(v.equal(weights[k]) for k, v in learn.model.state_dict().items())
        learn.fit(1)


def test_groups_in_another_order_are_refused(tmp_path):
    def two(order):
        learn = toy(opt=partial(torch.optim.SGD, momentum=.9))
        learn.splitter = lambda m: [[p for k in (0, 4) for p in m[k].parameters()], list(m[1].parameters())][::order]
        return learn
    path = two(1).fit(1).save(tmp_path/'w.pt')
    two(1).load(path)
    with pytest.raises(CheckpointError, match=r'parameter groups: 0.weight.* \| 1.weight, 1.bias; here: 1.weight, 1.bias \| 0.weight'): two(-1).load(path)


def test_what_a_kill_in_the_first_save_has_left_goes_after_a_day(tmp_path):
    old, young, mine = (tmp_path/f'.20250101-000000-000000-{k}.001-abcd.00000004.pt.0123abcd.tmp' for k in ('aaaa', 'bbbb', 'cccc'))
    others = [tmp_path/n for n in ('.notes.pt.0123abcd.tmp', '.notes.tmp', 'notes.pt')]
    for f in (old, young, *others): f.write_bytes(b'PK half')
    for f in (old, *others): os.utime(f, (0, 1e9))
    toy().fit(1, Checkpoint(tmp_path))
    assert not old.exists() and young.exists() and all(f.exists() for f in others)          # the young one may be a run's that is alive


def test_a_missing_partner_is_named_once(tmp_path):
    stopped(tmp_path, 9, fit=[Half2(1)])
    new, ck = toy(1), Checkpoint(tmp_path)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        new.fit(3, [EarlyStopping(patience=9), ck], start=ck.start(new))             # in the middle of an epoch, where callbacks are loaded twice
    said = [str(x.message) for x in w]
    assert sum('knows no EarlyStopping' in s for s in said) == 1 and sum('the state of Half2, which' in s for s in said) == 1


class Half2(Callback):
    def __init__(self, seed): self.g = torch.Generator().manual_seed(seed)


def test_what_is_not_plain_ends_the_fit_at_the_first_checkpoint(tmp_path):
    @keeps('f')
    class Keeps(Callback): f = staticmethod(print)
    with pytest.raises(TypeError, match='builtin_function'): toy().fit(1, [Keeps(), Checkpoint(tmp_path)])
    assert not list(tmp_path.iterdir())


if __name__ == '__main__':
    torch.set_num_threads(1)
    if sys.argv[1] == 'kills': drive(int(sys.argv[2]), Path(sys.argv[3]))
    else:
        base, folder, seed, *kill = sys.argv[2:]
        print(json.dumps(run_once(Path(base)/'pictures', 0, Path(base)/folder, int(seed), *(int(k) for k in kill))))


# ---------------------------------------------------------------- modules that save more than tensors, numpy's generators


class Counting(nn.Linear):
    "Saves a number beside its tensors, by torch's `get_extra_state`."
    calls = 0
    def forward(self, x): self.calls += 1; return super().forward(x)
    def get_extra_state(self): return {'calls': self.calls}
    def set_extra_state(self, s): self.calls = s['calls']


def counting():
    torch.manual_seed(0)
    batches = [(torch.randn(8, 4), torch.randint(0, 2, (8,))) for _ in range(4)]
    return Learner(nn.Sequential(Counting(4, 2)), DataBunch(batches, None), F.cross_entropy, lr=.1)


def test_a_module_with_a_state_beside_its_tensors(tmp_path):
    learn = counting(); learn.fit(1)
    assert counting().load(learn.save(tmp_path/'a.pt')).model[0].calls == 4
    with pytest.raises(CheckpointError, match=r'a\.safetensors.*0\._extra_state is a dict.*tensors only.*\.pt') as e: learn.save(tmp_path/'a.safetensors')
    assert not list(tmp_path.glob('*safetensors*')) and len(str(e.value)) < 250
    torch.save({k: torch.ones_like(v) for k, v in learn.model.state_dict().items() if torch.is_tensor(v)}, tmp_path/'bare.pt')
    was = learn.model[0].weight.clone()
    with pytest.raises(CheckpointError, match='0._extra_state is not in the file'): learn.load(tmp_path/'bare.pt')
    assert learn.model[0].weight.equal(was)


class NumpyOrder(torch.utils.data.Sampler):
    "Draws the order of each pass from a generator of numpy's."
    def __init__(self, n, kind, seed): self.n, self.dice = n, np.random.Generator(kind(seed))
    def __len__(self): return self.n
    def __iter__(self): return iter(self.dice.permutation(self.n).tolist())


class NumpyNoise(Callback):
    def __init__(self, seed): self.dice = np.random.default_rng(seed)
    def begin_batch(self, run): run.xb = run.xb + torch.from_numpy(self.dice.normal(size=run.xb.shape).astype(np.float32))


@pytest.mark.parametrize('every,at', [(None, 5), (1, 8)], ids=['between', 'in the middle'])
@pytest.mark.parametrize('kind', [np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64])
def test_generators_of_numpys_are_resumed(kind, every, at, tmp_path):
    def learner(seed):
        torch.manual_seed(seed)
        x, y = torch.arange(40.).view(20, 2).sin(), torch.arange(20) % 3
        dl = torch.utils.data.DataLoader(Dataset(x, y), 4, sampler=NumpyOrder(20, kind, seed))
        return Learner(nn.Linear(2, 3), DataBunch(dl, None), F.cross_entropy, sgd_mom_opt, lr=.1, cbs=NumpyNoise(seed))
    whole = learner(1); whole.fit(3)
    class Stop(Callback):
        _order = 2000
        def begin_batch(self, run):
            if run.n_iter == at: raise KeyboardInterrupt
    ck, first = Checkpoint(tmp_path, every=every), learner(1)
    with pytest.raises(KeyboardInterrupt): first.fit(3, [ck, Stop()])
    again, ck = learner(2), Checkpoint(tmp_path)
    again.fit(3, ck, start=ck.start(again))
    assert all(p.equal(q) for p, q in zip(whole.model.parameters(), again.model.parameters()))


def test_a_loader_state_from_before_numpys_generators_were_kept():
    "The file knows torch's only: it goes where it went, though the other's name comes first."
    from exp.checkpoints import load_loader_state, loader_state
    sampler = NumpyOrder(4, np.random.PCG64, 0); sampler.later = torch.Generator().manual_seed(0)
    dl = torch.utils.data.DataLoader(range(4), 2, sampler=sampler)
    s = loader_state(dl); assert len(s['generators']) == 2
    s['generators'] = [g for g in s['generators'] if torch.is_tensor(g)]
    a = torch.rand(1, generator=sampler.later)
    load_loader_state(dl, s)
    assert torch.rand(1, generator=sampler.later).equal(a)
