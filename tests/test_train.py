"""`exp-train` as a person meets it: the table, the mistakes, Ctrl-C."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, small_env, wants_sigint
from PIL import Image

from exp import train_imagenette as T
from exp.datasets import DataError


def run(*args, home, **kw):
    return subprocess.run([sys.executable, '-m', 'exp.train_imagenette', *map(str, args)], cwd=ROOT, env=small_env(home), capture_output=True,
                          text=True, timeout=300, **kw)


def folder(tmp_path, train=('a', 'b'), val=('a', 'b'), n=4):
    for s, cs in (('train', train), ('val', val)):
        (tmp_path/s).mkdir(exist_ok=True)
        for c in cs:
            (tmp_path/s/c).mkdir()
            for i in range(n): Image.new('RGB', (20, 30), (i*40, 0, 99)).save(tmp_path/s/c/f'{i}.png')
    return tmp_path


def test_trains_and_says_on_what(data_home, tmp_path):
    r = run('--data', 'sample', '--size', 32, '--epochs', 1, '--json', tmp_path/'r.json', home=data_home)
    assert r.returncode == 0, r.stderr
    first, last = r.stdout.strip().splitlines()[0], r.stdout.strip().splitlines()[-1]
    assert 'sample (drawn)' in first and '800 images' in first
    assert re.fullmatch(r'accuracy 0\.\d{3} · sample \(drawn\) · 300 validation images · 1 epochs · 32 px · seed 42 · \S+ · \d+ s', last)
    j = json.loads((tmp_path/'r.json').read_text())
    assert f"{j['accuracy']:.3f}" in last and j['rows'][-1]['valid_accuracy'] == j['accuracy'] and len(j['classes']) == 10
    assert '\r' not in r.stdout + r.stderr, 'carriage returns fill a log'


def test_same_seed_same_weights(data_home, monkeypatch):
    import torch
    from exp.datasets import URLs, untar_data
    data = T.get_items(untar_data(URLs.SAMPLE), 16).to_databunch(100, seed=3, in_memory=None)
    ws = []
    for seed in (1, 1, 2):
        data.train_dl.epoch = 0                                # the same order of pictures for all three
        ws.append(torch.cat([p.flatten() for p in T.get_training(data, .1, 'cpu', seed).fit(1).model.parameters()]))
    assert ws[0].equal(ws[1]) and not ws[0].equal(ws[2])


@pytest.mark.parametrize('args', [('--size', '0'), ('--epochs', '0'), ('--nonsense',), ('--lr', 'much'), ('--device', 'abacus'), ('--data', '/nowhere/at/all'),
                                  ('--bs', '1'), ('--json', '/nowhere/at/all/x.json')])
def test_a_mistake_is_one_line_and_exit_2(args, data_home):
    r = run('--data', 'sample', *args, home=data_home)
    assert r.returncode == 2 and r.stderr.startswith('exp-train: ') and len(r.stderr.strip().splitlines()) == 1, r.stderr


def test_faults_of_a_folder(tmp_path, data_home):
    def said(d):
        r = run('--data', d, home=data_home)
        assert r.returncode == 2 and len(r.stderr.strip().splitlines()) == 1 and 'Traceback' not in r.stderr
        return r.stderr
    for n in 'abcdef': (tmp_path/n).mkdir()
    assert 'no folder train/' in said(tmp_path/'a')
    assert 'no images' in said(folder(tmp_path/'b', n=0))
    assert 'one class only (a)' in said(folder(tmp_path/'c', train=('a',), val=('a',)))
    assert "label 'z' is none of the 2 of the training set (a, b)" in said(folder(tmp_path/'d', val=('a', 'z')))
    bad = folder(tmp_path/'e')
    (bad/'train/a/0.png').write_text('no picture')
    assert 'train/a/0.png' in said(bad)


@pytest.mark.skipif(os.name != 'posix' or os.geteuid() == 0, reason='root reads everything')
def test_an_unreadable_folder(tmp_path, data_home):
    os.chmod(folder(tmp_path)/'train/a', 0)
    r = run('--data', tmp_path, home=data_home)
    os.chmod(tmp_path/'train/a', 0o755)
    assert r.returncode == 2 and 'cannot be read' in r.stderr


def test_an_unreadable_folder_as_root_too(tmp_path, monkeypatch):
    def scandir(p): raise PermissionError(13, 'Permission denied')
    folder(tmp_path)
    monkeypatch.setattr(os, 'scandir', scandir)
    with pytest.raises(DataError, match='cannot be read: Permission denied'): T.get_items(tmp_path, 16)


def test_dot_folders_are_nobodys_class(tmp_path):
    folder(tmp_path, train=('a', 'b', '.ipynb_checkpoints'), val=('a', 'b'))
    (tmp_path/'train/a/.DS_Store').touch(); (tmp_path/'train/a/notes.txt').touch()
    ll = T.get_items(tmp_path, 16)
    assert ll.train.proc_y.vocab == ['a', 'b'] and len(ll.train) == len(ll.valid) == 8


def test_goes_through_the_data_block(tmp_path, data_home):
    "Uprightness, pixels and the rest are tested there; here, that the command's pictures are those, whole sets in memory or not."
    import torch
    from exp import data_block as D
    items = T.get_items(folder(tmp_path), 16)
    assert isinstance(items, D.SplitData) and items.train.x.tfms[0] is D.make_rgb and items.train.x.tfms[1].size == (16, 16)
    kept, read = (items.to_databunch(4, seed=0, in_memory=None, max_bytes=m, num_workers=0) for m in (1e9, 1))
    assert isinstance(kept.train_ds, D.Dataset) and not isinstance(read.train_ds, D.Dataset)
    for (a, ya), (b, yb) in zip(kept.train_dl, read.train_dl, strict=True): assert a.equal(b) and ya.equal(yb) and a.dtype == torch.uint8
    for name in ('find_images', 'load_image', 'ImageFiles', 'load_all', 'get_data'): assert not hasattr(T, name), f'{name}: the old way'


def test_a_broken_picture_of_a_large_set_is_one_line_too(tmp_path):
    "Too large to keep in memory: the error comes from a worker process, with its file and without its traceback."
    from exp import data_block as D
    d = folder(tmp_path)
    (d/'train/b/2.png').write_text('no picture')
    data = T.get_items(d, 16).to_databunch(4, seed=0, num_workers=1)
    with pytest.raises(DataError) as e: list(data.train_dl)
    assert str(e.value).startswith(str(d/'train/b/2.png')) and len(str(e.value).splitlines()) == 1 and isinstance(data, D.ItemBunch)


def test_ctrl_c_tells_how_far_it_got(data_home):
    p = subprocess.Popen([sys.executable, '-m', 'exp.train_imagenette', '--data', 'sample', '--size', '32', '--epochs', '500'], cwd=ROOT,
                         env=small_env(data_home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=wants_sigint)
    for _ in range(3): p.stdout.readline()                     # first line, heads, one epoch
    p.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, err = p.communicate(timeout=30)
    assert p.returncode == 130 and re.search(r'interrupted after \d+ of 500 epochs, accuracy 0\.\d+', err) and 'Traceback' not in err
    assert time.monotonic() - started < 10
