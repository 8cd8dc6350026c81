"""Optimizer steps beside the peers': momentum, Adam and LAMB, each with decay, on the tensors of five nets.

Functions shaped as `benchmarks.__main__` wants them, named OPTIMIZER_NET; run alone with `python -m benchmarks.optimizers [NAME …]`, which
takes 40 turns of each. Gradients are given once, so that a turn is a step and nothing else; what compiles does so in the warm-up turns.
"""
from functools import partial

import torch


def parameters(shapes, channels_last=False):
    "Parameters of these shapes with gradients, the same numbers at every call."
    g = torch.Generator().manual_seed(0)
    ps = [torch.nn.Parameter(torch.randn(s, generator=g)*.05) for s in shapes]
    for p in ps:
        if channels_last and p.ndim == 4: p.data = p.data.contiguous(memory_format=torch.channels_last)
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=g)*.01)
    return ps


def lesson():
    from types import SimpleNamespace
    from exp.batchnorm import conv_layer
    from exp.convnets import get_cnn_model
    return get_cnn_model(SimpleNamespace(c_in=3, c_out=10), [64, 64, 128, 256], conv_layer)


def half_xresnet18():
    from exp.xresnet import xresnet18
    return xresnet18(3, 10, width=.5)


def torchvisions(name):
    import torchvision
    return getattr(torchvision.models, name)()


NETS = {'small': None, 'lesson': lesson, 'half': half_xresnet18, 'resnet18': partial(torchvisions, 'resnet18'), 'resnet50': partial(torchvisions, 'resnet50')}


def shapes(net):
    "Shapes of the parameters of a net of NETS; `small` is 161 tensors of 64 numbers."
    return [(64,)]*161 if net == 'small' else [p.shape for p in NETS[net]().parameters()]


def peer(module, name):
    try: return getattr(__import__(module, fromlist=[name]), name)
    except ImportError: return None


def peers(opt):
    "`{name: optimizer function or None}` of the others that do the same step."
    from torch.optim import SGD, AdamW
    if opt == 'momentum': return {f'torch SGD {k}': partial(SGD, lr=1e-3, momentum=.9, weight_decay=.01, **{k: True}) for k in ('fused', 'foreach')}
    if opt == 'adam': return {f'torch AdamW {k}': partial(AdamW, lr=1e-3, betas=(.9, .99), eps=1e-5, weight_decay=.01, **{k: True}) for k in ('fused', 'foreach')}
    hy = dict(lr=1e-3, betas=(.9, .99), eps=1e-6, weight_decay=.01)
    timm, po = peer('timm.optim', 'Lamb'), peer('pytorch_optimizer', 'Lamb')
    return {'timm Lamb': timm and partial(timm, max_grad_norm=None, **hy), 'pytorch_optimizer Lamb': po and partial(po, **hy)}


def ours(opt):
    from exp.fast_optimizers import fast
    from exp.optimizers import adam_opt, lamb, sgd_mom_opt
    f = partial({'momentum': sgd_mom_opt, 'adam': adam_opt(), 'lamb': lamb}[opt], lr=1e-3, wd=.01)
    return {'exp, plain loop': f, 'exp, fast': fast(f)}


def steps(opt, net):
    "`{name: step}`, each on parameters of its own. Ours change their rate from step to step, as in training."
    ss = shapes(net)
    out = {k: f and f(parameters(ss)).step for k, f in peers(opt).items()}
    for k, f in ours(opt).items():
        made = f(parameters(ss))
        def step(made=made):
            made.hypers[0]['lr'] = 1e-3*(.5 + torch.rand(()).item())
            made.step()
        for _ in range(3): step()
        out[k] = step
    return out


BENCHMARKS = {f'{opt}_{net}': partial(steps, opt, net) for opt in ('momentum', 'adam', 'lamb') for net in NETS}


def main():
    import sys
    from benchmarks.__main__ import measure
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads')
    for name in sys.argv[1:] or BENCHMARKS:
        times = measure({k: f for k, f in BENCHMARKS[name]().items() if f}, 40)
        first = next(iter(times.values()))
        for k, t in times.items(): print(f'{name:<18} {k:<24} {1e3*t:>9.2f} ms {t/first:>7.3f}', flush=True)


if __name__ == '__main__': main()
