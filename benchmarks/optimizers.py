"""Optimizer steps beside the peers': Adam and LAMB on ResNet-50's 161 tensors, Adam on 161 tensors of 64 numbers.

Functions shaped as `benchmarks.__main__` wants them; run alone with `python -m benchmarks.optimizers [NAME …]`.
Gradients are given once, so that a turn is a step and nothing else; the compiled ways compile in the warm-up turn.
"""
import torch


def parameters(shapes, channels_last=False):
    "Parameters of these shapes with gradients, the same numbers at every call."
    g = torch.Generator().manual_seed(0)
    ps = [torch.nn.Parameter(torch.randn(s, generator=g)*.05) for s in shapes]
    for p in ps:
        if channels_last and p.ndim == 4: p.data = p.data.contiguous(memory_format=torch.channels_last)
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=g)*.01)
    return ps


def resnet50_shapes():
    "Shapes of the 161 parameters of ResNet-50 with 1,000 classes (25.6 million numbers)."
    import torchvision
    with torch.device('meta'): return [p.shape for p in torchvision.models.resnet50().parameters()]


SMALL = [(64,)]*161


def steps(peers, shapes, **kw):
    "`{name: step}` of `{name: optimizer function or None}`, each on parameters of its own."
    return {k: f and f(parameters(shapes, **kw)).step for k, f in peers.items()}


def adam_peers():
    from exp.optimizers import adam_opt
    hy, ours = dict(lr=1e-3, betas=(.9, .99), eps=1e-5, weight_decay=.01), dict(lr=1e-3, wd=.01)
    return {'torch AdamW fused': lambda ps: torch.optim.AdamW(ps, fused=True, **hy),
            'torch AdamW foreach': lambda ps: torch.optim.AdamW(ps, foreach=True, **hy),
            'exp adam_opt, plain loop': lambda ps: adam_opt()(ps, fast=False, **ours),
            'exp adam_opt': lambda ps: adam_opt()(ps, **ours),
            "exp adam_opt, fast='compile'": lambda ps: adam_opt()(ps, fast='compile', **ours)}


def adam_resnet50(): return steps(adam_peers(), resnet50_shapes())


def adam_small():
    peers = adam_peers()
    return steps({k: peers[k] for k in ('torch AdamW foreach', 'torch AdamW fused', 'exp adam_opt, plain loop', 'exp adam_opt')}, SMALL)


def lamb_peers():
    from exp.optimizers import lamb
    try: from timm.optim import Lamb as timm_lamb
    except ImportError: timm_lamb = None
    try: from pytorch_optimizer import Lamb as po_lamb
    except ImportError: po_lamb = None
    hy, ours = dict(lr=1e-3, betas=(.9, .99), eps=1e-6, weight_decay=.01), dict(lr=1e-3, wd=.01)
    return {'timm Lamb': timm_lamb and (lambda ps: timm_lamb(ps, max_grad_norm=None, **hy)),
            'pytorch_optimizer Lamb': po_lamb and (lambda ps: po_lamb(ps, **hy)),
            'exp lamb, plain loop': lambda ps: lamb(ps, fast=False, **ours),
            'exp lamb': lambda ps: lamb(ps, **ours),
            "exp lamb, fast='compile'": lambda ps: lamb(ps, fast='compile', **ours)}


def lamb_resnet50(): return steps(lamb_peers(), resnet50_shapes())


def lamb_small(): return steps({k: f for k, f in lamb_peers().items() if 'compile' not in k}, SMALL)


BENCHMARKS = {'adam_resnet50': adam_resnet50, 'adam_small': adam_small, 'lamb_resnet50': lamb_resnet50, 'lamb_small': lamb_small}


def main():
    import sys
    from benchmarks.__main__ import measure
    for name in sys.argv[1:] or BENCHMARKS:
        times = measure({k: f for k, f in BENCHMARKS[name]().items() if f}, 20)
        first = next(iter(times.values()))
        for k, t in times.items(): print(f'{name:<16} {k:<34} {1e3*t:>9.2f} ms {t/first:>7.3f}', flush=True)


if __name__ == '__main__': main()
