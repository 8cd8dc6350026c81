"""The command `exp-predict`: a line for each picture, one complaint for each bad file, and an exit status that a script can go by."""
import io
import json
import os
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, small_env, wants_sigint
from PIL import Image
from trained import COLOURS, NAMES, learner, net, norm, picture, pictures

from exp import predict as P
from exp.data_block import ImageList, ResizeFixed, SplitData, grandparent_splitter, label_by_func, make_rgb, parent_labeler, to_byte_tensor
from exp.datasets import readable
from exp.export_models import export
from exp.files import write_file
from exp.learner import Learner
from exp.tables import default_processor


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return pictures(tmp_path_factory.mktemp('pictures'))


@pytest.fixture(scope='module')
def learn(folder): return learner(folder)


@pytest.fixture(scope='module')
def model(learn, tmp_path_factory): return export(learn, tmp_path_factory.mktemp('model')/'m.pt')


@pytest.fixture
def run(capsys):
    def main(*args):
        try: status = P.main([*map(str, args)])
        except SystemExit as e: status = e.code
        return status, *capsys.readouterr()
    return main


def test_predicts(folder, learn, model, tmp_path, data_home):
    big, broken, none, r = (tmp_path/n for n in ('my photo: 1.png', 'broken.jpg', 'none.png', 'r.json'))
    picture(COLOURS['zebra'], 99, (300, 200)).save(big)
    broken.write_bytes(b'\xff\xd8\xff nothing')
    args = model, big, folder/'val', broken, none, f'{folder}/train/zebra/[01].png', '--json', r, '--bs', 4, '--device', 'cpu'
    p = subprocess.run([sys.executable, '-m', 'exp.predict', *map(str, args)], env={**small_env(data_home), 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, timeout=400)
    rows, errors, j = [l.split('\t') for l in p.stdout.splitlines()], p.stderr.splitlines(), json.loads(r.read_text())
    assert p.returncode == 1 and len(rows) == 1 + 15 + 2 and len(errors) == 2 and all(e.startswith('exp-predict: ') for e in errors)
    assert str(broken) in errors[0] and str(none) in errors[1]
    assert [row[0] for row in rows[:2] + rows[-2:]] == [str(big), str(folder/'val/n01440764/0.png'), str(folder/'train/zebra/0.png'), str(folder/'train/zebra/1.png')]
    for (f, name, p), q in zip(rows, j['predictions']):
        label, probs = learn.predict(f)
        top, = q['top']
        assert name == readable(label) == top['name'] and top['class'] == label and abs(float(p) - probs.max().item()) <= 5.1e-5
        assert q['file'] == f and f'{top["probability"]:.4f}' == p
    assert {*j['failed']} == {str(broken), str(none)} and j['model'] == str(model)


def test_all_well_is_0_and_top_k(folder, model, run):
    f = folder/'val/zebra/0.png'
    assert run(model, f)[0] == 0
    status, out, err = run(model, f, '--top', 9)
    name, *pairs = out.rstrip('\n').split('\t')
    probs = [float(p) for p in pairs[1::2]]
    assert status == 0 and not err and {*pairs[::2]} == {*NAMES} and probs == sorted(probs, reverse=True) and abs(sum(probs) - 1) < 2e-4
    assert run(model, '--help')[0] == 0


def no_models(d, model):
    "Files that are no model, or none for pictures."
    good = model.read_bytes()
    for name, data in (('cut.pt', good[:len(good)//2]), ('empty.pt', b''), ('poem.pt', b'Shall I compare thee')): (d/name).write_bytes(data)
    torch.save({'a': torch.ones(1)}, d/'foreign.pt')

    class Bomb:
        def __reduce__(self): return os.mkdir, (str(d/'you_were_here'),)
    torch.save({'format': 'exp.checkpoints', 'version': 1, 'kind': 'export', 'layers': Bomb()}, d/'hostile.pt')
    none = {'parameters': {}, 'buffers': {}, 'children': {}}
    flat = {'object': 'torch.nn.Flatten', 'vars': {'start_dim': 1, 'end_dim': -1}, **none}
    write_file(d/'nodata.pt', 'export', {'layers': flat, 'model': None, 'data': None, 'cbs': [], 'c_in': 3, 'c_out': 3})
    senseless = {**torch.load(model, weights_only=True), 'layers': {'object': 'torch.nn.Linear', 'vars': {'in_features': 4, 'out_features': 4}, **none}}
    torch.save(senseless, d/'senseless.pt')


@pytest.mark.parametrize('name', ['cut.pt', 'empty.pt', 'poem.pt', 'foreign.pt', 'hostile.pt', 'none.pt', 'nodata.pt', 'senseless.pt'])
def test_a_file_that_is_no_model_is_2(name, folder, model, tmp_path, run):
    no_models(tmp_path, model)
    status, out, err = run(tmp_path/name, folder/'val/zebra/0.png', '--json', tmp_path/'r.json')
    assert status == 2 and not out and err.startswith('exp-predict: ') and len(err.splitlines()) == 1 and name in err
    assert not (tmp_path/'you_were_here').exists()


@pytest.mark.parametrize('args, word', [('', 'FILE'), ('x.png --top 0', '0'), ('x.png --nonsense', '--nonsense'), ('x.png --device abacus', 'abacus'),
                                        ('x.png --json /nowhere/at/all/x.json', '/nowhere/at/all/x.json'), ('x.png --bs many', 'many')])
def test_a_mistake_in_the_options_is_2(args, word, model, run):
    status, out, err = run(model, *args.split())
    assert status == 2 and not out and err.startswith('exp-predict: ') and word in err and len(err.splitlines()) == 1


def test_folders_patterns_and_a_batch_all_broken(tmp_path, folder, model, run):
    (tmp_path/'empty').mkdir()
    (tmp_path/'odd[1].png').write_bytes((folder/'val/zebra/0.png').read_bytes())
    status, out, err = run(model, tmp_path/'empty', tmp_path/'*.gif', tmp_path/'odd[1].png', tmp_path/'od*')
    assert status == 1 and out.count('odd[1].png') == 2, 'a name with brackets that exists is that file'
    assert 'empty' in err and '*.gif' in err and len(err.splitlines()) == 2
    for i in range(3): (tmp_path/f'empty/{i}.png').write_text('no')
    status, out, err = run(model, tmp_path/'empty', folder/'val/zebra', '--bs', 3)
    assert status == 1 and len(out.splitlines()) == 5 and len(err.splitlines()) == 3


def test_what_is_no_regular_file_and_what_is_left_out(tmp_path, folder, model, run, monkeypatch):
    "A pipe would be waited for; /dev/zero, and a terabyte of nothing, be read whole."
    monkeypatch.setenv('HOME', str(tmp_path))
    d = tmp_path/'d'
    d.mkdir()
    for n in ('a.jpg', 'notes.txt', 'raw.dng2'): (d/n).touch()
    (d/'a.png').write_bytes((folder/'val/zebra/0.png').read_bytes())
    os.mkfifo(d/'b.jpg')
    (d/'c.jpg').symlink_to('/dev/zero')
    os.truncate(d/'a.jpg', 1 << 40)
    status, out, err = run(model, '~/d', d/'b.jpg', '--json', '~/r.json')
    j = json.loads((tmp_path/'r.json').read_text())
    assert status == 1 and len(out.splitlines()) == 1 and {str(d/'a.jpg')} <= {*j['failed']} and j['left_out'] == {str(d): 2}
    assert '2 files' in err and str(d/'b.jpg') in j['failed']


def test_a_pipe_hears_the_whole_json(tmp_path, folder, model, run):
    "It was opened and closed before the predicting, and its reader left."
    import threading
    os.mkfifo(tmp_path/'pipe')
    heard = []
    t = threading.Thread(target=lambda: heard.append((tmp_path/'pipe').read_text()), daemon=True)
    t.start()
    assert run(model, folder/'val/zebra/0.png', '--json', tmp_path/'pipe')[0] == 0
    t.join(60)
    assert json.loads(heard[0])['predictions']


@pytest.mark.parametrize('e, status', [(MemoryError(), 4), (RuntimeError('CUDA out of memory. Tried to allocate 2 GiB'), 4), (RuntimeError('shapes'), 2)])
def test_the_machine_and_the_model_have_their_own_status(e, status, folder, model, run, monkeypatch):
    def fails(*args): raise e
    real, P.scores_of = P.scores_of, fails
    try: got, out, err = run(model, folder/'val/zebra/0.png')
    finally: P.scores_of = real
    assert got == status and len(err.splitlines()) == 1
    monkeypatch.setattr(P, 'short_way', lambda x: x)
    monkeypatch.setattr('exp.data_block.ImageList.one', lambda self, f: fails())
    assert run(model, folder/'val/zebra/0.png')[0] == 1                                   # a picture that does not fit costs itself


def test_names_no_terminal_can_show(tmp_path, folder, model, monkeypatch):
    "A new line, a tab, an escape sequence, bytes that are no UTF-8: still a line each, on an ASCII terminal too, and the json has the true names."
    names = [os.path.join(os.fsencode(tmp_path), n) for n in (b'new\nline.png', b'tab\there.png', b'\x1b[31mred.png', 'grün.png'.encode(), b'\xff\xfe.png')]
    for n in names: open(n, 'wb').write((folder/'val/zebra/0.png').read_bytes())
    (tmp_path/'bad\n.png').touch()
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding='ascii') for _ in range(2))
    with monkeypatch.context() as m:
        m.setattr(sys, 'stdout', out)
        m.setattr(sys, 'stderr', err)
        status = P.main([str(model), str(tmp_path), '--json', str(tmp_path/'r.json')])
    said, complained = (t.buffer.getvalue().decode() for t in (out, err))
    assert status == 1 and len(said.splitlines()) == 5 and all(len(l.split('\t')) == 3 for l in said.splitlines()) and '\x1b' not in said and len(complained.splitlines()) == 1
    assert {os.fsencode(q['file']) for q in json.loads((tmp_path/'r.json').read_text())['predictions']} == {*names}


def test_pictures_of_several_shapes_and_one_that_fails(tmp_path, folder):
    "No resize: they go one by one, and one that a transform cannot take does not take the others with it."
    learn = learner(folder, 0)
    learn.data.source.valid.x.tfms = [make_rgb, to_byte_tensor]
    files = [str(tmp_path/n) for n in ('a.png', 'deep.png', 'b.png')]
    for f, im in zip(files, (picture((1, 2, 3), 0, (16, 16)), Image.fromarray(np.zeros((16, 16), np.uint16)), picture((200, 2, 3), 1, (20, 24)))): im.save(f)
    (a, p, _), (deep, none, why), (b, q, _) = P.predict_files(learn, files)
    assert [a, deep, b] == files and none is None and 'make_rgb' in why
    for f, scores in ((a, p), (b, q)): assert torch.allclose(scores.softmax(0), learn.predict(f)[1], atol=1e-6)


def test_no_numbers_are_a_failure(folder, tmp_path, run):
    learn = learner(folder, 0)
    learn.model[-1].bias.data[1] = float('nan')
    status, out, err = run(export(learn, tmp_path/'nan.pt'), folder/'val/zebra/0.png', '--json', tmp_path/'r.json')
    assert status == 1 and not out and 'NaN' in err and json.loads((tmp_path/'r.json').read_text())['predictions'] == []


def test_several_labels_and_values(folder, tmp_path, run):
    il = ImageList.from_files(folder, tfms=[make_rgb, ResizeFixed(16), to_byte_tensor])
    sd, f = SplitData.split_by_func(il, partial(grandparent_splitter, valid_name='val')), folder/'val/zebra/0.png'
    def says(label, loss, bias):
        data = label_by_func(sd, label, proc_y=default_processor([*map(label, sd.train.items)])).to_databunch(8, num_workers=0, seed=0)
        learn = Learner(net(len(bias)), data, loss, cbs=norm())
        learn.model[-1].weight.data.zero_()
        learn.model[-1].bias.data = torch.tensor(bias)
        return run(export(learn, tmp_path/'a.pt'), f)[1]
    many = says(lambda fn: [parent_labeler(fn), 'any'], F.binary_cross_entropy_with_logits, [3., -3., -3., 2.])
    assert many == f'{f}\tany\t{1/(1 + np.exp(-3)):.4f}\tzebra\t{1/(1 + np.exp(-2)):.4f}\n'
    assert says(lambda fn: float(len(parent_labeler(fn))), F.mse_loss, [2.5]) == f'{f}\t2.5\n'


@pytest.mark.skipif(os.name != 'posix', reason='signals and pipes of POSIX')
def test_ctrl_c_and_a_reader_who_leaves(folder, model, data_home):
    many = [str(folder/'val/zebra/0.png')]*4000
    def start(): return subprocess.Popen([sys.executable, '-m', 'exp.predict', str(model), *many, '--bs', '1'], cwd=ROOT, env=small_env(data_home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=wants_sigint)
    p = start()
    p.stdout.readline()
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=400)
    assert p.returncode == 130 and 'Traceback' not in err and len(err.splitlines()) == 1, err
    p = start()
    p.stdout.readline()
    p.stdout.close()
    err = p.stderr.read()
    assert p.wait(60) == 141 and not err, err


def test_what_there_is_stays_after_ctrl_c(tmp_path, folder, learn, model, run, monkeypatch):
    "The json used to be an empty file after an interruption, and after a model that is not there."
    real = P.predict_files

    def interrupted(*args):
        for i, row in enumerate(real(*args)):
            if i == 3: raise KeyboardInterrupt
            yield row
    monkeypatch.setattr(P, 'predict_files', interrupted)
    status, out, err = run(model, folder/'val', tmp_path/'none.png', '--json', tmp_path/'r.json')
    j = json.loads((tmp_path/'r.json').read_text())
    assert status == 130 and [q['file'] for q in j['predictions']] == [l.split('\t')[0] for l in out.splitlines()] and len(j['predictions']) == 3
    assert run(tmp_path/'nope.pt', folder/'val', '--json', tmp_path/'new.json')[0] == 2 and not (tmp_path/'new.json').exists()
