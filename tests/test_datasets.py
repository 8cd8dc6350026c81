"""Downloads from a real local server that misbehaves, archives that bite, disks that fill; and the drawn sample."""
import hashlib
import http.server
import io
import multiprocessing
import os
import shutil
import socket
import ssl
import struct
import tarfile
import threading
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exp import datasets as D

BLOB = bytes(np.random.default_rng(0).integers(0, 256, 50_000, dtype=np.uint8))


def tgz(members, links=()):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w:gz') as t:
        for name, data in members.items():
            i = tarfile.TarInfo(name); i.size = len(data); t.addfile(i, io.BytesIO(data))
        for name, kind, target in links:
            i = tarfile.TarInfo(name); i.type, i.linkname = kind, target; t.addfile(i)
    return out.getvalue()


GOOD = tgz({'imagenette2-160/train/a/1.JPEG': b'1', 'imagenette2-160/val/a/2.JPEG': b'2'})


@pytest.fixture
def server():
    "A server whose `files` are served with ranges; `cut` bytes are sent before it hangs up, for the first `cuts` requests."
    class H(http.server.BaseHTTPRequestHandler):
        files, asked, cut, cuts, ranges, status, length = {}, [], None, 0, True, None, True
        def do_GET(self):
            name, rng = self.path.lstrip('/'), self.headers.get('Range')
            H.asked.append(rng)
            if H.status or name not in H.files: return self.send_error(H.status or 404)
            data, start = H.files[name], int(rng[6:-1]) if rng and H.ranges else 0
            if start >= len(data): return self.send_error(416)
            self.send_response(206 if start else 200)
            if H.length: self.send_header('Content-Length', str(len(data) - start))
            self.end_headers()
            end = start + H.cut if H.cut and len(H.asked) <= H.cuts else None
            self.wfile.write(data[start:end])
        def log_message(self, *a): pass
    H.files, H.asked = {}, []
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), H)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    H.url = f'http://127.0.0.1:{s.server_port}'
    yield H
    s.shutdown(); s.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch): monkeypatch.setattr(D.time, 'sleep', lambda s: None)


@pytest.fixture
def offline(monkeypatch):
    "No official address answers."
    def no(url, *a, **k): raise D.DataError(f'{url}: no route to host')
    real = D.download
    monkeypatch.setattr(D, 'download', lambda url, *a, **k: real(url, *a, **k) if '127.0.0.1' in url else no(url))


def leftovers(folder): return [p.name for p in Path(folder).rglob('*') if not p.name.endswith('.lock') and p.name not in ('archive', 'data')]


def test_cut_in_the_middle_and_resumed(server, tmp_path):
    server.files, server.cut, server.cuts = {'b': BLOB}, 20_000, 2
    f = D.download(f'{server.url}/b', tmp_path/'b', ('sha256', hashlib.sha256(BLOB).hexdigest()))
    assert f.read_bytes() == BLOB and server.asked == [None, 'bytes=20000-', 'bytes=40000-']


def test_a_broken_off_download_goes_on_in_the_next_call(server, tmp_path):
    server.files, server.cut, server.cuts = {'b': BLOB}, 20_000, 1
    with pytest.raises(D.DataError, match='kept'): D.download(f'{server.url}/b', tmp_path/'b', tries=1)
    assert not (tmp_path/'b').exists() and (tmp_path/'b.part').stat().st_size == 20_000
    assert D.download(f'{server.url}/b', tmp_path/'b').read_bytes() == BLOB and server.asked[-1] == 'bytes=20000-'


def test_a_whole_file_is_not_fetched_again(server, tmp_path):
    server.files, digest = {'b': BLOB}, ('sha256', hashlib.sha256(BLOB).hexdigest())
    for _ in range(2): D.download(f'{server.url}/b', tmp_path/'b', digest)
    assert server.asked == [None]
    (tmp_path/'b').write_bytes(BLOB[:-1])                                     # with a wrong digest it is
    assert D.download(f'{server.url}/b', tmp_path/'b', digest).read_bytes() == BLOB


def test_a_part_that_is_whole_gets_its_name(server, tmp_path):
    "A process killed between the last byte and the rename left a whole `.part`; it was thrown away and fetched again."
    server.files, digest = {'b': BLOB}, ('sha256', hashlib.sha256(BLOB).hexdigest())
    (tmp_path/'b.part').write_bytes(BLOB)
    assert D.download(f'{server.url}/b', tmp_path/'b', digest).read_bytes() == BLOB and server.asked == [] and leftovers(tmp_path) == ['b']


class Screen(io.StringIO):
    def __init__(self, tty): super().__init__(); self.isatty = lambda: tty


def test_the_speed_counts_what_this_try_brought(server, tmp_path, monkeypatch):
    monkeypatch.delenv('EXP_NO_BAR', raising=False); monkeypatch.setattr(D.sys, 'stderr', screen := Screen(True))
    server.files['b'] = data = BLOB*20                                        # a million bytes, of which 10,000 are lacking
    (tmp_path/'b.part').write_bytes(data[:-10_000])
    D.download(f'{server.url}/b', tmp_path/'b')
    speed = float(screen.getvalue().split(', ')[-1].split()[0])
    assert server.asked == ['bytes=990000-'] and speed <= .1, screen.getvalue()          # at most, as the shortest time it counts with is .1 s


@pytest.mark.parametrize('tty', [False, True], ids=['log', 'terminal'])
def test_a_download_of_unknown_length_ends_with_a_line(server, tmp_path, monkeypatch, tty):
    monkeypatch.delenv('EXP_NO_BAR', raising=False); monkeypatch.setattr(D.sys, 'stderr', screen := Screen(tty))
    server.files, server.length = {'b': BLOB*20}, False
    D.download(f'{server.url}/b', tmp_path/'b')
    assert screen.getvalue().endswith('\n') and screen.getvalue().count('\n') == 1 and '1.0 MB' in screen.getvalue()


def test_a_server_that_speaks_no_http(tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as s:
        def answer():
            c, _ = s.accept()
            c.recv(1000); c.sendall(b'SSH-2.0-OpenSSH_9.6\r\n'); c.close()
        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(D.DataError, match=r'/b: .*tried once'): D.download(f'http://127.0.0.1:{s.getsockname()[1]}/b', tmp_path/'b', tries=1)


def test_a_server_that_knows_no_ranges_starts_anew(server, tmp_path):
    server.files, server.cut, server.cuts, server.ranges = {'b': BLOB}, 20_000, 1, False
    assert D.download(f'{server.url}/b', tmp_path/'b').read_bytes() == BLOB


def test_a_wrong_digest_throws_the_file_away(server, tmp_path):
    server.files = {'b': BLOB}
    with pytest.raises(D.DataError, match='wrong md5 digest'): D.download(f'{server.url}/b', tmp_path/'b', ('md5', '0'*32))
    assert leftovers(tmp_path) == []


def test_404_is_final_and_500_is_tried_again(server, tmp_path):
    with pytest.raises(D.DataError, match='404'): D.download(f'{server.url}/none', tmp_path/'b')
    assert len(server.asked) == 1
    server.status = 503
    with pytest.raises(D.DataError, match='503.*tried 4 times'): D.download(f'{server.url}/none', tmp_path/'b')
    assert len(server.asked) == 5
    server.status = 429                                                      # too many requests: that passes
    with pytest.raises(D.DataError, match='429.*tried 2 times'): D.download(f'{server.url}/none', tmp_path/'b', tries=2)
    assert len(server.asked) == 7


def test_a_certificate_that_is_not_trusted_is_final(tmp_path, monkeypatch):
    asked = []
    def urlopen(*a, **kw):
        asked.append(a)
        raise urllib.error.URLError(ssl.SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate'))
    monkeypatch.setattr(D.urllib.request, 'urlopen', urlopen)
    with pytest.raises(D.DataError, match='certificate is not trusted here .*EXP_MIRROR'): D.download('https://example.invalid/b', tmp_path/'b')
    assert len(asked) == 1


def test_a_name_that_nobody_knows_and_nothing_to_go_on_from(tmp_path, monkeypatch):
    def urlopen(*a, **kw): raise urllib.error.URLError(socket.gaierror(-2, 'Name or service not known'))
    monkeypatch.setattr(D.urllib.request, 'urlopen', urlopen)
    with pytest.raises(D.DataError, match=r'Name or service not known \(tried once\)$'): D.download('https://example.invalid/b', tmp_path/'b', tries=1)


def test_too_little_space_is_seen_before_the_download(server, tmp_path, monkeypatch):
    server.files = {'b': BLOB}
    monkeypatch.setattr(D.shutil, 'disk_usage', lambda p: os.statvfs_result and type('U', (), dict(free=60_000))())
    with pytest.raises(D.DataError, match='free'): D.download(f'{server.url}/b', tmp_path/'b')
    assert leftovers(tmp_path) == []


def test_a_full_disk_is_one_sentence(server, tmp_path, monkeypatch):
    server.files = {'b': BLOB}
    real = open

    class Full(io.FileIO):
        def write(self, b): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('builtins.open', lambda f, mode='r', *a, **k: Full(f, 'w') if str(f).endswith('.part') and mode != 'rb' else real(f, mode, *a, **k))
    with pytest.raises(D.DataError, match='full'): D.download(f'{server.url}/b', tmp_path/'b')
    assert not (tmp_path/'b').exists()


EVIL_TARS = {
    'dotdot': tgz({'a/1': b'x', '../evil': b'x'}), 'deep dotdot': tgz({'a/../../evil': b'x'}), 'absolute': tgz({'/tmp/evil_l11': b'x'}),
    'symlink out': tgz({}, [('a', tarfile.SYMTYPE, '/etc')]), 'hard link': tgz({}, [('a', tarfile.LNKTYPE, '/etc/passwd')]),
    'device': tgz({}, [('null', tarfile.CHRTYPE, '')]), 'fifo': tgz({}, [('pipe', tarfile.FIFOTYPE, '')]), 'drive': tgz({'C:/evil': b'x'}),
    'backslash': tgz({'..\\evil': b'x'})}


def zip_of(name, mode=0o100644):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as z:
        z.writestr('a/1', b'x')
        i = zipfile.ZipInfo(name); i.external_attr = mode << 16; z.writestr(i, b'/etc')
    return out.getvalue()


EVIL_ZIPS = {'zip dotdot': zip_of('../evil'), 'zip absolute': zip_of('/tmp/evil_l11'), 'zip symlink': zip_of('a/link', 0o120777),
             'zip device': zip_of('a/null', 0o020666)}


@pytest.mark.parametrize('data', [*EVIL_TARS.values(), *EVIL_ZIPS.values()], ids=[*EVIL_TARS, *EVIL_ZIPS])
def test_evil_archives_are_refused_whole(tmp_path, data):
    (tmp_path/'in').mkdir()
    (tmp_path/'in/evil.tgz').write_bytes(data)
    with pytest.raises(D.DataError, match='refused'): D.unpack(tmp_path/'in/evil.tgz', tmp_path/'in/out/data')
    assert {p.name for p in tmp_path.rglob('*')} == {'in', 'evil.tgz', 'out'} and not Path('/tmp/evil_l11').exists()


@pytest.mark.parametrize('data', [GOOD[:len(GOOD)//2], b'', b'no archive', b'\x1f\x8b' + b'0'*50],
                         ids=['half', 'empty', 'text', 'gzip head'])   # gzip notes the time: bytes as a name would differ
def test_a_broken_archive_leaves_nothing(tmp_path, data):
    (tmp_path/'b.tgz').write_bytes(data)
    with pytest.raises(D.DataError): D.unpack(tmp_path/'b.tgz', tmp_path/'out')
    assert leftovers(tmp_path) == ['b.tgz']


def test_one_flipped_bit_is_noticed(tmp_path):
    "tar reads to its own end and stops before gzip's checksum: most flips used to unpack without a word."
    import random
    rng = random.Random(0)
    files = {f'd/{i}': rng.randbytes(3000) for i in range(3)}
    data, noticed = tgz(files), 0
    for at in range(12, len(data), 150):
        (tmp_path/'f.tgz').write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:])
        try: got = D.unpack(tmp_path/'f.tgz', tmp_path/'out')
        except D.DataError as e: noticed += 1; assert 'f.tgz' in str(e)
        else: assert {f'd/{f.name}': f.read_bytes() for f in got.iterdir()} == files; shutil.rmtree(got)
    assert noticed > 50 and leftovers(tmp_path) == ['f.tgz']


def test_a_good_zip(tmp_path):
    (tmp_path/'g.zip').write_bytes(zip_of('a/2'))
    assert sorted(p.name for p in D.unpack(tmp_path/'g.zip', tmp_path/'out').iterdir()) == ['1', '2']


def test_a_zip_with_a_password_is_one_sentence(tmp_path):
    data = bytearray(zip_of('a/2'))
    data[6] |= 1; data[data.find(b'PK\1\2') + 8] |= 1                          # the bit that says: encrypted, in both places
    (tmp_path/'e.zip').write_bytes(data)
    with pytest.raises(D.DataError, match=r'e.zip: cannot be unpacked here \(.*encrypted'): D.unpack(tmp_path/'e.zip', tmp_path/'out')
    assert leftovers(tmp_path) == ['e.zip']


def make_mirror(folder, data=GOOD, digest=None):
    folder.mkdir(exist_ok=True)
    (folder/'imagenette2-160.tgz').write_bytes(data)
    (folder/'SHA256SUMS').write_text(f'{digest or hashlib.sha256(data).hexdigest()}  imagenette2-160.tgz\n')
    return folder


def test_mirror_as_a_folder(tmp_path, monkeypatch, offline):
    monkeypatch.setenv('EXP_MIRROR', str(make_mirror(tmp_path/'mirror')))
    path = D.untar_data(D.URLs.IMAGENETTE_160, base=tmp_path/'home/data')
    assert (path/'train/a/1.JPEG').read_bytes() == b'1' and path.name == 'imagenette2-160'
    assert D.unzip_data is D.untar_data


def test_mirror_as_an_address(tmp_path, monkeypatch, server, offline):
    m = make_mirror(tmp_path/'mirror')
    server.files = {p.name: p.read_bytes() for p in m.iterdir()}
    monkeypatch.setenv('EXP_MIRROR', server.url)
    assert (D.untar_data(D.URLs.IMAGENETTE_160, base=tmp_path/'home/data')/'val/a/2.JPEG').exists()


def test_nothing_is_deleted_that_was_there_before(tmp_path, monkeypatch, server):
    "The archive folder is fastai's too, and a mirror may lie there: only what a call has fetched itself goes when it is unpacked."
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path))
    make_mirror(tmp_path/'archive')
    monkeypatch.setenv('EXP_MIRROR', str(tmp_path/'archive'))
    D.untar_data(D.URLs.IMAGENETTE_160, quiet=True)
    monkeypatch.delenv('EXP_MIRROR')
    server.files = {f'{n}.tgz': tgz({f'{n}/a/1.JPEG': b'1'}) for n in ('ours', 'theirs')}
    (tmp_path/'archive/theirs.tgz').write_bytes(server.files['theirs.tgz'])
    for n in server.files: assert (D.untar_data(f'{server.url}/{n}', quiet=True)/'a/1.JPEG').exists()
    assert {f.name for f in (tmp_path/'archive').iterdir()} == {'imagenette2-160.tgz', 'SHA256SUMS', 'theirs.tgz'}


@pytest.mark.parametrize('fault', ['digest', 'unlisted', 'no sums', 'no folder', 'cut'])
def test_a_mirror_at_fault_names_all_three_ways_out(tmp_path, monkeypatch, offline, fault):
    m = make_mirror(tmp_path/'mirror', GOOD[:80] if fault == 'cut' else GOOD, '0'*64 if fault == 'digest' else None)
    if fault == 'unlisted': (m/'SHA256SUMS').write_text('')
    if fault == 'no sums': (m/'SHA256SUMS').unlink()
    monkeypatch.setenv('EXP_MIRROR', str(m if fault != 'no folder' else tmp_path/'none'))
    with pytest.raises(D.DataError) as e: D.untar_data(D.URLs.IMAGENETTE_160, base=tmp_path/'home/data')
    if fault != 'cut':
        for way in (f'put the unpacked folder at {tmp_path}/home/data/imagenette2-160;', 'set EXP_MIRROR', 'go online'): assert way in str(e.value)
        with pytest.raises(D.DataError, match=f'put the unpacked folder at {tmp_path}/home/data/mnist_idx;'): D.untar_data(D.URLs.MNIST, base=tmp_path/'home/data')
    assert not (tmp_path/'home/data/imagenette2-160').exists() and not leftovers(tmp_path/'home/data')


def _get(base, n, q):
    q.put(str(D.untar_data(D.URLs.SAMPLE if n else D.URLs.IMAGENETTE_160, base=base)))


def test_two_processes_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv('EXP_MIRROR', str(make_mirror(tmp_path/'mirror')))
    ctx = multiprocessing.get_context('spawn')
    q = ctx.Queue()
    ps = [ctx.Process(target=_get, args=(tmp_path/'home/data', 0, q)) for _ in range(2)]
    for p in ps: p.start()
    for p in ps: p.join(500); assert p.exitcode == 0
    assert q.get() == q.get() and sorted(leftovers(tmp_path/'home/data/imagenette2-160')) == sorted(
        ['.origin.json', '1.JPEG', '2.JPEG', 'a', 'a', 'train', 'val'])


def test_a_folder_of_ones_own_holds_all_of_it(tmp_path, monkeypatch, offline):
    monkeypatch.setenv('EXP_MIRROR', str(make_mirror(tmp_path/'mirror')))
    umask = os.umask(0o022)
    try: d = D.untar_data(D.URLs.IMAGENETTE_160, base=tmp_path/'a/b')
    finally: os.umask(umask)
    assert d == tmp_path/'a/b/imagenette2-160' and [p.name for p in (tmp_path/'a').iterdir()] == ['b']
    assert d.stat().st_mode & 0o777 == 0o755


def test_another_address_with_the_same_file_name_is_refused(server, tmp_path):
    for c in 'ab': server.files[f'{c}/train.tgz'] = tgz({f'train/{c}/1.JPEG': c.encode()})
    a, b = (f'{server.url}/{c}/train.tgz' for c in 'ab')
    got = D.untar_data(a, base=tmp_path, quiet=True)
    assert (got/'a/1.JPEG').read_bytes() == b'a' and D.untar_data(a, base=tmp_path) == got
    with pytest.raises(D.DataError) as e: D.untar_data(b, base=tmp_path)
    assert all(s in str(e.value) for s in (a, b, str(got)))
    assert (D.untar_data(b, base=tmp_path/'other', quiet=True)/'b/1.JPEG').read_bytes() == b'b'
    for theirs in ('', '[]', '{"from": 1}'):                                          # put there by other hands: taken as it is
        (got/'.origin.json').write_text(theirs)
        assert D.untar_data(b, base=tmp_path) == got
    (got/'.origin.json').unlink()
    assert D.untar_data(b, base=tmp_path) == got


def test_an_archive_with_several_tops_can_be_read_by_others(tmp_path):
    (tmp_path/'two.tgz').write_bytes(tgz({'train/a/1.JPEG': b'1', 'val/a/2.JPEG': b'2'}))
    assert D.unpack(tmp_path/'two.tgz', tmp_path/'out').stat().st_mode & 0o777 == 0o755


def test_a_place_that_no_folder_can_be_made_in(tmp_path, monkeypatch):
    (tmp_path/'file').touch()
    with pytest.raises(D.DataError, match='file/data cannot be made.*FASTAI_HOME'): D.untar_data(D.URLs.SAMPLE, base=tmp_path/'file/data')
    monkeypatch.setattr(D.os, 'access', lambda *a: False)                     # root may write anywhere, so say it may not
    with pytest.raises(D.DataError, match='cannot be written to'): D.untar_data(D.URLs.SAMPLE, base=tmp_path/'data')


def test_mnist_reads_idx(tmp_path, monkeypatch):
    import gzip
    d = tmp_path/'mnist_idx'; d.mkdir()
    x, y = np.arange(3*784).reshape(3, 28, 28).astype(np.uint8), np.array([3, 1, 4], np.uint8)
    for s in ('train', 't10k'):
        (d/f'{s}-images-idx3-ubyte.gz').write_bytes(gzip.compress(struct.pack('>4B3I', 0, 0, 8, 3, 3, 28, 28) + x.tobytes()))
        (d/f'{s}-labels-idx1-ubyte.gz').write_bytes(gzip.compress(struct.pack('>4BI', 0, 0, 8, 1, 3) + y.tobytes()))
    a, b, _, _ = D.mnist(base=tmp_path)
    assert a.shape == (3, 784) and np.allclose(a.numpy(), x.reshape(3, -1)/255) and b.tolist() == [3, 1, 4]
    (d/'t10k-labels-idx1-ubyte.gz').write_bytes(b'junk')
    with pytest.raises(D.DataError, match=f't10k-labels.*delete the folder {d} '): D.mnist(base=tmp_path)
    data = bytearray(gzip.compress(bytes(1000) + x.tobytes())); data[30] ^= 255
    (d/'t10k-labels-idx1-ubyte.gz').write_bytes(data)
    with pytest.raises(D.DataError, match='t10k-labels'): D.mnist(base=tmp_path)


def test_sample_is_the_same_everywhere_and_in_imagenettes_layout(tmp_path, data_home):
    def tree(d): return {p.relative_to(d).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(d.rglob('*.JPEG'))}
    one = tree(data_home/'data'/D.data_name(D.URLs.SAMPLE))
    assert one == tree(D.make_sample(tmp_path/'again'))
    assert len(one) == 1100 and {k.split('/')[1] for k in one} == set(D.SAMPLE_CLASSES)
    sizes = [Image.open(data_home/'data'/D.data_name(D.URLs.SAMPLE)/k) for k in one]
    assert {min(i.size) for i in sizes} == {160} and len({i.size for i in sizes}) > 20 and any(i.mode == 'L' for i in sizes)


def test_sample_separates_a_good_model_from_a_bad_one(data_home, tmp_path):
    "The lesson's CNN learns it in three epochs, a linear model on the pixels does not: augmentation and better nets have room to show."
    import json
    import torch
    import torch.nn.functional as F
    from conftest import python, small_env
    r = python('-m', 'exp.train_imagenette', '--data', 'sample', '--recipe', 'lesson', '--size', 96, '--epochs', 3, '--seed', 0, '--json', tmp_path/'r.json',
               '--log-dir', tmp_path/'run', env=small_env(data_home))
    assert r.returncode == 0, r.stderr
    cnn = json.loads((tmp_path/'r.json').read_text())['accuracy']

    home = data_home/'data'/D.data_name(D.URLs.SAMPLE)
    def load(split):
        files = sorted((home/split).glob('*/*.JPEG'))
        x = np.stack([np.asarray(Image.open(f).convert('RGB').resize((32, 32))) for f in files])
        return torch.from_numpy(x).flatten(1).float()/255 - .5, torch.tensor([D.SAMPLE_CLASSES.index(f.parent.name) for f in files])
    (x, y), (xv, yv) = load('train'), load('val')
    torch.manual_seed(0)
    w = torch.zeros(x.shape[1], 10, requires_grad=True)
    opt = torch.optim.Adam([w], lr=1e-3)
    best = 0
    for _ in range(200):                                             # as well as a linear model can, its best moment taken
        opt.zero_grad(); F.cross_entropy(x @ w, y).backward(); opt.step()
        best = max(best, ((xv @ w).argmax(1) == yv).float().mean().item())
    assert .6 <= cnn <= .97 and best < .5, (cnn, best)
