"""Files: whole or as before after any accident; refused in a sentence where they are damaged, foreign or hostile."""
import errno
import os
import pickle
import random
import signal
import struct
import warnings
import zipfile
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


def equal(a, b):
    if torch.is_tensor(a): return a.equal(b)
    return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a) if isinstance(a, dict) else a == b


@pytest.fixture
def good(tmp_path):
    write_file(tmp_path/'w.pt', 'weights', STATE)
    return tmp_path/'w.pt'


def refused(path, *kinds):
    "The one sentence with which a file is refused: it names the file, and tells nobody how to run its code."
    with pytest.raises(CheckpointError) as e: read_file(path, *(kinds or ['weights']))
    said = str(e.value)
    assert str(path) in said and '\n' not in said and 'weights_only' not in said and len(said) < len(str(path)) + 250, said
    return said


def test_there_and_back(good):
    assert equal(read_file(good, 'weights')['model'], STATE['model'])
    assert torch.load(good, weights_only=True)['kind'] == 'weights'          # torch alone reads it too
    torch.save(STATE['model'], good)                                         # and what everybody else writes is read
    assert equal(read_file(good, 'weights')['model'], STATE['model'])


def test_plain(tmp_path):
    class Colour(str, Enum): RED = 'red'
    for o, want in ((np.float64(2.5), 2.5), (Image.Resampling.BILINEAR, 2), (Colour.RED, 'red'), (True, True), (None, None), ((1, [2]), (1, [2]))):
        got = plain(o)
        assert got == want and type(got) is type(want)
    write_file(tmp_path/'v.pt', 'weights', {'model': {'row': torch.zeros(1000, 1000)[0]}})
    assert (tmp_path/'v.pt').stat().st_size < 20_000                         # a view does not drag its base along
    with pytest.raises(TypeError, match=r'a\.b\[1\]'): plain({'b': [1, lambda: 0]}, 'a')


# ---------------------------------------------------------------- writing


def test_a_write_that_fails_leaves_what_was_there(good, tmp_path):
    before = good.read_bytes()
    def half(f): f.write(b'half'); raise OSError(errno.ENOSPC, 'No space left on device')
    (tmp_path/'file').touch()
    for path, write in ((good, half), (tmp_path/'file'/'x.pt', half), (tmp_path/('x'*300), half)):
        with pytest.raises(CheckpointError): write_atomic(path, write)
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
    if where == 'after': assert good.read_bytes() == b'new'
    else: assert equal(read_file(good, 'weights')['model'], STATE['model'])
    left = [p for p in good.parent.iterdir() if p != good]
    mine = good.parent/'.notes.tmp'
    for p in (mine, *left): p.touch(); os.utime(p, (0, 1e9))
    write_file(good, 'weights', STATE)                                       # what is old and ours goes with the next write
    assert sorted(good.parent.iterdir()) == [mine, good] and len(left) == (where != 'after')


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path, monkeypatch):
    real = os.fsync
    def no_folders(fd):
        if os.path.isdir(f'/proc/self/fd/{fd}'): raise OSError(errno.EINVAL, 'Invalid argument')
        real(fd)
    monkeypatch.setattr(os, 'fsync', no_folders)
    write_atomic(tmp_path/'new'/'x', lambda f: f.write(b'x'))
    assert (tmp_path/'new'/'x').read_bytes() == b'x'


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    write_file('~/in/w.pt', 'weights', STATE)
    assert (tmp_path/'in'/'w.pt').exists() and not Path('~').exists() and read_file('~/in/w.pt', 'weights')


# ---------------------------------------------------------------- damaged


def test_truncated_at_any_length(good):
    whole = good.read_bytes()
    for n in [*range(0, 5), *range(30, len(whole), 97), len(whole) - 1]:
        good.write_bytes(whole[:n])
        refused(good)


def test_a_flipped_bit_never_goes_in_unnoticed(good):
    "torch.load itself takes such a file without a word."
    whole, rng = good.read_bytes(), random.Random(0)
    flips = [(rng.randrange(len(whole)), rng.randrange(8)) for _ in range(150)]
    flips += [(i, rng.randrange(8)) for i in range(whole.index(b'PK\1\2'), len(whole), 2)]         # its directory
    data = whole.find(STATE['model']['w'].numpy().tobytes())
    silent = 0
    for n, (i, bit) in enumerate([*flips, *((data + rng.randrange(2400), 3) for _ in range(30))]):
        bad = bytearray(whole)
        bad[i] ^= 1 << bit
        good.write_bytes(bad)
        try: d = read_file(good, 'weights')
        except CheckpointError: continue
        assert n < len(flips) and equal(d['model'], STATE['model'])          # padding, time stamps
    for i in range(data, data + 2400, 80):
        bad = bytearray(whole); bad[i + 2] ^= 8
        good.write_bytes(bad)
        silent += not equal(torch.load(good, weights_only=True)['model'], STATE['model'])
        refused(good)
    assert silent == 30


# ---------------------------------------------------------------- hostile


class Bomb:
    def __init__(self, marker): self.marker = marker
    def __reduce__(self): return os.mkdir, (str(self.marker),)


def rewritten(src, dst, change=lambda name, data: data, **kw):
    with zipfile.ZipFile(src) as z, zipfile.ZipFile(dst, 'w', **kw) as out:
        for i in z.infolist(): out.writestr(i.filename, change(i.filename, z.read(i)))


def test_hostile_files_run_nothing(good, tmp_path):
    d, marker = torch.load(good, weights_only=True), tmp_path/'marker'
    bomb, x = Bomb(marker), tmp_path/'x.pt'
    for o in (bomb, {**d, 'model': bomb}, {**d, 'model': {**d['model'], 'w': bomb}}, {**d, 'kind': bomb}, nn.Linear(2, 2), {**d, 'model': nn.Linear(2, 2)}):
        torch.save(o, x)
        refused(x)
    x.write_bytes(pickle.dumps(bomb)); refused(x)
    rewritten(good, x, lambda name, data: pickle.dumps(bomb, 2) if name.endswith('data.pkl') else data); refused(x)
    torch.save(bomb, x, _use_new_zipfile_serialization=False); refused(x)
    torch.save({**d, 'model': bomb}, x)
    assert 'mkdir' in refused(x) and not marker.exists()                     # it says what would have been called
    pickle.loads(pickle.dumps(bomb))
    assert marker.exists()                                                   # the bomb is a real one


def nested(depth, times):
    o = []
    for _ in range(depth): o = [o]*times
    return o


@pytest.mark.parametrize('what', [nested(60, 2), {'a': tuple(nested(40, 2))}, torch.zeros(1).expand(1 << 40), torch.zeros(2).to_sparse(),
                                  torch.zeros(2, device='meta'), {1, 2}, b'x', 1j, torch.float32], ids=lambda o: type(o).__name__)
def test_small_files_that_would_fill_the_memory_or_are_not_plain(what, good, tmp_path):
    torch.save({**torch.load(good, weights_only=True), 'more': what}, tmp_path/'x.pt')
    refused(tmp_path/'x.pt')


def a_key_of_tuples(depth): return b'\x80\2}K\1\x85q\1' + b'h\1h\1\x86q\1'*depth + b'K\1s.'


@pytest.mark.parametrize('code', [b'\x80\2' + b']'*100_000 + b'a'*99_999 + b'.', a_key_of_tuples(60), b'\x80\2c__builtin__\nbytearray\nJ\0\0\0\x7f\x85R.',
                                  b'\x80\2]ctorch\nTensor\n\x8a\5\0\0\0\0\1\x85Ra.', b'\x80\4\x8c\5posix\x8c\5mkdir\x93.'], ids=['deep', 'key', 'bytes', 'tensor', 'stack'])
@pytest.mark.parametrize('ending', ['data.pkl', 'DATA.PKL'])
def test_small_programs_that_would_fill_the_memory_or_never_end(code, ending, good, tmp_path):
    with zipfile.ZipFile(good) as z, zipfile.ZipFile(tmp_path/'x.pt', 'w') as out:
        for n in z.namelist(): out.writestr(n.replace('data.pkl', ending), code if n.endswith('data.pkl') else z.read(n))
    refused(tmp_path/'x.pt')


def test_all_kinds_of_tensors_are_read(tmp_path):
    there = {t: torch.ones(2).to(getattr(torch, t)) for t in 'bfloat16 float8_e4m3fn uint16 bool complex64 half int8'.split()}
    torch.save({**there, 'p': nn.Parameter(torch.ones(2))}, tmp_path/'x.pt')
    d = read_file(tmp_path/'x.pt', 'weights')['model']
    assert all(d[k].dtype == t.dtype for k, t in there.items()) and 'p' in d


def test_archives_that_unpack_to_more_than_they_are(good, tmp_path):
    x = tmp_path/'x.pt'
    rewritten(good, x, lambda name, data: bytes(1 << 24) if name.endswith('data/0') else data, compression=zipfile.ZIP_DEFLATED)
    assert x.stat().st_size < 100_000
    refused(x)
    with zipfile.ZipFile(x, 'w') as z: z.writestr('archive/data/0', bytes(1 << 16))
    whole = x.read_bytes()
    at = whole.index(b'PK\1\2')
    end = whole.rindex(b'PK\5\6')
    entry = whole[at:end]
    for n in (2000, 65_000):                                                 # so many names for one part
        x.write_bytes(whole[:at] + entry*n + b'PK\5\6' + struct.pack('<HHHHIIH', 0, 0, n, n, len(entry)*n, at, 0))
        refused(x)


def test_a_second_directory_changes_nothing(good, tmp_path):
    "Python and torch find the list of an archive's parts in different ways; what torch would read is what was checked."
    other, x = tmp_path/'o.pt', tmp_path/'x.pt'
    write_file(other, 'weights', {'model': {'w': torch.zeros(600), 'n': torch.tensor(3)}})
    for a, b in ((good, other), (other, good)):
        x.write_bytes(a.read_bytes() + b.read_bytes())
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try: d = read_file(x, 'weights')
            except CheckpointError: continue
        assert equal(d['model'], read_file(b, 'weights')['model'])


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path/'fifo')                                               # opening it would wait for ever
    (tmp_path/'zero').symlink_to('/dev/zero')
    for n in ('none.pt', '.', 'fifo', 'zero'):
        with pytest.raises(CheckpointError): read_file(tmp_path/n, 'weights')


# ---------------------------------------------------------------- foreign, other kinds, other architectures


def test_foreign_files_and_other_kinds(good, tmp_path):
    d = torch.load(good, weights_only=True)
    np.savez(tmp_path/'a.npz', x=np.ones(3)); (tmp_path/'a.txt').write_text('hello'); Image.new('RGB', (9, 9)).save(tmp_path/'a.png')
    for n in ('a.npz', 'a.txt', 'a.png'): refused(tmp_path/n)
    x = tmp_path/'x.pt'
    for o in ([1, 2], {}, {'model': {}, 'epoch': 3}, 5, {**d, 'kind': 'export'}, {k: v for k, v in d.items() if k != 'model'}, {**d, 'model': 5},
              *({**d, 'version': v} for v in (0, 99, -1, 2.5, 'x', None, True, [2], torch.ones(2))), {**d, 'format': torch.ones(2)}, {**d, 'kind': ['weights']}):
        torch.save(o, x)
        refused(x)
    refused(good, 'checkpoint', 'export')
    torch.save({**d, 'version': 1}, x)                                       # weights of the format before are still weights
    assert read_file(x, 'weights')


@pytest.mark.parametrize('other,first', [(nn.Sequential(nn.Linear(2, 4)), '0.weight'), (nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), '1.weight'),
                                         (nn.Sequential(nn.Linear(2, 3, bias=False)), '0.bias')])
def test_another_architecture_is_named_by_its_first_difference(other, first):
    net = nn.Sequential(nn.Linear(2, 3))
    for a, b in ((net, other), (other, net)):
        with pytest.raises(ValueError, match=first): check_model(a, b.state_dict())
    with pytest.raises(ValueError, match='0.weight'): check_model(net, {k: v.long() for k, v in net.state_dict().items()})
    check_model(net, net.double().state_dict())                              # another precision is the same architecture


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path):
    "`--json >(jq .)`, `--json /dev/full`: a regular file took their place."
    import threading
    write_atomic(tmp_path/'real', lambda f: f.write(b'old'))
    (tmp_path/'link').symlink_to('real')
    write_atomic(tmp_path/'link', lambda f: f.write(b'new'))
    assert (tmp_path/'link').is_symlink() and (tmp_path/'real').read_bytes() == b'new'
    os.mkfifo(tmp_path/'pipe')
    heard = []
    t = threading.Thread(target=lambda: heard.append((tmp_path/'pipe').read_bytes()), daemon=True)
    t.start()
    write_atomic(tmp_path/'pipe', lambda f: f.write(b'told'))
    t.join(60)
    assert heard == [b'told'] and (tmp_path/'pipe').is_fifo()
    with pytest.raises(CheckpointError, match='full'): write_atomic('/dev/full', lambda f: f.write(b'x'*10**6))
    with pytest.raises(CheckpointError): write_atomic(tmp_path, lambda f: f.write(b'x'))
