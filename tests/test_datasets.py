"""Downloads from a local server that misbehaves, archives that bite, disks that fill; mirrors; and the drawn sample."""
import gzip
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import random
import shutil
import socket
import ssl
import struct
import tarfile
import threading
import time
import urllib.error
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, largest_file, python, small_env
from PIL import Image

from exp import datasets as D
from exp.datasets import DataError, URLs

BLOB = random.Random(0).randbytes(50_000)


def sha(data): return hashlib.sha256(data).hexdigest()


def tgz(members, more=(), mode='w:gz'):
    "An archive of `{name: bytes}`, and of `more`: (name, type, link, fields)."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as t:
        for name, data in members.items():
            i = tarfile.TarInfo(name); i.size = len(data); t.addfile(i, io.BytesIO(data))
        for name, kind, target in more:
            i = tarfile.TarInfo(name); i.type, i.linkname = kind, target; t.addfile(i)
    return out.getvalue()


def zipped(*names, mode=0o100644):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as z:
        z.writestr('a/1', b'x')
        for name in names:
            i = zipfile.ZipInfo(name); i.external_attr = mode << 16; z.writestr(i, b'/etc')
    return out.getvalue()


GOOD = tgz({'imagenette2-160/train/a/1.JPEG': b'1', 'imagenette2-160/val/a/2.JPEG': b'2'})
NETTE = 'imagenette2-160.tgz'


def nette(base): return D.untar_data(URLs.IMAGENETTE_160, base=base, quiet=True)


def leftovers(folder):
    "Everything in it but folders, locks and the data itself."
    return sorted(p.name for p in Path(folder).rglob('*') if p.is_file() and not p.name.endswith('.lock'))


@pytest.fixture
def server(tmp_path):
    "Serves `files`, with ranges; what it does wrong is set from outside."
    s = SimpleNamespace(files={}, asked=[], cut=None, cuts=0, ranges=True, status=None, length='true', drip=0, headers=None)

    class H(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name, wanted = self.path.lstrip('/'), self.headers.get('Range')
            s.asked.append(wanted); s.headers = self.headers
            if s.status or name not in s.files: return self.send_error(s.status or 404, 'no\x1b[31m')
            data, start = s.files[name], int(wanted[6:-1]) if wanted and s.ranges else 0
            if start >= len(data): return self.send_error(416)
            self.send_response(206 if start else 200)
            if s.length: self.send_header('Content-Length', str(len(data) - start) if s.length == 'true' else s.length)
            self.end_headers()
            end = start + s.cut if s.cut and len(s.asked) <= s.cuts else None
            try:
                if not s.drip: return self.wfile.write(data[start:end])
                for b in data: self.wfile.write(bytes([b])); time.sleep(s.drip)
            except OSError: pass
        def log_message(self, *a): pass
    http_server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), H)
    http_server.daemon_threads = True
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    s.host = f'127.0.0.1:{http_server.server_port}'
    s.url = f'http://{s.host}'
    s.get = lambda *args, **kw: D.download(f'{s.url}/b', tmp_path/'b', *args, **kw)
    yield s
    http_server.shutdown(); http_server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch): monkeypatch.setattr(D.time, 'sleep', lambda s, real=time.sleep: real(min(s, .01)))


@pytest.fixture
def offline(monkeypatch):
    "No official address answers."
    real = D.download

    def download(url, *args, **kw):
        if '127.0.0.1' not in url: raise DataError(f'{url}: no route to host')
        return real(url, *args, **kw)
    monkeypatch.setattr(D, 'download', download)


@pytest.mark.parametrize('ranges', [True, False])
def test_cut_in_the_middle_and_gone_on_with(server, tmp_path, ranges):
    server.files, server.cut, server.cuts, server.ranges = {'b': BLOB}, 20_000, 2, ranges
    with pytest.raises(DataError): server.get(tries=1)
    assert leftovers(tmp_path) == ['b.part'] and (tmp_path/'b.part').stat().st_size == 20_000
    assert server.get(('sha256', sha(BLOB))).read_bytes() == BLOB
    assert server.asked == [None, 'bytes=20000-', 'bytes=40000-' if ranges else 'bytes=20000-'] and leftovers(tmp_path) == ['b']


@contextmanager
def answers(f, n=1):
    "A socket whose `n` callers get what `f(connection, what was asked)` does; its address."
    with socket.create_server(('127.0.0.1', 0)) as s:
        def serve():
            for _ in range(n):
                c, _ = s.accept()
                with c: f(c, c.recv(4000).decode())
        threading.Thread(target=serve, daemon=True).start()
        yield f'http://127.0.0.1:{s.getsockname()[1]}/b'


def test_a_line_that_breaks_often_ends_at_last(tmp_path):
    "What came before a reset is kept, however little: the next try has less to do."
    def some(c, asked):                                                # 50,000 bytes, 9,000 a time
        start = int(asked.split('bytes=')[1].split('-')[0]) if 'bytes=' in asked else 0
        c.sendall(f'HTTP/1.1 {206 if start else 200} OK\r\nContent-Length: {len(BLOB) - start}\r\n\r\n'.encode() + BLOB[start:start + 9000])
        time.sleep(.05)
        c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))      # a reset, and no orderly end
    with answers(some, 6) as url: assert D.download(url, tmp_path/'b', tries=9).read_bytes() == BLOB


def test_what_is_whole_is_not_fetched_again(server, tmp_path):
    server.files, digest = {'b': BLOB}, ('sha256', sha(BLOB))
    for _ in range(2): server.get(digest)
    assert server.asked == [None]
    (tmp_path/'b').rename(tmp_path/'b.part')                           # killed between the last byte and its name
    server.get(digest)
    assert server.asked == [None] and leftovers(tmp_path) == ['b']
    (tmp_path/'b').write_bytes(BLOB[:-1])                              # with a wrong digest it is
    assert server.get(digest).read_bytes() == BLOB
    (tmp_path/'c.part').write_bytes(BLOB)                              # whole, but nobody knows: the server says 416
    assert D.download(f'{server.url}/b', tmp_path/'c').read_bytes() == BLOB


def test_a_wrong_digest_throws_the_file_away(server, tmp_path):
    server.files = {'b': BLOB}
    for digest in (('md5', '0'*32), ('sha256', sha(BLOB)[::-1])):
        with pytest.raises(DataError, match='digest'): server.get(digest)
        assert leftovers(tmp_path) == []


@pytest.mark.parametrize('status, times', [(404, 1), (503, 3), (500, 3), (429, 3), (408, 3)])
def test_what_is_asked_again(server, tmp_path, status, times):
    server.status = status
    with pytest.raises(DataError, match=f'{status}.*no') as e: server.get(tries=3)
    assert len(server.asked) == times and '\x1b' not in str(e.value)   # its phrase cannot write on a terminal


@pytest.mark.parametrize('url', ['nonsense', 'http://[', 'http://127.0.0.1:x/b', 'gopher://127.0.0.1/b', 'http://127.0.0.1:9/a b', 'http:///b', 'http://127.0.0.1:9/\n'])
def test_a_bad_address_is_a_sentence(tmp_path, url):
    with pytest.raises(DataError): D.download(url, tmp_path/'b', tries=1)
    with pytest.raises(DataError): D.untar_data(url, base=tmp_path/'data', tries=1, quiet=True)


@pytest.mark.parametrize('length', ['many', '-5', '99999999999999'])
def test_a_bad_header_is_a_sentence(server, tmp_path, length):
    server.files, server.length = {'b': BLOB}, length
    try: got = server.get(tries=1)
    except DataError: return
    assert got.read_bytes() == BLOB


@pytest.mark.parametrize('answer', [b'SSH-2.0-OpenSSH_9.6\r\n', b'', b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n'])
def test_a_server_that_speaks_no_http(tmp_path, answer):
    with answers(lambda c, asked: c.sendall(answer)) as url, pytest.raises(DataError): D.download(url, tmp_path/'b', tries=1)


def test_a_server_that_drips_is_given_up(server, tmp_path):
    server.files, server.drip, began = {'b': BLOB}, .05, time.monotonic()
    with pytest.raises(DataError, match='drip'): server.get(tries=1, timeout=.2)
    assert time.monotonic() - began < 10 and (tmp_path/'b.part').stat().st_size > 3          # what came is kept


@pytest.mark.parametrize('reason, times', [(ssl.SSLCertVerificationError(1, 'certificate verify failed'), 1), (socket.gaierror(-2, 'Name or service not known'), 2)])
def test_no_connection_at_all(tmp_path, monkeypatch, reason, times):
    asked = []
    def urlopen(*a, **kw): asked.append(a); raise urllib.error.URLError(reason)
    monkeypatch.setattr(D.urllib.request, 'urlopen', urlopen)
    with pytest.raises(DataError, match=reason.args[1]) as e: D.download('https://example.invalid/b', tmp_path/'b', tries=2)
    assert len(asked) == times and 'kept' not in str(e.value)


def test_a_secret_in_an_address_is_sent_and_never_said(server, tmp_path, monkeypatch):
    url = f'http://zaphod:bee%40ble@{server.host}'
    server.files = {'x.tgz': tgz({'x/1': b'1'})}
    got = D.untar_data(f'{url}/x.tgz', base=tmp_path, quiet=True)
    assert server.headers['Authorization'] == 'Basic emFwaG9kOmJlZUBibGU='         # zaphod:bee@ble
    said = [(got/'.origin.json').read_text()]
    monkeypatch.setenv('EXP_MIRROR', url)
    for bad in (f'{url}/y.tgz', f'http://zaphod:bee%40ble@{server.host}x/y.tgz', f'{url}/elsewhere/x.tgz'):
        with pytest.raises(DataError) as e: D.untar_data(bad, base=tmp_path, quiet=True, tries=1)
        said.append(str(e.value))
    assert not [s for s in said if 'zaphod' in s or 'bee' in s], said


class Screen(io.StringIO):
    def __init__(self, tty): super().__init__(); self.isatty = lambda: tty


@pytest.mark.parametrize('tty', [False, True], ids=['log', 'terminal'])
@pytest.mark.parametrize('length', ['true', None])
def test_how_far_it_is(server, tmp_path, monkeypatch, tty, length):
    monkeypatch.delenv('EXP_NO_BAR', raising=False); monkeypatch.setattr(D.sys, 'stderr', screen := Screen(tty))
    server.files, server.length = {'b': BLOB*20}, length               # a million bytes, of which 10,000 are lacking
    (tmp_path/'b.part').write_bytes((BLOB*20)[:-10_000])
    server.get()
    said = screen.getvalue()
    assert said.endswith('\n') and said.count('\n') == 1 and '1.0 MB' in said and ('\r' in said) == tty
    assert server.asked == ['bytes=990000-'] and float(said.split(', ')[-1].split()[0]) <= .1        # the speed of this try, which brought little
    monkeypatch.setenv('EXP_NO_BAR', '1')
    D.download(f'{server.url}/b', tmp_path/'c')
    assert screen.getvalue() == said


def test_a_disk_that_is_full_or_will_be(server, tmp_path, monkeypatch):
    server.files = {'b': BLOB, 'x.tgz': tgz({'x/1': bytes(10**6)})}
    with largest_file(30_000), pytest.raises(DataError): server.get(tries=1)
    assert not (tmp_path/'b').exists()
    (tmp_path/'x.tgz').write_bytes(server.files['x.tgz'])
    with largest_file(30_000), pytest.raises(DataError): D.unpack(tmp_path/'x.tgz', tmp_path/'x')
    shutil.rmtree(tmp_path); tmp_path.mkdir()
    monkeypatch.setattr(D.shutil, 'disk_usage', lambda p: SimpleNamespace(free=60_000))
    with pytest.raises(DataError, match='free'): server.get()          # seen before the first byte
    server.length = None                                               # or else when it is there
    server.files['b'] = BLOB*2
    with pytest.raises(DataError, match='free'): server.get()
    (tmp_path/'x.tgz').write_bytes(tgz({'x/1': bytes(40_000), 'x/2': bytes(40_000)}))
    with pytest.raises(DataError, match='free'): D.unpack(tmp_path/'x.tgz', tmp_path/'x')
    assert not (tmp_path/'x').exists()


def sparse():
    "A member of 8 TB that takes no place in the archive: GNU's old form, and pax's."
    i = tarfile.TarInfo('a/huge'); i.type, i.size = tarfile.GNUTYPE_SPARSE, 0
    head = bytearray(i.tobuf(tarfile.GNU_FORMAT))
    head[483:495] = b'%011o\0' % (1 << 33)                             # its real size
    head[148:156] = b'%06o\0 ' % sum(head[:148] + b' '*8 + head[156:512])
    pax = tarfile.TarInfo('a/GNUSparseFile.0/huge'); pax.size = 0
    pax.pax_headers = {'GNU.sparse.major': '0', 'GNU.sparse.minor': '1', 'GNU.sparse.name': 'a/huge',
                       'GNU.sparse.size': str(1 << 43), 'GNU.sparse.map': f'{1 << 43},0'}
    return bytes(head) + bytes(1024), pax.tobuf(tarfile.PAX_FORMAT) + bytes(1024)


EVIL = {'dotdot': tgz({'a/1': b'x', '../evil': b'x'}), 'deep dotdot': tgz({'a/../../evil': b'x'}), 'absolute': tgz({'/tmp/evil_l11': b'x'}),
        'drive': tgz({'C:/evil': b'x'}), 'backslash': tgz({'..\\evil': b'x'}), 'symlink out': tgz({}, [('a', tarfile.SYMTYPE, '/etc')]),
        'through a link': tgz({}, [('a', tarfile.SYMTYPE, '..'), ('a/evil', tarfile.REGTYPE, '')]), 'hard link': tgz({}, [('a', tarfile.LNKTYPE, '/etc/passwd')]),
        'device': tgz({}, [('null', tarfile.CHRTYPE, '')]), 'fifo': tgz({}, [('pipe', tarfile.FIFOTYPE, '')]),
        'sparse': sparse()[0], 'sparse, pax': sparse()[1],
        'zip dotdot': zipped('../evil'), 'zip absolute': zipped('/tmp/evil_l11'), 'zip symlink': zipped('a/link', mode=0o120777), 'zip device': zipped('a/null', mode=0o020666)}


@pytest.mark.parametrize('data', EVIL.values(), ids=EVIL)
def test_evil_archives_are_refused_whole(tmp_path, data):
    (tmp_path/'in').mkdir()
    (tmp_path/'in/evil.tgz').write_bytes(data)
    with pytest.raises(DataError, match='refused'): D.unpack(tmp_path/'in/evil.tgz', tmp_path/'in/out/data')
    assert {p.name for p in tmp_path.rglob('*')} == {'in', 'evil.tgz', 'out'} and not Path('/tmp/evil_l11').exists()


def overlapping(n, data=b'x'*1000, name=b'a/f'):
    "A zip of one file that its directory lists `n` times."
    crc, size = zlib.crc32(data), len(data)
    local = struct.pack('<4s5H3I2H', b'PK\3\4', 20, 0, 0, 0, 0, crc, size, size, len(name), 0) + name + data
    one = struct.pack('<4s6H3I5H2I', b'PK\1\2', 20, 20, 0, 0, 0, 0, crc, size, size, len(name), 0, 0, 0, 0, 0, 0) + name
    big = struct.pack('<4sQ2H2I4Q', b'PK\6\6', 44, 45, 45, 0, 0, n, n, n*len(one), len(local))
    where = struct.pack('<4sIQI', b'PK\6\7', 0, len(local) + n*len(one), 1)
    return local + one*n + big + where + struct.pack('<4s4H2IH', b'PK\5\6', 0, 0, 0xffff, 0xffff, n*len(one), len(local), 0)


@pytest.mark.parametrize('data', [b'x'*1000, b''])
def test_members_that_overlap_are_refused(tmp_path, data):
    (tmp_path/'o.zip').write_bytes(overlapping(20_000, data))
    with pytest.raises(DataError, match='refused'): D.unpack(tmp_path/'o.zip', tmp_path/'out')
    assert leftovers(tmp_path) == ['o.zip']


@pytest.mark.parametrize('data', [GOOD[:len(GOOD)//2], b'', b'no archive', b'\x1f\x8b' + b'0'*50, zipped('a/2')[:-40], tgz({'a': b'1', 'a/b': b'2'}), tgz({'x'*999: b''})],
                         ids=['half', 'empty', 'text', 'gzip head', 'half a zip', 'a file as a folder', 'a long name'])    # gzip notes the time: bytes as a name would differ
def test_a_broken_archive_leaves_nothing(tmp_path, data):
    (tmp_path/'b.tgz').write_bytes(data)
    with pytest.raises(DataError): D.unpack(tmp_path/'b.tgz', tmp_path/'out')
    assert [p.name for p in tmp_path.iterdir()] == ['b.tgz']


def test_one_flipped_bit_is_noticed(tmp_path):
    "tar stops before gzip's checksum: most flips would unpack without a word."
    rng = random.Random(0)
    files = {f'd/{i}': rng.randbytes(3000) for i in range(3)}
    data, noticed = tgz(files), 0
    for at in range(12, len(data), 150):
        (tmp_path/'f.tgz').write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:])
        try: got = D.unpack(tmp_path/'f.tgz', tmp_path/'out')
        except DataError: noticed += 1
        else: assert {f'd/{f.name}': f.read_bytes() for f in got.iterdir()} == files; shutil.rmtree(got)
    assert noticed > 50 and leftovers(tmp_path) == ['f.tgz']


MAC = {'__MACOSX/a/._1': b'm', 'a/._1': b'm', './._a': b'm', '.DS_Store': b'm'}


@pytest.mark.parametrize('data, there', [
    (zipped('a/2'), ['1', '2']), (zipped('a/2', mode=0), ['1', '2']), (zipped('__MACOSX/._a', 'a/._1', '.DS_Store'), ['1']), (tgz({'a/1': b'x', **MAC}), ['1']),
    (tgz({'a/1': b'x'}, [('a/empty', tarfile.DIRTYPE, '')]), ['1', 'empty']), (tgz({'./a/1': b'x'}), ['1']), (tgz({'a/1': b'x'}, mode='w'), ['1']),
    (tgz({'a/1': b'x'}, mode='w:xz'), ['1']), (tgz({'1': b'x', 'b/2': b'x'}), ['1', 'b']), (tgz({'1': b'x'}), ['1']), (tgz({'a/a..b': b'x'}), ['a..b'])],
    ids=['zip', 'zip from DOS', 'zip from a Mac', 'tar from a Mac', 'empty folder', 'dot', 'tar', 'xz', 'two tops', 'a file', 'two dots'])
def test_a_good_archive(tmp_path, data, there):
    (tmp_path/'g').write_bytes(data)
    umask = os.umask(0o022)
    try: got = D.unpack(tmp_path/'g', tmp_path/'out')
    finally: os.umask(umask)
    assert sorted(p.name for p in got.iterdir()) == there and got.stat().st_mode & 0o777 == 0o755


def test_a_broken_archive_of_a_mirror_or_with_a_password(tmp_path, monkeypatch, offline):
    locked = bytearray(zipped('a/2'))
    locked[6] |= 1; locked[locked.find(b'PK\1\2') + 8] |= 1                  # the bit that says: encrypted, in both places
    for data, why in ((locked, 'encrypted'), (GOOD[:80], '')):
        monkeypatch.setenv('EXP_MIRROR', str(make_mirror(tmp_path/'mirror', data)))
        with pytest.raises(DataError, match=f'{NETTE}.*{why}'): nette(tmp_path/'data')
        assert leftovers(tmp_path/'data') == []


def make_mirror(folder, data=GOOD, line='{}  {}\n'):
    folder.mkdir(exist_ok=True)
    (folder/NETTE).write_bytes(data)
    (folder/'SHA256SUMS').write_bytes(line.format(sha(data), NETTE).encode('utf-8'))
    return folder


def test_a_mirror_is_a_folder_or_an_address(tmp_path, monkeypatch, server, offline):
    m = make_mirror(tmp_path/'mirror')
    server.files = {p.name: p.read_bytes() for p in m.iterdir()}
    assert D.unzip_data is D.untar_data
    for i, where in enumerate([str(m), server.url, f'{server.url}/', f'{m}/', '~/mirror']):
        monkeypatch.setenv('EXP_MIRROR', where); monkeypatch.setenv('HOME', str(tmp_path))
        got = nette(tmp_path/f'{i}/data')
        assert got == tmp_path/f'{i}/data/imagenette2-160' and got.stat().st_mode & 0o777 == 0o755
        assert leftovers(tmp_path/f'{i}') == ['.origin.json', '1.JPEG', '2.JPEG'] and [p.name for p in (tmp_path/f'{i}').iterdir()] == ['data']
        assert nette(f'~/{i}/data') == got      # found, and ~ is nobody's folder
    assert len(server.asked) == 4 and leftovers(m) == ['SHA256SUMS', NETTE]


@pytest.mark.parametrize('line', ['\ufeff{}  {}\n', '{}  ./{}\r\n', '{} *{}\n', '{} *./{}', '\n  {}\t{}  \n', 'caf\xe9\n{}  {}\n'])
def test_lists_from_many_hands(tmp_path, monkeypatch, offline, line):
    m = make_mirror(tmp_path/'mirror', line=line)
    monkeypatch.setenv('EXP_MIRROR', str(m))
    assert nette(tmp_path/'1').exists()
    raw = (m/'SHA256SUMS').read_text('utf-8')
    (m/'SHA256SUMS').write_bytes(raw.replace(sha(GOOD), sha(GOOD).upper()).encode('latin-1', 'replace') + b'\n' + bytes(range(256)))
    if '\ufeff' not in line: assert nette(tmp_path/'2').exists()


FAULTS = {'digest': f'{"0"*64}  {NETTE}', 'unlisted': '', 'another': f'{sha(GOOD)}  not-{NETTE}', 'no hex': f'{"x"*64}  {NETTE}', 'short': f'{sha(GOOD)[:63]}  {NETTE}',
          'large': '#'*(2 << 20) + f'\n{sha(GOOD)}  {NETTE}', 'no sums': None, 'fifo': None, 'no folder': None, 'lost': f'{sha(GOOD)}  {NETTE}'}


@pytest.mark.parametrize('fault', FAULTS)
@pytest.mark.parametrize('remote', [False, True], ids=['folder', 'address'])
def test_a_mirror_at_fault_names_all_three_ways_out(tmp_path, monkeypatch, offline, server, fault, remote):
    m = make_mirror(tmp_path/'mirror')
    if FAULTS[fault] is None: (m/'SHA256SUMS').unlink()
    else: (m/'SHA256SUMS').write_text(FAULTS[fault])
    if fault == 'lost': (m/NETTE).unlink()
    server.files = {p.name: p.read_bytes() for p in m.iterdir()}
    if fault == 'fifo': os.mkfifo(m/'SHA256SUMS')
    if fault == 'no folder': m = tmp_path/'none'
    monkeypatch.setenv('EXP_MIRROR', server.url if remote else str(m))
    base = tmp_path/'home/data'
    for url, name in ((URLs.IMAGENETTE_160, 'imagenette2-160'), (URLs.MNIST, 'mnist_idx')):
        with pytest.raises(DataError) as e: D.untar_data(url, base=base, quiet=True, tries=1)
        assert all(way in str(e.value) for way in (str(base/name), 'EXP_MIRROR', 'go online', 'no route to host')), str(e.value)
        assert not (base/name).exists() and not [f for f in leftovers(base) if 'tgz' in f and 'part' not in f]


def test_nothing_is_deleted_that_was_there_before(tmp_path, monkeypatch, server):
    "fastai keeps its archives beside the data, and a mirror may lie there: only what a call has fetched itself goes."
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path))
    monkeypatch.setenv('EXP_MIRROR', str(make_mirror(tmp_path/'archive')))
    server.files = {'theirs.tgz': tgz({'theirs/a/1.JPEG': b'1'})}
    (tmp_path/'archive/theirs.tgz').write_bytes(server.files['theirs.tgz'])
    before = leftovers(tmp_path/'archive')
    for url in (URLs.IMAGENETTE_160, f'{server.url}/theirs.tgz'): assert D.untar_data(url, quiet=True).is_dir()
    assert leftovers(tmp_path/'archive') == before and not [p for p in (tmp_path/'data').glob('.*') if p.suffix != '.lock']


def test_a_download_that_broke_off_waits_for_the_next_call(tmp_path, server):
    server.files, server.cut, server.cuts = {'x.tgz': tgz({'x/1': BLOB})}, 20_000, 1
    with pytest.raises(DataError): D.untar_data(f'{server.url}/x.tgz', base=tmp_path, tries=1, quiet=True)
    assert D.untar_data(f'{server.url}/x.tgz', base=tmp_path, quiet=True)/'1' and server.asked == [None, 'bytes=20000-']
    assert leftovers(tmp_path) == ['.origin.json', '1']


def _get(base, q): q.put(str(nette(base)))


def test_two_processes_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv('EXP_MIRROR', str(make_mirror(tmp_path/'mirror')))
    ctx = multiprocessing.get_context('spawn')
    q = ctx.Queue()
    ps = [ctx.Process(target=_get, args=(tmp_path/'data', q)) for _ in range(2)]
    for p in ps: p.start()
    for p in ps: p.join(500); assert p.exitcode == 0
    assert q.get() == q.get() and leftovers(tmp_path/'data') == ['.origin.json', '1.JPEG', '2.JPEG']


@pytest.mark.parametrize('at', ['shutil.copyfileobj', 'os.replace', 'json.dumps'])
def test_what_a_killed_process_left_is_swept_away(tmp_path, monkeypatch, at):
    monkeypatch.setenv('EXP_MIRROR', str(make_mirror(tmp_path/'mirror')))
    code = (f"import os, signal\nfrom exp import datasets as D\n"
            f"def kill(*a, **kw): os.kill(os.getpid(), signal.SIGKILL)\nD.{at} = kill\nD.untar_data(D.URLs.IMAGENETTE_160, base={str(tmp_path/'data')!r})")
    assert python('-c', code, env={**os.environ, 'PYTHONPATH': str(ROOT)}).returncode == -9
    assert not (tmp_path/'data/imagenette2-160').exists()
    nette(tmp_path/'data')
    assert [p.name for p in (tmp_path/'data').iterdir() if p.suffix != '.lock'] == ['imagenette2-160']


def test_another_address_with_the_same_file_name_is_refused(server, tmp_path):
    for c in 'ab': server.files[f'{c}/train.tgz'] = tgz({f'train/{c}/1.JPEG': c.encode()})
    a, b = (f'{server.url}/{c}/train.tgz' for c in 'ab')
    got = D.untar_data(a, base=tmp_path, quiet=True)
    assert (got/'a/1.JPEG').read_bytes() == b'a' and D.untar_data(a, base=tmp_path) == got
    with pytest.raises(DataError) as e: D.untar_data(b, base=tmp_path)
    assert all(s in str(e.value) for s in (a, b, str(got)))
    assert (D.untar_data(b, base=tmp_path/'other', quiet=True)/'b/1.JPEG').exists()
    for theirs in ('', '[]', '{"from": 1}', None):                     # put there by other hands: taken as it is
        if theirs is None: (got/'.origin.json').unlink()
        else: (got/'.origin.json').write_text(theirs)
        assert D.untar_data(b, base=tmp_path) == got


def test_names_and_places(tmp_path, monkeypatch):
    names = {URLs.IMAGENETTE_160: 'imagenette2-160', URLs.SAMPLE: 'drawn-shapes-160', URLs.MNIST: 'mnist_idx', 'http://x/a.tar.gz?key=/b#c': 'a', 'http://x/b.zip': 'b'}
    assert {u: D.data_name(u) for u in names} == names
    for url in ('http://x/', 'http://x/..', 'http://x/.tgz', '', 'http://x/a\x1b[31m.tgz'):
        with pytest.raises(DataError): D.untar_data(url, base=tmp_path)
    (tmp_path/'file').touch()
    with pytest.raises(DataError, match='FASTAI_HOME'): D.untar_data(URLs.SAMPLE, base=tmp_path/'file/data')
    monkeypatch.setenv('FASTAI_HOME', '~/fast'); monkeypatch.setenv('HOME', str(tmp_path))
    assert D.data_home() == tmp_path/'fast/data'
    monkeypatch.setenv('FASTAI_HOME', '')
    assert D.data_home() == tmp_path/'.fastai/data'
    monkeypatch.delenv('HOME'); monkeypatch.setattr('pwd.getpwuid', lambda uid: {}[uid])             # a user id without a home
    with pytest.raises(DataError, match='FASTAI_HOME'): D.untar_data(URLs.SAMPLE)
    assert str(DataError('a\x1b[31mb\udcff\n\u202ec é')) == 'a\\x1b[31mb\\udcff\n\\u202ec é'


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write anywhere')
def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path/'data').mkdir(mode=0o500)
    with pytest.raises(DataError, match='FASTAI_HOME'): D.untar_data(URLs.SAMPLE, base=tmp_path/'data')


def test_mnist_reads_idx(tmp_path):
    d = tmp_path/'mnist_idx'; d.mkdir()
    x, y = np.arange(3*784).reshape(3, 28, 28).astype(np.uint8), np.array([3, 1, 4], np.uint8)
    for s in ('train', 't10k'):
        (d/f'{s}-images-idx3-ubyte.gz').write_bytes(gzip.compress(struct.pack('>4B3I', 0, 0, 8, 3, 3, 28, 28) + x.tobytes()))
        (d/f'{s}-labels-idx1-ubyte.gz').write_bytes(gzip.compress(struct.pack('>4BI', 0, 0, 8, 1, 3) + y.tobytes()))
    for a, b in (D.mnist(base=tmp_path)[:2], D.mnist(base=tmp_path)[2:]):
        assert a.shape == (3, 784) and np.allclose(a.numpy(), x.reshape(3, -1)/255) and b.tolist() == [3, 1, 4] and str(b.dtype) == 'torch.int64'
    damaged = bytearray(gzip.compress(bytes(1000) + x.tobytes())); damaged[30] ^= 255
    head = struct.pack('>4BI', 0, 0, 8, 1, 3)
    for bad in (b'junk', damaged, gzip.compress(b''), gzip.compress(head + b'12'), gzip.compress(head + b'1234'), gzip.compress(b'\1' + head[1:] + b'123')):
        (d/'t10k-labels-idx1-ubyte.gz').write_bytes(bad)
        with pytest.raises(DataError, match=f't10k-labels.*{d}'): D.mnist(base=tmp_path)


def test_published_digests():
    assert D.published_digest(URLs.MNIST + 'train-labels-idx1-ubyte.gz') == ('md5', 'd53e105ee54ea40749a09fcbcd1e9432')
    assert {len(D.published_digest(url)[1]) for url in (URLs.IMAGENETTE, URLs.IMAGENETTE_320, URLs.IMAGENETTE_160)} == {32} and D.published_digest(URLs.IMAGEWOOF) is None


def test_sample_is_the_same_everywhere_and_in_imagenettes_layout(tmp_path, data_home):
    def tree(d): return {p.relative_to(d).as_posix(): sha(p.read_bytes()) for p in sorted(d.rglob('*.JPEG'))}
    home = data_home/'data'/D.data_name(URLs.SAMPLE)
    one = tree(home)
    assert len(one) == 1100 and {k.split('/')[1] for k in one} == set(D.SAMPLE_CLASSES)
    few = tree(D.make_sample(tmp_path/'few', 2, 1))                    # bytes do not depend on how many are drawn
    assert len(few) == 30 and few.items() <= one.items()
    assert len(set(one.values())) == 1100 and not tree(D.make_sample(tmp_path/'other', 2, 1, seed=1)).items() & one.items()
    sizes = [Image.open(home/k) for k in one]
    assert {min(i.size) for i in sizes} == {160} and len({i.size for i in sizes}) > 20 and any(i.mode == 'L' for i in sizes)


def test_sample_separates_a_good_model_from_a_bad_one(data_home, tmp_path):
    "The lesson's CNN learns it in three epochs, a linear model on the pixels does not: augmentation and better nets have room to show."
    import torch
    import torch.nn.functional as F
    r = python('-m', 'exp.train', '--data', 'sample', '--recipe', 'lesson', '--size', 96, '--epochs', 3, '--seed', 0, '--json', tmp_path/'r.json',
               '--log-dir', tmp_path/'run', env=small_env(data_home))
    assert r.returncode == 0, r.stderr
    cnn = json.loads((tmp_path/'r.json').read_text())['accuracy']

    home = data_home/'data'/D.data_name(URLs.SAMPLE)
    def load(split):
        files = sorted((home/split).glob('*/*.JPEG'))
        x = np.stack([np.asarray(Image.open(f).convert('RGB').resize((32, 32))) for f in files])
        return torch.from_numpy(x).flatten(1).float()/255 - .5, torch.tensor([D.SAMPLE_CLASSES.index(f.parent.name) for f in files])
    (x, y), (xv, yv) = load('train'), load('val')
    torch.manual_seed(0)
    w = torch.zeros(x.shape[1], 10, requires_grad=True)
    opt = torch.optim.Adam([w], lr=1e-3)
    best = 0
    for _ in range(200):                                               # as well as a linear model can, its best moment taken
        opt.zero_grad(); F.cross_entropy(x @ w, y).backward(); opt.step()
        best = max(best, ((xv @ w).argmax(1) == yv).float().mean().item())
    assert .6 <= cnn <= .97 and best < .5, (cnn, best)
