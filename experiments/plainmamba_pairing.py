"""Which token gives Δ, B and C to a step of PlainMamba's scan in a reduced sequence: ``source`` or ``rank``.

    python experiments/plainmamba_pairing.py

On one mixer of PlainMamba-L1's width, with random weights in three regimes of Δ and D: relative error of the output at
the survivors against the same mixer on all tokens, where random tokens have been replaced by neighbours that they equal
up to a tenth. No trained weights are used; these may decide otherwise.
"""

import torch
from torch import Tensor, nn

from mtr_lab import ops
from mtr_lab.backbones.plainmamba_mixer import PAIRINGS, PlainMamba2D
from mtr_lab.tokens import Layout, TokenState
from mtr_lab.tokens.positions import Positions

WIDTH, IMAGES, LAYOUT = 192, 8, Layout(14, 14)
REGIMES = {
    "Δ 0.69, as training starts": (0.0, 1.0),
    "Δ in [0.001, 0.1]": ((0.001, 0.1), 1.0),
    "Δ in [0.03, 1], D 0.1": ((0.03, 1.0), 0.1),
}


def mixer_of(delta: float | tuple[float, float], skip: float, pairing: str) -> PlainMamba2D:
    """A mixer with the authors' initialisation, but for the bias of Δ and for D."""
    torch.manual_seed(0)
    mixer = PlainMamba2D(WIDTH, pairing=pairing)
    for module in mixer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(mixer.direction_Bs, std=0.02)
    with torch.no_grad():
        mixer.D.fill_(skip)
        if isinstance(delta, tuple):
            low, high = torch.tensor(delta).log()
            wanted = torch.empty(mixer.d_inner).uniform_(float(low), float(high)).exp()
            mixer.dt_proj.bias.copy_((wanted + torch.log(-torch.expm1(-wanted))) / 2)  # the bias is added twice
            mixer.dt_proj.weight.mul_(0.1)
    return mixer.eval()


def reduced(field: Tensor, share: float) -> tuple[Tensor, TokenState]:
    """Tokens (B, L, C) of which a share nearly equals a neighbour, and the state in which these are merged."""
    generator = torch.Generator().manual_seed(1)
    columns, count = LAYOUT.columns, round(share * LAYOUT.tokens)
    odd = torch.arange(LAYOUT.tokens).view(LAYOUT.grid)[:, 1::2].flatten()
    order = torch.stack([odd[torch.randperm(len(odd), generator=generator)] for _ in range(IMAGES)])
    gone = order[:, :count].sort(1).values
    into = gone - 1
    noise = 0.1 * torch.randn(*gone.shape, field.shape[2], generator=generator)
    rows = into[..., None].expand_as(noise)
    field = field.scatter(1, gone[..., None].expand_as(noise), field.gather(1, rows) + noise)
    assert bool((gone % columns > 0).all())
    state = TokenState.start(field, (), LAYOUT).traced()
    return field, state.reduced(ops.make_plan(gone, into, state.index.double(), state.size)).applied()


@torch.no_grad()
def main() -> None:
    """Print a table."""
    smooth = torch.randn(IMAGES, WIDTH, 4, 4, generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.interpolate(smooth, LAYOUT.grid, mode="bicubic").flatten(2).transpose(1, 2)
    print(f"{'regime':28s} {'removed':>8s}" + "".join(f"{pairing:>10s}" for pairing in PAIRINGS))
    for name, regime in REGIMES.items():
        for share in (0.1, 0.25, 0.5):
            field, state = reduced(smooth, share)
            whole = TokenState.start(field, (), LAYOUT)
            errors = []
            for pairing in PAIRINGS:
                mixer = mixer_of(*regime, pairing)
                expected = mixer(field, Positions(whole))[0]
                expected = expected.gather(1, state.index[..., None].expand(-1, -1, WIDTH))
                actual = mixer(state.hidden, Positions(state))[0]
                errors.append(((actual - expected).norm() / expected.norm()).item())
            print(f"{name:28s} {share:8.0%}" + "".join(f"{error:10.3f}" for error in errors))


if __name__ == "__main__":
    main()
