"""What is exported says what the learner says: by another runtime, in batches of any size, with the transforms in it, or not at all."""
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trained import COLOURS, NAMES, learner, net, norm, of, pictures

from exp.batchnorm import BatchNorm, RunningBatchNorm
from exp.callbacks import Callback, CudaCallback
from exp.convnets import GeneralRelu
from exp.export_models import export, load_learner
from exp.learner import Learner
from exp.onnx_export import to_exported_program, to_onnx, whole_model


def batch(n): return torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8)


@pytest.fixture(scope='module')
def learn(tmp_path_factory): return learner(pictures(tmp_path_factory.mktemp('pictures')), 1)


def nested():
    "A running batch norm that has never been trained, one level down."
    inner = nn.Sequential(RunningBatchNorm(4), GeneralRelu(leak=.1, sub=.2))
    return nn.Sequential(nn.Conv2d(3, 4, 3), inner, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


@pytest.mark.parametrize('model, epochs', [(net(), 1), (net(norm=BatchNorm), 1), (net(norm=RunningBatchNorm), 1), (nested(), 0), (nested(), 5)], ids=range(5))
def test_an_exported_program_gives_the_same(learn, model, epochs, tmp_path):
    new = Learner(model, learn.data, F.cross_entropy, lr=.05, cbs=[CudaCallback('cpu'), norm()]).fit(epochs)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.export.save(to_exported_program(new), tmp_path/'m.pt2')
    f = torch.export.load(tmp_path/'m.pt2').module()
    for n in (1, 2, 7):
        for other in (f, whole_model(new)): assert (other(xb := batch(n)) - new.get_preds([xb])[0]).abs().max() < 1e-4
    assert all(v.equal(before[k]) for k, v in model.state_dict().items()) and [*before] == [*model.state_dict()]


def test_onnx_runs_elsewhere(learn, tmp_path):
    pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    ort = pytest.importorskip('onnxruntime')
    model = export(learn, tmp_path/'m.pt')
    for who, f in ((learn, tmp_path/'a.onnx'), (load_learner(model), tmp_path/'b.onnx')):
        assert to_onnx(who, f) == f and [p.name for p in tmp_path.iterdir() if p.stem == f.stem] == [f.name], 'one file'
        s = ort.InferenceSession(str(f), providers=['CPUExecutionProvider'])
        i, o = s.get_inputs()[0], s.get_outputs()[0]
        assert (i.name, i.shape[1:], i.type, o.name, o.shape[1:]) == ('pictures', [3, 16, 16], 'tensor(uint8)', 'scores', [3])
        for n in (1, 5): assert abs(s.run(None, {'pictures': (xb := batch(n)).numpy()})[0] - learn.get_preds([xb])[0].numpy()).max() < 1e-4
        meta = s.get_modelmeta().custom_metadata_map
        assert json.loads(meta['classes']) == sorted(COLOURS) and json.loads(meta['names']) == NAMES


def test_floats_of_any_size_without_a_data_block():
    plain, xb = of(net(), 3), torch.randn(4, 3, 12, 20)
    assert (to_exported_program(plain, xb[:1]).module()(xb) - plain.get_preds([xb])[0]).abs().max() < 1e-5


class Doubles(Callback):
    def begin_batch(self, run): run.xb = run.xb.float()*2


class Decides(nn.Module):
    def forward(self, x): return x*2 if x.sum() > 0 else x


def test_an_export_that_would_lie_is_refused(tmp_path):
    xb, odd = torch.randn(2, 3, 16, 16), of(net(), 3)
    odd.add_cbs(Doubles())
    with pytest.raises(ValueError, match='Doubles'): to_exported_program(odd, xb)
    with pytest.raises(Exception, match='data-dependent'): to_onnx(of(nn.Sequential(Decides(), net()), 3), tmp_path/'x.onnx', xb)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize('package', ['onnx', 'onnxscript'])
def test_missing_packages_are_named(learn, package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=package): to_onnx(learn, tmp_path/'m.onnx')
