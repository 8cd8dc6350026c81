"""Benchmarks of exp.interpret, exp.predict and exp.onnx_export: counting a confusion matrix, predicting a folder of pictures, and one trained net in three runtimes.

Each function returns `{name: callable}` as benchmarks/__main__.py takes it; the first name is the one the ratios are to.
"""
import importlib.util
from types import SimpleNamespace


def confusion(n=5_000, c=50):
    "The confusion matrix of 5,000 predictions of 50 classes: fastai's, a loop over the pairs, ours."
    import torch
    from exp.interpret import Interpretation
    g = torch.Generator().manual_seed(0)
    preds, targets = torch.randn(n, c, generator=g), torch.randint(0, c, (n,), generator=g)
    it = Interpretation(preds, targets, losses=torch.zeros(n))

    def loop():
        cm = [[0]*c for _ in range(c)]
        for t, p in zip(targets.tolist(), preds.argmax(1).tolist()): cm[t][p] += 1
        return torch.tensor(cm)

    def fastai():
        from fastai.interpret import ClassificationInterpretation
        # its method predicts first; here the predictions are there, so that the counting alone is timed
        stub = SimpleNamespace(vocab=range(c), dl=None, act=None, learn=SimpleNamespace(get_preds=lambda **kw: (preds, targets, preds.argmax(1))))
        return torch.as_tensor(ClassificationInterpretation.confusion_matrix(stub))
    if importlib.util.find_spec('fastai') is None: fastai = None
    for f in filter(None, (fastai, loop)): assert f().long().equal(it.confusion_matrix())
    return {'fastai': fastai, 'a loop': loop, 'exp': it.confusion_matrix}


def _learner(size):
    from functools import partial
    import torch.nn.functional as F
    from torch import nn
    from benchmarks import Skip
    from exp.batchnorm import conv_layer
    from exp.callbacks import BatchTransformXCallback, CudaCallback
    from exp.convnets import Lambda, flatten
    from exp.data_block import ImageList, NormalizeBytes, ResizeFixed, SplitData, grandparent_splitter, label_by_func, make_rgb, parent_labeler, to_byte_tensor
    from exp.datasets import DataError, URLs, untar_data
    from exp.learner import Learner, set_seed
    try: path = untar_data(URLs.IMAGENETTE_160, quiet=True, tries=1)
    except DataError as e: raise Skip(str(e)) from None
    il = ImageList.from_files(path, include=('train', 'val'), tfms=[make_rgb, ResizeFixed(size), to_byte_tensor])
    data = label_by_func(SplitData.split_by_func(il, partial(grandparent_splitter, valid_name='val')), parent_labeler).to_databunch(64, num_workers=0)
    set_seed(0)
    sizes = [(3, 32, 2), (32, 64, 2), (64, 128, 2), (128, 128, 1)]
    net = nn.Sequential(*(conv_layer(a, b, stride=s) for a, b, s in sizes), nn.AdaptiveAvgPool2d(1), Lambda(flatten), nn.Linear(128, 10))
    return Learner(net.eval(), data, F.cross_entropy, cbs=[CudaCallback('cpu'), BatchTransformXCallback(NormalizeBytes([.5]*3, [.3]*3))])


def predicting(n=256, size=128):
    "256 pictures of Imagenette from their files to probabilities at 128 px, a net of four convolutions: one by one, and as exp-predict takes them."
    from exp.predict import predict_files
    learn = _learner(size)
    files = [learn.data.source.valid.x.items[i] for i in range(0, 3925, 3925//n)][:n]

    def one_by_one():
        for f in files: learn.predict(f)

    def batched(threads=None):
        assert sum(why == '' for _, _, why in predict_files(learn, files, threads=threads)) == n
    return {'learn.predict': one_by_one, 'predict_files, 1 thread': lambda: batched(1), 'predict_files': batched}


def runtimes(bs=32, size=64):
    "A batch of 32 pictures, bytes at 64 px, to scores: the learner's model, torch.export's program, onnxruntime; all on the CPU with torch's number of threads."
    import tempfile
    from pathlib import Path
    import torch
    from exp.onnx_export import to_exported_program, to_onnx, whole_model
    learn = _learner(size)
    xb = torch.stack([learn.data.source.valid.x[i] for i in range(bs)])
    whole, program, run = whole_model(learn), to_exported_program(learn).module(), None
    try:
        import onnxruntime as ort
        opts = ort.SessionOptions()
        opts.intra_op_num_threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as d: session = ort.InferenceSession(to_onnx(learn, Path(d)/'m.onnx').read_bytes(), opts, providers=['CPUExecutionProvider'])
        x = xb.numpy()
        def run(): return torch.from_numpy(session.run(None, {'pictures': x})[0])
    except ImportError: pass

    def torch_():
        with torch.no_grad(): return whole(xb)

    def program_():
        with torch.no_grad(): return program(xb)
    for f in filter(None, (program_, run)): assert (f() - torch_()).abs().max() < 1e-4
    return {'torch': torch_, 'torch.export': program_, 'onnxruntime': run}


BENCHMARKS = {'confusion': confusion, 'predicting': predicting, 'runtimes': runtimes}
