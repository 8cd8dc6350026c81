"""Models that travel: they predict elsewhere as they did here, and a file can name nothing but what may travel."""
import importlib
import os
import subprocess
import sys
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, small_env
from PIL import Image
from test_checkpoints import Half, make_pictures
from torch import nn

from exp.batchnorm import BatchNorm
from exp.callbacks import AvgStatsCallback, BatchTransformXCallback
from exp.convnets import GeneralRelu, Lambda, conv_relu, flatten
from exp.data_block import ImageList, NormalizeBytes, ResizeFixed, SplitData, grandparent_splitter, label_by_func, make_rgb, parent_labeler, to_byte_tensor
from exp.datasets import DataError
from exp.export_models import TRAVELS, export, find, load_learner, load_safetensors, pack, register, save_safetensors, unpack
from exp.files import CheckpointError, plain
from exp.learner import Learner
from exp.optimizers import sgd_mom_opt
from exp.pictures import any_rgb, open_picture


def learner(tmp_path, norm=BatchNorm, seed=0):
    make_pictures(tmp_path/'pictures')
    il = ImageList.from_files(tmp_path/'pictures', tfms=[make_rgb, ResizeFixed(12), to_byte_tensor])
    data = label_by_func(SplitData.split_by_func(il, grandparent_splitter), parent_labeler).to_databunch(8, seed=0, num_workers=0)
    torch.manual_seed(seed)
    model = nn.Sequential(conv_relu(3, 4, leak=.1, sub=.2), norm(4), nn.Conv2d(4, 4, 1), GeneralRelu(), nn.AdaptiveAvgPool2d(1), Lambda(flatten), nn.Dropout(.5), nn.Linear(4, 2))
    return Learner(model, data, F.cross_entropy, sgd_mom_opt, lr=.05, cbs=[BatchTransformXCallback(NormalizeBytes([.5]*3, [.3]*3)), AvgStatsCallback(silent=True)])


class Own(nn.Module):
    def forward(self, x): return x


def test_it_predicts_the_same_elsewhere(tmp_path, data_home):
    said, files = '', []
    for norm in (BatchNorm, nn.BatchNorm2d):
        learn = learner(tmp_path/norm.__name__, norm).fit(1)
        path, fn = export(learn, tmp_path/f'{norm.__name__}.pt'), learn.data.valid_ds.x.items[0]
        label, probs = learn.predict(fn)
        said, files = said + f"{label} {probs.tolist()} ['a', 'b']\n", [*files, (str(path), str(fn))]
        there = load_learner(path)
        assert there.get_preds(learn.data.valid_dl)[0].equal(learn.get_preds()[0])
        assert there.predict(Image.open(fn))[1].equal(probs) and not there.model.training
    code = f'from exp.export_models import load_learner\nfor path, fn in {files!r}: l = load_learner(path); r = l.predict(fn); print(r[0], r[1].tolist(), l.data.classes)'
    p = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env={**small_env(data_home), 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    assert p.stdout == said, p.stderr


def renamed(o, old, new):
    "A file's plain data with other names in it."
    if isinstance(o, dict): return {k: renamed(v, old, new) for k, v in o.items()}
    if isinstance(o, (list, tuple)): return type(o)(renamed(v, old, new) for v in o)
    return o.replace(old, new) if isinstance(o, str) else o


def test_the_opener_travels_and_older_files_are_read(tmp_path):
    learn = learner(tmp_path).fit(1)
    fn = learn.data.source.valid.x.items[0]
    learn.data.source.valid.x.open = partial(open_picture, max_pixels=9, fast=True)
    there = load_learner(export(learn, tmp_path/'e.pt')).data.source.valid.x
    assert there.open.func is open_picture and there.open.keywords == {'max_pixels': 9, 'fast': True}
    with pytest.raises(DataError): there.one(fn)
    learn.data.source.valid.x.open = open_picture
    d = torch.load(export(learn, tmp_path/'e.pt'), weights_only=True)
    data = {k: v for k, v in d['data'].items() if k not in ('open', 'options')}
    torch.save(renamed({**d, 'data': {**data, 'max_pixels': None}}, 'exp.items.', 'exp.data_block.'), tmp_path/'old.pt')
    old = load_learner(tmp_path/'old.pt')
    assert old.predict(fn)[1].equal(learn.predict(fn)[1]) and old.data.source.valid.x.tfms[0] is any_rgb
    learn.data.source.valid.x.open = lambda fn: open_picture(fn)
    with pytest.raises(CheckpointError, match='what opens a picture'): export(learn, tmp_path/'f.pt')


def test_a_model_alone_and_data_without_words(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    learn = learner(tmp_path)
    learn.data = types.SimpleNamespace(train_dl=None, valid_dl=None, c_in=3, c_out=2)
    export(learn, '~/m.pt')
    x = torch.randint(0, 256, (3, 12, 12), dtype=torch.uint8)
    label, probs = load_learner('~/m.pt').predict(x)
    assert label in (0, 1) and probs.sum().item() == pytest.approx(1)


@pytest.mark.parametrize('module,names', TRAVELS.items())
def test_all_that_may_travel_exists(module, names):
    for n in names.split(): assert getattr(importlib.import_module(module), n) is find(f'{module}.{n}')


def blur(im): return im
blur._order = 12


@pytest.mark.parametrize('change,named', [(lambda l: setattr(l.data.source.valid.x, 'tfms', [make_rgb, blur]), 'blur'), (lambda l: l.model.add_module('own', Own()), 'model.own'),
                                          (lambda l: setattr(l.model[5], 'func', lambda x: x), 'model.5.func'), (lambda l: l.add_cbs(Half(1)), 'Half'),
                                          (lambda l: l.model.add_module('lstm', nn.LSTM(2, 2)), 'model.lstm')])
def test_what_cannot_travel_is_named(change, named, tmp_path):
    learn = learner(tmp_path)
    change(learn)
    with pytest.raises(CheckpointError, match=named): export(learn, tmp_path/'e.pt')
    assert not (tmp_path/'e.pt').exists()


def test_without_layers(tmp_path):
    learn, other = learner(tmp_path), learner(tmp_path, seed=1)
    for l in (learn, other): l.model.add_module('own', Own()); l.add_cbs(Half(1))
    path = export(learn, tmp_path/'f.pt', model=False, cbs=[])
    x = torch.rand(2, 3, 12, 12)
    assert load_learner(path, other.model).model(x).equal(learn.model.eval()(x))
    for model in (None, nn.Linear(2, 2)):
        with pytest.raises(CheckpointError): load_learner(path, model)


def test_what_you_register_travels_also_when_its_cell_runs_again(tmp_path):
    learn = learner(tmp_path)
    space = {'nn': nn, 'register': register, '__name__': 'cell'}
    cell = 'class Scale(nn.Module):\n    def __init__(self, by): super().__init__(); self.by = by\n    def forward(self, x): return x*self.by\nregister(Scale)'
    exec(cell, space)
    learn.model.add_module('scale', space['Scale'](3.))
    exec(cell, space)                                                        # the layer in the model is of the class before
    there = load_learner(export(learn, tmp_path/'e.pt'))
    assert type(there.model.scale) is space['Scale'] and there.model.scale.by == 3.
    class Scale(nn.Module): pass
    Scale.__module__ = 'cell'; Scale.__qualname__ = 'Scale'
    with pytest.raises(CheckpointError): pack(Scale())                       # the name alone does not do


def test_pack_keeps_what_a_layer_is():
    "Every attribute: stride, groups, padding mode, buffers that are not saved, frozen or not, a layer of one's own."
    @register
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.by, self.none = (2., [3], {'k': None}), nn.Identity()
            self.register_buffer('b', torch.ones(2), persistent=False)
            self.register_parameter('p', None)
        def forward(self, x): return self.none(x*self.by[0] + self.b)
    net = nn.Sequential(nn.Conv1d(2, 4, 3, stride=2, groups=2, padding=1, padding_mode='circular', bias=False), nn.GroupNorm(2, 4), nn.GELU('tanh'), nn.Linear(4, 2), Scale()).eval()
    x = torch.randn(3, 2, 8)
    again = unpack(plain(pack(net)))
    assert again(x).equal(net(x)) and str(again) == str(net) and again.state_dict().keys() == net.state_dict().keys()
    assert not again.training and again[4].by == net[4].by and type(again[4].by) is tuple and again[4].p is None


# ---------------------------------------------------------------- hostile


NAMES = ['os.system', 'builtins.eval', 'exp.datasets.untar_data', 'exp.files.write_atomic', 'exp.data_block.os', 'torch.nn.modules.os', 'torch.nn.init', 'torch.nn.functional',
         'torch.nn.Module.forward', 'torch.nn.', 'torch.nn', '', '.', 'exp.data_block.', 'exp.data_block.make_rgb.__globals__', 'antigravity.x', 5, None, ['os.system']]


@pytest.mark.parametrize('name', NAMES, ids=str)
def test_a_file_can_name_nothing_else(name, tmp_path):
    d, loaded = torch.load(export(learner(tmp_path), tmp_path/'e.pt'), weights_only=True), set(sys.modules)
    for where in ({'data': {**d['data'], 'tfms': [{'name': name}]}}, {'data': {**d['data'], 'list': name}}, {'layers': {**d['layers'], 'object': name}},
                  {'cbs': [{'object': name, 'vars': {}}]}, {'layers': {**d['layers'], 'vars': {'forward': {'name': name}}}}):
        torch.save({**d, **where}, tmp_path/'x.pt')
        with pytest.raises(CheckpointError): load_learner(tmp_path/'x.pt')
    assert 'antigravity' not in set(sys.modules) - loaded


def test_no_constructor_runs_and_no_table_is_set(tmp_path):
    ran = []
    @register
    class Loud(nn.Module):
        def __init__(self): super().__init__(); ran.append('init')
        def __setstate__(self, s): ran.append('setstate')
        def forward(self, x): return x
    r = pack(Loud())
    ran.clear()
    assert isinstance(unpack(r), Loud) and not ran
    for k in ('_modules', '_parameters', '_forward_hooks', '_buffers', '_backward_hooks'):
        with pytest.raises(CheckpointError, match=k): unpack({**r, 'vars': {k: 5}})


@pytest.mark.parametrize('bad', [{'layers': {'object': 'torch.nn.Linear'}}, {'layers': 3}, {'layers': None}, {'data': {}}, {'data': 'x'}, {'cbs': None}, {'cbs': [3]}, {'cbs': 'abc'},
                                 {'c_in': 'x'}, {'layers': {'object': 'exp.data_block.make_rgb', 'vars': {}}}, {'layers': {'object': 'torch.nn.Linear', 'vars': 5}},
                                 {'layers': {'dict': []}}, {'layers': {'name': 'torch.nn.Linear'}}, {'kind': 'weights'}], ids=str)
def test_broken_descriptions_end_in_a_sentence(bad, tmp_path):
    d = torch.load(export(learner(tmp_path), tmp_path/'e.pt'), weights_only=True)
    torch.save({**d, **bad}, tmp_path/'x.pt')
    with pytest.raises(CheckpointError) as e: load_learner(tmp_path/'x.pt')
    assert 'x.pt' in str(e.value) and '\n' not in str(e.value)


# ---------------------------------------------------------------- safetensors


def test_safetensors(tmp_path, monkeypatch):
    st = pytest.importorskip('safetensors.torch')
    learn, new, path = learner(tmp_path).fit(1), learner(tmp_path, seed=7), tmp_path/'w.safetensors'
    w = learn.model[2].weight
    w.data = w.data.transpose(0, 1).contiguous().transpose(0, 1)             # not contiguous, which the format does not know
    assert save_safetensors(learn, path) == path and set(st.load_file(path)) == set(learn.model.state_dict())
    load_safetensors(new, path)
    assert all(v.equal(learn.model.state_dict()[k]) for k, v in new.model.state_dict().items())
    st.save_file({f'module.{k}': v for k, v in st.load_file(path).items()}, path)
    assert load_safetensors(learner(tmp_path, seed=8), path).model[2].weight.equal(w)
    for spoil in (lambda: path.write_bytes(path.read_bytes()[:-7]), lambda: path.write_bytes(b''), path.unlink, lambda: os.mkfifo(path)):
        spoil()
        with pytest.raises(CheckpointError): load_safetensors(new, path)
    class Extra(nn.Linear):
        def get_extra_state(self): return {'n': 1}
        def set_extra_state(self, s): pass
    learn.model.add_module('extra', Extra(1, 1))
    with pytest.raises(CheckpointError, match='extra'): save_safetensors(learn, path)
    assert not path.is_file()
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    with pytest.raises(ImportError, match='pip install safetensors'): save_safetensors(new, path)
