"""Rankfold's rule of AdamW in 8 bits, written out in torch, beside bitsandbytes' AdamW8bit on the CPU: the same
gradients to both, those of a random quadratic (every element in every step) and of an embedding's rows (each in one
step of eight).

    python benches/peers/adamw8bit.py [--steps N]

Printed, of every rule and of AdamW in f32 on the same gradients: the largest step in units of the learning rate, and
how far the parameters end from AdamW's, the largest and the mean over the mean way. Needs torch, bitsandbytes.

The rules differ where a second moment is not 0 and its nearest value is. It keeps the least code here; by the nearest
code, which is what bitsandbytes' CUDA kernels give it, it is lost, and the next step without a gradient is lr·m/eps.
bitsandbytes' quantiser on a CPU looks a value up in a table of steps of 2⁻¹⁵ of the largest, and so makes every
second moment at least 1.6e-5 of it: none is lost, and all small ones are too large.
"""
import argparse
import bitsandbytes, bitsandbytes.functional as bnb, torch

BLOCK, ROWS = 256, 512
LR, BETA1, BETA2, EPS = 1e-3, 0.9, 0.999, 1e-8


class Rankfold:
    """The contract's `adamw_8bit`; or, with a least code of 0, the nearest."""

    def __init__(self, start, least=1):
        self.param, self.step, self.least = start.clone(), 0, least
        self.maps = [bnb.create_dynamic_map(signed=signed).sort().values for signed in (True, False)]
        self.codes = [torch.zeros(start.shape, dtype=torch.long) for _ in self.maps]
        self.absmax = [torch.zeros(len(start), 1) for _ in self.maps]

    def update(self, grad):
        self.step += 1
        m, v = (map[codes] * absmax for map, codes, absmax in zip(self.maps, self.codes, self.absmax))
        m, v = BETA1 * m + (1 - BETA1) * grad, BETA2 * v + (1 - BETA2) * grad * grad
        correction1, correction2 = 1 - BETA1**self.step, 1 - BETA2**self.step
        self.param -= LR / correction1 * m / ((v / correction2).sqrt() + EPS)
        self.absmax = [x.abs().amax(1, keepdim=True) for x in (m, v)]
        for k, (x, map) in enumerate(zip((m, v), self.maps)):
            midpoints = (map[1:].double() + map[:-1].double()) / 2
            normalised = x * (1 / self.absmax[k].clamp(min=1e-38))
            self.codes[k] = torch.bucketize(normalised.double(), midpoints)
        self.codes[1] = torch.maximum(self.codes[1], self.least * (v > 0))


class Peer:
    """An optimiser of torch's kind on one tensor."""

    def __init__(self, start, optimizer, **more):
        self.parameter = torch.nn.Parameter(start.clone())
        self.optimizer = optimizer([self.parameter], lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=0.0, **more)
        self.param = self.parameter.data

    def update(self, grad):
        self.parameter.grad = grad.clone()
        self.optimizer.step()


def compare(title, steps, gradient):
    torch.manual_seed(0)
    start = torch.randn(ROWS, BLOCK)
    rules = {
        "AdamW in f32": Peer(start, torch.optim.AdamW, foreach=False),
        "rankfold in 8 bits": Rankfold(start),
        "nearest codes": Rankfold(start, least=0),
        "bitsandbytes in 8 bits": Peer(start, bitsandbytes.optim.AdamW8bit),
    }
    exact = rules["AdamW in f32"]
    largest = dict.fromkeys(rules, 0.0)
    for t in range(steps):
        grad = gradient(t, exact.param)
        for name, rule in rules.items():
            before = rule.param.clone()
            rule.update(grad)
            largest[name] = max(largest[name], ((rule.param - before).abs().max() / LR).item())
    way = (exact.param - start).abs().mean()
    for name, rule in rules.items():
        off = (rule.param - exact.param).abs() / way
        how_far = f"off by {off.max():.3g} at most, {off.mean():.3g} on average"
        print(f"{title}, {name}: largest step {largest[name]:.4g} lr; {how_far}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(1)
    curvature = 10 ** (torch.rand(ROWS, BLOCK, generator=generator) * 2 - 2)
    target = torch.randn(ROWS, BLOCK, generator=generator)
    rows = torch.arange(ROWS)[:, None] % 8
    compare("quadratic", steps, lambda t, x: curvature * (x - target))
    compare("rare rows", steps, lambda t, x: 0.01 * torch.randn(ROWS, BLOCK, generator=generator) * (rows == t % 8))


main()
