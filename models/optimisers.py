"""The optimisers: Muon for the ternary matrices, Adam for the rest, and how their rates go down."""

import torch


class Muon:
    """Momentum, made orthogonal by a Newton-Schulz iteration: each step changes a matrix by the same amount in every direction."""

    MOMENTUM = 0.95
    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __init__(self, weights, precision=torch.float32):
        self.precision = precision
        self.momentum = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.groups = {}  # Matrices of one size, wide side last, are made orthogonal together.
        for name, weight in weights.items():
            self.groups.setdefault(tuple(sorted(weight.shape)), []).append(name)

    @torch.no_grad()
    def step(self, weights, rate):
        for names in self.groups.values():
            updates = []
            for name in names:
                gradient, momentum = weights[name].grad, self.momentum[name]
                momentum.lerp_(gradient, 1 - self.MOMENTUM)
                update = gradient.lerp(momentum, self.MOMENTUM)  # Nesterov's.
                updates.append(update.T if update.shape[0] > update.shape[1] else update)
            for name, update in zip(names, self.orthogonal(torch.stack(updates))):
                weight = weights[name]
                is_tall = weight.shape[0] > weight.shape[1]
                gain = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.add_(update.T if is_tall else update, alpha=-rate * gain)

    def orthogonal(self, x):
        a, b, c = self.COEFFICIENTS
        x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).to(self.precision)
        for _ in range(5):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.float()

    def state(self):
        return {"momentum": self.momentum}


class Adam:
    BETAS, EPSILON = (0.9, 0.95), 1e-8

    def __init__(self, weights):
        self.mean = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.square = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.n_steps = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def step(self, weights, rate):
        self.n_steps += 1
        first, second = (1 - beta ** int(self.n_steps) for beta in self.BETAS)
        for name, mean in self.mean.items():
            gradient, square = weights[name].grad, self.square[name]
            mean.lerp_(gradient, 1 - self.BETAS[0])
            square.lerp_(gradient.square(), 1 - self.BETAS[1])
            weights[name].addcdiv_(mean, (square / second).sqrt_().add_(self.EPSILON), value=-rate / first)

    def state(self):
        return {"mean": self.mean, "square": self.square, "n_steps": self.n_steps}


def set_state(optimiser, state):
    """Copies a loaded state over that of a new optimiser, which has the right sizes and device."""
    for key, now in optimiser.state().items():
        if isinstance(now, dict):
            for name, tensor in now.items():
                tensor.copy_(state[key][name])
        else:
            now.copy_(state[key])


def rate_factor(step, n_steps):
    """One for the first half, then down to nothing in a straight line."""
    return min(1.0, 2.0 * (1.0 - step / n_steps))
