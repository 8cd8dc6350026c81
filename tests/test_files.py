"""Files: whole or as before after any accident; refused in a sentence where they are damaged, foreign, or hold code."""
import errno
import os
import pickle
import random
import signal
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import largest_file
from PIL import Image
from torch import nn

from exp.files import CheckpointError, check_model, plain, read_file, write_atomic, write_file

STATE = {'model': {'w': torch.arange(600.), 'n': torch.tensor(3)}}


def same(d): return d['model'].keys() == STATE['model'].keys() and all(v.equal(d['model'][k]) for k, v in STATE['model'].items())


@pytest.fixture
def good(tmp_path):
    write_file(tmp_path/'w.pt', 'weights', STATE)
    return tmp_path/'w.pt'


def refused(path, *kinds):
    "Refused, by a sentence that names the file and tells nobody how to run its code."
    with pytest.raises(CheckpointError) as e: read_file(path, *(kinds or ['weights']))
    assert str(path) in str(e.value) and 'weights_only' not in str(e.value)


def test_there_and_back(good):
    assert same(read_file(good, 'weights')) and torch.load(good, weights_only=True)['kind'] == 'weights'
    torch.save(STATE['model'], good)                                         # and what everybody else writes
    assert same(read_file(good, 'weights'))


def test_plain(tmp_path):
    class Colour(str, Enum): RED = 'red'
    for o, want in ((np.float64(2.5), 2.5), (Image.Resampling.BILINEAR, 2), (Colour.RED, 'red'), (True, True), (None, None), ((1, [2]), (1, [2]))):
        got = plain(o)
        assert got == want and type(got) is type(want)
    write_file(tmp_path/'v.pt', 'weights', {'model': {'row': torch.zeros(1000, 1000)[0]}})
    assert (tmp_path/'v.pt').stat().st_size < 20_000                         # a view does not drag its base along
    with pytest.raises(TypeError, match=r'a\.b\[1\]'): plain({'b': [1, lambda: 0]}, 'a')


def test_a_write_that_fails_leaves_what_was_there(good, tmp_path):
    before = good.read_bytes()
    def half(f): f.write(b'half'); raise OSError(errno.ENOSPC, 'No space left on device')
    (tmp_path/'file').touch()
    for path in (good, tmp_path/'file'/'x.pt', tmp_path/('x'*300)):
        with pytest.raises(CheckpointError): write_atomic(path, half)
    with largest_file(500), pytest.raises(CheckpointError, match='w.pt'): write_file(good, 'weights', STATE)      # the system's own refusal
    with pytest.raises(ZeroDivisionError): write_atomic(good, lambda f: 1/0)
    assert good.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ['file', 'w.pt']


@pytest.mark.parametrize('where', ['write', 'fsync', 'replace', 'after'])
def test_killed_while_writing(where, good):
    "SIGKILL in the middle, before the data is safe, and on either side of the rename: the old file or the new one."
    pid = os.fork()
    if not pid:
        def die(*args): os.kill(os.getpid(), signal.SIGKILL)
        replace = os.replace
        if where == 'fsync': os.fsync = die
        if where in ('replace', 'after'): os.replace = die if where == 'replace' else lambda a, b: (replace(a, b), die())
        write_atomic(good, lambda f: (f.write(b'new'), f.flush(), where == 'write' and die()))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert good.read_bytes() == b'new' if where == 'after' else same(read_file(good, 'weights'))
    left, mine = [p for p in good.parent.iterdir() if p != good], good.parent/'.notes.tmp'
    mine.touch()
    write_file(good, 'weights', STATE)
    assert all(p.exists() for p in left) and len(left) == (where != 'after')  # a young one may be somebody's
    for p in (mine, *left): os.utime(p, (0, 1e9))
    write_file(good, 'weights', STATE)                                       # what is old and ours goes with the next write
    assert sorted(good.parent.iterdir()) == [mine, good]


def test_a_folder_that_cannot_be_synced_is_no_failure_and_home_is_expanded(tmp_path, monkeypatch):
    real, synced = os.fsync, []
    def no_folders(fd):
        synced.append(os.path.isdir(f'/proc/self/fd/{fd}'))
        if synced[-1]: raise OSError(errno.EINVAL, 'Invalid argument')
        real(fd)
    monkeypatch.setattr(os, 'fsync', no_folders)
    monkeypatch.setenv('HOME', str(tmp_path))
    write_file('~/in/w.pt', 'weights', STATE)
    assert synced == [False, True] and (tmp_path/'in'/'w.pt').exists() and not Path('~').exists() and same(read_file('~/in/w.pt', 'weights'))


def test_truncated_or_with_a_flipped_bit(good):
    "torch.load itself takes a flipped bit without a word."
    whole, rng = good.read_bytes(), random.Random(0)
    for n in [*range(0, 5), *range(30, len(whole), 97), len(whole) - 1]:
        good.write_bytes(whole[:n])
        refused(good)
    def flip(i, bit):
        bad = bytearray(whole)
        bad[i] ^= 1 << bit
        good.write_bytes(bad)
    entries = [i for i in range(len(whole)) if whole[i:i + 4] == b'PK\1\2']
    flips = [(rng.randrange(len(whole)), rng.randrange(8)) for _ in range(150)] + [(i, rng.randrange(8)) for i in range(entries[0], len(whole), 2)]
    for i, bit in flips + [(i + 38, 4) for i in entries]:                    # for torch, the part is a folder now: it gives back what is in memory
        flip(i, bit)
        try: assert same(read_file(good, 'weights'))                         # padding, time stamps
        except CheckpointError: pass
    data = whole.find(STATE['model']['w'].numpy().tobytes())
    for i in range(data, data + 2400, 80):
        flip(i + 2, 3)
        assert not same(torch.load(good, weights_only=True))
        refused(good)


class Bomb:
    def __init__(self, marker): self.marker = marker
    def __reduce__(self): return os.mkdir, (str(self.marker),)


def test_files_with_code_run_nothing(good, tmp_path):
    d, marker, x = torch.load(good, weights_only=True), tmp_path/'marker', tmp_path/'x.pt'
    bomb = Bomb(marker)
    for o in (bomb, {**d, 'model': bomb}, {**d, 'model': {**d['model'], 'w': bomb}}, nn.Linear(2, 2), {**d, 'model': nn.Linear(2, 2)}):
        for zipped in (True, False):
            torch.save(o, x, _use_new_zipfile_serialization=zipped)
            refused(x)
    x.write_bytes(pickle.dumps(bomb)); refused(x)
    assert not marker.exists()
    pickle.loads(pickle.dumps(bomb))
    assert marker.exists()                                                   # the bomb is a real one


def test_foreign_files_and_other_kinds(good, tmp_path):
    d, x = torch.load(good, weights_only=True), tmp_path/'x.pt'
    np.savez(tmp_path/'a.npz', x=np.ones(3)); (tmp_path/'a.txt').write_text('hello')
    for n in ('a.npz', 'a.txt', 'none.pt', '.'): refused(tmp_path/n)
    for o in ([1, 2], 5, {}, {'model': {}, 'epoch': 3}, {**d, 'kind': 'export'}, {**d, 'version': 99}, {k: v for k, v in d.items() if k != 'kind'}):
        torch.save(o, x)
        refused(x)
    refused(good, 'checkpoint', 'export')
    torch.save({**d, 'version': 1}, x)                                       # weights of the format before are still weights
    assert same(read_file(x, 'weights'))


@pytest.mark.parametrize('other,first', [(nn.Sequential(nn.Linear(2, 4)), '0.weight'), (nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), '1.weight'),
                                         (nn.Sequential(nn.Linear(2, 3, bias=False)), '0.bias')])
def test_another_architecture_is_named_by_its_first_difference(other, first):
    net = nn.Sequential(nn.Linear(2, 3))
    for a, b in ((net, other), (other, net)):
        with pytest.raises(ValueError, match=first): check_model(a, b.state_dict())
    check_model(net, net.double().state_dict())                              # another precision is the same architecture
