"""Compares private training with Opacus: accuracy at equal budgets, and the cost of a step.

python3 scripts/peers/dp_opacus.py accuracy [seeds]   (at least 2 seeds; needs torch, opacus, scikit-learn, safetensors; runs the example `private`)
python3 scripts/peers/dp_opacus.py cost [rounds]      (at least 1 round; the model of benches/private.rs)

Accuracy: the handwritten digits that scikit-learn ships (1797 images of 8 x 8 pixels, a fifth of them for the test), an MLP of 64, 64 and
10 features with ReLU, SGD. Both sides have the same mechanism, budget, learning rate and distribution of initial weights.
"""

import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings

import torch
from opacus import PrivacyEngine
from opacus.accountants.utils import get_noise_multiplier
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")
RATE, EPOCHS, DELTA, CLIP, LEARNING_RATE, HIDDEN = 0.05, 20, 1e-4, 1.0, 0.5, 64
STEPS = round(EPOCHS / RATE)


def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = (torch.tensor(x, dtype=torch.float32) / 16)[order], torch.tensor(y)[order]
    test = len(x) // 5
    return x[test:], y[test:], x[:test], y[:test]


def by_opacus(epsilon, seed, data):
    x, y, test_x, test_y = data
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(x.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.weight, std=0.2)
        nn.init.zeros_(layer.bias)
    # The default tolerance of ε, 0.01, gives more noise than is needed.
    noise = get_noise_multiplier(
        target_epsilon=epsilon, target_delta=DELTA, sample_rate=RATE, steps=STEPS, accountant="rdp", epsilon_tolerance=1e-4
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    # The batch size determines the rate of the Poisson sampling.
    loader = DataLoader(TensorDataset(x, y), batch_size=round(RATE * len(x)))
    engine = PrivacyEngine(accountant="rdp")
    private, optimizer, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=noise, max_grad_norm=CLIP
    )
    steps = 0
    while steps < STEPS:
        for rows, classes in loader:
            optimizer.zero_grad()
            F.cross_entropy(private(rows), classes).backward()
            optimizer.step()
            steps += 1
            if steps == STEPS:
                break
    with torch.no_grad():
        right = (model(test_x).argmax(1) == test_y).float().mean().item()
    return right, noise


def by_shardwise(epsilon, seed, file):
    command = ["cargo", "run", "-q", "--release", "--features", "privacy", "--example", "private", "--"]
    values = {
        "epsilon": epsilon, "delta": DELTA, "epochs": EPOCHS, "rate": RATE, "clip": CLIP, "hidden": HIDDEN,
        "learning-rate": LEARNING_RATE, "seed": seed, "data": file,
    }
    command += [text for name, value in values.items() for text in (f"--{name}", str(value))]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(re.search(r"accuracy on \d+ test points: ([\d.]+)", output)[1]), float(re.search(r"σ = ([\d.]+)", output)[1])


def accuracy(seeds):
    from safetensors.torch import save_file

    data = digits()
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        save_file(dict(zip(("x", "y", "test_x", "test_y"), data)), file.name)
        print("| ε | σ, Opacus | σ, shardwise | accuracy, Opacus | accuracy, shardwise | difference / its standard error |")
        print("|---|---|---|---|---|---|")
        for epsilon in (0.5, 2.0, 8.0):
            peer = [by_opacus(epsilon, seed, data) for seed in range(1, seeds + 1)]
            own = [by_shardwise(epsilon, seed, file.name) for seed in range(1, seeds + 1)]
            means = [statistics.mean(right for right, _ in side) for side in (peer, own)]
            spreads = [statistics.stdev(right for right, _ in side) for side in (peer, own)]
            error = ((spreads[0] ** 2 + spreads[1] ** 2) / seeds) ** 0.5
            cells = [f"{mean:.4f} ± {spread:.4f}" for mean, spread in zip(means, spreads)]
            print(f"| {epsilon} | {peer[0][1]:.4f} | {own[0][1]:.4f} | {cells[0]} | {cells[1]} | {(means[1] - means[0]) / error:+.2f} |", flush=True)


class Block(nn.Module):
    def __init__(self, hidden, heads=8):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x):
        shape = x.shape[0], x.shape[1], self.heads, -1
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


def cost(rounds, hidden=512, tokens=128, samples=8, microbatches=4):
    """The gradient is that of a sum of y times a constant. Opacus' per-sample gradients, and its ghost clipping."""
    from opacus.grad_sample import GradSampleModule
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping

    torch.manual_seed(1)
    batches = [[torch.randn(samples, tokens, hidden) for _ in range(2)] for _ in range(microbatches)]
    make = lambda: nn.Sequential(Block(hidden), Block(hidden))
    options = dict(noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=samples * microbatches)

    plain = make()
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=1e-9)

    def step_plain():
        plain_optimizer.zero_grad()
        for x, dy in batches:
            (plain(x) * dy).sum().backward()
        plain_optimizer.step()

    hooked = GradSampleModule(make(), loss_reduction="sum")
    hooked_optimizer = DPOptimizer(torch.optim.SGD(hooked.parameters(), lr=1e-9), **options)

    def step_hooked():
        for at, (x, dy) in enumerate(batches):
            hooked_optimizer.signal_skip_step(at + 1 < microbatches)
            (hooked(x) * dy).sum().backward()
            hooked_optimizer.step()
            hooked_optimizer.zero_grad()

    ghost = GradSampleModuleFastGradientClipping(make(), loss_reduction="sum", max_grad_norm=1.0, use_ghost_clipping=True)
    ghost_optimizer = DPOptimizerFastGradientClipping(torch.optim.SGD(ghost.parameters(), lr=1e-9), **options)

    def step_ghost():
        for at, (x, dy) in enumerate(batches):
            ghost_optimizer.signal_skip_step(at + 1 < microbatches)
            losses = (ghost(x) * dy).sum((1, 2))
            losses.sum().backward(retain_graph=True)
            factors = ghost.get_clipping_coef()
            ghost_optimizer.zero_grad(set_to_none=True)
            ghost.disable_hooks()
            (losses * factors).sum().backward()
            ghost.enable_hooks()
            ghost_optimizer.step()
            ghost_optimizer.zero_grad()

    steps = {"plain": step_plain, "Opacus, gradients of samples": step_hooked, "Opacus, ghost clipping": step_ghost}
    times = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number:
                times[name].append(time.perf_counter() - start)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in steps:
        ratio = statistics.median(a / b for a, b in zip(times[name], times["plain"]))
        print(f"{name}: {1e3 * statistics.median(times[name]):.1f} ms, {ratio:.3f} x plain")


if __name__ == "__main__":
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    {"accuracy": accuracy, "cost": cost}[sys.argv[1]](count)
