"""exp.pictures: pictures of every kind and size, beside Pillow and with a stand-in for the fast decoder."""
import io
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from PIL import Image

from exp import pictures as P
from exp.data_block import ImageList, get_files
from exp.datasets import DataError, URLs, untar_data
from exp.pictures import any_rgb, open_picture, verify_images, without


@pytest.fixture(scope='module')
def files(data_home): return get_files(untar_data(URLs.SAMPLE, base=data_home/'data'), recurse=True)


@pytest.fixture
def simplejpeg(monkeypatch):
    "A stand-in for the package: Pillow's own pictures, `off` levels brighter."
    def install(off):
        m = type(sys)('simplejpeg')
        def load(data): return Image.open(io.BytesIO(data))
        m.decode_jpeg_header = lambda data: (*load(data).size[::-1], 'Gray' if load(data).mode == 'L' else 'YCbCr', '420')
        m.decode_jpeg = lambda data, space='RGB': np.clip(np.asarray(load(data), int).reshape(*load(data).size[::-1], -1) + off, 0, 255).astype(np.uint8)
        monkeypatch.setitem(sys.modules, 'simplejpeg', m)
        P.fast_decoder.cache_clear()
    yield install
    P.fast_decoder.cache_clear()


def fast(fn, **kw): return open_picture(fn, fast=True, **kw)


# ------------------------------------------------------------------ the fast decoder
def test_a_faster_decoder_only_where_it_agrees(simplejpeg, files, monkeypatch):
    simplejpeg(1)
    assert P.fast_decoder() and {fast(f).mode for f in files[::7]} == {'RGB', 'L'}
    assert abs(np.asarray(fast(files[0]), int) - np.asarray(open_picture(files[0]), int)).max() == 1, 'it was not used'
    for way in (open_picture, fast): pytest.raises(DataError, way, files[0], max_pixels=1000)
    sys.modules['simplejpeg'].decode_jpeg_header = lambda data: (10**5, 10**5, 'YCbCr', '420')
    assert np.array_equal(fast(files[0]), open_picture(files[0])), "beyond the limit it is Pillow's to refuse"
    for other in (partial(simplejpeg, 5), partial(monkeypatch.setitem, sys.modules, 'simplejpeg', None)):       # another picture; not installed
        other()
        P.fast_decoder.cache_clear()
        assert P.fast_decoder() is None and np.array_equal(fast(files[0]), open_picture(files[0]))


def test_the_real_one_gives_the_same_pictures(files):
    pytest.importorskip('simplejpeg')
    P.fast_decoder.cache_clear()
    for f in files[::60]: assert abs(np.asarray(fast(f), int) - np.asarray(open_picture(f), int)).mean() <= 2


XMP = (b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
       b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>')


def test_what_pillow_turns_is_turned(tmp_path, simplejpeg):
    simplejpeg(1)
    exif = Image.Exif()
    exif[0x112] = 6
    for name, kw in (('exif', dict(exif=exif)), ('xmp', dict(xmp=XMP))): Image.new('RGB', (40, 20)).save(tmp_path/f'{name}.jpg', **kw)
    data = (tmp_path/'exif.jpg').read_bytes()
    (tmp_path/'late.jpg').write_bytes(data[:2] + (b'\xff\xed' + (65000).to_bytes(2, 'big') + bytes(64998))*2 + data[2:])         # behind 130 KB of other segments
    for f in tmp_path.iterdir(): assert fast(f).size == open_picture(f).size == (20, 40), f
    exif[0x112], exif[0x10f] = 1, 'a camera'
    Image.new('RGB', (40, 20)).save(tmp_path/'up.jpg', exif=exif)
    assert np.asarray(fast(tmp_path/'up.jpg')).max() == 1, 'EXIF that turns nothing goes the fast way'
    Image.new('RGB', (40, 20)).save(tmp_path/'a.png', exif=b'Exif\0\0garbage, no EXIF')
    assert open_picture(tmp_path/'a.png').size == (40, 20)


def test_open_files_and_broken_ones(simplejpeg, tmp_path):
    simplejpeg(1)
    good = io.BytesIO()
    Image.new('RGB', (40, 30)).save(good, 'JPEG')
    for way in (open_picture, fast):
        assert way(good).size == (40, 30)
        for bad in (b'', b'no picture', good.getvalue()[:300]):
            (tmp_path/'a.jpg').write_bytes(bad)
            for f in (io.BytesIO(bad), tmp_path/'a.jpg'): pytest.raises(DataError, way, f)
        with pytest.raises(DataError, match='nope.jpg'): way(tmp_path/'nope.jpg')


# ------------------------------------------------------------------ large pictures
def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path, simplejpeg):
    simplejpeg(60)
    y, x = np.mgrid[:960, :1280]
    Image.fromarray(np.stack([x//5 % 256, y//4 % 256, (x + y)//9 % 256], -1).astype(np.uint8)).save(tmp_path/'a.jpg', quality=95)
    whole = open_picture(tmp_path/'a.jpg')
    for way in (open_picture, fast):
        small = way(tmp_path/'a.jpg', draft=64)
        a, b = (np.asarray(im.resize((32, 32), Image.Resampling.BILINEAR), float) for im in (small, whole))
        assert 64 <= min(small.size) < 240 and whole.size == (1280, 960) and np.abs(a - b).mean() < 2
    assert open_picture(tmp_path/'a.jpg', draft=1000).size == (1280, 960), 'never below the draft'


@pytest.mark.parametrize('kind', 'png jpg bmp gif webp ppm tif jp2'.split())
def test_the_limit_is_raised_for_every_kind_and_for_one_picture(kind, tmp_path, monkeypatch):
    "Some are asked for their size when they are opened, some once more when they are decoded."
    Image.new('RGB', (40, 30)).save(f := tmp_path/f'a.{kind}')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 500)
    with pytest.raises(DataError, match=f.name): open_picture(f)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert open_picture(f, max_pixels=2000).size == (40, 30) and Image.MAX_IMAGE_PIXELS == 500


def test_pictures_under_a_limit_of_their_own_are_decoded_side_by_side(tmp_path, monkeypatch):
    from PIL import PngImagePlugin
    for n in 'ab': Image.new('RGB', (40, 30)).save(tmp_path/f'{n}.png')
    both, load, limits, before = threading.Barrier(2, timeout=10), PngImagePlugin.PngImageFile.load, [], Image.MAX_IMAGE_PIXELS

    def meet(self): both.wait(); limits.append(Image.MAX_IMAGE_PIXELS); return load(self)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, 'load', meet)
    with ThreadPoolExecutor(2) as pool: sizes = list(pool.map(lambda n: open_picture(tmp_path/f'{n}.png', max_pixels=10**4).size, 'ab'))
    assert sizes == [(40, 30)]*2 and {*limits} == {before}, 'other lists do not see the limit while these decode'


# ------------------------------------------------------------------ all kinds to bytes
@pytest.mark.parametrize('a, want', [
    (np.array([[0, 128*256]], np.uint16), [0, 128]), (np.array([[0, 255]], np.int32), [0, 255]), (np.array([[0, 128*256]], np.int32), [0, 128]),
    (np.array([[0, .5, 1.001]], np.float32), [0, 127, 255]), (np.array([[-.1, .5, np.nan, np.inf, -np.inf]], np.float32), [0, 127, 0, 255, 0]),
    (np.array([[0, 127.5, 255.4]], np.float32), [0, 127, 255]), (np.array([[0, 65535.]], np.float32), [0, 255]), (np.array([[np.nan]], np.float32), [0]),
    (np.array([[7, 9]], np.uint8), [7, 9])], ids=str)
def test_more_than_a_byte_a_colour(a, want):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        im = any_rgb(Image.fromarray(a))
    assert im.mode == 'RGB' and np.asarray(im)[0, :, 1].tolist() == want


def test_a_transparent_value_of_16_bits_is_white(tmp_path):
    deep = np.full((4, 4), 128*256, np.uint16)
    deep[0, 0] = 77
    Image.fromarray(deep).save(tmp_path/'t.png', transparency=77)
    assert np.asarray(any_rgb(open_picture(tmp_path/'t.png')))[:2, 0, 0].tolist() == [255, 128]


# ------------------------------------------------------------------ broken files
def test_verify_lists_and_never_deletes(tmp_path):
    for i in range(450): Image.new('RGB', (8, 8)).save(tmp_path/f'{i:03d}.png')
    (d := tmp_path/'part 1: cats').mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60), dtype=np.uint8)).save(whole := io.BytesIO(), 'PNG')
    for name, content in (('a: b.png', b'no picture'), ('x\ny.png', b''), ('cut.png', whole.getvalue()[:1000])): (d/name).write_bytes(content)
    seen, il = [], ImageList.from_files(tmp_path, tfms=any_rgb, open=partial(open_picture, max_pixels=10**6))
    bad = verify_images(il, progress=lambda *n: seen.append(n))
    assert sorted(f.name for f in bad) == ['a: b.png', 'cut.png', 'x\ny.png'] and bad[d/'x\ny.png'] and str(d) not in ''.join(map(str, bad.values()))
    assert seen[-1] == (453, 453) and len(seen) == 3 and len([*d.iterdir()]) == 3
    good = without(il, bad)
    assert len(good) == 450 and len(il) == 453 and good.tfms == il.tfms and not verify_images(good, open=il.open, progress=None)


def test_progress_on_a_terminal_only():
    class Terminal(io.StringIO):
        def isatty(self): return True
    term, log = Terminal(), io.StringIO()
    for out in (term, log): P.text_bar(200, 1000, out); P.text_bar(1000, 1000, out)
    assert '200' in term.getvalue() and term.getvalue().endswith(' \r') and log.getvalue() == ''
