"""What LSUV costs in forward passes: torchvision nets, 16 pictures of 64 px, training mode; the first row is one forward pass.

`lsuv_init` (one pass; torch's QR for the orthonormal matrices, or woven ones) and `lsuv_any` (statistics before, woven matrices, the pass that sets, the pass that checks)."""
from functools import partial

NETS = {'lsuv18': 'resnet18', 'lsuv11': 'vgg11', 'lsuv50': 'resnet50', 'lsuv_mobilenet': 'mobilenet_v2', 'lsuv_efficientnet': 'efficientnet_b0',
        'lsuv_squeezenet': 'squeezenet1_1', 'lsuv_densenet': 'densenet121', 'lsuv_convnext': 'convnext_tiny'}


def lsuv(name):
    "LSUV whole beside one forward pass of the net `name`."
    import torch
    import torchvision
    from exp.lsuv import lsuv_init
    from exp.lsuv_any import lsuv_any, orthonormal_
    torch.manual_seed(0)
    model, x = getattr(torchvision.models, name)(weights=None), torch.randn(16, 3, 64, 64)

    @torch.no_grad()
    def forward(): model(x)

    @torch.no_grad()
    def reference(tol=.01, max_trials=10):
        "Algorithm 1 as printed: a whole forward pass for each layer and trial; without the orthonormal matrices."
        stats = {}
        def look(mod, args, out): stats['var'] = out.var().item()
        for m in [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]:
            m.weight.mul_(1.5)                                  # off, so that there is something to do, in every turn
            handle = m.register_forward_hook(look)
            for trial in range(max_trials + 1):
                model(x)
                if abs(stats['var'] - 1) < tol or trial == max_trials: break
                m.weight.div_(stats['var']**.5)
            handle.remove()

    work = {f'{name}: a forward pass': forward, f'{name}: lsuv_any': lambda: lsuv_any(model, x),
            f'{name}: lsuv_init, woven': lambda: lsuv_init(model, x, orthonormal=orthonormal_)}
    if name != 'vgg11': work[f'{name}: lsuv_init'] = lambda: lsuv_init(model, x)          # QR of 4,096 × 25,088: a minute
    if name == 'resnet18': work[f'{name}: layer by layer'] = reference
    return work


BENCHMARKS = {k: partial(lsuv, name) for k, name in NETS.items()}
