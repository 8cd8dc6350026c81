"""A folder served with ranges, and a mirror that is filled, served and used."""
import os
import urllib.request

import pytest
from exp.archives import make_mirror, serve
from exp.datasets import MNIST_FILES, DataError, URLs, download, file_digest, untar_data
from test_datasets import GOOD, NETTE, tgz


@pytest.mark.parametrize('rng, status, body', [(None, 200, b'0123456789'), ('bytes=4-', 206, b'456789'), ('bytes=9-', 206, b'9'), ('bytes=0-', 206, b'0123456789'),
                                               ('bytes=10-', 416, None), ('bytes=2-4', 200, b'0123456789'), ('lines=1-', 200, b'0123456789')])
def test_ranges(tmp_path, rng, status, body):
    (tmp_path/'f').write_bytes(b'0123456789')
    with serve(tmp_path) as address:
        request = urllib.request.Request(f'{address}/f', headers={'Range': rng} if rng else {})
        try: r = urllib.request.urlopen(request)
        except urllib.error.HTTPError as e: r = e
        assert r.status == status and (body is None or (r.read() == body and int(r.headers['Content-Length']) == len(body)))
        (tmp_path/'secret').write_bytes(b'')
        with pytest.raises(DataError): download(f'{address}/../{tmp_path.name}x', tmp_path/'g', tries=1)
        (tmp_path/'g.part').write_bytes(b'0123')
        assert download(f'{address}/f', tmp_path/'g').read_bytes() == b'0123456789'


def test_a_mirror_is_filled_and_used(tmp_path, monkeypatch):
    home, stick = tmp_path/'home', tmp_path/'stick'
    home.mkdir()
    for name in MNIST_FILES: (home/name).write_bytes(name.encode())
    (home/NETTE).write_bytes(GOOD)
    (home/'SHA256SUMS').write_text(''.join(f'{file_digest(f)}  {f.name}\n' for f in home.iterdir()))
    monkeypatch.setenv('EXP_MIRROR', str(home))
    make_mirror(stick, URLs.IMAGENETTE_160)
    for _ in range(2): assert make_mirror(stick, URLs.MNIST) == stick
    assert {f.name for f in stick.iterdir()} == {'SHA256SUMS', NETTE, *MNIST_FILES} and len((stick/'SHA256SUMS').read_text().splitlines()) == 5
    (home/'own.tgz').write_bytes(tgz({'own/1': b'1'}))
    with serve(home) as address:
        make_mirror(stick, f'{address}/own.tgz')
        (home/'own.tgz').write_bytes(tgz({'own/1': b'another'}))
        (stick/'own.tgz').unlink()
        make_mirror(stick, f'{address}/own.tgz')                       # a new one has a new line in the old one's place
    assert (stick/'SHA256SUMS').read_text().count('own.tgz') == 1
    old = f'\ufeff{"0"*64} *./own.tgz\n'.encode() + b'# caf\xe9\n'          # by another hand: it is read, and its old digest goes
    (stick/'SHA256SUMS').write_bytes(old + (stick/'SHA256SUMS').read_bytes())
    with serve(home) as address: make_mirror(stick, f'{address}/own.tgz')
    assert (stick/'SHA256SUMS').read_text().count('own.tgz') == 1
    with serve(stick) as address:
        monkeypatch.setenv('EXP_MIRROR', address)
        assert (untar_data(URLs.IMAGENETTE_160, base=tmp_path/'data', quiet=True)/'train/a/1.JPEG').exists()
        assert sorted(f for f in os.listdir(untar_data(URLs.MNIST, base=tmp_path/'data', quiet=True)) if f[0] != '.') == sorted(MNIST_FILES)
        assert (untar_data('http://x.invalid/own.tgz', base=tmp_path/'data', quiet=True)/'1').read_bytes() == b'another'
