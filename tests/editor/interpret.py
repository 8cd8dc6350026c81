"From a trained net to what it confuses, to pictures of one's own, and to a file for others, as notebooks 11a, 11c and 11d do it."
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F

from exp.batchnorm import conv_layer
from exp.calibration import measure_calibration, plot_reliability
from exp.callbacks import DataBunch, Dataset, get_dls
from exp.export_models import export, load_learner
from exp.interpret import Interpretation, cam, loss_of_each, overlay, show_cam
from exp.learner import get_learner, set_seed
from exp.onnx_export import to_exported_program, whole_model
from exp.predict import find_pictures, predict_files, ranked

set_seed(0)
x, y = torch.randn(32, 3, 16, 16), torch.randint(0, 3, (32,))
learn = get_learner([16], DataBunch(*get_dls(Dataset(x, y), Dataset(x, y), bs=16), c_in=3, c_out=3), .1, conv_layer).fit(1)

it = Interpretation.from_learner(learn)
print(it, len(it), it.names, it.confusion_matrix().sum().item(), it.probs.shape)
for true, said, n in it.most_confused(2): print(f'{n} × {true} taken for {said}')
print(it.per_class()['recall'].tolist(), loss_of_each(F.cross_entropy, it.preds, it.targets).mean().item())
losses, idx = it.top_losses(3)
print(losses.tolist(), idx.tolist(), f'{measure_calibration(it.probs, it.targets).ece:.3f}')
it.plot_confusion_matrix('what for what')
it.plot_top_losses(4, largest=False)
plot_reliability(measure_calibration(it.probs, it.targets, bins=5), 'five steps')
m = cam(learn, x[0], cls=2, layer='1')
print(m.map.shape, m.name, f'{m.score:.1f}', overlay(x[0], m.map).shape)
show_cam(learn, [x[0], x[1]], titles=['a', 'b'])

program = to_exported_program(learn, x[:1]).module()
print((program(x) - whole_model(learn)(x)).abs().max().item())
with TemporaryDirectory() as d:
    there = load_learner(export(learn, Path(d)/'net.pt'))
    files, lost = find_pictures([Path(d)])
    print(files, [*lost.values()], ranked(there, torch.tensor([1., 2., 3.]), k=2))
    for f, scores, why in predict_files(learn, files) if files else (): print(f, scores, why)
