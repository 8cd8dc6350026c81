"""What `lsuv_init` costs in forward passes: torchvision nets, 16 pictures of 64 px, training mode; the first row is one forward pass."""
from functools import partial


def lsuv(name, step_by_step=False):
    "`lsuv_init` whole (statistics before, orthonormal matrices, the one pass, statistics after) beside one forward pass of the net `name`."
    import torch
    import torchvision
    from exp.lsuv import lsuv_init
    torch.manual_seed(0)
    model, x = getattr(torchvision.models, name)(weights=None), torch.randn(16, 3, 64, 64)

    @torch.no_grad()
    def forward(): model(x)

    @torch.no_grad()
    def reference(tol=.01, max_trials=10):
        "Algorithm 1 as written: a whole forward pass for each layer and trial; without the orthonormal matrices."
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

    work = {f'{name}: a forward pass': forward, f'{name}: lsuv_init': lambda: lsuv_init(model, x)}
    return {**work, f'{name}: layer by layer': reference} if step_by_step else work


BENCHMARKS = {'lsuv18': partial(lsuv, 'resnet18', step_by_step=True), 'lsuv11': partial(lsuv, 'vgg11'), 'lsuv50': partial(lsuv, 'resnet50')}
